"""The LIBERO suites: names, instructions and protocols. The simulator itself is imported when a task is opened."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlarl_bench.errors import BenchError
from vlarl_bench.protocol import Protocol, check_choice, for_tuning
from vlarl_bench.suite import Demonstration, Simulator, Suite, Task

# Names and instructions as in LIBERO's own task map (for LIBERO-PRO's changed tasks and wordings as in its BDDL files),
# kept here so that listing them needs no import of LIBERO; tests/tasks/test_suite.py holds the two against each other.
_TASKS: dict[str, list[list[str]]] = json.loads((Path(__file__).parent / "tasks.json").read_text(encoding="utf-8"))

ALL_STATES = tuple(range(50))
CAMERAS = ("agentview", "robot0_eye_in_hand")


@dataclass(frozen=True)
class _Published:
    """What is particular to a published way of evaluating on LIBERO."""

    horizon: tuple[int, int, int, int, int]
    """Spatial, object, goal, 10, 90."""
    execute: int
    settle_steps: int = 10
    train_states: tuple[int, ...] = ()
    cameras: tuple[str, ...] = CAMERAS
    render: int = 256
    image_size: int = 224
    resize: Literal["bilinear", "lanczos"] = "bilinear"
    decoding: Literal["sampled", "zero-noise"] = "sampled"
    version: int = 1


BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
_GREEDY: dict[str, Any] = {"decoding": "zero-noise", "version": 2}
"""The likeliest token each time. Version 1 drew them, as these authors do while training only."""
TINY_HORIZON = (200, 200, 400, 520, 400)
# Read from each project's public code in November 2026; docs/suites/libero.md says where.
PUBLISHED = {
    "openpi": _Published((220, 280, 300, 520, 400), execute=5),
    "lerobot": _Published((280, 280, 300, 520, 400), execute=10, render=360, image_size=360),
    "rlinf": _Published((240, 240, 320, 480, 512), execute=5, settle_steps=15, train_states=ALL_STATES, image_size=256),
    "openvla": _Published(
        (220, 280, 300, 520, 400),
        execute=1,
        train_states=ALL_STATES,
        cameras=("agentview",),
        resize="lanczos",
        **_GREEDY,
    ),
    "openvla-oft": _Published(
        (220, 280, 300, 520, 400), execute=8, train_states=ALL_STATES, resize="lanczos", **_GREEDY
    ),
    "simplevla": _Published(
        (512,) * 5, execute=8, train_states=ALL_STATES, cameras=("agentview",), resize="lanczos", **_GREEDY
    ),
    # Ours, for no code that evaluates Octo on LIBERO is public: openvla's, with what Octo sees and all that it plans.
    "octo": _Published((220, 280, 300, 520, 400), execute=4, train_states=ALL_STATES, image_size=256),
}


class LiberoSuite(Suite):
    """What all LIBERO suites share (Liu et al., 2023): a Panda arm, 7 actions, 50 stored initial states a task."""

    benchmark: ClassVar[str] = "libero"
    action_dim: ClassVar[int] = 7
    proprio_dim: ClassVar[int] = 8
    fps: ClassVar[int] = 20
    action_names = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    proprio_names = ("eef.x", "eef.y", "eef.z", "eef.rx", "eef.ry", "eef.rz", "finger.left", "finger.right")
    film_camera: ClassVar[str] = "agentview"

    def __init__(self, name: str, summary: str, members: tuple[str, ...] = ()) -> None:
        """A suite, or with `members` a group of suites."""
        self.name, self.summary = name, summary
        self.members = members or (name,)
        # LIBERO-Object's episodes are still those of the first expert.
        self.expert_version = 1 if name == "libero_object" else 3

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Members' tasks in upstream order."""
        return tuple(Task(suite, name, words) for suite in self.members for name, words in _TASKS[suite])

    def protocol(self, observation: str, name: str = "tiny") -> Protocol:
        """`tiny` learns from states 0-24 and is judged on 25-49; the published ones use all 50 as their authors do."""
        check_choice(observation, name, PUBLISHED, whose="LIBERO")
        if name in ("tiny", "tuning"):
            tiny = _tiny(observation)
            return tiny if name == "tiny" else for_tuning(tiny)
        published = PUBLISHED[name]
        return Protocol(
            name=name,
            version=published.version,
            observation="pixels",
            horizon=_horizon(published.horizon),
            settle_steps=published.settle_steps,
            execute=published.execute,
            train_states=published.train_states,
            eval_states=ALL_STATES,
            cameras=published.cameras,
            image_size=published.image_size,
            render_size=(published.render, published.render),
            mirrored=True,
            resize=published.resize,
            decoding=published.decoding,
        )

    def open(self, task: Task, protocol: Protocol, video: bool = False) -> Simulator:
        """Builds the scene: about 0.1 s, and 0.5 s when it can render."""
        if not protocol.shadows:
            raise BenchError("shadows: False, but no light of LIBERO casts any; a protocol of LIBERO leaves it at True")
        from .simulator import LiberoSimulator

        return LiberoSimulator(task, protocol, render=video or protocol.observation == "pixels")

    def demonstrate(self, simulator: Simulator, task: Task, init_state: int, seed: int) -> Demonstration:
        """The scripted expert of `expert.py`."""
        from .expert import demonstrate
        from .simulator import LiberoSimulator

        assert isinstance(simulator, LiberoSimulator)
        return demonstrate(simulator, task, init_state, seed)

    def object_names(self, suite: str) -> tuple[str, ...]:
        from .simulator import object_names

        return object_names(suite)

    def read_upstream(self, folder: Path, task: Task, protocol: Protocol, limit: int | None) -> list[Demonstration]:
        """LIBERO's `<task>_demo.hdf5`."""
        from .hdf5 import read

        return read(folder, task, protocol, limit)


