"""What a gain costs: the whole run, and until training first succeeded so often, in each of four currencies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BenchError
from ..stats import steps_to
from .comparisons import change, change_text
from .methods import base_of, cell, compared_methods, in_order, suites_of
from .metrics import metrics_of
from .runs import RunFolder, training_curve
from .table import Record, Table, protocol_notes

CURRENCIES: Mapping[str, tuple[str, float]] = {
    "env_steps": ("environment steps", 1),
    "gradient_steps": ("gradient steps", 1),
    "flops": ("TFLOP", 1e12),
    "cpu_seconds": ("CPU hours", 3600),
}
"""Name in `metrics.jsonl` -> heading, and how many of the one make one of the other."""

REACHED = (
    "spent before the first of two rounds in a row in which so many of the training episodes succeeded (on the line "
    "from the round before); where the first two did, it was so at the start; a run that was stopped reached nothing"
)


def cost_table(runs: Sequence[RunFolder], threshold: float = 0.8) -> Table:
    """Rows are methods on one suite, columns their gain and what it cost. Raises BenchError if there are no runs."""
    if not runs:
        raise BenchError("runs: none given; name at least one run folder")
    methods, lines, records = compared_methods(runs), [], []
    for suite in suites_of(methods):
        for method in in_order(methods, [suite]):
            shown = cell(method, suite)
            trained = [run for run in method.runs if run.compares and suite in run.suites]
            if method.is_base or not shown["expected"] or not any(metrics_of(run) for run in trained):
                continue
            base = base_of(method, methods)
            gain = change(method, base, suite) if base is not None else None
            paid = {name: _paid(trained, suite, name, threshold) for name in CURRENCIES}
            names = ("algorithm", "policy", "base_checkpoint", "settings", "suite", "protocol", "decoding", "seeds",
                     "expected", "episodes", "successes", "complete")  # fmt: skip
            record: Record = {
                **{name: shown[name] for name in names},
                "gain": gain, "threshold": threshold, **paid,
            }  # fmt: skip
            records.append(record)
            texts = [_text(paid[name], scale) for name, (_, scale) in CURRENCIES.items()]
            counts = f"{shown['successes']}/{shown['episodes']}"
            policy, seeds = f"{method.policy} {method.checkpoint}", str(len(method.seeds_on(suite)))
            lines.append((suite, method.label, policy, seeds, counts, change_text(gain), *texts))
    columns = (
        "suite",
        "method",
        "base policy",
        "seeds",
        "successes",
        "gain, pp [95%]",
        *(heading for heading, _ in CURRENCIES.values()),
    )
    notes = (
        *protocol_notes(runs),
        "Gain: change against the base policy on held-out initial states; 95% interval resamples seeds (Student's t), "
        "with one seed initial states.",
        f"Costs are those of training, medians over seeds: until {threshold:.0%} succeeded, of the whole run. Until "
        f"then: {REACHED}. A critic's gradient steps count like an actor's, and collecting like updating.",
        "CPU hours are those of all cores, for training alone; they depend on the machine, and older runs have none.",
    )
    return Table("What a gain costs", notes, columns, tuple(lines), 0, tuple(records), tuple(records))


def _paid(runs: Sequence[RunFolder], suite: str, name: str, threshold: float) -> dict[str, Any] | None:
    """Medians over the runs of one currency: `whole`, and `reached`, None where too few got there, 0 where it was so
    before training, and absent where training plays no episodes; None where a run does not say."""
    whole, reached = [], []
    for run in runs:
        told = {line["iteration"]: line.get(name) for line in metrics_of(run)}
        spent = {iteration: float(value) for iteration, value in told.items() if value is not None}
        in_vain = {**run.stopped, **run.stopped.get("spent", {})} if run.stopped else {}
        all_of_it = in_vain.get(name, spent[max(spent)] if spent else None)  # its time is there since 2026-11-30
        if all_of_it is None or len(spent) < len(told):
            return None
        whole.append(float(all_of_it))
        played = run.rows.where((run.rows.column("phase") == "train") & (run.rows.column("suite") == suite))
        rounds = [int(i) for i in np.unique(played.column("iteration"))]
        before = {i: spent.get(i - 1) if i > 1 else 0.0 for i in rounds}  # a round's policy cost so much
        curve = [(x, y) for x, y in zip(before.values(), training_curve(played)[1], strict=True) if x is not None]
        reached.append(reach(run, [x for x, _ in curve], [rate for _, rate in curve], threshold))
    if not any(run.spent["train_episodes"] for run in runs):
        return {"whole": float(np.median(whole))}
    middle = float(np.median(reached))
    return {"whole": float(np.median(whole)), "reached": middle if math.isfinite(middle) else None}


def reach(run: RunFolder, before: Sequence[float], rates: Sequence[float], threshold: float) -> float:
    """What a run had spent `before` the round from which on its training succeeded so often; infinite if never, and for
    one that was stopped, whose training destroyed the policy."""
    return math.inf if run.stopped else steps_to(before, rates, threshold)


def _text(paid: dict[str, Any] | None, scale: float) -> str:
    if paid is None:
        return "-"
    if "reached" not in paid:
        return _number(paid["whole"] / scale)
    first = "never" if paid["reached"] is None else _number(paid["reached"] / scale)
    first = "at the start" if paid["reached"] == 0 else first
    return f"{first} of {_number(paid['whole'] / scale)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
