"""Demonstrations: made by the suite's expert in parallel worker processes, and read whoever made them.

A folder of demonstrations holds, for each suite at `<folder>/<suite>` or for one suite at `<folder>` itself,

- a LeRobotDataset v3 of ours (`demo_store.py`): verified, of one protocol, from training states only;
- any other LeRobotDataset v3 (`lerobot.py`) whose features are those that the suite and the protocol have; or
- the HDF5 files that the suite's upstream project publishes, read by the suite (`Suite.read_upstream`).

Those of others do not say which initial state an episode began from, so whether it is one that is held out for
evaluation cannot be checked; a run's manifest says so.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .demo_store import RECORD, Mismatch, Writer, read_episodes, read_record, writing
from .errors import BenchError
from .lerobot import INFO, Entry, Reader
from .pool import Patience
from .protocol import Protocol
from .suite import Demonstration, Simulator, Suite, Task
from .workers import Worker, WorkerLost, ready

OURS, FOREIGN, UPSTREAM = "vlarl-bench", "LeRobotDataset", "HDF5"
ROUNDS = 4
"""Give up on a task after this many attempts per wanted demonstration."""

Progress = Callable[[int], None]
"""Called with the number of demonstrations that are newly there: those that were found, then each that is made."""


def make_demonstrations(
    suite: Suite,
    tasks: Sequence[Task],
    protocol: Protocol,
    per_task: int,
    folder: Path,
    workers: int = 2,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_wait: Callable[[], None] | None = None,
    patience: Patience | None = None,
) -> list[Path]:
    """Makes `per_task` successful expert episodes of every task on the protocol's train states.

    Attempt j starts from train state j mod n with seed `seed` + j // n, and tasks are kept in their order, so a
    dataset is a pure function of the arguments, whatever `workers` is. Episodes that are there already are kept, and
    only those that are missing are made and appended; damaged ones are made again. Returns the datasets' folders.
    While another process writes there, `on_wait` is called and its end waited for.
    Raises BenchError when the expert cannot do a task, when a worker dies, raises or is silent for longer than
    `patience` allows, when the folder cannot be written, or is being written to and there is no `on_wait`; and rather
    than replace demonstrations of another protocol, seed or expert.
    """
    for name, value in (("per_task", per_task), ("workers", workers)):
        if value < 1:
            raise BenchError(f"{name}: {value}; must be at least 1")
    progress = on_progress or (lambda _: None)
    names = list(dict.fromkeys(task.suite for task in tasks))
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(writing(folder / name, suite, name, protocol, seed, on_wait)) for name in names
        }
        missing = []
        for task in tasks:
            count = writers[task.suite].record.count(task.name)
            progress(min(count, per_task))
            if count < per_task:
                missing.append(_Order(task, count, writers[task.suite].next_attempt(task)))
        if missing:
            experts = _Experts(suite, protocol, per_task, seed, min(workers, len(missing)), patience or Patience())
            experts.make(missing, writers, progress)
    return [folder / name for name in names]


def count_demonstrations(folder: Path, task: Task) -> int:
    """How many of ours there are of a task, by the dataset's own word."""
    root = folder / task.suite
    return read_record(root).count(task.name) if (root / RECORD).is_file() else 0


def load_demonstrations(
    suite: Suite, folder: Path, tasks: Sequence[Task], protocol: Protocol, limit: int | None = None
) -> list[Demonstration]:
    """Reads the demonstrations of `tasks`, at most `limit` of each, in the order in which they were made.

    Raises BenchError when one is missing, damaged or of other features than the suite and the protocol have; in our
    own datasets also when it was made under another protocol, or from a state that the protocol does not give to
    training.
    """
    readers: dict[Path, tuple[Reader, list[Entry]]] = {}
    demonstrations: list[Demonstration] = []
    for task in tasks:
        root, kind = _source(folder, task, protocol)
        if kind == OURS:
            try:
                found = read_episodes(root, suite, task, protocol, limit)
            except Mismatch:
                raise
            except BenchError as error:
                raise BenchError(f"{error}; {_advice(task, protocol)}") from error
        elif kind == FOREIGN:
            if root not in readers:
                reader = Reader(root, suite, protocol)
                readers[root] = reader, reader.entries()
            found = _read_foreign(*readers[root], suite, task, limit)
        else:
            found = suite.read_upstream(root, task, protocol, limit)
        if len(found) < (limit or 1):
            advice = f"; {_advice(task, protocol, limit)}" if kind == OURS else ""
            raise BenchError(
                f"{root}: holds {len(found)} demonstrations of {task.key}, {limit or 1} are wanted{advice}"
            )
        demonstrations += found
    return demonstrations