def upstream_name(suite: str) -> str:
    """The name under which LIBERO's package has a suite: `libero_pro_goal_language` is its `libero_goal_lan`."""
    return suite.replace("libero_pro_", "libero_").replace("_language", "_lan")


def _tiny(observation: str) -> Protocol:
    pixels = observation == "pixels"
    return Protocol(
        name=f"tiny-{observation}",
        version=2,
        observation="pixels" if pixels else "state",
        horizon=_horizon(TINY_HORIZON),
        settle_steps=10,
        execute=8,
        train_states=ALL_STATES[:25],
        eval_states=ALL_STATES[25:],
        cameras=CAMERAS if pixels else (),
        image_size=64 if pixels else 0,
    )


def _horizon(steps: tuple[int, ...]) -> dict[str, int]:
    """Per suite; a perturbed suite has the horizon of the one it was made from."""
    by_base = dict(zip(BASES, steps, strict=True))
    return {suite: by_base["_".join(upstream_name(suite).split("_")[:2])] for suite in _TASKS}


LIBERO_SPATIAL = LiberoSuite("libero_spatial", "10 tasks: of two equal bowls the one named by its place")
LIBERO_OBJECT = LiberoSuite("libero_object", "10 tasks: one grocery into the basket")
LIBERO_GOAL = LiberoSuite("libero_goal", "10 tasks in one scene: open, push, turn on, put something somewhere")
LIBERO_10 = LiberoSuite("libero_10", "LIBERO-Long: 10 tasks of two steps each, in kitchen, living room and study")
LIBERO_90 = LiberoSuite("libero_90", "90 short tasks in 20 scenes")
LIBERO = LiberoSuite(
    "libero",
    "LIBERO-Object, -Spatial, -Goal and -10 together: 40 tasks",
    ("libero_object", "libero_spatial", "libero_goal", "libero_10"),
)

# LIBERO-PRO (Zhou et al., 2025): the same suites perturbed, to see what a policy has learnt by heart. Its fifth kind,
# other environments, is not in the package: neither scenes nor initial states.
_PERTURBED = {
    "swap": "objects in each other's places",
    "object": "other looking objects",
    "task": "another goal in the same scene",
    "language": "other words for the same goal",
}


def _pro(base: str, kind: str) -> LiberoSuite:
    return LiberoSuite(f"libero_pro_{base}_{kind}", f"LIBERO-{base.capitalize()} with {_PERTURBED[kind]}")


LIBERO_PRO_SPATIAL_SWAP = _pro("spatial", "swap")
LIBERO_PRO_SPATIAL_OBJECT = _pro("spatial", "object")
LIBERO_PRO_SPATIAL_TASK = _pro("spatial", "task")
LIBERO_PRO_SPATIAL_LANGUAGE = _pro("spatial", "language")
LIBERO_PRO_OBJECT_SWAP = _pro("object", "swap")
LIBERO_PRO_OBJECT_OBJECT = _pro("object", "object")
LIBERO_PRO_OBJECT_TASK = _pro("object", "task")
LIBERO_PRO_OBJECT_LANGUAGE = _pro("object", "language")
LIBERO_PRO_GOAL_SWAP = _pro("goal", "swap")
LIBERO_PRO_GOAL_OBJECT = _pro("goal", "object")
LIBERO_PRO_GOAL_TASK = _pro("goal", "task")
LIBERO_PRO_GOAL_LANGUAGE = _pro("goal", "language")
LIBERO_PRO_10_SWAP = _pro("10", "swap")
LIBERO_PRO_10_OBJECT = _pro("10", "object")
LIBERO_PRO_10_TASK = _pro("10", "task")
LIBERO_PRO_10_LANGUAGE = _pro("10", "language")
