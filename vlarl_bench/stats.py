"""The statistics behind every table: success rates, and how much they changed on the same episodes."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, ttest_1samp
from scipy.stats import t as student

CONFIDENCE = 0.95

Episode = tuple[str, str, int, int]
"""(suite, task, init_state, repeat): what makes two episodes a pair."""


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a success rate (Wilson, 1927); (0, 1) when there are no episodes.

    Treats episodes as independent: with several repeats of an initial state it is somewhat too narrow.
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedResult:
    """How a policy changed on the episodes that were played before and after."""

    n_pairs: int
    n_clusters: int
    """Distinct (suite, task, init_state) among the pairs: the units that count as independent."""
    gained: int
    """Pairs that failed before and succeed after."""
    lost: int
    """Pairs that succeeded before and fail after."""
    difference: float
    """Success rate after minus before, over the pairs; in [-1, 1]."""
    low: float
    high: float
    """95% interval of the difference."""
    p_value: float
    """Two-sided, of the exact sign-flip test over clusters: valid when repeats of an initial state go together."""
    mcnemar_p: float
    """Two-sided, of the exact McNemar test over pairs: valid only if all pairs are independent."""


def paired_result(base: Mapping[Episode, bool], final: Mapping[Episode, bool]) -> PairedResult:
    """Compares the episodes that are in both; the others do not count. With no pair at all, the interval is [-1, 1]
    and p is 1."""
    pairs = sorted(base.keys() & final.keys())
    changes = np.array([int(final[pair]) - int(base[pair]) for pair in pairs], dtype=int)
    clusters: dict[Hashable, int] = {pair[:3]: 0 for pair in pairs}
    index = {cluster: i for i, cluster in enumerate(clusters)}
    which = np.array([index[pair[:3]] for pair in pairs], dtype=int)
    totals = np.bincount(which, weights=changes, minlength=len(clusters)).round().astype(int)
    sizes = np.bincount(which, minlength=len(clusters))
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    low, high = difference_interval(totals, sizes)
    return PairedResult(
        n_pairs=len(pairs),
        n_clusters=len(clusters),
        gained=gained,
        lost=lost,
        difference=float(changes.mean()) if len(pairs) else 0.0,
        low=low,
        high=high,
        p_value=sign_flip_p(totals),
        mcnemar_p=mcnemar_p(gained, lost),
    )


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: are the pairs that changed as often gains as losses (McNemar, 1947)?"""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip_p(totals: Sequence[int] | np.ndarray) -> float:
    """Two-sided exact sign-flip (paired permutation) test that cluster totals are symmetric about 0.

    totals [C]: the sum of changes in each cluster. If before and after were the same policy, swapping them within a
    cluster would change nothing, so all 2^C sign patterns are equally likely; p is the share of them whose absolute
    sum is at least the one seen. The totals are integers, so the distribution of the sum is built exactly, one cluster
    at a time, without drawing patterns. With one pair a cluster this is the exact McNemar test.
    """
    sizes, seen = np.abs(np.asarray(totals, dtype=int)), int(np.sum(totals))
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)  # of each sum from -reach to reach
    chances[reach] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # never wraps: |sum| <= reach
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(seen)].sum()))


def difference_interval(
    totals: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of a paired difference of success rates, in [-1, 1], from [C] cluster sums of changes and pair counts.

    Student's t over clusters with the cluster-robust variance of a ratio (Cochran, 1977, sec. 6.3), so repeats of one
    initial state count as one observation. Two imagined clusters of average size are added, one all gained and one all
    lost, as Bonett and Price (2012) do with pairs: without them the interval has no width when every cluster changes
    alike. What varies is the initial state and the noise; the tasks and the trained policy are taken as they are.
    """
    totals, sizes = np.asarray(totals, dtype=float), np.asarray(sizes, dtype=float)
    if len(sizes) == 0:
        return -1.0, 1.0
    average = sizes.mean()
    totals, sizes = np.append(totals, [average, -average]), np.append(sizes, [average, average])
    n = len(sizes)
    centre = totals.sum() / sizes.sum()
    spread = math.sqrt(n / (n - 1) * np.square(totals - centre * sizes).sum()) / sizes.sum()
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * spread
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def seeds_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float] | None:
    """(low, high, p) of Student's t over training seeds, two-sided against no change; None for fewer than two seeds
    or when all are equal, where t is undefined."""
    if len(set(differences)) < 2:
        return None
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(confidence)
    return max(-1.0, float(interval.low)), min(1.0, float(interval.high)), float(test.pvalue)
