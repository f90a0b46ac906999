"""What a run leaves behind: append-only logs that survive a crash. Standard library only; every other module reads and
writes them through this one."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import typing
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from .errors import BenchError
from .files import explained

Phase = Literal["base", "train", "final", "eval"]
Key = tuple[str, str, int, str, str, int, int, str]
STOPPED = "stopped.json"
"""In the folder of a run that was stopped because training had destroyed the policy: in which round, and why."""


@dataclass(frozen=True)
class EpisodeRow:
    """One episode. `return_` is written as `return`; the line on disk carries a crc of the rest besides."""

    run: str
    phase: Phase
    iteration: int
    """Updates done when the episode was played, 0 for the base policy; of a training episode its round, one more."""
    algorithm: str
    policy: str
    checkpoint: str
    """First 12 hex digits of the content hash of the policy that acted."""
    suite: str
    """Concrete suite, never a group."""
    task: str
    init_state: int
    repeat: int
    seed: int
    decoding: Literal["sampled", "zero-noise", "explore"]
    """`explore`: as the algorithm acts while collecting."""
    observation: Literal["state", "pixels"]
    success: bool
    steps: int
    """Environment steps, settle steps not counted."""
    return_: float
    protocol: str
    fingerprint: str
    code: str
    env_steps: int
    """Environment steps that the policy's training had taken when the episode was played ..."""
    gradient_steps: int
    """... optimiser steps, critics' among them ..."""
    flops: int
    """... and floating-point operations, of acting and of learning (`metering.Meter` says which count)."""

    @property
    def key(self) -> Key:
        """What makes a row unique."""
        place = (self.suite, self.task, self.init_state, self.repeat, self.decoding)
        return (self.run, self.phase, self.iteration, *place)

    def to_json(self) -> dict[str, Any]:
        """The row as it is written."""
        return {field.rstrip("_"): value for field, value in dataclasses.asdict(self).items()}

    def __post_init__(self) -> None:
        for name, (kind, allowed) in field_types().items():
            value = getattr(self, name)
            if type(value) is not kind or (allowed and value not in allowed):
                raise ValueError(f"{name.rstrip('_')} is {value!r}, expected {list(allowed) or kind.__name__}")

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "EpisodeRow":
        """Raises ValueError where a field is missing, unknown, of another type or not one of its values."""
        fields = _field_names()
        if record.keys() != fields.keys():
            raise ValueError(f"fields {sorted(record.keys() ^ fields.keys())} are missing or unknown")
        return cls(**{fields[name]: value for name, value in record.items()})


@functools.cache
def field_types() -> dict[str, tuple[type, tuple[str, ...]]]:
    """Field of a row -> its type and, for a Literal, the values it may have."""
    hints = typing.get_type_hints(EpisodeRow)
    return {name: (str, allowed) if (allowed := typing.get_args(hint)) else (hint, ()) for name, hint in hints.items()}


@functools.cache
def _field_names() -> dict[str, str]:
    """Name on disk -> field."""
    return {name.rstrip("_"): name for name in field_types()}


Record = TypeVar("Record")


