"""The suite seam: tasks, and simulators that run them. NumPy only; an environment never sees a tensor.

A simulator here is one task's physics with exact snapshots. An episode in flight is nothing but a snapshot, so one
simulator serves many interleaved episodes, and a row never depends on which worker ran it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from typing import Protocol as Interface

import numpy as np

from .errors import BenchError
from .protocol import Protocol


@dataclass(frozen=True)
class Task:
    """One task of a suite."""

    suite: str
    """The concrete suite (`libero_object`), also when it was reached through a group (`libero`)."""
    name: str
    instruction: str

    @property
    def key(self) -> str:
        """`suite/name`: unique over all suites."""
        return f"{self.suite}/{self.name}"


@dataclass(frozen=True)
class Embodiment:
    """The robot, and what is seen of it: everything that a policy must fit."""

    action_dim: int
    proprio_dim: int
    cameras: tuple[str, ...] = ()
    """In `pixels` mode."""
    hands: tuple[str, ...] = ()
    """Names, among the objects of `state` mode, of the robot's hands. Empty: it has one, and proprio begins with its
    position (m)."""
    chunk: int = 8
    """Actions that the protocol executes before the policy looks again."""


@dataclass(frozen=True)
class Observation:
    """What the policy is shown at one decision."""

    instruction: str
    proprio: np.ndarray
    """[P] float32. LIBERO: end-effector position (m), its axis-angle (rad), gripper joint positions (m); P = 8."""
    objects: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> [7] float32: world position (m) and quaternion (x, y, z, w); empty in `pixels` mode."""
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Camera -> [S, S, 3] uint8, upright; empty in `state` mode."""


@dataclass(frozen=True)
class Outcome:
    """What executing an action chunk led to."""

    executed: int
    """Actions executed: the whole chunk, or fewer when the episode ended inside it."""
    success: bool
    broken: bool = False
    """The physics did not bear the actions. That ends the episode without success: its state means nothing any more."""


class Simulator(Interface):
    """One task, open. Not shared between processes."""

    def reset(self, init_state: int) -> None:
        """Puts the task into its stored initial state and lets it settle."""

    def step(self, actions: np.ndarray) -> Outcome:
        """Executes [n, A] actions one after another; stops at the first success."""

    def observe(self) -> Observation:
        """Shows the present state; renders only here, and only in `pixels` mode."""

    def save(self) -> Any:
        """Exact snapshot of everything that decides the future (picklable)."""

    def restore(self, snapshot: Any) -> None:
        """Goes back to a snapshot; what follows replays bitwise."""

    def render(self, camera: str, size: int) -> np.ndarray:
        """An upright [size, size, 3] uint8 frame; needs `open(..., video=True)` or `pixels` mode."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Demonstration:
    """One expert episode; entry t of each list is what was seen and done at environment step t."""

    task: Task
    init_state: int
    """The protocol's number of it; -1 where demonstrations of others do not tell."""
    success: bool
    observations: tuple[Observation, ...]
    actions: np.ndarray
    """[T, A] float32, environment units."""


def windows(actions: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """At each of an episode's steps [T, A] the next H actions [T, H, A], and a mask [T, H] float32: past the end the
    last action is repeated and the mask 0."""
    index = np.arange(len(actions))[:, None] + np.arange(chunk)
    return actions[index.clip(max=len(actions) - 1)], (index < len(actions)).astype(np.float32)


class Suite(ABC):
    """A set of tasks. Importing and constructing one is cheap; the simulator is imported by `open`."""

    name: str
    summary: str
    benchmark: ClassVar[str]
    """What it belongs to, such as `libero`: a shipped prior serves all suites of one benchmark."""
    expert_version: int = 1
    """Goes up when the same arguments of `demonstrate` no longer give the same episode."""
    action_dim: ClassVar[int]
    proprio_dim: ClassVar[int]
    fps: ClassVar[int]
    """Environment steps a second of simulated time."""
    action_names: ClassVar[tuple[str, ...]] = ()
    """What the action's dimensions are called in datasets; empty leaves them unnamed."""
    proprio_names: ClassVar[tuple[str, ...]] = ()
    """The same for `Observation.proprio`."""
    hands: ClassVar[tuple[str, ...]] = ()
    """See `Embodiment`."""
    film_camera: ClassVar[str]
    """Camera that films are taken with: one that shows the whole scene to a person."""

    @property
    @abstractmethod
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, in the order of the upstream suite."""

    @abstractmethod
    def protocol(self, observation: str, name: str = "tiny") -> Protocol:
        """The protocol of that name for `state` or `pixels`; `tiny` is this project's own, `tuning` that without its
        held-out states (`protocol.for_tuning`), others are published ones.

        Raises BenchError for a name or a way of observing that the suite does not have.
        """

    def embodiment(self, protocol: Protocol) -> Embodiment:
        """What a policy must fit to act here under `protocol`."""
        return Embodiment(self.action_dim, self.proprio_dim, protocol.cameras, self.hands, protocol.execute)

    @abstractmethod
    def open(self, task: Task, protocol: Protocol, video: bool = False) -> Simulator:
        """Builds one task's simulator; with `video`, one that can render also in `state` mode."""

    @abstractmethod
    def demonstrate(self, simulator: Simulator, task: Task, init_state: int, seed: int) -> Demonstration:
        """One episode of the scripted expert, from a stored initial state."""

    def object_names(self, suite: str) -> tuple[str, ...]:
        """Names of all objects that the tasks of the concrete suite `suite` show in `state` mode, in a fixed order.

        This opens every task; a suite that knows better overrides it."""
        protocol = self.protocol("state")
        names: set[str] = set()
        for task in self.tasks:
            if task.suite == suite:
                simulator = self.open(task, protocol)
                try:
                    simulator.reset(protocol.train_states[0])
                    names |= simulator.observe().objects.keys()
                finally:
                    simulator.close()
        return tuple(sorted(names))

    def read_upstream(self, folder: Path, task: Task, protocol: Protocol, limit: int | None) -> list[Demonstration]:
        """Demonstrations of `task` from the HDF5 files that the upstream project publishes, at most `limit`."""
        raise BenchError(f"{folder}: suite {self.name!r} reads no HDF5 demonstrations; give a LeRobotDataset v3")
