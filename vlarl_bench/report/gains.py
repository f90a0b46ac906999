"""What each method gained over the policy that it began with, a line each: the answer in short."""

from collections.abc import Sequence

from ..errors import BenchError
from .comparisons import change, change_text, separation
from .methods import Method, base_of, cell, compared_methods, in_order, noiseless_of, suites_of
from .paper import SEPARATED
from .runs import RunFolder
from .table import (
    TRAINING,
    WITHOUT_NOISE,
    Record,
    Table,
    noiseless_note,
    noiseless_text,
    p_text,
    protocol_notes,
    training_text,
)


def gains_table(runs: Sequence[RunFolder]) -> Table:
    """Rows are methods on one suite, columns their success before and after and the difference. Raises BenchError if
    there are no runs."""
    if not runs:
        raise BenchError("runs: none given; name at least one run folder")
    methods, lines, records = compared_methods(runs), [], []
    for suite in suites_of(methods):
        tests = separation(methods, suite).p
        for method in in_order(methods, [suite]):
            base, shown = base_of(method, methods), cell(method, suite)
            if base is None or not shown["expected"]:
                continue
            gain, p = change(method, base, suite), float(tests[methods.index(method), methods.index(base)])
            before, of = _counts(base, method, suite)
            names = ("algorithm", "policy", "base_checkpoint", "settings", "suite", "protocol", "decoding", "seeds",
                     "expected", "episodes", "successes", "complete")  # fmt: skip
            record: Record = {
                **{name: shown[name] for name in names}, **method.budget(),
                "base_episodes": of, "base_successes": before, "gain": gain, "p_holm": p if p == p else None,
                "noiseless": noiseless_of(method, suite),
            }  # fmt: skip
            records.append(record)
            counts = [f"{n}/{m} {100 * n / m:.0f}%" if m else "not run"
                      for n, m in ((before, of), (shown["successes"], shown["episodes"]))]  # fmt: skip
            start, spent = f"{method.policy} {method.checkpoint}", training_text(method.budget())
            found = (change_text(gain), p_text(record["p_holm"]))
            lines.append((suite, method.label, start, spent, str(len(method.seeds_on(suite))), *counts, *found))
    columns: tuple[str, ...] = ("suite", "method", "base policy", TRAINING, "seeds", "before", "after")
    columns += ("gain, pp [95%]", "p")
    if any(record["noiseless"] for record in records):
        columns += (WITHOUT_NOISE,)
        lines = [(*line, noiseless_text(record["noiseless"])) for line, record in zip(lines, records, strict=True)]
    notes = (
        *protocol_notes(runs),
        "Before: the base policy on the episodes that it shares with the method. Gain: the mean change on these; its "
        "95% interval resamples training seeds (Student's t), with one seed initial states.",
        f"p: of the comparison with the base policy. {SEPARATED}",
        *noiseless_note(records),
    )
    return Table("What each method gained", notes, columns, tuple(lines), 0, tuple(records), tuple(records))


def _counts(base: Method, method: Method, suite: str) -> tuple[int, int]:
    """The base policy's successes on the episodes that both played, and how many these are."""
    outcomes = base.results[base.played(suite) & method.played(suite)]
    return int(outcomes.sum()), len(outcomes)
