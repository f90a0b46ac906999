"""Simulators in worker processes: who answers for which slot, what a lost worker owes, and how that is made good."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BenchError
from .suite import Observation, Outcome, Suite, Task
from .workers import Worker, WorkerLost, ready

if TYPE_CHECKING:
    from .protocol import Protocol


@dataclass(frozen=True)
class Patience:
    """Seconds that a request to a worker may take. Generous: a slow machine is not a fault."""

    open: float = 300.0
    """Opening a scene, which comes before the first reset of a task in a worker, and setting it to its start."""
    step: float = 120.0
    """Executing a chunk and looking; the first time in a process something may be compiled."""
    each: float = 1.0
    """More for each environment step asked for."""


LOSSES = 3
"""An episode that has lost so many workers ends the run: it would lose the next one, too."""


@dataclass(frozen=True)
class LostEpisode:
    """An attempt at an episode that ended with its worker. It is no outcome: the episode is played again."""

    task: Task
    init_state: int
    doing: str
    """`reset`, `step`, `replay` or `film`."""
    why: str
    trace: str = ""
    """The worker's traceback, if it raised."""

    def to_json(self) -> dict[str, Any]:
        """The line that is kept of it."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "suite": self.task.suite,
            "task": self.task.name,
            "init_state": self.init_state,
            "doing": self.doing,
            "why": self.why,
            "trace": self.trace,
        }

    def __str__(self) -> str:
        return f"{self.task.key}, init state {self.init_state}: the environment worker {self.why} (at {self.doing})"


@dataclass
class _Held:
    """What it takes to bring a slot's episode back in another process."""

    task: Task
    init_state: int
    seen: Observation
    chunks: list[np.ndarray] = field(default_factory=list)


_Request = tuple[int, str, Any]
"""(slot, command, what the command is given)."""


