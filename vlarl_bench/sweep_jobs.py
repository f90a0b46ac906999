"""What becomes of a sweep's cells: their states on disk, one cell run under a claim, many of them on an executor.

Everything is a file of the sweep's folder, and nothing of it is a pickle:

    cells/NAME.json           the run that the cell is
    attempts/NAME.0001.json   who runs or ran it, and how that ended (attempts.py)
    logs/NAME.0001.log        what it printed
    runs/NAME/                the run folder, as `vlarl-bench run` leaves it
    submissions/TOKEN.json    one SLURM array: its job and the cells of its indices
    slurm/                    its batch script, and what the scheduler printed
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import attempts
from .attempts import BEAT, Attempt, Claim
from .config import RunConfig
from .errors import BenchError
from .files import explained
from .sealed import read_sealed, write_sealed
from .sweep import Cell, Sweep
from .sweep_slurm import COMMAND, across, ask, job_here, queued

Word = Literal["done", "running", "queued", "failed", "interrupted", "missing", "impossible"]
TO_RUN: tuple[Word, ...] = ("missing", "interrupted")
INTERRUPTED = 75
"""Exit status of a cell that was stopped and can go on (EX_TEMPFAIL)."""
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class State:
    """What is known of one cell."""

    word: Word
    attempt: Attempt | None = None
    note: str = ""
    """Who runs it, why it failed, or why it cannot run."""
    job: str = ""
    """The SLURM job, with its index, that a queued cell waits for."""

    @property
    def seen(self) -> int:
        """Number of the newest attempt; 0 if there is none."""
        return self.attempt.number if self.attempt else 0


def read_states(sweep: Sweep) -> list[State]:
    """The state of each cell, in order, from the files on disk and the scheduler's queue."""
    folder = sweep.out / "attempts"
    newest = attempts.newest(folder)
    now = attempts.file_clock(folder) if folder.is_dir() and os.access(folder, os.W_OK) else time.time()
    packed = packed_runs(sweep)
    found = [
        State("done", note="packed") if cell.name in packed else _state(sweep, cell, newest.get(cell.name), now)
        for cell in sweep.cells
    ]
    open_cells = {cell.name for cell, state in zip(sweep.cells, found, strict=True) if state.word in TO_RUN}
    waiting = queued(sweep.out, open_cells)
    return [
        State("queued", state.attempt, job=waiting[cell.name])
        if state.word in TO_RUN and cell.name in waiting
        else state
        for cell, state in zip(sweep.cells, found, strict=True)
    ]


def packed_runs(sweep: Sweep) -> dict[str, Path]:
    """Cell -> the run of the sweep's pack (PACK/NAME) that it is: the same experiment and seed, whatever its name."""
    pack = sweep.path.parent / sweep.file.packed
    if not sweep.file.packed or not pack.exists():
        return {}
    from .report.pack import read_pack
    from .report.runs import PLACE_AND_SPEED

    def decides(config: Mapping[str, Any]) -> str:
        kept = {name: value for name, value in config.items() if name not in PLACE_AND_SPEED or name == "seed"}
        return json.dumps(kept, sort_keys=True)

    runs = {decides(entry.config): pack / entry.name for entry in read_pack(pack)}
    return {cell.name: runs[key] for cell in sweep.cells if (key := decides(cell.config.to_dict())) in runs}


def _state(sweep: Sweep, cell: Cell, path: Path | None, now: float) -> State:
    if path is not None:
        attempt = attempts.read_attempt(path)
        if attempt.outcome == "failed":
            return State("failed", attempt, attempt.error)
        if attempt.outcome == "done" and (sweep.out / "runs" / cell.name / "table.md").is_file():
            return State("done", attempt)
        if not attempt.outcome and attempts.is_alive(path, attempt, now):
            return State("running", attempt, attempts.where(attempt))
        if attempt.outcome != "done":
            return State("interrupted", attempt, attempt.error or f"{attempts.where(attempt)} is gone")
    return State("impossible", None, cell.row.impossible) if cell.row.impossible else State("missing")


# ---- one cell


