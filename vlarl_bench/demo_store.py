"""One suite's demonstrations on disk: a LeRobotDataset v3 that only grows, with a record of what made it.

`meta/vlarl_bench.json`, which lerobot does not look at, holds the protocol, the seed, the expert's version and the
SHA-256 of every file. It is replaced last, and that is when a batch of episodes is there: whatever else lies in the
folder was left by an interrupted command and is removed by the next. A batch is one task's episodes: one data file,
one video a camera, one file of meta/episodes.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from . import lerobot, registry
from .errors import BenchError
from .files import atomic_file, explained, sole_writer
from .lerobot import Reader, read_table
from .lerobot_writer import Place, batch_files, meta_files
from .protocol import Protocol
from .sealed import read_sealed, write_sealed
from .suite import Demonstration, Suite, Task

FORMAT = 2
RECORD = "meta/vlarl_bench.json"


class Mismatch(BenchError):
    """A sound dataset, but of other things than those asked for."""


@dataclass(frozen=True)
class Record:
    """What `meta/vlarl_bench.json` says."""

    suite: str
    protocol: str
    """Hash."""
    protocol_label: str
    seed: int
    expert_version: int
    features: dict[str, Any]
    batches: list[dict[str, Any]] = field(default_factory=list)
    """In the order of episodes: {"task": name, "episodes": their number, "files": {file name: SHA-256}}."""
    meta: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files that speak of all batches."""

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file."""
        return {name: digest for batch in self.batches for name, digest in batch["files"].items()} | self.meta

    def count(self, task: str) -> int:
        """How many demonstrations of a task there are."""
        return sum(batch["episodes"] for batch in self.batches if batch["task"] == task)

    def episode_files(self, task: str | None = None) -> list[str]:
        """Files of meta/episodes, of one task or of all."""
        chosen = [batch for batch in self.batches if task in (None, batch["task"])]
        return [name for batch in chosen for name in batch["files"] if name.startswith("meta/episodes")]


def read_record(root: Path) -> Record:
    """Reads the record of the dataset at `root`. Raises BenchError if it is damaged or of another format."""
    path = root / RECORD
    try:
        content = read_sealed(path)
    except BenchError as error:
        raise BenchError(f"{error}; or delete {root} to begin anew") from None
    if content.pop("format", None) != FORMAT:
        raise BenchError(f"{path}: not of format {FORMAT}, which this version reads; delete {root} to begin anew")
    try:
        return Record(**content)
    except TypeError:
        raise BenchError(f"{path}: not a record of ours; delete {root} to begin anew") from None


def read_episodes(
    root: Path, suite: Suite, task: Task, protocol: Protocol, limit: int | None = None
) -> list[Demonstration]:
    """Reads the demonstrations of one task, verified, in the order of attempts; at most `limit`.

    Raises BenchError if the dataset is damaged, of another suite or protocol, or holds an episode of the task from a
    state that is not for training.
    """
    record = read_record(root)
    check_record(root, record, task, protocol)
    files = record.episode_files(task.name)
    if not files:
        return []
    reader = Reader(root, suite, protocol, record.hashes)
    entries = reader.entries(files)
    states = {int(entry.row["init_state"]) for entry in entries}
    forbidden = sorted(states - set(protocol.train_states))
    if forbidden:
        raise BenchError(f"{root}: {task.name}: init states {forbidden} are not train states of {protocol.label}")
    return [reader.demonstration(entry, task, int(entry.row["init_state"])) for entry in entries[:limit]]


def check_record(root: Path, record: Record, task: Task, protocol: Protocol) -> None:
    """Raises Mismatch unless the dataset is of the task's suite and of `protocol`."""
    if record.suite != task.suite:
        raise Mismatch(f"{root}: holds demonstrations of {record.suite}, not of {task.suite}")
    if record.protocol != protocol.hash:
        raise Mismatch(f"{root}: made under protocol {record.protocol_label}, not {protocol.label}; use another folder")


