"""Latent dynamics during training, in pictures: what `latents.describe` found of one run."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import COLOURS
from .latents import FAILED, INITIAL, SUCCESSFUL

SHOWN = {INITIAL: (COLOURS[4], "s"), FAILED: (COLOURS[1], "X"), SUCCESSFUL: (COLOURS[2], "o")}
"""Colour and marker of each group."""


def draw_embeddings(figure: Figure, found: dict[str, Any]) -> bool:
    """PCA and t-SNE of all chunks: above by policy, below the base policy's against the last one's by outcome."""
    figure.set_size_inches(9, 8)
    panels = figure.subplots(2, 2)
    stage, won = np.array(found["policy_of_chunk"]), np.array(found["succeeded"], bool)
    last = stage.max()
    first, second = (f"{100 * share:.0f}%" for share in found["pca"]["explained_variance"])
    everything = np.arange(len(stage))
    tsne = found["tsne"]
    for column, (points, chunks, axis_labels) in enumerate((
        (found["pca"]["points"], everything, (f"PCA 1 ({first} of the variance)", f"PCA 2 ({second})")),
        (tsne["points"], np.array(tsne["chunks"], int), ("t-SNE 1", "t-SNE 2")),
    )):  # fmt: skip
        above, below = panels[:, column]
        for axes in (above, below):
            axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
        if points is None:
            above.set_title("too few chunks")
            continue
        at = np.array(points)
        for i, policy in enumerate(found["policies"]):
            colour = matplotlib.colormaps["viridis"](0.9 * i / max(last, 1))
            _scatter(above, at[stage[chunks] == i], colour, "osD^vPX"[i % 7], _after(policy), column == 0)
        for name, mine in (
            (INITIAL, stage == 0), (FAILED, (stage == last) & ~won), (SUCCESSFUL, (stage == last) & won)
        ):  # fmt: skip
            _scatter(below, at[mine[chunks]], *SHOWN[name], name, column == 0)
    for axes in panels[:, 0]:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="best", frameon=True)
    return True


def _scatter(axes: Axes, points: np.ndarray, colour: Any, marker: str, label: str, named: bool) -> None:
    if len(points):
        axes.scatter(points[:, 0], points[:, 1], s=12, color=[colour], marker=marker, alpha=0.5, linewidths=0,
                     label=label if named else None)  # fmt: skip


def _after(policy: dict[str, Any]) -> str:
    name = f"after round {policy['iteration']}" if policy["iteration"] else "base policy"
    return f"{name}: {policy['successes']}/{policy['episodes']}"


def draw_dispersion(figure: Figure, found: dict[str, Any]) -> bool:
    """Each policy the run kept, in the order of training: spread, hull, lengths of actions, distance from the base."""
    figure.set_size_inches(9, 6.5)
    policies = found["policies"]
    rounds = [policy["iteration"] for policy in policies]
    (std, hull, norm), (distance, apart, success) = figure.subplots(2, 3)
    for axes, name, title in (
        (std, "std", "dispersion: standard deviation"),
        (hull, "hull_area", "dispersion: hull area, PCA plane"),
        (apart, "silhouette_against_base", "silhouette against the base"),
    ):
        values = [np.nan if policy[name] is None else policy[name] for policy in policies]
        axes.plot(rounds, values, color=COLOURS[0], marker="o")
        axes.set_title(title, fontsize=9)
    for axes, name, title in (
        (norm, "action_norm", "length of an action"),
        (distance, "mahalanobis", "Mahalanobis distance to the base"),
    ):
        low, middle, high = np.array([policy[name] for policy in policies]).T
        axes.errorbar(rounds, middle, [middle - low, high - middle], color=COLOURS[0], marker="o", capsize=4)
        axes.set_title(f"{title}\n(median, quartiles of chunks)", fontsize=9)
    shares = [100 * policy["successes"] / policy["episodes"] for policy in policies]
    success.plot(rounds, shares, color=COLOURS[2], marker="o")
    success.set_title(f"success here (%), {policies[0]['episodes']} episodes each", fontsize=9)
    success.set_ylim(-2, 102)
    for axes in (std, hull, norm, distance):
        axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 0.01))
    apart.set_ylim(-0.1, 1)  # or two policies that are on top of each other would look apart
    for axes in (distance, apart, success):
        axes.set_xlabel("rounds of training")
    for axes in figure.axes:
        axes.set_xlim(-0.3, max(rounds) + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def draw_groups(figure: Figure, found: dict[str, Any]) -> bool:
    """Initial, failed and successful chunks: lengths of actions, variance of each dimension, distance from the base."""
    figure.set_size_inches(9, 5.2)
    groups = found["groups"]
    norm, variance, distance = figure.subplots(1, 3, width_ratios=(1, 1.6, 1))
    for axes, key, title in (
        (norm, "action_norm", "length of an action"),
        (distance, "mahalanobis", "Mahalanobis distance\nto the base"),
    ):
        for x, (name, group) in enumerate(groups.items()):
            low, middle, high = group[key]
            axes.errorbar([x], [middle], [[middle - low], [high - middle]], color=SHOWN[name][0], marker=SHOWN[name][1],
                          markersize=8, capsize=5, linewidth=2)  # fmt: skip
        axes.set_xticks(
            range(len(groups)), [f"{name}\nn={group['chunks']}" for name, group in groups.items()], fontsize=8
        )
        axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, None))
        axes.set_title(f"{title}\n(median, quartiles of chunks)", fontsize=9)
    for i, (name, group) in enumerate(groups.items()):
        dimensions = np.arange(len(group["variance"]))
        variance.bar(dimensions + 0.27 * (i - 1), group["variance"], 0.25, color=SHOWN[name][0], label=name,
                     hatch=("", "//", "..")[i], edgecolor="white")  # fmt: skip
    variance.set_xticks(dimensions, [str(i + 1) for i in dimensions])
    variance.set(xlabel="dimension of an action")
    variance.set_title("variance of each dimension", fontsize=9)
    three, two = (_number(found["silhouette"][name]) for name in ("groups", "failed_against_successful"))
    figure.supxlabel(f"silhouette: of the groups {three}; of failed against successful {two}", fontsize=9)
    variance.legend(fontsize=8)
    return True


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