def prepare(sweep: Sweep, cells: Iterable[Cell]) -> None:
    """Writes down the runs of cells, so that whoever runs one needs nothing but its name."""
    for folder in ("cells", "attempts", "logs", "runs"):
        with explained(sweep.out / folder):
            (sweep.out / folder).mkdir(parents=True, exist_ok=True)

    def write(cell: Cell) -> None:
        resources = cell.row.resources
        spread = {"nodes": resources.nodes, "processes": resources.processes}
        content = {"cell": cell.name, "config": cell.config.to_dict(), "tracker": sweep.file.tracker, **spread}
        path = sweep.out / "cells" / f"{cell.name}.json"
        if not path.exists() or read_sealed(path) != content:
            write_sealed(path, content)

    with ThreadPoolExecutor(32) as pool:  # each waits for the disk, which serves many at once
        list(pool.map(write, cells))


def run_cell(out: Path, name: str, seen: int) -> int:
    """Runs one cell in a process of its own, or continues it, and keeps its claim alive meanwhile.

    Returns 0 if it is done or another process's, 1 if it failed, 75 if it was stopped and can go on.
    """
    signals = _listen()
    config, tracker, nodes, processes = _read_cell(out, name)
    claim = attempts.take(out / "attempts", name, seen, job=job_here())
    if isinstance(claim, str):
        print(f"{name}: left alone: {claim}")
        return 0
    try:
        arguments = _arguments(config, tracker)
        if nodes == 1:
            command = [*COMMAND, *arguments, *(["--processes", str(processes)] if processes > 1 else [])]
        else:
            command = across(nodes, processes, arguments)
        before = _progress(Path(config.out))
        status, asked = _supervise(claim, command, out / claim.attempt.log, signals)
    except BenchError as error:
        claim.end("failed", str(error))
        print(f"{name}: {error}")
        return 1
    if asked == signal.SIGUSR2 and _progress(Path(config.out)) == before:
        claim.end("failed", "the job's time limit came before anything was done; raise resources.minutes")
        return 1
    if status == 0:
        claim.end("done")
        return 0
    if asked or status in (130, -signal.SIGTERM, -signal.SIGINT):
        claim.end("interrupted", f"stopped by {signal.Signals(asked or signal.SIGTERM).name}")
        if asked == signal.SIGUSR2:
            try:
                ask(["scontrol", "requeue", job_here()])
            except BenchError as error:
                print(f"{name}: {error}; it stays interrupted, and `vlarl-bench sweep` goes on with it")
        return INTERRUPTED
    claim.end("failed", _last_error(out / claim.attempt.log, status))
    print(f"{name}: failed: {claim.attempt.error}; see {out / claim.attempt.log}")
    return 1


def _listen() -> int:
    """From here on each of `_SIGNALS` is a byte in a pipe, which is returned to be read: none is lost, nothing polls.

    Not by `signal.sigtimedwait`: that of CPython 3.11 tells a signal which never came, after a pause that outlasts its
    time (SIGSTOP, `scontrol suspend`)."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    return reader


def _supervise(claim: Claim, command: Sequence[str], log: Path, signals: int) -> tuple[int, int]:
    """Runs a command to its end; returns its exit status, and the signal that asked this process to stop it (0: none).
    `signals` is what `_listen` returned."""
    parent, watcher = os.getpid(), os.getppid()

    def in_child() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive the holder of its claim
        if os.getppid() != parent:
            os._exit(1)

    with explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    asked = 0
    with output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=in_child if sys.platform == "linux" else None,
        )
        while child.poll() is None:
            got = _next_signal(signals, BEAT)
            lost = got is None and (not claim.beat() or os.getppid() != watcher)
            if lost or got not in (None, signal.SIGCHLD):
                asked = got or signal.SIGTERM
                child.terminate()
                try:
                    child.wait(3)
                except subprocess.TimeoutExpired:
                    child.kill()
    return child.wait(), asked


def _next_signal(signals: int, seconds: float) -> int | None:
    """The next one, None if none comes within so many seconds."""
    came, _, _ = select.select([signals], [], [], seconds)
    return os.read(signals, 1)[0] if came else None


@contextmanager
def _beating(claim: Claim) -> Iterator[None]:
    """Keeps a claim alive from a thread."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            claim.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _read_cell(out: Path, name: str) -> tuple[RunConfig, str, int, int]:
    """A cell's run, its tracker, and on how many nodes how many processes each share it."""
    path = out / "cells" / f"{name}.json"
    content = read_sealed(path)
    if content.get("cell") != name:
        raise BenchError(f"{path}: it holds the cell {content.get('cell')!r}; run the sweep's command again")
    config = RunConfig.from_dict(content["config"])
    return config, str(content["tracker"]), int(content["nodes"]), int(content["processes"])


