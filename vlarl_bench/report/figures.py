"""Figures that compare methods under one protocol, as SVG and PNG in one style."""

import functools
import itertools
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import BenchError
from ..files import atomic_file
from ..stats import mean, performance_profile, seeds_estimate
from .comparisons import change, change_text, families
from .methods import (
    Method,
    base_of,
    cell,
    compared_methods,
    in_order,
    noiseless_of,
    planned_tasks,
    scores,
    suites_of,
    titles,
)
from .metrics import cpu_hours, machines_of, wall_time_curve
from .runs import RunFolder, training_curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, safe for the colour-blind; lines and markers differ too."""
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
"""7, 4 and 8: the combination repeats after 56 methods."""
LETTERS = 118
"""Of a legend, that a figure of 7.2 inches has room for side by side."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "vlarl-bench",
    "svg.fonttype": "none",
}  # fmt: skip
SAVED: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 150, "metadata": {"Software": ""}},
}
BAND = "band: 95% interval, resamples training seeds (Student's t); of fewer than three seeds none"
BARS = "bars: 95% interval over training seeds, of one seed over initial states"
"""What a figure says of its intervals, below its axis."""
Draw = Callable[[Figure, Sequence[Method], str], bool]


def write_figures(folder: str | os.PathLike[str], runs: Sequence[RunFolder]) -> list[Path]:
    """Draws what the rows allow, for each suite: `<figure>-<suite>.svg` and `.png`. Returns the paths."""
    methods = compared_methods(runs)
    written: list[Path] = []
    for suite in suites_of(methods):
        present = [method for method in methods if planned_tasks(method, suite)]
        for name, draw in FIGURES.items():
            title = f"{suite}, protocol {runs[0].manifest['protocol']['label']}"
            written += write_figure(folder, f"{name}-{suite}", title, draw, present, suite)
    if not written:
        raise BenchError("figures: the runs have no scored episode to draw")
    return written


def write_figure(
    folder: str | os.PathLike[str], name: str, title: str, draw: Callable[..., bool], *what: Any
) -> list[Path]:
    """Writes `<name>.svg` and `.png` of what `draw(figure, *what)` draws, in this project's style; the same drawing
    gives the same bytes. Returns their paths, none where `draw` says that there is nothing to see."""
    written = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        if not draw(figure, *what):
            return []
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        for ending, options in SAVED.items():
            path = Path(folder) / f"{name}.{ending}"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, **options)
            written.append(path)
    return written


def looks() -> Iterator[dict[str, Any]]:
    """Colour, line and marker of the first method, the second, and so on without end."""
    parts = zip(itertools.cycle(COLOURS), itertools.cycle(LINES), itertools.cycle(MARKERS), strict=False)
    return ({"color": colour, "linestyle": line, "marker": marker} for colour, line, marker in parts)


def _looks(methods: Sequence[Method]) -> list[tuple[Method, str, dict[str, Any]]]:
    """Each method with its title and its look; the same in every figure."""
    return [(method, title, look) for (method, title), look in zip(titles(methods).items(), looks(), strict=False)]


def _scored(methods: Sequence[Method], suite: str) -> list[Method]:
    return [method for method in methods if cell(method, suite)["complete"]]


