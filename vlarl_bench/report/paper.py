"""Tables in the layouts of papers: methods down, suites across; and methods down, aggregates across."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import BenchError
from ..stats import (
    Estimate,
    area_under_curve,
    iqm,
    mean,
    median_interval,
    optimality_gap,
    probability_of_improvement,
    rank_intervals,
    seeds_estimate,
)
from .comparisons import best, families, reach_notes, separation
from .cost import REACHED, reach
from .lint import lint_runs
from .methods import Method, base_of, cell, compared_methods, in_order, scores, suites_of
from .published import Published
from .render import BEST
from .runs import RunFolder, training_curve
from .table import TRAINING, Record, Table, protocol_notes, spent_text, training_text


def paper_table(runs: Sequence[RunFolder], published: Sequence[Published] = ()) -> Table:
    """Rows are methods, columns are suites: the layout of most papers' main table, and of an ablation where the rows
    are one algorithm under several settings. Published numbers follow in a part of their own."""
    if not runs:
        raise BenchError("runs: none given; name at least one run folder")
    methods = compared_methods(runs)
    suites = suites_of(methods)
    methods = in_order(methods, suites)
    winners = {suite: best(methods, suite) for suite in suites}
    lines, cells = [], []
    for i, method in enumerate(methods):
        mine = [cell(method, suite) | {"best": i in winners[suite], **method.budget()} for suite in suites]
        texts = [_cell_text(each) for each in mine]
        if len(suites) > 1:
            rates = [each["rate"] for each in mine]
            whole = all(each["complete"] for each in mine)
            texts.append(f"{100 * float(np.mean(rates)):.1f}" if whole else "-")
        seeds = " or ".join(map(str, sorted({len(each["seeds"]) for each in mine if each["tasks"]})))
        lines.append((method.label, f"{method.policy} {method.checkpoint}", budget_text(method), seeds, *texts))
        cells += mine
    copied = [line for entry in published if (line := _copied_line(entry, suites)) is not None]
    budget = "training budget, a run" + ("; of copied lines source and protocol" if copied else "")
    columns = ("method", "base policy", budget, "seeds", *suites, *(("average",) if len(suites) > 1 else ()))
    notes = (
        *protocol_notes(runs),
        "Cells: success rate in per cent, 95% interval, successes/episodes. Intervals resample training seeds "
        "(Student's t), with one seed episodes (Wilson); tasks and initial states are taken as they are. A base "
        "policy's seeds are those of the noise it was played with.",
        f"{BEST.strip()}: separated above every other measured line from the same base policy on the same tasks, "
        f"controls aside: p < 0.05. {SEPARATED}",
        *reach_notes(methods, suites),
        *(("Average: of the suites, each counting the same.",) if len(suites) > 1 else ()),
        *((_COPIED,) if copied else ()),
        *(f"LINT: {finding}." for finding in lint_runs(runs)),
    )
    return Table(
        "Success rate by method and suite",
        notes,
        columns,
        (*lines, *copied),
        0,
        tuple(cells),
        tuple(cells),
        copied=len(copied),
    )


SEPARATED = (
    "p is the larger of the exact sign-flip test paired by (task, initial state, seed) and Student's t over seeds. "
    "Holm's correction is over all pairs of methods from one base policy on a suite, and over all their comparisons "
    "with that policy apart; pairs that share fewer than two seeds, or lack episodes, are not tested."
)

_COPIED = (
    "Copied lines: printed by others, under other base policies and protocols, measured by nobody here; they compare "
    "neither with the measured lines nor with one another."
)


def _copied_line(entry: Published, suites: Sequence[str]) -> tuple[str, ...] | None:
    if not entry.scores.keys() & set(suites):
        return None
    texts = [f"{entry.scores[suite]:.1f} (copied)" if suite in entry.scores else "-" for suite in suites]
    if len(suites) > 1:
        whole = all(suite in entry.scores for suite in suites)
        texts.append(f"{np.mean([entry.scores[suite] for suite in suites]):.1f} (recomputed)" if whole else "-")
    return (f"{entry.method}, copied", entry.base_policy, f"{entry.source}; {entry.protocol}", "-", *texts)


def _cell_text(found: Record) -> str:
    n, expected = found["episodes"], found["expected"]
    if n == 0:
        return "not run" if expected else "-"
    text = f"{100 * found['rate']:.1f}"
    if found["low"] is not None:
        text += f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    text += f" {found['successes']}/{n}"
    text = text if found["complete"] else f"{text} INCOMPLETE ({n} of {expected})"
    return text + BEST if found["best"] else text


def budget_text(method: Method) -> str:
    """What one run of the method spent on training, in short."""
    return "none" if method.is_base else spent_text(method.budget(), method.runs[0])


def aggregate_table(runs: Sequence[RunFolder], threshold: float = 0.8) -> Table:
    """Rows are methods on one suite, columns what many seeds and tasks come to (rliable's aggregates), ranks, and the
    efficiency of training."""
    if not runs:
        raise BenchError("runs: none given; name at least one run folder")
    methods, lines, records = compared_methods(runs), [], []
    ends: list[str] = []
    for suite in suites_of(methods):
        planned = [method for method in in_order(methods, [suite]) if cell(method, suite)["expected"]]
        present = [method for method in planned if cell(method, suite)["complete"]]
        ranks = _ranks(present, suite)
        if until := _until(present, suite):
            ends.append(f"{until:,.0f} on {suite}")
        for method in present:
            record = _aggregates(method, suite, present, threshold, until) | {"rank": ranks.get(method)}
            records.append(record)
            rank = "-" if method not in ranks else "-".join(map(str, dict.fromkeys(ranks[method])))
            texts = [_estimate_text(record[name], 100) for name in ("mean", "iqm", "optimality_gap")]
            texts += [_estimate_text(record["improvement"], 100), rank, _estimate_text(record["area"], 100)]
            lines.append((*_head(method, suite), *texts, _steps_text(record["steps_to"])))
        for method in planned:
            if method not in present:
                lines.append((*_head(method, suite), *["INCOMPLETE"] * 7))
    columns = ("suite", "method", "base policy", TRAINING, "seeds", "successes", "mean, %", "IQM, %",
               "optimality gap, pp", "better than its base, %", "rank", "training curve, %",
               f"steps to {threshold:.0%} in training")  # fmt: skip
    notes = (
        *protocol_notes(runs),
        "Intervals (95%) resample training seeds: Student's t with each seed left out in turn; tasks and initial "
        "states are taken as they are. One seed, or seeds that agree exactly, have none.",
        "IQM: mean of the middle half of all (seed, task) scores. Optimality gap: what is missing to 100%. Better than "
        "its base: chance that a run of the method scores higher on a task than a run of its base policy, ties half.",
        f"Rank: among the methods from the same base policy, all that pairwise tests leave open. {SEPARATED}",
        *reach_notes(methods, suites_of(methods)),
        f"Training curve: average success while exploring, over the first environment steps that every run has which "
        f"was not stopped ({', '.join(ends) or 'none'}); a stopped run stays where it ended.",
        f"Steps to the threshold: {REACHED}; median over seeds with its exact interval (six seeds or more), never "
        "counting as infinite.",
    )
    return Table("Aggregates over seeds and tasks", notes, columns, tuple(lines), 0, tuple(records), tuple(records))


def _head(method: Method, suite: str) -> tuple[str, ...]:
    """What stands before the numbers: who, from which policy, on what budget and by how many episodes."""
    shown = cell(method, suite)
    budget = "none" if method.is_base else training_text(method.budget())
    counts = f"{shown['successes']}/{shown['episodes']}"
    return suite, method.label, f"{method.policy} {method.checkpoint}", budget, str(len(method.seeds_on(suite))), counts


def _ranks(methods: Sequence[Method], suite: str) -> dict[Method, list[int]]:
    """Lowest and highest rank of each trained method among those of its family."""
    found: dict[Method, list[int]] = {}
    for family in families(methods, suite):
        trained = [methods[i] for i in family if not methods[i].is_base]
        differences, p, _ = separation(trained, suite)
        found |= dict(zip(trained, rank_intervals(differences, p).tolist(), strict=True))
    return found


def _until(methods: Sequence[Method], suite: str) -> float:
    """Environment steps that the training curves of all runs have, apart from those that were stopped."""
    trained = [run for method in methods if not method.is_base for run in method.runs]
    ends = [(run.stopped is not None, training_curve(run.rows_of(suite))[0]) for run in trained]
    whole = [steps[-1] for stopped, steps in ends if steps and not stopped]
    return min(whole or [steps[-1] for _, steps in ends if steps], default=0.0)


def _aggregates(
    method: Method, suite: str, methods: Sequence[Method], threshold: float, until: float
) -> dict[str, Any]:
    table = scores(method, suite)
    base = base_of(method, methods)
    estimators: dict[str, Callable[..., np.ndarray]] = {"mean": mean, "iqm": iqm, "optimality_gap": optimality_gap}
    names = ("algorithm", "policy", "base_checkpoint", "settings", "suite", "protocol", "decoding", "seeds", "tasks",
             "episodes", "successes")  # fmt: skip
    shown = cell(method, suite)
    found: dict[str, Any] = {name: shown[name] for name in names} | method.budget() | {"resamples": "seeds"}
    found |= {name: _pair(seeds_estimate(estimator, table)) for name, estimator in estimators.items()}
    versus_base = None
    if base is not None:
        versus_base = _pair(seeds_estimate(probability_of_improvement, table, scores(base, suite)))
    runs = () if method.is_base else method.runs
    curves = [(run, *curve) for run in runs if (curve := training_curve(run.rows_of(suite)))[0]]
    area = reached = None
    if curves:
        area = seeds_estimate(mean, np.array([[area_under_curve(steps, rates, until)] for _, steps, rates in curves]))
        reached = median_interval([reach(run, [0.0, *steps[:-1]], rates, threshold) for run, steps, rates in curves])
    return found | {"improvement": versus_base, "area": area and _pair(area), "steps_to": reached and _pair(reached)}


def _pair(found: Estimate) -> dict[str, float | None]:
    return {"value": _finite(found.value), "low": _finite(found.low), "high": _finite(found.high)}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a threshold that was never reached has no number of steps."""
    return value if value is None or math.isfinite(value) else None


def _estimate_text(found: dict[str, float | None] | None, scale: float) -> str:
    if found is None or found["value"] is None:
        return "-"
    text = f"{scale * found['value']:.1f}"
    low, high = found["low"], found["high"]
    return text if low is None or high is None else f"{text} [{scale * low:.1f}, {scale * high:.1f}]"


def _steps_text(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "-"
    if found["value"] is None:
        return "not reached"
    return (
        ("at the start" if found["value"] == 0 else f"{found['value']:,.0f}")
        + (f" [{found['low']:,.0f}, " if found["low"] is not None else "")
        + ("" if found["low"] is None else "never]" if found["high"] is None else f"{found['high']:,.0f}]")
    )
