"""What a gain costs: the whole run, and until training first succeeded so often, in each of four currencies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BenchError
from ..stats import steps_to
from .methods import Method, base_of, change, compared_methods, suites_of
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


def cost_table(runs: Sequence[RunFolder], threshold: float = 0.8) -> Table:
    """Rows are methods on one suite, columns their gain and what it cost. Raises BenchError if there are no runs."""
    if not runs:
        raise BenchError("runs: none given; name at least one run folder")
    methods, lines, records = compared_methods(runs), [], []
    for suite in suites_of(methods):
        for method in methods:
            if method.is_base or not any(metrics_of(run) for run in method.runs):
                continue
            base = base_of(method, methods)
            gain = change(method, base, suite) if base is not None else None
            paid = {name: _paid(method, suite, name, threshold) for name in CURRENCIES}
            record: Record = {
                "algorithm": method.name, "policy": method.policy, "settings": method.settings, "suite": suite,
                "seeds": list(method.seeds), "threshold": threshold, "gain": gain and gain["value"], **paid,
            }  # fmt: skip
            records.append(record)
            texts = [_text(paid[name], scale) for name, (_, scale) in CURRENCIES.items()]
            told = "-" if gain is None else f"{100 * gain['value']:+.1f}"
            lines.append((suite, method.label, method.policy, str(len(method.seeds)), told, *texts))
    columns = ("suite", "method", "policy", "seeds", "gain, pp", *(heading for heading, _ in CURRENCIES.values()))
    notes = (
        *protocol_notes(runs),
        f"Costs are those of training: what a whole run spent and, before it, what it had spent by the round in which "
        f"{threshold:.0%} of the training episodes succeeded (on the line between two rounds); medians over seeds. A "
        "critic's gradient steps count like an actor's, and collecting like updating.",
        "CPU hours are those of all cores, for training alone; they depend on the machine, and older runs have none.",
    )
    return Table("What a gain costs", notes, columns, tuple(lines), 0, tuple(records), tuple(records))


def _paid(method: Method, suite: str, name: str, threshold: float) -> dict[str, Any] | None:
    """Medians over the runs of one currency: `whole`, and `reached`, None where too few got there, and absent where
    training plays no episodes; None where a run does not say."""
    whole, reached = [], []
    for run in method.runs:
        told = {line["iteration"]: line.get(name) for line in metrics_of(run)}
        spent = {iteration: float(value) for iteration, value in told.items() if value is not None}
        if not spent or len(spent) < len(told):
            return None
        whole.append(spent[max(spent)])
        trained = run.rows.where((run.rows.column("phase") == "train") & (run.rows.column("suite") == suite))
        rounds = [int(i) for i in np.unique(trained.column("iteration"))]
        curve = [(spent[i], rate) for i, rate in zip(rounds, training_curve(trained)[1], strict=True) if i in spent]
        reached.append(steps_to([x for x, _ in curve], [rate for _, rate in curve], threshold))
    if not any(run.spent["train_episodes"] for run in method.runs):
        return {"whole": float(np.median(whole))}
    middle = float(np.median(reached))
    return {"whole": float(np.median(whole)), "reached": middle if math.isfinite(middle) else None}


def _text(paid: dict[str, Any] | None, scale: float) -> str:
    if paid is None:
        return "-"
    if "reached" not in paid:
        return _number(paid["whole"] / scale)
    first = "never" if paid["reached"] is None else _number(paid["reached"] / scale)
    return f"{first} of {_number(paid['whole'] / scale)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