def learning_curves(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Success while training against environment steps: mean over seeds, and Student's 95% band over seeds."""
    axes, drawn = figure.add_subplot(), False
    for method, title, look in _looks(methods):
        runs = () if method.is_base else method.runs
        curves = [Curve(*training_curve(run.rows_of(suite)), run.stopped is not None) for run in runs]
        drawn |= _mean_curve(axes, title, look, curves)
    axes.set(xlabel=f"environment steps of training\n{BAND}", ylabel="success while exploring (%)", ylim=(-2, 102))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    place_legend(figure, axes)
    return drawn


def wall_time_curves(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """As `learning_curves`, against minutes of training; says on which machines, since those decide the minutes."""
    axes, drawn = figure.add_subplot(), False
    timed: list[RunFolder] = []
    for method, title, look in _looks(methods):
        curves = []
        for run in () if method.is_base else method.runs:
            seconds, rates = wall_time_curve(run, run.rows_of(suite))
            curves.append(Curve([second / 60 for second in seconds], rates, run.stopped is not None))
            timed += [run] if seconds else []
        drawn |= _mean_curve(axes, title, look, curves)
    axes.set(ylabel="success while exploring (%)", ylim=(-2, 102))
    where = f"minutes of training, collecting and updating, on {'; '.join(machines_of(timed))}; these depend on"
    axes.set_xlabel(textwrap.fill(f"{where} the machine and on what else it did", 90) + f"\n{BAND}")
    place_legend(figure, axes)
    return drawn


class Curve(NamedTuple):
    """One seed's success rates."""

    x: list[float]
    rates: list[float]
    stopped: bool
    """Whether training ended it: from there on it stays where it was."""


def _mean_curve(axes: Axes, title: str, look: dict[str, Any], curves: Sequence[Curve]) -> bool:
    """Draws the mean of the seeds' curves where all of them have points, or have been stopped, with its band."""
    curves = [curve for curve in curves if curve.x]
    if not curves:
        return False
    end = min([curve.x[-1] for curve in curves if not curve.stopped] or [max(curve.x[-1] for curve in curves)])
    grid = np.linspace(min(end, max(curve.x[0] for curve in curves)), end, 60)
    at = np.array([np.interp(grid, curve.x, curve.rates) for curve in curves])
    seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}"
    axes.plot(grid, 100 * at.mean(axis=0), label=f"{title}, {seeds}", markevery=12, markersize=4, **look)
    _band(axes, grid, at, look["color"])
    return True


def _band(axes: Axes, x: np.ndarray, each: np.ndarray, colour: str, step: Literal["post"] | None = None) -> None:
    """Around the mean of curves [S, N], where there are three: that of two seeds would cover the figure."""
    if len(each) < 3:
        return
    estimates = [seeds_estimate(mean, column[:, None]) for column in each.T]
    low = np.array([np.nan if e.low is None else 100 * e.low for e in estimates])
    high = np.array([np.nan if e.high is None else 100 * e.high for e in estimates])
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, step=step)


