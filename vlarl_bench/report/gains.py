"""What each method gained over the policy that it began with, a line each: the answer in short."""

from collections.abc import Sequence

from ..errors import BenchError
from .comparisons import change, change_text, separation
from .methods import Method, base_of, cell, compared_methods, in_order, suites_of, without_noise_of
from .paper import SEPARATED
from .runs import RunFolder
from .table import (
    TRAINING,
    WITHOUT_NOISE,
    Record,
    Table,
    p_text,
    protocol_notes,
    training_text,
    without_noise_note,
    without_noise_text,
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
            quiet = without_noise_of(method, suite)
            record: Record = {
                **{name: shown[name] for name in names}, **method.budget(),
                "base_episodes": of, "base_successes": before, "gain": gain, "p_holm": p if p == p else None,
                "without_noise": quiet,
            }  # fmt: skip
            records.append(record)
            counts = [f"{n}/{m} {100 * n / m:.0f}%" if m else "not run"
                      for n, m in ((before, of), (shown["successes"], shown["episodes"]))]  # fmt: skip
            start, spent = f"{method.policy} {method.checkpoint}", training_text(method.budget())
            found = (change_text(gain), p_text(record["p_holm"]), without_noise_text(quiet))
            lines.append((suite, method.label, start, spent, str(len(method.seeds)), *counts, *found))
    columns = ["suite", "method", "base policy", TRAINING, "seeds", "before", "after", "gain, pp [95%]", "p"]
    if any(record["without_noise"] for record in records):
        columns.append(WITHOUT_NOISE)
    notes = (
        *protocol_notes(runs),
        "Before: the base policy on the episodes that it shares with the method. Gain: the mean change on these; its "
        "95% interval resamples training seeds (Student's t), with one seed initial states.",
        f"p: of the comparison with the base policy. {SEPARATED}",
        *without_noise_note(records),
    )
    lines = [line[: len(columns)] for line in lines]
    return Table("What each method gained", notes, tuple(columns), tuple(lines), 0, tuple(records), tuple(records))


def _counts(base: Method, method: Method, suite: str) -> tuple[int, int]:
    """The base policy's successes on the episodes that both played, and how many these are."""
    outcomes = base.results[base.played(suite) & method.played(suite)]
    return int(outcomes.sum()), len(outcomes)
