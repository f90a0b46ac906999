"""The commands of sweeps: `vlarl-bench sweep | tune | status | cancel`, and what executors start."""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BenchError
from .files import explained

if TYPE_CHECKING:
    from .options import Sweep, Tune
    from .sweep import Resources
    from .sweep import Sweep as Cells


def sweep(args: list[str]) -> int:
    """Runs what is missing, or prints the plan; the exit status is 1 if a cell has failed."""
    from .options import Sweep, parse
    from .sweep import plan_sweep, read_sweep
    from .sweep_jobs import read_states
    from .sweep_table import print_plan

    options = parse(Sweep, args, "vlarl-bench sweep")
    file, text = _file_of(options)
    found = read_sweep(file) if not text else plan_sweep(tomllib.loads(text), file)
    if options.dry_run:
        print_plan(found, read_states(found))
        return 0
    return _play(found, text, options)


def tune(args: list[str]) -> int:
    """Runs the trials that are missing, and prints all of them and the best of each; the exit status is 1 if one has
    failed."""
    from .config import BUDGETS
    from .files import write_text_atomic
    from .options import Tune, parse
    from .sweep import plan_sweep, read_sweep
    from .tune import report, trials

    default = Tune(numbers=dataclasses.replace(BUDGETS["quick"], eval_states=10, eval_repeats=3))
    options = parse(Tune, args, "vlarl-bench tune", default)
    if options.file:
        _check_alone(options, default, ("file", "executor", "retry_failed"))
        found, text = read_sweep(options.file), ""
        for axis in ("suites", "seeds"):
            named = list(getattr(found.file, axis))
            if len(named) > 1:
                raise BenchError(f"{options.file}: {axis}: {named}; all trials share one")
        for row in found.rows:
            if row.config.protocol != "tuning":
                raise BenchError(f"{options.file}: run.protocol: {row.config.protocol!r}; trials are under 'tuning'")
    else:
        if not options.algo:
            raise BenchError("algo: missing; name algorithms, or a file that `vlarl-bench tune` wrote")
        file = _beside(options.out)
        text = trials(options, file.parent)
        found, text = plan_sweep(tomllib.loads(text), file), _unless_there(file, text)
    status = _play(found, text, options)
    told = report(found)
    write_text_atomic(found.out / "trials.md", told)
    print(told)
    return status


def _play(found: Cells, text: str, options: Sweep | Tune) -> int:
    """Writes the sweep's file, if there is `text` for it, runs what is missing, and tells how the cells stand; 1 if one
    has failed."""
    from .files import write_text_atomic
    from .progress import Progress
    from .sweep_jobs import choose, count, crowded, prepare, read_states, run_here, run_local
    from .sweep_slurm import submit
    from .sweep_table import summary
    from .trackers import check_tracker

    states = read_states(found)
    if all(state.word == "impossible" for state in states):
        raise BenchError(f"{found.path}: no cell can run: {states[0].note}")
    check_tracker(found.file.tracker)
    if text:
        write_text_atomic(found.path, text)
        print(f"wrote {found.path}")
    chosen = choose(found, states, options.retry_failed)
    for cell, _ in chosen:
        check_executor(options.executor, cell.row.resources)
    prepare(found, [cell for cell, _ in chosen])
    if chosen and options.executor == "slurm":
        for job in submit(found, chosen):
            print(f"submitted job {job}")
    elif chosen:
        if options.executor == "local":
            parallel = found.file.parallel or 1
            with Progress() as progress:
                if told := crowded([cell for cell, _ in chosen], parallel):
                    progress.say(told)
                run_local(found, chosen, parallel, progress.say)
        else:
            run_here(found, chosen)
    states = read_states(found)
    print(summary(states))
    for cell, state in zip(found.cells, states, strict=True):
        if state.word == "failed":
            log = f"; log: {found.out / state.attempt.log}" if state.attempt and state.attempt.log else ""
            print(f"failed: {cell.name}: {state.note}{log}")
    return 1 if "failed" in count(states) else 0


def _file_of(options: Sweep) -> tuple[Path, str]:
    """The sweep file, and what to write into it first: what other options stand for, unless it is there already."""
    from .options import Sweep

    if options.file:
        _check_alone(options, Sweep(), ("file", "executor", "dry_run", "retry_failed"))
        return Path(options.file), ""
    for name in ("algo", "suite", "out"):
        if not getattr(options, name):
            raise BenchError(f"{name}: missing; name a sweep file, or give --algo, --suite and --out in its place")
    axes = {"algorithms": options.algo, "policies": options.policy, "suites": options.suite, "seeds": options.seeds}
    # JSON's texts, numbers and lists are TOML's, too.
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in {**axes, "budget": options.budget}.items())
    file = _beside(options.out)
    return file, _unless_there(file, text)


def _check_alone(options: Any, default: Any, beside: tuple[str, ...]) -> None:
    """Raises BenchError where options that stand in for a sweep file are given beside one."""
    for field in dataclasses.fields(options):
        if field.name not in beside and getattr(options, field.name) != getattr(default, field.name):
            raise BenchError(f"{field.name}: only without a sweep file; write it into {options.file}")


def _beside(out: str) -> Path:
    """The file of the sweep whose folder is `out`."""
    return Path(f"{out.rstrip('/')}.toml")


def _unless_there(file: Path, text: str) -> str:
    """What to write into a sweep file: nothing if it says the same already. Raises BenchError if it says something
    else."""
    with explained(file):
        if file.exists() and file.read_bytes() != text.encode():
            raise BenchError(f"out: {file} says something else than these options; name that file, or choose another")
        return "" if file.exists() else text


def check_executor(executor: str, resources: Resources) -> None:
    """Raises BenchError where an executor cannot give a cell what it asks for."""
    if resources.nodes > 1 and executor != "slurm":
        raise BenchError(f"resources.nodes: {resources.nodes}; more than one need --executor slurm")
    if resources.processes > 1 and executor == "debug":
        raise BenchError(f"resources.processes: {resources.processes}; --executor debug runs cells in its own process")


def status(args: list[str]) -> int:
    """Prints the plan, or shows it live in a terminal."""
    from .options import Status, parse
    from .sweep import read_sweep
    from .sweep_jobs import read_states
    from .sweep_table import print_plan, watch

    options = parse(Status, args, "vlarl-bench status")
    found = read_sweep(options.file)
    if options.once or not sys.stdout.isatty():
        print_plan(found, read_states(found))
    else:
        watch(found)
    return 0


def cancel(args: list[str]) -> int:
    """Stops a sweep, and prints what that stopped."""
    from .options import Cancel, parse
    from .sweep import read_sweep
    from .sweep_jobs import cancel as stop

    found = read_sweep(parse(Cancel, args, "vlarl-bench cancel").file)
    print("\n".join(stop(found)) or "nothing runs or waits")
    return 0


def sweep_cell(args: list[str]) -> int:
    """What an executor starts: one cell by its name, or that of a SLURM array's index."""
    from .sweep_cell import run_cell
    from .sweep_slurm import submitted_cell

    match args:
        case [out, token]:
            return run_cell(Path(out), *submitted_cell(Path(out), token))
        case [out, name, seen] if seen.isdigit():
            return run_cell(Path(out), name, int(seen))
    raise BenchError("sweep-cell: only `vlarl-bench sweep` calls this")