def _arguments(config: RunConfig, tracker: str) -> list[str]:
    """The command that starts a cell's run or, if it had begun, continues it."""
    from .options import to_arguments

    start = ["run", "--resume", config.out] if _begun(config) else to_arguments(config)
    return [*start, *(["--tracker", tracker] if tracker else [])]


def _begun(config: RunConfig) -> bool:
    """Whether there is something of a cell's run to continue; remains of which nothing counts are removed. Raises
    BenchError if what is there is another run."""
    run = Path(config.out)
    if not (run / "manifest.json").exists():
        with explained(run):
            if run.exists():
                shutil.rmtree(run)
        return False
    stored, wanted = read_sealed(run / "config.json", older=True), config.to_dict()
    for field in wanted:
        if field not in ("out", "workers") and stored.get(field) != wanted[field]:
            raise BenchError(
                f"{run / 'config.json'}: {field} is {stored.get(field)!r}, but the sweep's cell has {wanted[field]!r}; "
                "restore the file, or remove the run folder to begin again"
            )
    _wait_until_free(run / "episodes.jsonl")
    return True


def _wait_until_free(rows: Path) -> None:
    """A run that was killed with its supervisor may take a moment to die, and holds its rows until then."""
    for _ in range(50):
        try:
            with rows.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.2)


def _progress(run: Path) -> tuple[int, int]:
    """Grows as a run goes on: its checkpoints and the bytes of its rows."""
    rounds = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]
    rows = run / "episodes.jsonl"
    return max(rounds, default=-1), rows.stat().st_size if rows.exists() else 0


