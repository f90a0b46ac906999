"""Figures that compare methods under one protocol, as SVG and PNG in one style."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import BenchError
from ..records import atomic_file
from ..stats import mean, performance_profile, seeds_estimate
from .methods import Method, base_of, cell, change, compared_methods, planned_tasks, scores, suites_of
from .paper import budget_text
from .runs import RunFolder, training_curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, safe for the colour-blind; lines and markers differ too."""
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "vlarl-bench",
    "svg.fonttype": "none",
}  # fmt: skip
Draw = Callable[[Figure, Sequence[Method], str], bool]


def write_figures(folder: str | os.PathLike[str], runs: Sequence[RunFolder]) -> list[Path]:
    """Draws what the rows allow, for each suite: `<figure>-<suite>.svg` and `.png`. Returns the paths."""
    methods = compared_methods(runs)
    written: list[Path] = []
    for suite in suites_of(methods):
        present = [method for method in methods if planned_tasks(method, suite)]
        for name, draw in FIGURES.items():
            with matplotlib.rc_context(STYLE):
                figure = Figure(figsize=(7.2, 4.4), layout="constrained")
                FigureCanvasAgg(figure)
                if not draw(figure, present, suite):
                    continue
                label = runs[0].manifest["protocol"]["label"]
                figure.suptitle(f"{suite}, protocol {label}", fontsize=9, x=0.01, ha="left")
                for ending, options in (
                    ("svg", {"metadata": {"Date": None}}),
                    ("png", {"dpi": 150, "metadata": {"Software": ""}}),
                ):
                    path = Path(folder) / f"{name}-{suite}.{ending}"
                    with atomic_file(path) as temporary:
                        figure.savefig(temporary, **options)
                    written.append(path)
    if not written:
        raise BenchError("figures: the runs have no scored episode to draw")
    return written


def _looks(methods: Sequence[Method]) -> list[tuple[Method, dict[str, Any]]]:
    """Each method with its colour and line; the same in every figure."""
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(LINES), strict=False)
    return [
        (method, {"color": colour, "linestyle": line}) for method, (colour, line) in zip(methods, looks, strict=False)
    ]


def _scored(methods: Sequence[Method], suite: str) -> list[Method]:
    return [method for method in methods if cell(method, suite)["complete"]]


def learning_curves(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Success while training against environment steps: mean over seeds, and Student's 95% band over seeds."""
    axes, drawn = figure.add_subplot(), False
    for method, look in _looks(methods):
        curves = [
            training_curve(row for row in run.rows if row.suite == suite) for run in method.runs if not method.is_base
        ]
        curves = [curve for curve in curves if curve[0]]
        if not curves:
            continue
        drawn = True
        grid = np.linspace(max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves), 60)
        at = np.array([np.interp(grid, steps, rates) for steps, rates in curves])
        axes.plot(grid, 100 * at.mean(axis=0), label=f"{method.label}, {len(curves)} seed(s)", linewidth=1.8, **look)
        _band(axes, grid, [seeds_estimate(mean, each[:, None]) for each in at.T], look["color"])
    axes.set(xlabel="environment steps of training", ylabel="success while exploring (%)", ylim=(-2, 102))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    _legend(figure, axes)
    return drawn


def _band(axes: Axes, x: np.ndarray, estimates: Sequence[Any], colour: str) -> None:
    low = np.array([np.nan if e.low is None else 100 * e.low for e in estimates])
    high = np.array([np.nan if e.high is None else 100 * e.high for e in estimates])
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _legend(figure: Figure, axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=1, fontsize=8)


def task_heat_map(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Success of each method on each task, all seeds together; crossed out where nothing was played."""
    tasks = list(dict.fromkeys(task for method in methods for task in planned_tasks(method, suite)))
    rates = np.full((len(tasks), len(methods)), np.nan)
    for j, method in enumerate(methods):
        at = {task: i for i, task in enumerate(planned_tasks(method, suite))}
        table = scores(method, suite)
        for i, task in enumerate(tasks):
            if task in at and not np.isnan(table[:, at[task]]).all():
                rates[i, j] = np.nanmean(table[:, at[task]])
    figure.set_size_inches(4.6 + 1.1 * len(methods), 1.8 + 0.36 * len(tasks))
    axes = figure.add_subplot()
    axes.grid(False)
    image = axes.imshow(100 * rates, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, j in itertools.product(range(len(tasks)), range(len(methods))):
        known = not np.isnan(rates[i, j])
        colour = "white" if known and rates[i, j] < 0.5 else "black"
        axes.text(j, i, f"{100 * rates[i, j]:.0f}" if known else "×", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(methods)), [_wrapped(method.label) for method in methods], fontsize=7)
    axes.set_yticks(range(len(tasks)), [_wrapped(task.replace("_", " "), 44) for task in tasks], fontsize=7)
    figure.colorbar(image, label="success (%)")
    return not np.isnan(rates).all()


def _wrapped(text: str, width: int = 18) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def profiles(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Share of (seed, task) scores above each success rate, with Student's 95% band over seeds."""
    axes, thresholds = figure.add_subplot(), np.linspace(0, 1, 101)
    scored = _scored(methods, suite)
    for method, look in _looks(methods):
        if method not in scored:
            continue
        each = np.array([performance_profile(seed[None], thresholds) for seed in scores(method, suite)])
        axes.step(100 * thresholds, 100 * each.mean(axis=0), where="post", label=method.label, linewidth=1.8, **look)
        _band(axes, 100 * thresholds, [seeds_estimate(mean, column[:, None]) for column in each.T], look["color"])
    axes.set(xlabel="success rate τ (%)", ylabel="runs and tasks above τ (%)", xlim=(0, 100), ylim=(-2, 102))
    _legend(figure, axes)
    return bool(scored)


def pareto(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Gain over the base policy, with its 95% interval, against what a run spent on training."""
    axes = figure.add_subplot()
    points: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for (method, look), marker in zip(_looks(methods), itertools.cycle(MARKERS), strict=False):
        base = base_of(method, methods)
        gain = change(method, base, suite) if base is not None else None
        if gain is None:
            continue
        x, y = method.budget()["env_steps"], 100 * gain["value"]
        error = None if gain["low"] is None else [[y - 100 * gain["low"]], [100 * gain["high"] - y]]
        axes.errorbar([x], [y], error, color=look["color"], marker=marker, markersize=7, capsize=4, linestyle="none",
                      label=f"{method.label}: {budget_text(method)}")  # fmt: skip
        if not method.is_control:
            points.setdefault(tuple(planned_tasks(method, suite)), []).append((x, y))
    for same_tasks in points.values():
        front = [point for point in sorted(same_tasks) if all(y < point[1] for x, y in same_tasks if x < point[0])]
        if len(front) > 1:
            axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel="environment steps of training, a run", ylabel="change against the base policy (points)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlim(left=0)
    _legend(figure, axes)
    return bool(axes.containers)


FIGURES: dict[str, Draw] = {
    "learning-curves": learning_curves,
    "tasks": task_heat_map,
    "profiles": profiles,
    "pareto": pareto,
}