def place_legend(figure: Figure, axes: Axes) -> None:
    """Below the panels, where there is something to name, in columns that fit; the figure grows by its lines."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = max(1, min(len(names), LETTERS // (max(map(len, names)) + 8)))
        figure.set_figheight(4.0 + 0.17 * -(-len(names) // columns))
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8)


def task_heat_map(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Success of each method (rows, the best first) on each task, all seeds together; crossed out where nothing was
    played."""
    methods, title = in_order(methods, [suite]), titles(methods)
    tasks = list(dict.fromkeys(task for method in methods for task in planned_tasks(method, suite)))
    rates = np.full((len(methods), len(tasks)), np.nan)
    for i, method in enumerate(methods):
        table = scores(method, suite)
        for k, task in enumerate(planned_tasks(method, suite)):
            if not np.isnan(table[:, k]).all():
                rates[i, tasks.index(task)] = np.nanmean(table[:, k])
    crowded = len(tasks) > 12
    figure.set_size_inches(4.4 + (0.4 if crowded else 0.95) * len(tasks), 2.2 + 0.27 * len(methods))
    axes = figure.add_subplot()
    axes.grid(False)
    image = axes.imshow(100 * rates, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, j in itertools.product(range(len(methods)), range(len(tasks))):
        known = not np.isnan(rates[i, j])
        colour = "white" if known and rates[i, j] < 0.5 else "black"
        axes.text(
            j, i, f"{100 * rates[i, j]:.0f}" if known else "×", ha="center", va="center", color=colour, fontsize=8
        )
    names = [textwrap.fill(task.replace("_", " "), 60 if crowded else 18) for task in tasks]
    axes.set_xticks(range(len(tasks)), names, fontsize=6, rotation=90 if crowded else 0)
    axes.set_yticks(range(len(methods)), [textwrap.fill(title[method], 44) for method in methods], fontsize=7)
    figure.colorbar(image, label="success (%)")
    return not np.isnan(rates).all()


def profiles(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Share of (seed, task) scores above each success rate, with Student's 95% band over seeds."""
    axes, thresholds = figure.add_subplot(), np.linspace(0, 1, 101)
    scored = _scored(methods, suite)
    for method, title, look in _looks(methods):
        if method not in scored:
            continue
        each = np.array([performance_profile(seed[None], thresholds) for seed in scores(method, suite)])
        axes.step(
            100 * thresholds, 100 * each.mean(axis=0), where="post", label=title, markevery=10, markersize=4, **look
        )
        _band(axes, 100 * thresholds, each, look["color"], step="post")
    axes.set(xlabel=f"success rate τ (%)\n{BAND}", ylabel="runs and tasks above τ (%)", xlim=(0, 100), ylim=(-2, 102))
    place_legend(figure, axes)
    return bool(scored)


def pareto(figure: Figure, methods: Sequence[Method], suite: str, cost: str = "env_steps") -> bool:
    """Gain over the base policy, with its 95% interval, against what a run spent on training; hollow where episodes are
    missing. Lines: of each base policy, which costs nothing, the best gain for so much."""

    def spent(method: Method) -> float | None:
        return cpu_hours(method.runs) if cost == "cpu_hours" else method.budget().get(cost)

    axes = figure.add_subplot()
    points: dict[Method, tuple[float, float]] = {}
    for method, title, look in _looks(methods):
        gain, x = _gain(method, methods, suite), spent(method)
        if gain is None or x is None:
            continue
        y = 100 * gain["value"]
        whole = {} if gain["complete"] else {"markerfacecolor": "none"}
        title += "" if gain["complete"] else " INCOMPLETE"
        axes.errorbar(
            [x], [y], _error(gain), capsize=4, markersize=7, label=title, **look | {"linestyle": "none"} | whole
        )
        if gain["complete"] and not method.is_control:
            points[method] = (x, y)
    if not axes.containers:
        return False
    together = families(methods, suite)
    for family in together:
        mine = sorted(points[methods[i]] for i in family if methods[i] in points)
        front = [(0.0, 0.0)]
        front += [point for k, point in enumerate(mine) if all(point[1] > y for _, y in [*front, *mine[:k]])]
        if len(front) > 1:
            onward = [*front, (max(x for x, _ in points.values()), front[-1][1])]
            axes.step(*zip(*onward, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
            if len(together) > 1:
                axes.annotate(methods[family[0]].policy, front[-1], (4, 6), textcoords="offset points", fontsize=7)
    axes.plot([0], [0], marker="s", color="0.4", linestyle="none", label="base policy")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel=f"{COSTS[cost]}\n{BARS}", ylabel="change against base (points)")
    whole_numbers = cost in ("env_steps", "gradient_steps")
    axes.xaxis.set_major_formatter((lambda x, _: f"{x:,.0f}") if whole_numbers else (lambda x, _: f"{x:.3g}"))
    axes.set_xlim(-0.02 * (axes.dataLim.x1 or 1), 1.06 * (axes.dataLim.x1 or 1))
    place_legend(figure, axes)
    return True


COSTS = {
    "env_steps": "environment steps of training, a run",
    "gradient_steps": "gradient steps of training, a run; a critic's count like an actor's",
    "flops": "floating-point operations of training, a run",
    "cpu_hours": "CPU hours of training, a run; these depend on the machine",
}
"""By their names in `Method.budget`; CPU hours are told by `metrics.jsonl`."""


def _gain(method: Method, methods: Sequence[Method], suite: str) -> dict[str, Any] | None:
    """Change against the base policy that the method began with; None where there is none."""
    base = base_of(method, methods)
    return None if base is None else change(method, base, suite)


def _error(gain: dict[str, Any]) -> list[list[float]] | None:
    """How far its interval reaches below and above it, in points, as `errorbar` wants it."""
    if gain["low"] is None:
        return None
    return [[100 * (gain["value"] - gain["low"])], [100 * (gain["high"] - gain["value"])]]


def gains(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """Gain over the base policy, with its 95% interval, of every method: a bar each, the best first, those of one base
    policy together."""
    groups: dict[tuple[str, str], list[tuple[float, Method]]] = {}
    for method in methods:
        if gain := _gain(method, methods, suite):
            groups.setdefault((method.policy, method.checkpoint), []).append((-gain["value"], method))
    order = [sorted(group, key=lambda pair: (pair[0], pair[1].label)) for _, group in sorted(groups.items())]
    return _bars(figure, methods, suite, [[method for _, method in group] for group in order])


def ablation(figure: Figure, methods: Sequence[Method], suite: str) -> bool:
    """As `gains`, of each algorithm that was run under several settings."""
    groups: dict[tuple[str, str, str], list[Method]] = {}
    for method in methods:
        groups.setdefault((method.name, method.policy, method.checkpoint), []).append(method)
    several = [[method for method in group if _gain(method, methods, suite)] for group in groups.values()]
    return _bars(figure, methods, suite, [group for group in several if len(group) > 1])


def _bars(figure: Figure, methods: Sequence[Method], suite: str, groups: Sequence[Sequence[Method]]) -> bool:
    """A bar for each method that has a gain, a colour a group. Controls are hatched; what has episodes missing is
    hollow. A diamond is the gain without noise."""
    title, name, y, diamond = titles(methods), {}, 0.0, ""
    axes = figure.add_subplot()
    for i, group in enumerate(groups):
        for method in group:
            gain, shown = _gain(method, methods, suite), cell(method, suite)
            if gain is None:
                continue
            colour, whole = COLOURS[i % len(COLOURS)], gain["complete"]
            axes.barh(y, 100 * gain["value"], 0.7, color=colour if whole else "none", alpha=0.75,
                      edgecolor="0.15" if method.is_control else colour, hatch="//" if method.is_control else None,
                      xerr=_error(gain),
                      error_kw={"capsize": 3, "ecolor": "0.2"})  # fmt: skip
            noiseless = noiseless_of(method, suite)
            if noiseless and noiseless["complete"] and noiseless["difference"] is not None:
                axes.plot(100 * noiseless["difference"], y, "D", color="white", markeredgecolor="0.1", markersize=6)
                diamond = "; diamond: the same without noise"
            n = len(method.seeds_on(suite))
            seeds = f"{n} seed{'s' * (n > 1)}"
            told = f"{change_text(gain)}, {seeds}, {shown['successes']}/{shown['episodes']}"
            axes.annotate(told, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            name[y] = textwrap.fill(title[method], 40)
            y += 1
        y += 0.6
    figure.set_size_inches(8.6, 1.3 + 0.3 * y)
    axes.set_yticks(list(name), list(name.values()), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    told = f"change against the base policy (points){diamond}; beside it interval, seeds, successes/episodes"
    axes.set_xlabel(f"{told}\n{BARS}", fontsize=8)
    return bool(name)


FIGURES: dict[str, Draw] = {
    "learning-curves": learning_curves,
    "wall-time": wall_time_curves,
    "tasks": task_heat_map,
    "profiles": profiles,
    "gains": gains,
    "ablation": ablation,
    "pareto": pareto,
    "pareto-gradient-steps": functools.partial(pareto, cost="gradient_steps"),
    "pareto-flops": functools.partial(pareto, cost="flops"),
    "pareto-cpu-hours": functools.partial(pareto, cost="cpu_hours"),
}
