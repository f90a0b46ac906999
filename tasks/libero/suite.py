"""The LIBERO suites: names, instructions and protocols. The simulator itself is imported when a task is opened."""

import json
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from vlarl_bench.errors import BenchError
from vlarl_bench.protocol import Protocol
from vlarl_bench.suite import Demonstration, Simulator, Suite, Task

# Names and instructions as in LIBERO's own task map, kept here so that listing them needs no import of LIBERO;
# tests/tasks/test_suite.py holds the two against each other.
_TASKS: dict[str, list[list[str]]] = json.loads((Path(__file__).parent / "tasks.json").read_text(encoding="utf-8"))

HORIZON = {"libero_object": 200, "libero_spatial": 200}
"""Longest episode of the tiny protocols in environment steps (20 a second)."""


class LiberoSuite(Suite):
    """What all LIBERO suites share (Liu et al., 2023): a Panda arm, 7 actions, 50 stored initial states a task."""

    action_dim: ClassVar[int] = 7
    proprio_dim: ClassVar[int] = 8
    fps: ClassVar[int] = 20
    action_names = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    proprio_names = ("eef.x", "eef.y", "eef.z", "eef.rx", "eef.ry", "eef.rz", "finger.left", "finger.right")
    film_camera: ClassVar[str] = "agentview"
    members: ClassVar[tuple[str, ...]]
    """The upstream suites that this one is made of."""

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Members' tasks in upstream order."""
        return tuple(Task(suite, name, words) for suite in self.members for name, words in _TASKS[suite])

    def protocol(self, observation: str) -> Protocol:
        """The `tiny` protocols: states 0-24 to learn from, 25-49 to be judged on."""
        if observation not in ("state", "pixels"):
            raise BenchError(f"observation: {observation!r}; LIBERO has 'state' and 'pixels'")
        pixels = observation == "pixels"
        return Protocol(
            name=f"tiny-{observation}",
            version=1,
            observation="pixels" if pixels else "state",
            horizon=HORIZON,
            settle_steps=10,
            execute=8,
            train_states=tuple(range(25)),
            eval_states=tuple(range(25, 50)),
            cameras=("agentview", "robot0_eye_in_hand") if pixels else (),
            image_size=64 if pixels else 0,
        )

    def open(self, task: Task, protocol: Protocol, video: bool = False) -> Simulator:
        """Builds the scene: 2-8 s, and 0.5-2 GB with textures."""
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


class LiberoObject(LiberoSuite):
    """LIBERO-Object: put one of ten groceries into the basket."""

    name = "libero_object"
    summary = "LIBERO-Object: 10 tasks, one grocery into the basket"
    members = ("libero_object",)


class LiberoSpatial(LiberoSuite):
    """LIBERO-Spatial: put the one of two equal bowls that the instruction names by its place onto the plate."""

    name = "libero_spatial"
    summary = "LIBERO-Spatial: 10 tasks, the bowl named by its place onto the plate"
    members = ("libero_spatial",)


class Libero(LiberoSuite):
    """All LIBERO suites that this version runs."""

    name = "libero"
    summary = "LIBERO-Object and LIBERO-Spatial together: 20 tasks"
    members = ("libero_object", "libero_spatial")