def describe_demonstrations(
    folder: Path, tasks: Sequence[Task], protocol: Protocol, demonstrations: Sequence[Demonstration]
) -> dict[str, Any]:
    """What a run's manifest says of the demonstrations that it learned from: the digest of their content, which is the
    same wherever and in whichever format they lie, their number, and whether held-out states can be among them."""
    kinds = sorted({_source(folder, task, protocol)[1] for task in tasks})
    return {
        "digest": _digest(demonstrations),
        "episodes": len(demonstrations),
        "source": ", ".join(kinds),
        "held_out": "from training states only" if kinds == [OURS] else "cannot be checked: init states are unknown",
    }


def _read_foreign(
    reader: Reader, entries: Sequence[Entry], suite: Suite, task: Task, limit: int | None
) -> list[Demonstration]:
    """The episodes whose instruction is the task's."""
    twins = [other.key for other in suite.tasks if _words(other.instruction) == _words(task.instruction)]
    if len(twins) > 1:
        raise BenchError(f"{reader.root}: {task.instruction!r} is the instruction of {' and of '.join(twins)}")
    chosen = [entry for entry in entries if _words(task.instruction) in map(_words, entry.instructions)]
    if not chosen:
        there = sorted({words for entry in entries for words in entry.instructions})
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        shown = ", ".join(map(repr, there[:3]))
        raise BenchError(f"{reader.root}: tasks: no episode of {task.instruction!r}; there is {shown}{more}")
    return [reader.demonstration(entry, task, -1) for entry in chosen[:limit]]


def _words(instruction: str) -> list[str]:
    return instruction.lower().split()


def _source(folder: Path, task: Task, protocol: Protocol) -> tuple[Path, str]:
    """Where the demonstrations of a task's suite lie, and of which kind they are."""
    for root in (folder / task.suite, folder):
        if (root / RECORD).is_file():
            return root, OURS
        if (root / INFO).is_file():
            return root, FOREIGN
        if any(root.glob("*.hdf5")):
            return root, UPSTREAM
    raise BenchError(f"{folder}: no demonstrations of {task.key}; {_advice(task, protocol)}")


def _advice(task: Task, protocol: Protocol, episodes: int | None = None) -> str:
    mode = "" if protocol.observation == "state" else f" --mode {protocol.observation}"
    count = "" if episodes is None else f" --episodes {episodes}"
    return f"run `vlarl-bench demos --suite {task.suite}{mode}{count}`"


def _digest(demonstrations: Sequence[Demonstration]) -> str:
    """First 12 hex digits of the SHA-256 of everything that is learned from."""
    digest = hashlib.sha256()
    for episode in demonstrations:
        digest.update(f"{episode.task.key} {episode.actions.shape}".encode())
        digest.update(episode.actions.tobytes())
        for seen in episode.observations:
            digest.update(seen.proprio.tobytes())
            for shown in (seen.objects, seen.images):
                for name in sorted(shown):
                    digest.update(name.encode() + shown[name].tobytes())
    return digest.hexdigest()[:12]


# Workers. A worker plays one attempt when asked to, and the parent alone writes: so a worker can be killed at any time.


@dataclass
class _Order:
    """A task of which demonstrations are missing."""

    task: Task
    solved: int
    """Demonstrations that there are."""
    attempt: int
    """The next one."""
    made: list[tuple[int, Demonstration]] = field(default_factory=list)
    """(attempt, what it gave), of those not yet on the disk."""


