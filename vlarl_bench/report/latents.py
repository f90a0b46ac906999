"""Latent dynamics during training, in numbers: how the chunks that a run's policies decode spread and move.

The paper's latent x_t is what the flow actor emits and the decoder turns into actions (Lyu et al., 2025). Here the
actor is the policy's own decoder, so a latent is the normalised action chunk: one point, its H x A numbers in a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from ..errors import BenchError, install

if TYPE_CHECKING:
    from ..replay import Played

INITIAL, FAILED, SUCCESSFUL = "initial", "failed", "successful"
MOST_POINTS = 2000
"""Beyond so many chunks t-SNE and silhouettes take every k-th: both grow faster than their number."""


def describe(played: Sequence[Played]) -> dict[str, Any]:
    """All numbers of one run's figures, JSON-ready; `played` is in the order of training, the base policy first.

    Groups: `initial` are the base policy's chunks, `failed` and `successful` those of the last policy, by how their
    episode ended. Lengths and distances are of normalised actions. None stands where too few chunks say nothing.
    """
    points = np.concatenate([each.chunks.reshape(len(each.chunks), -1) for each in played]).astype(float)
    stage = np.repeat(np.arange(len(played)), [len(each.chunks) for each in played])
    group = np.concatenate([_groups(each, i, len(played)) for i, each in enumerate(played)])
    norms = np.concatenate([_norms(each) for each in played])
    plane, explained = _pca(points)
    thin = np.unique(np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round().astype(int))
    distance = _mahalanobis(points, points[stage == 0])
    policies = []
    for i, each in enumerate(played):
        mine, both = stage == i, thin[np.isin(stage[thin], (0, i))]
        policies.append({
            "iteration": each.iteration,
            "checkpoint": each.checkpoint,
            "episodes": len(each.success),
            "successes": int(each.success.sum()),
            "chunks": int(mine.sum()),
            "std": float(np.sqrt(points[mine].var(axis=0).mean())),
            "hull_area": _hull_area(plane[mine]),
            "action_norm": _quartiles(norms[mine]),
            "mahalanobis": _quartiles(distance[mine]),
            "silhouette_against_base": _silhouette(points[both], stage[both]),
        })  # fmt: skip
    names = [name for name in (INITIAL, FAILED, SUCCESSFUL) if (group == name).any()]
    groups = {}
    for name in names:
        own = np.concatenate([each.chunks[_groups(each, i, len(played)) == name] for i, each in enumerate(played)])
        groups[name] = {
            "chunks": len(own),
            "action_norm": _quartiles(norms[group == name]),
            "variance": own.reshape(-1, own.shape[-1]).astype(float).var(axis=0).tolist(),
            "mahalanobis": _quartiles(distance[group == name]),
        }
    grouped = thin[np.isin(group[thin], names)]
    judged = thin[np.isin(group[thin], (FAILED, SUCCESSFUL))]
    return {
        "dimensions": int(points.shape[1]),
        "policies": policies,
        "groups": groups,
        "silhouette": {
            "groups": _silhouette(points[grouped], group[grouped]),
            "failed_against_successful": _silhouette(points[judged], group[judged]),
        },
        "pca": {"explained_variance": explained, "points": plane.round(4).tolist()},
        "tsne": {"chunks": thin.tolist(), "points": _tsne(points[thin])},
        "policy_of_chunk": stage.tolist(),
        "succeeded": np.concatenate([each.success[each.episode] for each in played]).astype(int).tolist(),
    }


def _groups(played: Played, place: int, policies: int) -> np.ndarray:
    """[N] the group of each chunk; empty where it is in none."""
    if place == 0:
        return np.full(len(played.chunks), INITIAL)
    ended = np.where(played.success[played.episode], SUCCESSFUL, FAILED)
    return ended if place == policies - 1 else np.full(len(played.chunks), "")


def _norms(played: Played) -> np.ndarray:
    """[N] mean Euclidean length of a chunk's executed actions."""
    steps = np.arange(played.chunks.shape[1])[None] < played.executed[:, None]
    return (np.linalg.norm(played.chunks, axis=2) * steps).sum(1) / steps.sum(1)


def _quartiles(values: np.ndarray) -> list[float]:
    return np.percentile(values, (25, 50, 75)).tolist()


def _hull_area(plane: np.ndarray) -> float | None:
    """Area of the convex hull of points [N, 2]; None where they have none."""
    try:
        return float(ConvexHull(plane).volume)  # which in two dimensions is the area
    except (QhullError, ValueError):
        return None


def _pca(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Points [N, D] in the plane of their two largest variances [N, 2], and each one's share of all variance."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full")
    return pca.fit_transform(points), pca.explained_variance_ratio_.tolist()


def _tsne(points: np.ndarray) -> list[list[float]] | None:
    """t-SNE [N, 2] on one thread, which makes it repeat; None for fewer than ten points."""
    if len(points) < 10:
        return None
    import threadpoolctl
    from sklearn.manifold import TSNE

    with threadpoolctl.threadpool_limits(1):
        tsne = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=0)
        found: list[list[float]] = tsne.fit_transform(points).astype(float).round(4).tolist()
    return found


def _mahalanobis(points: np.ndarray, base: np.ndarray) -> np.ndarray:
    """[N] Mahalanobis distance to the base policy's chunks, over the root of the dimension; for those themselves its
    mean square is about 1. Their covariance is shrunk (Ledoit and Wolf, 2004): chunks are few for their dimensions."""
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(base)
    return np.sqrt(fitted.mahalanobis(points) / points.shape[1])


def _silhouette(points: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean silhouette (Rousseeuw, 1987): 1 apart, 0 on top of each other. None without two groups of two points."""
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2 or counts.min() < 2:
        return None
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(points, labels))


def check_installed() -> None:
    """Raises BenchError where scikit-learn is missing: before anything is played."""
    if importlib.util.find_spec("sklearn") is None:
        needs = f"analyze: latents need scikit-learn, which is not installed; {install('analysis')}"
        raise BenchError(f"{needs}, or add --states 0 to leave them out")
