"""The ALOHA suites: names, instructions and protocols. The simulator itself is imported when a task is opened."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from vlarl_bench.protocol import Protocol, check_choice, for_tuning
from vlarl_bench.suite import Demonstration, Simulator, Suite, Task

# The instructions of LeRobot's `aloha_sim_*` datasets; gym-aloha itself has none.
_TASKS = {
    "aloha_transfer_cube": Task(
        "aloha_transfer_cube",
        "transfer_cube",
        "pick up the cube with the right arm and transfer it to the left arm",
    ),
    "aloha_insertion": Task("aloha_insertion", "insertion", "insert the peg into the socket"),
}

TINY_STATES = tuple(range(50))
MORE_STATES = tuple(range(50, 125))
"""For training in `state` mode: tokens interpolate between poses too badly to learn from 25."""
PUBLISHED_STATES = tuple(range(1000, 1050))
"""LeRobot's evaluation seeds its environments with 1000, 1001, ... and plays 50 episodes."""


@dataclass(frozen=True)
class _Published:
    """What is particular to a published way of evaluating on ALOHA."""

    horizon: int
    execute: int
    image_size: int


# Read from each project's public code in November 2026; docs/suites/aloha.md says where.
PUBLISHED = {
    "lerobot": _Published(horizon=400, execute=100, image_size=640),
    "openpi": _Published(horizon=300, execute=10, image_size=224),
}


class AlohaSuite(Suite):
    """gym-aloha (Zhao et al., 2023): two ViperX arms, 14 absolute joint targets at 50 Hz; a state is a seed."""

    benchmark: ClassVar[str] = "aloha"
    action_dim: ClassVar[int] = 14
    proprio_dim: ClassVar[int] = 14
    fps: ClassVar[int] = 50
    hands: ClassVar[tuple[str, ...]] = ("left_hand", "right_hand")
    film_camera: ClassVar[str] = "angle"

    def __init__(self, name: str, summary: str, members: tuple[str, ...] = ()) -> None:
        """A suite of one task, or with `members` a group of suites."""
        self.name, self.summary = name, summary
        self.members = members or (name,)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """One a member."""
        return tuple(_TASKS[suite] for suite in self.members)

    def protocol(self, observation: str, name: str = "tiny") -> Protocol:
        """`tiny` learns from states 0-24, in `state` mode also from 50-124, and is judged on 25-49; the published ones
        are judged on LeRobot's 50."""
        check_choice(observation, name, PUBLISHED, whose="ALOHA")
        if name in ("tiny", "tuning"):
            tiny = _tiny(observation)
            return tiny if name == "tiny" else for_tuning(tiny)
        published = PUBLISHED[name]
        return Protocol(
            name=name,
            version=1,
            observation="pixels",
            horizon=dict.fromkeys(_TASKS, published.horizon),
            settle_steps=0,
            execute=published.execute,
            train_states=TINY_STATES,
            eval_states=PUBLISHED_STATES,
            cameras=("top",),
            image_size=published.image_size,
            render_size=(480, 640),
        )

    def open(self, task: Task, protocol: Protocol, video: bool = False) -> Simulator:
        """Builds the scene: 0.1 s the first time in a process, then less."""
        from .simulator import AlohaSimulator

        return AlohaSimulator(task, protocol, render=video or protocol.observation == "pixels")

    def demonstrate(self, simulator: Simulator, task: Task, init_state: int, seed: int) -> Demonstration:
        """The scripted expert of `expert.py`."""
        from .expert import demonstrate
        from .simulator import AlohaSimulator

        assert isinstance(simulator, AlohaSimulator)
        return demonstrate(simulator, task, init_state, seed)


def _tiny(observation: str) -> Protocol:
    """Images without shadows and multisampling, which cost far more than the rest; drawn at three times their size
    and shrunk instead, which smooths edges as well and is almost free."""
    pixels = observation == "pixels"
    return Protocol(
        name=f"tiny-{observation}",
        version=1 if pixels else 3,  # 2 shows the hands among the objects, 3 has more states to learn from
        observation="pixels" if pixels else "state",
        horizon=dict.fromkeys(_TASKS, 400),
        settle_steps=0,
        execute=20,
        train_states=TINY_STATES[:25] + (() if pixels else MORE_STATES),
        eval_states=TINY_STATES[25:],
        cameras=("top", "angle") if pixels else (),
        image_size=64 if pixels else 0,
        render_size=(192, 192) if pixels else None,
        msaa=not pixels,
        shadows=not pixels,
    )


ALOHA_TRANSFER_CUBE = AlohaSuite("aloha_transfer_cube", "ALOHA: one arm picks up a cube and hands it to the other")
ALOHA_INSERTION = AlohaSuite("aloha_insertion", "ALOHA: each arm picks up a part, and the peg goes into the socket")
ALOHA = AlohaSuite("aloha", "Both ALOHA tasks: two arms, 14 joint targets", ("aloha_transfer_cube", "aloha_insertion"))
