"""Attempts at the cells of a sweep: at once the claim that keeps two processes off one cell, and its history.

Each attempt is one file, `attempts/NAME.0001.json`. It appears whole and only once (a hard link, which fails where the
name is taken), so of any number of processes one gets the cell. Its modification time is its holder's heartbeat. When
it ends, its outcome is written into it; an attempt without outcome whose holder is dead was interrupted, and the next
one may begin.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .config import read
from .errors import BenchError
from .files import explained, fsync
from .sealed import read_sealed, write_sealed

BEAT = 15.0
"""Seconds between two heartbeats."""
EXPIRES = 180.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead. Network file systems may show
times that are a minute old."""

Outcome = Literal["", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a cell, as its file holds it."""

    cell: str
    number: int
    """From 1."""
    host: str
    space: str
    """Boot and process namespace: in which system the process id means something."""
    pid: int
    started: str
    """When that process began, in ticks since boot: ids are used again."""
    job: str
    """SLURM job, or empty."""
    begun: float
    """Seconds since 1970, by the file system's clock."""
    log: str
    """Its output, from the sweep's folder; empty where it went to the terminal."""
    outcome: Outcome = ""
    error: str = ""
    """The last line that tells why it did not end well."""
    seconds: float = 0.0
    """Wall time of this attempt and those before it."""

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.cell}.{self.number:04d}.json"


def newest(folder: Path) -> dict[str, Path]:
    """Cell -> the file of its newest attempt."""
    found: dict[str, Path] = {}
    if folder.is_dir():
        with explained(folder):
            names = sorted(entry.name for entry in os.scandir(folder))
        for name in names:
            match = re.fullmatch(r"(.+)\.\d{4,}\.json", name)
            if match and not name.startswith("."):
                found[match[1]] = folder / name
    return found


def read_attempt(path: Path) -> Attempt:
    """Reads one attempt's file. Raises BenchError naming it if it is damaged or belongs elsewhere."""
    attempt = Attempt(**read(Attempt, read_sealed(path), str(path)))
    if attempt.file != path.name:
        raise BenchError(f"{path}: it holds the attempt {attempt.file!r}; restore it from a copy or remove it")
    return attempt


def is_alive(path: Path, attempt: Attempt, now: float | None = None) -> bool:
    """Whether the holder of an attempt without outcome still lives. `now` is the file system's clock, if it was read.

    A holder in this system is looked up by its process id; of any other, the heartbeat tells.
    """
    if is_here(attempt):
        return _started(attempt.pid) == attempt.started
    try:
        beat = path.stat().st_mtime
    except FileNotFoundError:
        return False
    # A beat from the future is no sign of life, either: that clock was set back, and the living beat again.
    return abs((file_clock(path.parent) if now is None else now) - beat) < EXPIRES


def is_here(attempt: Attempt) -> bool:
    """Whether process ids mean the same to the attempt's holder and to this process."""
    return bool(attempt.started) and (attempt.host, attempt.space) == (socket.gethostname(), _space())


def file_clock(folder: Path) -> float:
    """What time it is where `folder` is stored: hosts' clocks differ, and jump."""
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}"
    with explained(folder):
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


class Claim:
    """An attempt that this process makes."""

    def __init__(self, folder: Path, attempt: Attempt) -> None:
        self.attempt = attempt
        self._folder, self._begun = folder, time.monotonic()
        self._earlier = attempt.seconds

    def beat(self) -> bool:
        """Shows that the holder lives; False if another took the cell, because this one seemed dead for too long."""
        path = self._folder / self.attempt.file
        following = dataclasses.replace(self.attempt, number=self.attempt.number + 1)
        try:
            if (self._folder / following.file).exists():
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError:  # a network folder that does not answer now may do so at the next beat
            return True
        return True

    def end(self, outcome: Outcome, error: str = "") -> Attempt:
        """Writes down how it ended. Raises BenchError if the folder is gone: it is not made anew elsewhere."""
        path = self._folder / self.attempt.file
        with explained(path):
            path.stat()
        seconds = self._earlier + time.monotonic() - self._begun
        self.attempt = dataclasses.replace(self.attempt, outcome=outcome, error=error, seconds=round(seconds, 3))
        write_sealed(path, dataclasses.asdict(self.attempt))
        return self.attempt


def take(folder: Path, cell: str, seen: int, log: bool = True, job: str = "") -> Claim | str:
    """Begins the next attempt at a cell, or says in a few words why there is none to make.

    folder is the sweep's `attempts`. seen is the newest attempt that whoever asked for this one knew (0: none): a
    cell that failed or was done later than that is left alone. A SLURM job that was queued again takes over from itself
    at once.
    """
    path = newest_of(folder, cell)
    number, seconds = 1, 0.0
    if path is not None:
        last = read_attempt(path)
        number, seconds = last.number + 1, last.seconds
        if last.outcome == "done" and last.number > seen:
            return "it is done"
        if last.outcome == "failed" and last.number > seen:
            return "it failed; --retry-failed tries again"
        if not last.outcome:
            if not (job and last.job == job) and is_alive(path, last):
                return f"it is running: {where(last)}"
            seconds += max(0.0, path.stat().st_mtime - last.begun)
    output = f"logs/{cell}.{number:04d}.log" if log else ""
    pid = os.getpid()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    begun = file_clock(folder)
    attempt = Attempt(
        cell=cell,
        number=number,
        host=socket.gethostname(),
        space=_space(),
        pid=pid,
        started=_started(pid),
        job=job,
        begun=begun,
        log=output,
        seconds=seconds,
    )
    temporary = folder / f".{cell}.{socket.gethostname()}.{pid}.tmp"
    with explained(folder):
        try:
            write_sealed(temporary, dataclasses.asdict(attempt))
            os.link(temporary, folder / attempt.file)
            fsync(folder)
        except FileExistsError:
            return "another process just took it"
        finally:
            temporary.unlink(missing_ok=True)
    return Claim(folder, attempt)


def newest_of(folder: Path, cell: str) -> Path | None:
    """The file of the newest attempt at one cell."""
    number = 0
    while (folder / f"{cell}.{number + 1:04d}.json").exists():
        number += 1
    return folder / f"{cell}.{number:04d}.json" if number else None


def where(attempt: Attempt) -> str:
    """Who holds an attempt."""
    return f"job {attempt.job} on {attempt.host}" if attempt.job else f"process {attempt.pid} on {attempt.host}"


@functools.cache
def _space() -> str:
    """Names the system that process ids belong to; empty where /proc does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since boot; empty if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