class Writer:
    """Appends to the dataset of one suite. Made by `writing`, which holds the lock."""

    def __init__(self, root: Path, record: Record, suite: Suite, tables: list[pa.Table]) -> None:
        self.root, self.record, self.suite = root, record, suite
        self._tables = tables

    def next_attempt(self, task: Task) -> int:
        """The attempt that comes after those whose demonstrations are there."""
        rows = [row for table in self._tables for row in table.select(["task_name", "attempt"]).to_pylist()]
        return max((row["attempt"] for row in rows if row["task_name"] == task.name), default=-1) + 1

    def append(self, task: Task, attempts: Sequence[int], demonstrations: Sequence[Demonstration]) -> None:
        """Adds a batch of one task's episodes. When this returns, it is on the disk."""
        instructions = self._instructions()
        place = Place(
            batch=len(self.record.batches),
            episode=sum(map(len, self._tables)),
            frame=sum(sum(table.column("length").to_pylist()) for table in self._tables),
            tasks=tuple(dict.fromkeys([*instructions, task.instruction])),
        )
        for episode in demonstrations:
            unknown = episode.observations[0].objects.keys() - self._objects()
            if unknown:
                raise BenchError(f"{task.key}: object {min(unknown)!r} is not among the suite's object_names()")
        features, fps = self.record.features, self.suite.fps
        files, table = batch_files(demonstrations, attempts, features, fps, place)
        self._tables.append(table)
        self.record.batches.append({"task": task.name, "episodes": len(table), "files": self._write(files)})
        self.write_meta()

    def write_meta(self) -> None:
        """Writes what follows from the batches: tasks, statistics, info and, last, the record."""
        if self._tables:
            features, fps = self.record.features, self.suite.fps
            episodes = pa.concat_tables(self._tables)
            files = meta_files(features, fps, self.record.suite, self._instructions(), episodes)
            self.record.meta.clear()
            self.record.meta.update(self._write(files))
        write_sealed(self.root / RECORD, {**vars(self.record), "format": FORMAT})

    def _instructions(self) -> list[str]:
        words = [words for table in self._tables for (words, *_) in table.column("tasks").to_pylist()]
        return list(dict.fromkeys(words))

    def _objects(self) -> set[str]:
        names = self.record.features.get(lerobot.OBJECTS, {}).get("names") or []
        return {name.removesuffix(".x") for name in names[::7]}

    def _write(self, files: Mapping[str, bytes]) -> dict[str, str]:
        for name, content in files.items():
            with atomic_file(self.root / name) as temporary:
                temporary.write_bytes(content)
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@contextlib.contextmanager
def writing(
    root: Path, suite: Suite, name: str, protocol: Protocol, seed: int, on_wait: Callable[[], None] | None = None
) -> Iterator[Writer]:
    """The dataset of suite `name` at `root`, made if it is not there, for one writer at a time (see `sole_writer`).

    A damaged batch and all that follow it are dropped, so that they are made again; so is what an interrupted command
    left. A dataset of another protocol, seed or expert is never touched. `suite` may be a group that `name` is in.
    """
    with sole_writer(root, on_wait):
        with explained(root):
            fresh = not any(path.is_file() for path in root.rglob("*"))
        if not fresh and not (root / RECORD).is_file():
            raise BenchError(f"{root}: holds files, and no {RECORD}: not demonstrations of ours; use another folder")
        if fresh:
            record = _new_record(suite, name, protocol, seed)
        else:
            record = read_record(root)
            _check_same(root, record, suite, name, protocol, seed)
        intact = _intact_batches(root, record)
        writer = Writer(root, record, suite, [_episodes(root, batch) for batch in record.batches[:intact]])
        current = intact == len(record.batches) and all(
            _matches(root / file, digest) for file, digest in record.meta.items()
        )
        del record.batches[intact:]
        if fresh or not current:
            if not record.batches:
                record.meta.clear()
            writer.write_meta()
        _remove_strays(root, record)
        yield writer


def _new_record(suite: Suite, name: str, protocol: Protocol, seed: int) -> Record:
    objects = suite.object_names(name) if protocol.observation == "state" else ()
    features = lerobot.features(suite, protocol, objects)
    return Record(name, protocol.hash, protocol.label, seed, _expert_version(suite, name), features)


def _expert_version(suite: Suite, name: str) -> int:
    """Of the concrete suite `name`: a group's members need not share one."""
    return (suite if suite.name == name else registry.get("suite", name)).expert_version


def _check_same(root: Path, record: Record, suite: Suite, name: str, protocol: Protocol, seed: int) -> None:
    check_record(root, record, Task(name, "", ""), protocol)
    for what, was, now in (
        ("seed", record.seed, seed),
        ("expert version", record.expert_version, _expert_version(suite, name)),
    ):
        if was != now:
            raise BenchError(f"{root}: made with {what} {was}, not {now}; delete it or use another folder")


def _intact_batches(root: Path, record: Record) -> int:
    """How many batches, from the first on, have all their files as they were written."""
    for number, batch in enumerate(record.batches):
        if not all(_matches(root / name, digest) for name, digest in batch["files"].items()):
            return number
    return len(record.batches)


def _matches(path: Path, digest: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def _episodes(root: Path, batch: Mapping[str, Any]) -> pa.Table:
    (name,) = (name for name in batch["files"] if name.startswith("meta/episodes"))
    return read_table((root / name).read_bytes())


def _remove_strays(root: Path, record: Record) -> None:
    """Removes the files that no batch has, so that lerobot, which reads all that it finds, does not see them."""
    known = {*record.hashes, RECORD}
    with explained(root):
        for path in (path for folder in ("data", "videos", "meta") for path in (root / folder).rglob("*")):
            if path.is_file() and str(path.relative_to(root)) not in known:
                path.unlink()