class Pool:
    """Worker processes that hold simulators. Use as a context manager: no process outlives it.

    A worker that dies, is stopped, hangs, raises or answers nonsense is lost. A fresh one takes its place and plays
    the episodes that it held again, with the same actions, up to where they were; that must show the same observation
    again. So a loss costs time and changes nothing else.
    """

    def __init__(
        self,
        suite: Suite,
        protocol: Protocol,
        workers: int,
        video: bool = False,
        on_loss: Callable[[LostEpisode], None] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._arguments = (suite, protocol, video)
        self._proprio_dim, self._protocol = suite.proprio_dim, protocol
        self._on_loss, self._patience = on_loss, patience or Patience()
        self._held: dict[int, _Held] = {}
        self._losses: dict[int, int] = {}
        self._workers: list[Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(Worker(_Worker, self._arguments))
        except BaseException:
            self.__exit__()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers of the moment."""
        return [worker.process.pid or 0 for worker in self._workers]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def call(self, command: str, by_slot: dict[int, Any]) -> dict[int, Any]:
        """Sends each slot's request to the worker that owns the slot; returns each slot's answer.

        Raises:
            BenchError: from a worker, and when the same episode has lost `LOSSES` workers.
        """
        pending: dict[int, deque[_Request]] = {}
        for slot, request in by_slot.items():
            pending.setdefault(slot % len(self._workers), deque()).append((slot, command, request))
            if command != "step":
                self._losses[slot] = 0
        for place, requests in pending.items():
            self._ask(place, requests)
        answers: dict[int, Any] = {}
        while pending:
            for worker in ready(self._workers[place] for place in pending):
                place = self._workers.index(worker)
                try:
                    answer = worker.answer()
                    self._check(*pending[place][0], answer)
                except WorkerLost as lost:
                    self._replace(place, pending[place], lost)
                    continue
                slot, done, request = pending[place].popleft()
                self._keep(slot, done, request, answer)
                if done != "replay":
                    answers[slot] = answer
                if not pending[place]:
                    del pending[place]
        return answers

    def free(self, slot: int) -> None:
        """Says that the slot's episode is over: nobody needs to bring it back."""
        self._held.pop(slot, None)

    def _ask(self, place: int, requests: deque[_Request]) -> None:
        self._workers[place].ask(list(requests), [self._limit(command, request) for _, command, request in requests])

    def _limit(self, command: str, request: Any) -> float:
        patience = self._patience
        if command == "step":
            return patience.step + patience.each * len(request)
        steps = sum(map(len, request[2])) if command in ("replay", "film") else 0
        return patience.open + patience.each * steps

    def _keep(self, slot: int, command: str, request: Any, answer: Any) -> None:
        """Follows the slot's episode, so that it can be brought back."""
        if command == "reset":
            task, init_state = request
            self._held[slot] = _Held(task, init_state, answer)
        elif command == "step":
            self._held[slot].chunks.append(request)
            self._held[slot].seen = answer[1]

    def _replace(self, place: int, requests: deque[_Request], lost: WorkerLost) -> None:
        """Puts a fresh worker in the place of a lost one, and asks it for everything that the lost one owed."""
        slot, doing, request = requests[0]
        if doing == "step":
            task, init_state = self._held[slot].task, self._held[slot].init_state
        else:
            task, init_state = request[:2]
        loss = LostEpisode(task, init_state, doing, str(lost), lost.trace)
        if self._on_loss is not None:
            self._on_loss(loss)
        self._losses[slot] = self._losses.get(slot, 0) + 1
        self._workers[place].end()
        if self._losses[slot] >= LOSSES:
            raise BenchError(f"{loss}; it has now lost {LOSSES} workers, so it is not tried again")
        self._workers[place] = Worker(_Worker, self._arguments)
        starting = {slot for slot, command, _ in requests if command == "reset"}
        owed = [entry for entry in requests if entry[1] != "replay"]
        requests.clear()
        for slot, held in self._held.items():
            if slot % len(self._workers) == place and slot not in starting:
                requests.append((slot, "replay", (held.task, held.init_state, held.chunks)))
        requests.extend(owed)
        self._ask(place, requests)

    def _check(self, slot: int, command: str, request: Any, answer: Any) -> None:
        """Raises WorkerLost unless the answer is of the kind that was asked for and all its numbers are finite."""
        if command == "step":
            wrong = _wrong_outcome(answer, len(request)) or self._wrong_observation(answer[1])
        elif command in ("reset", "replay"):
            wrong = self._wrong_observation(answer)
        else:
            return
        if wrong:
            raise WorkerLost(f"returned {wrong}")
        if command == "replay" and not _same(answer, self._held[slot].seen):
            raise BenchError(
                f"{request[0].key}, init state {request[1]}: played again with the same actions it ended elsewhere; "
                "the simulator is not deterministic"
            )

    def _wrong_observation(self, seen: Any) -> str:
        """What is wrong with an observation, or the empty string."""
        if not isinstance(seen, Observation):
            return f"{type(seen).__name__} where an Observation was due"
        protocol = self._protocol
        cameras, side = (protocol.cameras, protocol.image_size) if protocol.observation == "pixels" else ((), 0)
        if set(seen.images) != set(cameras):
            return f"images of {sorted(seen.images)} where {sorted(cameras)} were due"
        return (
            _wrong_array("proprio", seen.proprio, (self._proprio_dim,), np.float32)
            or next(filter(None, (_wrong_array(n, a, (7,), np.float32) for n, a in seen.objects.items())), "")
            or next(filter(None, (_wrong_array(n, a, (side, side, 3), np.uint8) for n, a in seen.images.items())), "")
        )


def _wrong_outcome(answer: Any, asked: int) -> str:
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Outcome)):
        return f"{type(answer).__name__} where an Outcome and an Observation were due"
    outcome = answer[0]
    if type(outcome.success) is not bool:
        return f"success {outcome.success!r} where a bool was due"
    least = 1 if outcome.success or outcome.broken else asked
    if type(outcome.executed) is not int or not least <= outcome.executed <= asked:
        return f"{outcome.executed!r} executed steps with success {outcome.success} where {asked} were asked for"
    return ""


