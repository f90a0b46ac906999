"""The learning curve of one run: training episodes along the way, held-out evaluations before and after."""

import os

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import atomic_file
from ..stats import wilson_interval
from .runs import RunFolder, training_curve
from .spans import spans

TRAIN, BASE, AFTER = "#56B4E9", "#D55E00", "#009E73"
"""From the colour-blind safe palette of Okabe and Ito; the markers differ too."""


def write_curve(path: str | os.PathLike[str], run: RunFolder) -> None:
    """Draws `curve.png`. x: environment steps spent on training episodes. A method that learns without playing has
    its two evaluations side by side at 0."""
    manifest = run.manifest
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends_of_rounds, shares = training_curve(run.rows)
    steps, rates = [round(step) for step in ends_of_rounds], [100 * share for share in shares]
    if steps:
        seen = spans(manifest["protocol"]["train_states"])
        label = f"training episodes (exploring, initial states {seen})"
        axes.plot(steps, rates, color=TRAIN, linewidth=1, marker=".", markersize=4, label=label)
    total = steps[-1] if steps else 0
    held_out = spans(manifest["evaluation"]["init_states"])
    ends = []
    for rows, x, colour, marker, name in (
        (run.base, 0, BASE, "s", "base"),
        (run.evaluated, total or (1 if run.base else 0), AFTER, "o", manifest["algorithm"]),
    ):
        if not rows:
            continue
        successes, n = sum(row.success for row in rows), len(rows)
        rate, (low, high) = successes / n, wilson_interval(successes, n)
        error = [[100 * (rate - low)], [100 * (high - rate)]]
        label = f"{name}, held-out initial states {held_out}: {successes}/{n} = {100 * rate:.0f}% (Wilson 95%)"
        axes.errorbar([x], [100 * rate], error, color=colour, marker=marker, markersize=7, capsize=5, linewidth=2,
                      linestyle="none", label=label, zorder=3)  # fmt: skip
        ends.append((x, 100 * rate))
    if len(ends) == 2:
        axes.plot(*zip(*ends, strict=True), color="0.6", linestyle=":", linewidth=1, zorder=1)
    if steps:
        axes.set_xlabel("training (environment steps)")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    else:
        axes.set_xlabel("no training episodes (environment steps: 0)")
        axes.set_xticks([])
    axes.set_xlim(-0.04 * (total or 1) - 0.2 * (not steps), 1.04 * (total or 1) + 0.2 * (not steps))
    axes.set_ylabel("success rate (%)")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.25)
    axes.set_title(
        f"{run.title}\n"
        f"{len(manifest['evaluation']['tasks'])} of {manifest['evaluation']['suite_tasks']} tasks of "
        f"{manifest['suite']}, protocol {manifest['protocol']['label']}",
        fontsize=10,
    )
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": ""})
