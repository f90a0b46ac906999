"""One cell of a sweep in a process of its own: run under a claim, stopped and continued as its executor asks."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import attempts
from .attempts import BEAT, Claim
from .config import RunConfig, settings_before
from .errors import BenchError
from .files import explained
from .sealed import read_sealed
from .sweep_slurm import COMMAND, across, ask, job_here
from .workers import end_with

INTERRUPTED = 75
"""Exit status of a cell that was stopped and can go on (EX_TEMPFAIL)."""
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


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
    holder, watcher = os.getpid(), os.getppid()
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
            preexec_fn=lambda: end_with(holder),  # it must not outlive the holder of its claim
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
def beating(claim: Claim) -> Iterator[None]:
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

    shared = ["--base-from", str(Path(config.out).parent)]
    start = ["run", "--resume", config.out] if begun(config) else [*to_arguments(config), *shared]
    return [*start, *(["--tracker", tracker] if tracker else [])]


def begun(config: RunConfig) -> bool:
    """Whether there is something of a cell's run to continue; remains of which nothing counts are removed. Raises
    BenchError if what is there is another run."""
    run = Path(config.out)
    if not (run / "manifest.json").exists():
        with explained(run):
            if run.exists():
                shutil.rmtree(run)
        return False
    stored, wanted = read_sealed(run / "config.json", older=True), config.to_dict()
    if isinstance(stored.get("settings"), dict):
        stored["settings"] = settings_before(config.algorithm) | stored["settings"]
    for field in wanted:
        if field not in ("out", "workers", "device") and stored.get(field) != wanted[field]:
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