class _Experts:
    """Worker processes that play the expert, and are watched like those of a rollout."""

    def __init__(
        self, suite: Suite, protocol: Protocol, per_task: int, seed: int, workers: int, patience: Patience
    ) -> None:
        self._arguments = (suite, protocol, seed)
        self._horizon, self._per_task, self._workers, self._patience = protocol.horizon, per_task, workers, patience

    def make(self, orders: Sequence[_Order], writers: Mapping[str, Writer], progress: Progress) -> None:
        """Makes what is ordered. Batches are kept in the order of `orders`; a task that ends early waits for its turn,
        and at most 2 `workers` tasks are begun and not yet kept, since they are held in memory."""
        waiting, unkept = list(orders), list(orders)
        pool: list[Worker] = []
        idle: list[Worker] = []
        busy: dict[Worker, _Order] = {}

        def give_work() -> None:
            while idle and waiting and len(unkept) - len(waiting) < 2 * self._workers:
                worker, order = idle.pop(0), waiting.pop(0)
                busy[worker] = order
                self._ask(worker, order)
            while idle and not waiting:
                idle.pop().end()

        try:
            for _ in range(self._workers):
                pool.append(Worker(_Expert, self._arguments))
                idle.append(pool[-1])
                give_work()
            while busy:
                for worker in ready(busy):
                    order = busy[worker]
                    if self._take(worker, order):
                        progress(1)
                    if order.solved < self._per_task:
                        self._ask(worker, order)
                        continue
                    idle.append(worker)
                    del busy[worker]
                    while unkept and unkept[0].solved == self._per_task:
                        _keep(unkept.pop(0), writers)
                    give_work()
        finally:
            for worker in pool:
                worker.end()

    def _ask(self, worker: Worker, order: _Order) -> None:
        """Orders the next attempt, unless there have been too many."""
        if order.attempt >= ROUNDS * self._per_task:
            count = f"{order.solved} of {ROUNDS * self._per_task}"
            raise BenchError(
                f"{order.task.key}: the expert solved {count} attempts, not {self._per_task}; ask for fewer"
            )
        # In pixels mode a step is taken twice: the expert looks in a second pass.
        steps = 2 * self._horizon[order.task.suite]
        limit = self._patience.open + self._patience.step + self._patience.each * steps
        worker.ask([(order.task, order.attempt)], [limit])

    def _take(self, worker: Worker, order: _Order) -> bool:
        """Receives an attempt; whether it succeeded."""
        try:
            demonstration = worker.answer()
        except WorkerLost as lost:
            raise BenchError(f"{order.task.key}, attempt {order.attempt}: the expert's worker {lost}") from lost
        if demonstration is not None:
            order.made.append((order.attempt, demonstration))
            order.solved += 1
        order.attempt += 1
        return demonstration is not None


def _keep(order: _Order, writers: Mapping[str, Writer]) -> None:
    attempts, episodes = zip(*order.made, strict=True)
    order.made = []
    writers[order.task.suite].append(order.task, attempts, episodes)


class _Expert:
    """What a worker does, with one simulator at a time."""

    def __init__(self, suite: Suite, protocol: Protocol, seed: int) -> None:
        self.suite, self.protocol, self.seed = suite, protocol, seed
        self.opened: tuple[Task, Simulator] | None = None

    def __call__(self, request: tuple[Task, int]) -> Demonstration | None:
        """One attempt at a task; None if it failed."""
        task, attempt = request
        states = self.protocol.train_states
        turn, index = divmod(attempt, len(states))
        demonstration = self.suite.demonstrate(self._open(task), task, states[index], self.seed + turn)
        return demonstration if demonstration.success else None

    def _open(self, task: Task) -> Simulator:
        if self.opened is not None:
            opened, simulator = self.opened
            if opened == task:
                return simulator
            self.opened = None
            simulator.close()
        simulator = self.suite.open(task, self.protocol)
        self.opened = task, simulator
        return simulator
