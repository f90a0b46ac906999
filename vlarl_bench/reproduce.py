"""A published run again: the same configuration from the same weights, and whether it comes to the same."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING

from .config import BUDGETS, RunConfig
from .errors import BenchError
from .plan import plan_run
from .stats import wilson_interval

if TYPE_CHECKING:
    from .options import Reproduce
    from .report.runs import RunFolder


def reproduce(asked: Reproduce) -> bool:
    """Runs it, prints what was published beside what came out, and returns whether the two agree: whether they have the
    same rows or, elsewhere than on the same code and hardware, whether the success rate lies in the published interval.

    Raises:
        BenchError: if the run is no training run, or its base policy is not the one that it started from.
    """
    from .policies.store import content_hash
    from .report.runs import read_all, read_run
    from .run import run

    published = _choose(read_all([asked.run]), asked.run)
    out = asked.out or str(Path("runs") / f"again-{published.folder.name}")
    config = dataclasses.replace(
        RunConfig.from_dict(published.config),
        out=out,
        workers=asked.workers,
        device=asked.device,
        video=False,
        demos=asked.demos,
    )
    if asked.smoke:
        config = dataclasses.replace(config, budget=BUDGETS["smoke"])
    plan = plan_run(config)
    wanted, found = published.manifest["base_checkpoint"], content_hash(plan.load_base()) if plan.base else ""
    if plan.base and found != wanted:
        raise BenchError(f"{published.folder}: it started from {wanted}, and --base {config.base} is {found} here")
    print(f"again: {published.folder}, made by {published.manifest['code']}", flush=True)
    folder = run(config)
    if asked.smoke:
        print("at smoke size it runs to its end; whether it comes to the same, only the whole run tells")
        return True
    text, agrees = verdict(published, read_run(folder))
    print(text)
    return agrees


def _choose(runs: list[RunFolder], name: str) -> RunFolder:
    """The run; of several, one at random."""
    trained = [run for run in runs if run.compares]
    if not trained:
        raise BenchError(f"run: {name} is an evaluation without training; `vlarl-bench eval` plays it again")
    return random.choice(trained)


def verdict(published: RunFolder, again: RunFolder) -> tuple[str, bool]:
    """What to say of a run and its repetition, and whether they agree."""
    (k, n), (j, m) = ((int(run.evaluated.column("success").sum()), len(run.evaluated)) for run in (published, again))
    low, high = wilson_interval(k, n)
    counts = f"published {k}/{n} {k / n:.1%} [{low:.1%}, {high:.1%}], again {j}/{m} {j / m:.1%}"
    same = ("suite", "task", "init_state", "repeat", "checkpoint", "success", "steps")
    rows = [{tuple(getattr(row, name) for name in same) for row in run.evaluated} for run in (published, again)]
    if rows[0] == rows[1]:
        return f"{counts}: the same weights and the same episodes", True
    if low <= j / m <= high:
        return f"{counts}: inside the interval", True
    return f"{counts}: OUTSIDE the interval, as one in six would be by chance where code or hardware differ", False