def _last_error(log: Path, status: int) -> str:
    """The last line of a log that tells what went wrong."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"the run was killed by {name}{': out of memory?' if name == 'SIGKILL' else ''}"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("vlarl-bench: error:")]
    return (errors or lines or [f"exit status {status}"])[-1][:500]


# ---- executors


def run_here(sweep: Sweep, cells: Sequence[tuple[Cell, int]]) -> None:
    """Executor `debug`: one cell after another in this process, output on the terminal; the first error ends it."""
    from .run import run

    for cell, seen in cells:
        config = cell.config
        claim = attempts.take(sweep.out / "attempts", cell.name, seen, log=False)
        if isinstance(claim, str):
            print(f"{cell.name}: left alone: {claim}")
            continue
        try:
            with _beating(claim):
                run(config, resume=_begun(config), tracker=sweep.file.tracker)
        except KeyboardInterrupt:
            claim.end("interrupted", "stopped by Ctrl-C")
            raise
        except BaseException as error:
            claim.end("failed", " ".join(f"{type(error).__name__}: {error}".split())[:500])
            raise
        claim.end("done")


def run_local(sweep: Sweep, cells: Sequence[tuple[Cell, int]], parallel: int, say: Any) -> None:
    """Executor `local`: processes of this machine, `parallel` at a time, each told of by `say` as it begins and ends.
    Ctrl-C stops them all; so does `vlarl-bench cancel`."""
    running: set[subprocess.Popen[bytes]] = set()
    stop = threading.Event()
    token = _cancel_token(sweep.out)

    def work(cell: Cell, seen: int) -> None:
        if stop.is_set() or _cancel_token(sweep.out) != token:
            return
        say(f"{cell.name}: begins")
        command = [*COMMAND, "sweep-cell", str(sweep.out), cell.name, str(seen)]
        # In a group of its own, so that Ctrl-C in the terminal reaches it only through this process.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        running.add(process)
        if stop.is_set():  # since the look above; whoever stops the others may have missed this one
            process.terminate()
        process.wait()
        running.discard(process)
        path = attempts.newest_of(sweep.out / "attempts", cell.name)
        say(f"{cell.name}: {_outcome(path)}")

    with ThreadPoolExecutor(parallel) as pool:
        jobs = [pool.submit(work, cell, seen) for cell, seen in cells]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            stop.set()
            for process in list(running):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _outcome(path: Path | None) -> str:
    if path is None:
        return "did not begin"
    attempt = attempts.read_attempt(path)
    return f"{attempt.outcome or 'running elsewhere'}{f': {attempt.error}' if attempt.error else ''}"


# ---- cancelling


def cancel(sweep: Sweep) -> list[str]:
    """Takes cells out of the queue and stops those that run; each goes on later from its checkpoint. Returns what was
    done, a line each."""
    write_sealed(sweep.out / "cancelled.json", {"token": secrets.token_hex(8)})
    states = read_states(sweep)
    told, jobs = [], []
    for cell, state in zip(sweep.cells, states, strict=True):
        if state.word == "queued":
            jobs.append(state.job)
            told.append(f"{cell.name}: taken out of the queue")
        elif state.word == "running" and state.attempt is not None:
            told.append(f"{cell.name}: {_stop(state.attempt, jobs)}")
    for start in range(0, len(jobs), 500):
        ask(["scancel", *jobs[start : start + 500]])
    return told


def _stop(attempt: Attempt, jobs: list[str]) -> str:
    if attempt.job:
        jobs.append(attempt.job)
        return "stopped"
    if not attempts.is_here(attempt):
        return f"runs elsewhere; stop it there: {attempts.where(attempt)}"
    with suppress(ProcessLookupError):
        os.kill(attempt.pid, signal.SIGTERM)
    return "stopped"


def _cancel_token(out: Path) -> str:
    path = out / "cancelled.json"
    return str(read_sealed(path)["token"]) if path.exists() else ""


# ---- what it costs


def estimate(cells: Sequence[Cell], states: Sequence[State]) -> dict[str, float]:
    """Cell -> seconds that it should take, for cells that are to run: the mean of finished cells like it (algorithm,
    policy and suite; else algorithm and policy; else algorithm). Cells without any finished one like them are left
    out."""
    spent: dict[tuple[str, ...], list[float]] = {}
    for cell, state in zip(cells, states, strict=True):
        if state.word == "done" and state.attempt is not None:
            for likeness in _likeness(cell):
                spent.setdefault(likeness, []).append(state.attempt.seconds)
    found = {}
    for cell, state in zip(cells, states, strict=True):
        if state.word in (*TO_RUN, "queued"):
            like = next((spent[likeness] for likeness in _likeness(cell) if likeness in spent), None)
            if like is not None:
                found[cell.name] = sum(like) / len(like)
    return found


def _likeness(cell: Cell) -> list[tuple[str, ...]]:
    row = cell.row
    return [(row.algorithm, row.policy, row.suite), (row.algorithm, row.policy), (row.algorithm,)]


def count(states: Iterable[State]) -> Mapping[Word, int]:
    """How many cells are in each state."""
    counts: dict[Word, int] = {}
    for state in states:
        counts[state.word] = counts.get(state.word, 0) + 1
    return counts


def choose(sweep: Sweep, states: Sequence[State], retry_failed: bool) -> list[tuple[Cell, int]]:
    """The cells to run now, each with the newest attempt that is known of it: all of one seed before those of the
    next, so that a sweep which is cut short has played as much of each row."""
    wanted = (*TO_RUN, "failed") if retry_failed else TO_RUN
    chosen = [(cell, state.seen) for cell, state in zip(sweep.cells, states, strict=True) if state.word in wanted]
    return sorted(chosen, key=lambda item: item[0].row.seeds.index(item[0].seed))