class _Log(Generic[Record]):
    """Append-only JSON lines, each with the crc32 of its own content. One writer at a time (advisory lock)."""

    torn: int
    """Bytes of a last line without an end, which opening removed."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        encode: Callable[[Record], dict[str, Any]],
        decode: Callable[[dict[str, Any]], Record],
        key: Callable[[Record], Any],
        iteration: Callable[[Record], int],
    ) -> None:
        self.path = Path(path)
        self._encode, self._key, self._iteration = encode, key, iteration
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BenchError(f"{self.path}: another process is writing here; wait or use another folder") from None
            except OSError:
                pass  # Some network file systems have no locks; a run there is as safe as its user is careful.
            entries, self._size = _parse(self.path, decode)
            self._records: dict[Any, Record] = {}
            self._starts: dict[Any, int] = {}
            for number, start, record in entries:
                self._accept(record, start, f"{self.path}:{number}")
            with explained(self.path):
                self.torn = self._file.seek(0, os.SEEK_END) - self._size
                self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def _accept(self, record: Record, start: int, where: str) -> bool:
        key = self._key(record)
        if key in self._records:
            # Compared as written, so that values that JSON cannot tell apart count as equal.
            if log_line(self._encode(self._records[key])) != log_line(self._encode(record)):
                raise BenchError(f"{where}: {key} is already recorded with other content; one of the two is wrong")
            return False
        self._records[key] = record
        self._starts[key] = start
        return True

    def _append(self, records: Iterable[Record]) -> None:
        known, starts = dict(self._records), dict(self._starts)
        data = b""
        try:
            for record in records:
                if self._accept(record, self._size + len(data), str(self.path)):
                    data += log_line(self._encode(record))
            self._check_place()
            with explained(self.path):
                written = 0
                while written < len(data):
                    written += os.write(self._file.fileno(), data[written:])
                os.fsync(self._file.fileno())
        except BaseException:
            # A half-written batch would look like damage once more lines follow it.
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            self._records, self._starts = known, starts
            raise
        self._size += len(data)

    def _check_place(self) -> None:
        """Raises BenchError if the file is no longer where it was opened: what is written next would be elsewhere."""
        mine = os.fstat(self._file.fileno())
        try:
            there = self.path.stat()
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise BenchError(
                f"{self.path}: moved, removed or unmounted while the run went on; put the folder back, and continue "
                "with --resume"
            )

    def rewind(self, iteration: int) -> int:
        """Forgets every record later than `iteration`, and whatever follows the first of them.

        For resuming: what was logged after the last checkpoint belongs to updates that died with the process.
        Returns the number of records forgotten.
        """
        return self._cut(lambda record: self._iteration(record) > iteration)

    def _cut(self, unwanted: Callable[[Record], bool]) -> int:
        late = [self._starts[key] for key, record in self._records.items() if unwanted(record)]
        if not late:
            return 0
        cut = min(late)
        with explained(self.path):
            self._file.truncate(cut)
            os.fsync(self._file.fileno())
        forgotten = [key for key, start in self._starts.items() if start >= cut]
        for key in forgotten:
            del self._records[key], self._starts[key]
        self._size = cut
        return len(forgotten)

    def close(self) -> None:
        """Releases the file; appending afterwards is an error."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EpisodeLog(_Log[EpisodeRow]):
    """`episodes.jsonl`. Opening drops a last line torn by a crash; any other damage raises BenchError with its line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, EpisodeRow.to_json, EpisodeRow.from_json, lambda row: row.key, lambda row: row.iteration)

    @property
    def rows(self) -> tuple[EpisodeRow, ...]:
        """All rows, in the order of writing."""
        return tuple(self._records.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def append(self, row: EpisodeRow) -> None:
        """Writes one row and waits until it is on the disk."""
        self._append([row])

    def append_all(self, rows: Iterable[EpisodeRow]) -> None:
        """Writes rows with one wait for the disk, all or (on an error) none. A row already there is ignored; one
        with the same key and other content raises BenchError."""
        self._append(rows)

    def forget(self, phase: Phase) -> int:
        """Forgets the rows of a phase, and whatever follows the first of them; returns how many."""
        return self._cut(lambda row: row.phase == phase)


class MetricsLog(_Log[dict[str, Any]]):
    """`metrics.jsonl`: one dict an iteration, with `iteration` in it. NaN and infinities are written as null."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, _finite, _metrics, lambda line: line["iteration"], lambda line: line["iteration"])

    @property
    def lines(self) -> tuple[dict[str, Any], ...]:
        """All lines, in the order of writing."""
        return tuple(self._records.values())

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one iteration and waits until it is on the disk."""
        self._append([_metrics(dict(line))])


class LostLog(_Log[dict[str, Any]]):
    """`lost.jsonl`: one dict for each attempt at an episode that ended with its worker, numbered from 1.

    The episode was then played again and has its row like any other, so a loss never counts as a failure. The file is
    there only if there was a loss.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, dict, dict, lambda line: line["number"], lambda _: 0)

    @property
    def lines(self) -> tuple[dict[str, Any], ...]:
        """All losses, in the order of writing."""
        return tuple(self._records.values())

    def append(self, line: Mapping[str, Any]) -> int:
        """Writes one loss, waits until it is on the disk, and returns its number."""
        number = len(self._records) + 1
        self._append([{"number": number, **line}])
        return number


def read_rows(path: str | os.PathLike[str]) -> list[EpisodeRow]:
    """Rows for a report. Leaves the file alone: a run may be writing, so an unfinished last line is skipped
    (`is_torn` tells)."""
    rows: dict[Key, EpisodeRow] = {}
    for number, _, row in _parse(Path(path), EpisodeRow.from_json)[0]:
        if rows.setdefault(row.key, row) != row:
            raise BenchError(f"{path}:{number}: {row.key} is already recorded with other content; one of them is wrong")
    return list(rows.values())


def is_torn(path: str | os.PathLike[str]) -> bool:
    """Whether a log's last line has no end: its writer was killed, or is writing right now."""
    with explained(path), open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` for a report; leaves the file alone."""
    return [line for _, _, line in _parse(Path(path), _metrics)[0]]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def log_line(record: Mapping[str, Any]) -> bytes:
    """A record as a log has it: one canonical line with its crc."""
    return (_canonical({**record, "crc": f"{zlib.crc32(_canonical(record).encode()):08x}"}) + "\n").encode()


def _parse(path: Path, decode: Callable[[dict[str, Any]], Record]) -> tuple[list[tuple[int, int, Record]], int]:
    """(line number, byte offset, record) of every whole line, and the size in bytes of all of them."""
    with explained(path):
        data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    entries, start = [], 0
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            crc = record.pop("crc", "") if isinstance(record, dict) else ""
            if not crc or not (_has_crc(line) or log_line(record) == line + b"\n"):
                raise ValueError("its crc does not match")
            entries.append((number, start, decode(record)))
        except ValueError as error:
            raise BenchError(f"{path}:{number}: damaged line ({error}); restore the file from a copy") from None
        start += len(line) + 1
    return entries, len(whole)


def _has_crc(line: bytes) -> bool:
    """Whether a line is what its crc says. False also where it ends with its crc: that is found by writing it again."""
    head, _, tail = line.partition(b'"crc":"')
    return tail[8:10] == b'",' and f"{zlib.crc32(head + tail[10:]):08x}".encode() == tail[:8]


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _metrics(line: dict[str, Any]) -> dict[str, Any]:
    if type(line.get("iteration")) is not int:
        raise ValueError("iteration is missing or not an integer")
    return line
