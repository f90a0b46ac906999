"""Convergence of the CFM objective: the loss that training logged, over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .figures import looks, place_legend
from .methods import Method
from .metrics import metrics_of

METRIC = "cfm_loss"
"""What a method's update logs of the conditional flow-matching loss: its mean over the round's draws."""


def convergence(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """For each method that logged the loss: its quartiles over seeds, round by round, JSON-ready. A seed that stopped
    early counts up to there."""
    found = []
    for method in methods:
        rounds: dict[int, list[tuple[float, float]]] = {}
        for run in () if method.is_base else method.runs:
            for line in metrics_of(run):
                if line.get(METRIC) is not None and line.get("gradient_steps") is not None:
                    rounds.setdefault(line["iteration"], []).append((line["gradient_steps"], line[METRIC]))
        if not rounds:
            continue
        order = sorted(rounds)
        quartiles = [np.percentile([loss for _, loss in rounds[i]], (25, 50, 75)).tolist() for i in order]
        found.append({
            "method": method.label,
            "policy": method.policy,
            "iteration": order,
            "seeds": [len(rounds[i]) for i in order],
            "gradient_steps": [float(np.mean([steps for steps, _ in rounds[i]])) for i in order],
            "quartiles": quartiles,
        })  # fmt: skip
    return found


def draw_convergence(figure: Figure, curves: Sequence[dict[str, Any]]) -> bool:
    """The loss against gradient steps: median over seeds, and a band from the first to the third quartile."""
    axes = figure.add_subplot()
    for curve, look in zip(curves, looks(), strict=False):
        low, middle, high = np.array(curve["quartiles"]).T
        seeds = max(curve["seeds"])
        label = f"{curve['method']} on {curve['policy']}, {seeds} seed{'s' * (seeds > 1)}"
        axes.plot(curve["gradient_steps"], middle, label=label, linewidth=1.8, markersize=4, **look)
        axes.fill_between(curve["gradient_steps"], low, high, color=look["color"], alpha=0.18, linewidth=0)
    axes.set(xlabel="gradient steps of training; a critic's count like an actor's", ylim=(0, None))
    axes.set_ylabel("CFM loss in the round's update\n(median and quartiles over seeds)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    place_legend(figure, axes)
    return bool(curves)
