"""Choosing settings: the same number of trials for every method, on one suite, on training states only.

A trial is a cell of a sweep under the protocol `tuning`, which learns from some training states and is judged on
others; the states that tables are made from are never seen. The first trial has the defaults (the sweep's `default`),
the others are ablations, drawn from the values that the method names (`Algorithm.search`). So trials share machines,
resume and are packed as all cells are, and failures stay among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import registry
from .errors import BenchError

if TYPE_CHECKING:
    from .options import Tune
    from .report.runs import RunFolder
    from .sweep import Row, Sweep

SUITE = "libero_object"
"""What trials are of unless a file says otherwise. Tasks of it are also compared on, from other initial states."""


def choices(algorithm: str, trials: int, seed: int) -> list[Any]:
    """Settings of each trial: the defaults, then distinct others, the same for the same arguments.

    Raises:
        BenchError: if the method names no values, or fewer combinations than trials.
    """
    method = registry.get("algorithm", algorithm)
    if not method.search:
        raise BenchError(f"algo: {algorithm!r} names no settings to search")
    default = method.Settings()
    names = tuple(method.search)
    grid = [
        dataclasses.replace(default, **dict(zip(names, v, strict=True)))
        for v in itertools.product(*method.search.values())
    ]
    others = [settings for settings in grid if settings != default]
    if not 1 <= trials <= len(others) + 1:
        raise BenchError(f"trials: {trials}; {algorithm!r} has {len(others) + 1} combinations of {', '.join(names)}")
    order = np.random.default_rng(seed).permutation(len(others))
    return [default, *(others[i] for i in order[: trials - 1])]


def trials(asked: Tune, folder: Path) -> str:
    """The sweep file, to lie in `folder`, whose cells are the trials that are asked for."""
    base = asked.base if asked.base in ("prior", "scratch") else os.path.relpath(asked.base, folder)
    options: dict[str, int | str] = {"workers": asked.workers, "threads": asked.threads}
    options |= {"device": asked.device} if asked.device != "cpu" else {}  # as files of before it could be chosen
    lines = [
        f"# {asked.trials} trials of each method. Written by `vlarl-bench tune`, which goes on with it.",
        *(f"{axis} = {json.dumps(names)}" for axis, names in (("algorithms", asked.algo), ("policies", asked.policy))),
        f"suites = {json.dumps([asked.suite])}",
        f"seeds = [{asked.seed}]",
        f"budget = {_table(dataclasses.asdict(asked.numbers))}",
        f"run = {_table({'protocol': 'tuning', 'base': base, **options})}",
        f"parallel = {asked.parallel}",
    ]
    for algorithm in asked.algo:
        for number, settings in enumerate(choices(algorithm, asked.trials, asked.seed)):
            values = {name: getattr(settings, name) for name in registry.get("algorithm", algorithm).search}
            if number:
                head = [f"[ablations.{json.dumps(f'{algorithm} {number}')}]", f"algorithms = {json.dumps([algorithm])}"]
                lines += ["", *head, f"settings = {_table(values)}"]
            else:  # written out, so that the file means the same when defaults become others
                lines += ["", f"[settings.{algorithm}]", *(f"{name} = {json.dumps(v)}" for name, v in values.items())]
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    return f"{{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in values.items())} }}"


def report(sweep: Sweep) -> str:
    """Markdown: for every method and policy a table of its trials, from their rows, and as a sweep file has them the
    settings of the best: most held-back successes, and of equals the earliest."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sweep.rows:
        if not row.impossible:
            groups.setdefault((row.algorithm, row.policy), []).append(row)
    runs = _runs(sweep)
    parts = [_table_of(name, policy, rows, runs) for (name, policy), rows in groups.items()]
    first = sweep.rows[0]
    return "\n".join([
        f"Trials on {first.suite}, protocol `{first.config.protocol}`, seed {first.seeds[0]}, by "
        f"`vlarl-bench tune {sweep.path.name}`. What is not done yet has no numbers.",
        "",
        *parts,
    ])  # fmt: skip


def _runs(sweep: Sweep) -> dict[int, RunFolder]:
    """Row's id -> its finished run, of the sweep's folder or its pack."""
    from .report.runs import read_all, read_run
    from .sweep_jobs import packed_runs, read_states

    packed = packed_runs(sweep)
    found = {}
    for cell, state in zip(sweep.cells, read_states(sweep), strict=True):
        if state.word == "done":
            folder = sweep.out / "runs" / cell.name
            (run,) = read_all([packed[cell.name]]) if cell.name in packed else [read_run(folder)]
            found[id(cell.row)] = run
    return found


def _table_of(name: str, policy: str, rows: Sequence[Row], runs: Mapping[int, RunFolder]) -> str:
    names = _varied(name, rows)
    lines, scores = [], []
    for number, row in enumerate(rows):
        values = [_shown(getattr(row.config.settings, setting)) for setting in names]
        found = runs.get(id(row))
        scores.append(-1 if found is None else int(found.evaluated.column("success").sum()))
        seen = ["", "", "", "", ""] if found is None else _outcome(found)
        lines.append("| " + " | ".join((str(number), *values, *seen)) + " |")
    head = ("trial", *names, "before", "after", "gradient steps", "TFLOP", "")
    best = int(np.argmax(scores))
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, ""]
    if max(scores) >= 0:
        settings = rows[best].config.settings
        chosen = [f"{setting} = {json.dumps(getattr(settings, setting))}" for setting in names]
        text += [f"Best: trial {best}.", "", "```toml", f"[settings.{name}]", *chosen, "```", ""]
    return "\n".join([f"## {name} on {policy}", "", *text])


def _varied(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """Settings that the method searches, and whichever others these trials vary: a file may be edited."""
    searched = tuple(registry.get("algorithm", name).search)
    settings = [vars(row.config.settings) for row in rows]
    others = [key for key in settings[0] if key not in searched and any(s[key] != settings[0][key] for s in settings)]
    return (*searched, *others)


def _shown(value: Any) -> str:
    return f"{value:g}" if type(value) in (int, float) else str(value)


def _outcome(run: RunFolder) -> list[str]:
    before, after = (f"{int(rows.column('success').sum())}/{len(rows)}" for rows in (run.base, run.evaluated))
    spent = run.evaluated[0]
    remark = f"stopped in round {run.stopped['iteration']}" if run.stopped else ""
    return [before, after, f"{spent.gradient_steps}", f"{spent.flops / 1e12:.1f}", remark]