def _wrong_array(name: str, array: Any, shape: tuple[int, ...], dtype: type[np.generic]) -> str:
    if not isinstance(array, np.ndarray):
        return f"{name} as {type(array).__name__} where an array was due"
    if array.shape != shape or array.dtype != dtype:
        return f"{name} as {list(array.shape)} {array.dtype} where {list(shape)} {np.dtype(dtype)} was due"
    if dtype is np.float32 and not np.isfinite(array).all():
        return f"{name} = {array[~np.isfinite(array)][0]} at [{np.flatnonzero(~np.isfinite(array))[0]}]"
    return ""


def _same(a: Observation, b: Observation) -> bool:
    """Whether two observations are equal bit by bit."""
    pairs = [(a.proprio, b.proprio)]
    for mine, theirs in ((a.objects, b.objects), (a.images, b.images)):
        if mine.keys() != theirs.keys():
            return False
        pairs += [(mine[name], theirs[name]) for name in mine]
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


MOST_OPEN = 10
"""Simulators that a worker keeps open, unless more episodes than that are in flight. One with pixels takes some
0.3 GiB, and building it anew half a second at most."""


class _Worker:
    """The simulators of one process, one a task, shared by its slots."""

    def __init__(self, suite: Suite, protocol: Protocol, video: bool) -> None:
        self.suite, self.protocol, self.video = suite, protocol, video
        self.simulators: dict[Task, Any] = {}
        self.owner: dict[Task, int] = {}
        self.snapshots: dict[int, tuple[Task, Any]] = {}

    def __call__(self, request: _Request) -> Any:
        slot, command, given = request
        return getattr(self, command)(slot, given)

    def _open(self, task: Task) -> Any:
        """The task's simulator. Where there are many, those that nobody has asked for longest make room."""
        if (simulator := self.simulators.pop(task, None)) is None:
            needed = {task for task, _ in self.snapshots.values()}
            for other in [other for other in self.simulators if other not in needed]:
                if len(self.simulators) < MOST_OPEN:
                    break
                self.simulators.pop(other).close()
                self.owner.pop(other, None)
            simulator = self.suite.open(task, self.protocol, self.video)
        self.simulators[task] = simulator
        return simulator

    def reset(self, slot: int, request: tuple[Task, int]) -> Observation:
        return self.replay(slot, (*request, []))

    def replay(self, slot: int, request: tuple[Task, int, list[np.ndarray]]) -> Observation:
        """Plays an episode from its start with known actions: what it shows after them."""
        task, init_state, chunks = request
        simulator = self._open(task)
        simulator.reset(init_state)
        for actions in chunks:
            simulator.step(actions)
        seen = simulator.observe()
        self._keep(slot, task, simulator)
        return seen

    def step(self, slot: int, actions: np.ndarray) -> tuple[Outcome, Observation]:
        task, snapshot = self.snapshots[slot]
        simulator = self.simulators[task]
        if self.owner[task] != slot:
            simulator.restore(snapshot)
        outcome = simulator.step(actions)
        seen = simulator.observe()
        self._keep(slot, task, simulator)
        return outcome, seen

    def _keep(self, slot: int, task: Task, simulator: Any) -> None:
        self.snapshots[slot] = (task, simulator.save())
        self.owner[task] = slot

    def film(self, slot: int, request: tuple[Task, int, list[np.ndarray], str, int, int]) -> list[np.ndarray]:
        task, init_state, chunks, camera, size, every = request
        simulator = self._open(task)
        simulator.reset(init_state)
        self.owner[task] = slot
        actions = np.concatenate(chunks)
        frames = [simulator.render(camera, size)]
        for start in range(0, len(actions), every):
            simulator.step(actions[start : start + every])
            frames.append(simulator.render(camera, size))
        return frames
