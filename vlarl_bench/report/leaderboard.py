"""The leaderboard: one HTML page, from rows and nothing else, that loads nothing from elsewhere."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text_atomic
from ..protocol import TUNING
from .comparisons import best, change
from .lint import lint_methods, lint_published, lint_run
from .method_pages import link, method_pages
from .methods import Method, base_of, cell, compared_methods, noiseless_of, planned_tasks, suites_of, untrained
from .metrics import machine_of, wall_time_curve
from .paper import SEPARATED, budget_text
from .published import Published
from .runs import RunFolder, training_curve
from .spans import spans
from .table import noiseless_text

MOST_EPISODES = 200_000
"""Beyond so many scored episodes the page leaves out single ones, to stay below 2 MB."""

NOTES = (
    "Scores: mean success rate over seeds and tasks. 95% intervals resample training seeds (Student's t); with one "
    "seed they resample episodes (Wilson) and say nothing of other training runs. Tasks and initial states are taken "
    "as they are.",
    "Against its base: on the same held-out initial states, repeats and noise; over several seeds Student's t, with "
    "one seed a cluster-robust interval and the exact sign-flip test with the initial state as the unit.",
    "A change is coloured where its interval, which speaks of this one comparison, excludes 0.",
    "Best: separated above every other measured score from the same base policy on the same suite, tasks and protocol, "
    f"controls aside: p < 0.05. {SEPARATED}",
    "Without noise: each held-out initial state once more, before and after, decoded from zero noise; "
    "token policies take the likeliest token. A gain that is not there either may be due to drawing less noise alone.",
    "Scores under different protocols do not compare, nor do scores on different tasks of a suite. Trials in which "
    "settings were chosen, on training states, stand below all others.",
)


def write_leaderboard(path: str | os.PathLike[str], runs: Iterable[RunFolder], published: Sequence[Published]) -> int:
    """Writes the page; returns its size in bytes."""
    page = make_page(list(runs), published, Path(path).parent)
    write_text_atomic(path, page)
    return len(page.encode())


def make_page(runs: Sequence[RunFolder], published: Sequence[Published], site: Path | None = None) -> str:
    """The page as text, with its data as JSON inside. It links to films and notes if it is told the folder that it goes
    to, `site`."""
    parts = files("vlarl_bench.report") / "site"
    by_protocol: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_protocol.setdefault(run.manifest["protocol"]["hash"], []).append(run)
    single = sum(len(run.base) + len(run.evaluated) for run in runs) <= MOST_EPISODES
    compared = [compared_methods(group) for group in by_protocol.values()]
    cells = [found for methods in compared for found in _measured_cells(methods, single, site)]
    cells += [found for entry in published for found in _copied_cells(entry)]
    notes = [*NOTES, *([] if single else ["Single episodes are left out: they are too many for one page."])]
    findings = [finding for run in runs for finding in lint_run(run)]
    findings += [finding for methods in compared for finding in lint_methods(methods)]
    content = {"cells": cells, "methods": method_pages(runs, site), "notes": notes, "findings": findings}
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = (parts / "index.html").read_text(encoding="utf-8")
    for name, text in (
        ("STYLE", (parts / "style.css").read_text(encoding="utf-8")),
        ("SCRIPT", (parts / "script.js").read_text(encoding="utf-8")),
        ("DATA", data),
    ):
        head, tail = page.split(f"/*{name}*/")
        page = head + text + tail
    return page


def _measured_cells(methods: Sequence[Method], single: bool, site: Path | None) -> list[dict[str, Any]]:
    cells = []
    for suite in suites_of(methods):
        present = [method for method in methods if any(suite in run.suites for run in method.runs)]
        winners = best(present, suite)
        for i, method in enumerate(present):
            cells.append(_measured_cell(method, suite, base_of(method, present), i in winners, single, site))
    return cells


def _measured_cell(
    method: Method, suite: str, base: Method | None, is_best: bool, single: bool, site: Path | None
) -> dict[str, Any]:
    runs = [run for run in method.runs if suite in run.suites]
    manifest = runs[0].manifest
    shown = cell(method, suite)
    tasks = planned_tasks(method, suite)
    curves = []
    for run in [] if method.is_base else runs:
        steps, rates = training_curve(run.rows_of(suite))
        if steps:
            curve: dict[str, Any] = {
                "seed": run.manifest["seed"],
                "steps": steps,
                "rates": [round(rate, 4) for rate in rates],
            }
            seconds, _ = wall_time_curve(run, run.rows_of(suite))
            curves.append(curve | ({"seconds": seconds} if len(seconds) == len(steps) else {}))
    return {
        "kind": "measured",
        "id": _identity(method.label, method.policy, suite, method.settings, method.decoding, method.checkpoint,
                        manifest["protocol"]["hash"]),
        "method": method.label,
        "algorithm": method.name,
        "policy": f"{method.policy} {method.checkpoint}",
        "suite": suite,
        "protocol": manifest["protocol"]["label"],
        "tuning": manifest["protocol"]["name"].endswith(TUNING),
        "coverage": f"{len(tasks)} of {manifest['evaluation']['suite_tasks']} tasks of {manifest['suite']}",
        **{name: shown[name] for name in ("settings", "decoding", "seeds", "episodes", "successes", "expected",
                                          "submitted", "complete", "rate", "low", "high", "resamples")},
        "best": is_best,
        "change": change(method, base, suite) if base else None,
        "noiseless": noiseless_text(noiseless) if (noiseless := noiseless_of(method, suite)) else None,
        "budget": budget_text(method),
        "steps": method.budget()["env_steps"],
        "curves": curves,
        "tasks": [_task(method, base, suite, task, single) for task in tasks],
        "runs": [_run(run, method, suite, site) for run in runs],
    }  # fmt: skip


def _task(method: Method, base: Method | None, suite: str, task: str, single: bool) -> dict[str, Any]:
    """Counts of one task, of all seeds and of each; outcomes: a string for each seed, by initial state and repeat."""

    def of(which: Method) -> list[np.ndarray]:
        at = which.played(suite) & (which.episodes["task"] == task).to_numpy()
        seeds = which.episodes["seed"].to_numpy()[at]
        return [which.results[at][seeds == seed] for seed in which.seeds_on(suite)]

    def count(outcomes: Iterable[np.ndarray]) -> list[int]:
        listed = list(outcomes)
        return [sum(int(each.sum()) for each in listed), sum(map(len, listed))]

    mine = of(method)
    record: dict[str, Any] = {
        "name": task,
        "all": count(mine),
        "seeds": [count([outcomes]) for outcomes in mine],
    }
    if base is not None:
        record["base"] = count(of(base))
    if single:
        record["outcomes"] = ["".join(map(str, outcomes.tolist())) for outcomes in mine]
    return record


def _run(run: RunFolder, method: Method, suite: str, site: Path | None) -> dict[str, Any]:
    rows = untrained(run) if method.is_base else run.evaluated
    successes = rows.column("success")[rows.column("suite") == suite]
    films = ("before",) if method.is_base and run.compares else ("before", "after", "eval")
    there = [name for name in films if site is not None and (run.folder / f"{name}.mp4").is_file()]
    return {
        "films": {name: link(run.folder / f"{name}.mp4", site) for name in there if site is not None},
        "submitted": run.submitted,
        "seed": run.manifest["seed"],
        "episodes": len(successes),
        "successes": int(successes.sum()),
        "command": shlex.join(["vlarl-bench", *run.manifest["argv"]]),
        "folder": f"{run.folder.name}, initial states {spans(run.manifest['evaluation']['init_states'])}",
        "code": run.manifest["code"],
        "machine": f"{run.manifest['fingerprint']['hash']} ({machine_of(run)})",
    }


def _copied_cells(entry: Published) -> list[dict[str, Any]]:
    findings = [finding for finding in lint_published([entry]) if finding.startswith(entry.where)]
    average = f"{entry.average:.2f}, recomputed"
    average += f"; printed: {entry.printed_average:g}" if entry.printed_average is not None else "; none is carried"
    return [
        {
            "kind": "copied",
            "id": _identity(entry.method, entry.base_policy, suite, entry.source),
            "method": f"{entry.method} [{entry.kind}]",
            "algorithm": entry.algorithm,
            "policy": entry.base_policy,
            "suite": suite,
            "protocol": entry.protocol,
            "source": entry.source,
            "budget": entry.source,
            "rate": score / 100,
            "low": None,
            "high": None,
            "average": average,
            "findings": [finding.removeprefix(f"{entry.where}: ") for finding in findings],
        }
        for suite, score in entry.scores.items()
    ]


def _identity(method: str, policy: str, suite: str, *more: str) -> str:
    """What a link to a cell says: readable, and one for each cell."""
    name = "".join(c if c.isalnum() or c in "._" else "-" for c in f"{method.split(' (')[0]}-{suite}".lower())
    return f"{name}-{hashlib.sha256('/'.join((method, policy, suite, *more)).encode()).hexdigest()[:8]}"
