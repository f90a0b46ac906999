"""What becomes of a sweep's cells: their states on disk, many of them run on an executor. One: `sweep_cell.py`.

Everything is a file of the sweep's folder, and nothing of it is a pickle:

    cells/NAME.json           the run that the cell is
    attempts/NAME.0001.json   who runs or ran it, and how that ended (attempts.py)
    logs/NAME.0001.log        what it printed
    runs/NAME/                the run folder, as `vlarl-bench run` leaves it
    submissions/TOKEN.json    one SLURM array: its job and the cells of its indices
    slurm/                    its batch script, and what the scheduler printed
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import attempts, registry
from .attempts import Attempt
from .config import settings_before
from .files import explained
from .provenance import cores
from .sealed import read_sealed, write_sealed
from .sweep import Cell, Sweep
from .sweep_cell import beating, begun
from .sweep_slurm import COMMAND, ask, queued

if TYPE_CHECKING:
    from .config import RunConfig

Word = Literal["done", "running", "queued", "failed", "interrupted", "missing", "impossible"]
TO_RUN: tuple[Word, ...] = ("missing", "interrupted")


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
    """Cell -> the run of one of the sweep's packs (PACK/NAME) that it is: the same experiment and seed, whatever its
    name. None is one from a prior that no longer ships."""
    packs = [pack for name in sweep.file.packed if (pack := sweep.path.parent / name).exists()]
    if not packs:
        return {}
    from .report.pack import read_pack
    from .report.runs import PLACE_AND_SPEED, UNREAD

    unread = {row.algorithm: UNREAD[registry.get("algorithm", row.algorithm).learns_from] for row in sweep.rows}

    def decides(config: Mapping[str, Any]) -> str:
        kept = {name: value for name, value in config.items() if name not in PLACE_AND_SPEED or name == "seed"}
        kept["budget"] = {k: v for k, v in config["budget"].items() if k not in unread.get(config["algorithm"], ())}
        kept["settings"] = settings_before(config["algorithm"]) | kept["settings"]
        return json.dumps(kept, sort_keys=True)

    def from_here(config: RunConfig, checkpoint: str) -> bool:
        return config.base != "prior" or checkpoint == _prior(config.policy, config.suite)

    runs: dict[str, list[tuple[Path, str]]] = {}
    for pack in packs:
        for entry in read_pack(pack):
            runs.setdefault(decides(entry.config), []).append((pack / entry.name, entry.manifest["base_checkpoint"]))
    found = [(cell, *run) for cell in sweep.cells for run in runs.get(decides(cell.config.to_dict()), ())]
    return {cell.name: run for cell, run, checkpoint in found if from_here(cell.config, checkpoint)}


@functools.cache
def _prior(policy: str, suite: str) -> str:
    """Hash of the prior that ships with a policy for a suite."""
    from .policies.store import content_hash

    spec = registry.get("policy", policy)
    folder = spec.prior_folder(registry.get("suite", suite).benchmark)
    return "" if folder is None else content_hash(spec.load(folder))


def _state(sweep: Sweep, cell: Cell, path: Path | None, now: float) -> State:
    if path is not None:
        attempt = attempts.read_attempt(path)
        if attempt.outcome == "failed":
            return State("failed", attempt, attempt.error)
        if attempt.outcome == "done" and (sweep.out / "runs" / cell.name / "table.md").is_file():
            return State("done", attempt)
        if not attempt.outcome and attempts.is_alive(path, attempt, now):
            return State("running", attempt, attempts.where(attempt))
        if attempt.outcome == "done":
            return State("missing", attempt, "it was done, and its folder is gone")
        return State("interrupted", attempt, attempt.error or f"{attempts.where(attempt)} is gone")
    return State("impossible", None, cell.row.impossible) if cell.row.impossible else State("missing")


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
            with beating(claim):
                run(config, begun(config), tracker=sweep.file.tracker, base_from=str(Path(config.out).parent))
        except KeyboardInterrupt:
            claim.end("interrupted", "stopped by Ctrl-C")
            raise
        except BaseException as error:
            claim.end("failed", " ".join(f"{type(error).__name__}: {error}".split())[:500])
            raise
        claim.end("done")


def crowded(cells: Sequence[Cell], parallel: int) -> str:
    """What to change where so many cells at a time want more cores than there are; empty where they do not. A learner's
    threads wait for one another at every step, so one that has no core of its own stops the others."""
    at_once, have = min(parallel, len(cells)), cores()
    each = max((max(c.config.workers, c.config.threads) * c.row.resources.processes for c in cells), default=0)
    if at_once < 2 or at_once * each <= have:
        return ""
    fits = max(1, have // at_once)
    return (
        f"{at_once} cells at a time keep {at_once * each} cores busy, and this machine has {have}: learners wait for "
        f"each other; set run.workers and run.threads to {fits}, or parallel to {max(1, have // each)}"
    )


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
    return sorted(chosen, key=lambda item: sweep.file.seeds.index(item[0].seed))
