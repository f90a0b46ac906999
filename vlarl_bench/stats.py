"""The statistics behind every table: success rates, how much they changed on the same episodes, and what many seeds
and tasks come to. Each function says what its interval resamples: that is what the interval speaks about.

Scores over seeds and tasks are arrays [..., S, T]: success rates of S training seeds on T tasks. The seed is the unit
that counts as independent; tasks and initial states are taken as they are.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from scipy.stats import binom, binomtest, quantile_test, ttest_1samp
from scipy.stats import t as student

CONFIDENCE = 0.95

Episode = TypeVar("Episode", bound=tuple[Any, ...])
"""What makes two episodes a pair: (suite, task, init_state, repeat), behind a training seed where there are several.
All but the repeat name the cluster."""

Level = Literal["seed", "task", "episode"]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval for a success rate (Wilson, 1927); (0, 1) when there are no episodes.

    Treats episodes as independent: with several repeats of an initial state it speaks of these states, and is too
    narrow for others like them (docs/statistics.md has how much).
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedResult:
    """How a policy changed on the episodes that were played before and after."""

    n_pairs: int
    n_clusters: int
    """Distinct pairs but for the repeat, such as (suite, task, init_state): the units that count as independent."""
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
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(pair[:-1] for pair in pairs))}
    changes = np.array([int(final[pair]) - int(base[pair]) for pair in pairs], dtype=int)
    return paired_changes(changes, np.array([number[pair[:-1]] for pair in pairs], dtype=int))


def paired_changes(changes: np.ndarray, clusters: np.ndarray) -> PairedResult:
    """As `paired_result`, of [P] changes (-1, 0 or 1) and the number of each pair's cluster."""
    _, which = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(which)
    totals = np.bincount(which, weights=changes, minlength=len(sizes)).round().astype(int)
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    low, high = difference_interval(totals, sizes)
    return PairedResult(
        n_pairs=len(changes),
        n_clusters=len(sizes),
        gained=gained,
        lost=lost,
        difference=float(changes.mean()) if len(changes) else 0.0,
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
    sum is at least the one seen. The totals are integers, so this is exact, without drawing patterns: n clusters of one
    size sum to that size times (2 Binomial(n, 1/2) - n). With one pair a cluster this is the exact McNemar test.
    """
    seen = abs(int(np.sum(totals)))
    sizes, counts = np.unique(np.abs(np.asarray(totals, dtype=int)), return_counts=True)
    groups = sorted((int(count), int(size)) for size, count in zip(sizes, counts, strict=True) if size)
    if not seen:
        return 1.0
    chances = np.ones(1)  # of each sum of the groups so far, from the lowest to the highest
    for count, size in groups[:-1]:
        sums = np.zeros(2 * count * size + 1)
        sums[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, sums)
    count, size = groups[-1]
    missing = seen - (np.arange(len(chances)) - len(chances) // 2)  # what the last and largest group must add
    least = -((-missing - count * size) // (2 * size))
    return min(1.0, 2 * float(chances @ binom.sf(least - 1, count, 0.5)))


def difference_interval(totals: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray) -> tuple[float, float]:
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
    half = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def seeds_interval(differences: Sequence[float]) -> tuple[float, float, float] | None:
    """(low, high, p) of Student's t over training seeds, two-sided against no change; None for fewer than two seeds
    or when all are equal, where t is undefined."""
    if len(differences) < 2 or np.ptp(differences) < 1e-12:  # what rounding leaves of equal seeds is no spread
        return None
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return max(-1.0, float(interval.low)), min(1.0, float(interval.high)), float(test.pvalue)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's (1979) adjusted p-values [N], in the order given: below alpha for none of the true hypotheses with
    probability at least 1 - alpha, however the tests depend on one another."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def rank_intervals(differences: np.ndarray, p_values: np.ndarray) -> np.ndarray:
    """[M, 2] lowest and highest rank (1 is best) of M methods that the data leave open.

    differences [M, M]: score of i minus score of j, antisymmetric; p_values [M, M]: of each pair, symmetric, corrected
    for their number. A method's best rank is one more than the methods separated above it, and its worst leaves out
    those separated below (Mogstad, Romano, Shaikh and Wilhelm, 2024). All ranks are right at once with probability at
    least 95%. It resamples whatever the tests do.
    """
    separated = np.asarray(p_values) < 1 - CONFIDENCE
    above = (separated & (np.asarray(differences) < 0)).sum(axis=1)
    below = (separated & (np.asarray(differences) > 0)).sum(axis=1)
    return np.stack([1 + above, len(above) - below], axis=1)


# Aggregates over seeds and tasks, as rliable (Agarwal et al., 2021) defines them: [..., S, T] -> [...].


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over tasks of the mean over seeds."""
    return np.asarray(scores).mean(axis=(-2, -1))


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: the mean of what is left of all S*T scores without the lowest and the highest quarter."""
    flat = np.asarray(scores)
    flat = flat.reshape(*flat.shape[:-2], -1)
    cut = flat.shape[-1] // 4
    return np.sort(flat, axis=-1)[..., cut : flat.shape[-1] - cut].mean(axis=-1)


def optimality_gap(scores: np.ndarray, target: float = 1.0) -> np.ndarray:
    """By how much the scores miss `target` on average; more than the target is no merit. With success rates and a
    target of 1 it is 1 - mean."""
    return target - np.minimum(scores, target).mean(axis=(-2, -1))


def probability_of_improvement(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Chance that a run of one method beats a run of another on the same task, averaged over tasks; ties count half.

    scores [..., S, T] and others [..., U, T] -> [...].
    """
    mine, theirs = np.asarray(scores)[..., :, None, :], np.asarray(others)[..., None, :, :]
    return ((mine > theirs) + 0.5 * (mine == theirs)).mean(axis=(-3, -2, -1))


def performance_profile(scores: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share of (seed, task) scores above each threshold: [..., S, T] -> [..., len(thresholds)]."""
    above = np.asarray(scores)[..., None] > np.asarray(thresholds)
    return above.mean(axis=(-3, -2))


@dataclass(frozen=True)
class Estimate:
    """A number and its interval over training seeds; no interval for one seed, or where all seeds agree exactly."""

    value: float
    low: float | None = None
    high: float | None = None


def seeds_estimate(
    estimator: Callable[..., np.ndarray],
    *groups: np.ndarray,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """`estimator` of one [S, T] array of scores, or of several whose seeds are independent, with its interval.

    Resamples: whole training seeds, by leaving out one at a time (jackknife; Efron and Tibshirani, 1993, ch. 11), with
    Student's t on the seeds. For `mean` this is Student's interval over the seeds' means; for
    `probability_of_improvement` on one task it has Brunner and Munzel's (2000) standard error, with the degrees of
    freedom of the method with fewer seeds: theirs cover 93% at 3 to 5 seeds and several tasks. Tasks and initial
    states are taken as they are. A bootstrap of so few seeds would not do (docs/statistics.md).
    """
    groups = tuple(np.asarray(group, dtype=float) for group in groups)
    value = float(estimator(*groups))
    counts = [len(group) for group in groups]
    if min(counts) < 2:
        return Estimate(value)
    variances = []
    for i, (group, n) in enumerate(zip(groups, counts, strict=True)):
        kept = ~np.eye(n, dtype=bool)
        without = np.stack([group[kept[k]] for k in range(n)])
        left = estimator(*(without if j == i else other for j, other in enumerate(groups)))
        variances.append((n - 1) ** 2 / n * float(np.var(left, ddof=1)))
    total = sum(variances)
    if total < 1e-24:  # rounding of equal seeds
        return Estimate(value)
    half = float(student.ppf((1 + CONFIDENCE) / 2, min(counts) - 1)) * math.sqrt(total)
    return Estimate(value, max(bounds[0], value - half), min(bounds[1], value + half))


def hierarchical_bootstrap(
    scores: np.ndarray,
    replicates: int,
    rng: np.random.Generator,
    levels: Collection[Level] = ("seed", "task", "episode"),
    episodes: np.ndarray | None = None,
) -> np.ndarray:
    """[replicates, S, T] scores as other experiments might have had them, drawn level by level from [S, T].

    Resamples what `levels` names: whole seeds; within each drawn seed its tasks; within each task its episodes, whose
    numbers [S, T] `episodes` gives (only then). A level that is not named stays as it is. No table uses
    it: percentiles of seeds alone cover too little with few seeds, and those of all levels too much for a claim about
    these tasks, since the chance of tasks and episodes is in the spread of the seeds already (docs/statistics.md has
    how much). Intervals in tables come from `seeds_estimate`.
    """
    scores = np.asarray(scores, dtype=float)
    n_seeds, n_tasks = scores.shape
    shape = (replicates, n_seeds, n_tasks)
    seeds = rng.integers(n_seeds, size=(*shape[:2], 1)) if "seed" in levels else np.arange(n_seeds)[:, None]
    tasks = rng.integers(n_tasks, size=shape) if "task" in levels else np.arange(n_tasks)
    cells = np.broadcast_to(seeds * n_tasks + tasks, shape)
    drawn = scores.ravel()[cells]
    if "episode" in levels and episodes is not None:
        counts = np.broadcast_to(episodes, scores.shape).ravel()[cells]
        drawn = rng.binomial(counts, drawn) / counts  # resampling n outcomes of which a share p succeeded
    return drawn


def area_under_curve(steps: Sequence[float] | np.ndarray, rates: Sequence[float] | np.ndarray, until: float) -> float:
    """Average height from 0 to `until` of the curve through (steps, rates), level before its first and after its last
    point; the sample efficiency of one run, comparable between runs with the same `until`."""
    x = np.asarray(steps, dtype=float)
    grid = np.unique(np.concatenate([[0.0], x[(x > 0) & (x < until)], [until]]))
    return float(np.trapezoid(np.interp(grid, x, rates), grid) / until)


def steps_to(steps: Sequence[float] | np.ndarray, rates: Sequence[float] | np.ndarray, threshold: float) -> float:
    """Steps at which the curve first reaches `threshold`, on the line between two points, and is there at the next
    point too, since one alone may be luck; infinite if never."""
    for i in range(len(rates) - 1):
        if min(rates[i], rates[i + 1]) >= threshold:
            if i == 0:
                return float(steps[0])
            share = (threshold - rates[i - 1]) / (rates[i] - rates[i - 1])
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return math.inf


def median_interval(values: Sequence[float]) -> Estimate:
    """Median over seeds with the exact interval between two order statistics. It needs six seeds for 95%, and holds
    for infinite values too, so seeds that never reached a threshold count. Resamples: training seeds."""
    found = quantile_test(sorted(values), p=0.5).confidence_interval(CONFIDENCE)
    low, high = float(found.low), float(found.high)
    value = float(np.median(values))
    return Estimate(value) if math.isnan(low) or math.isnan(high) else Estimate(value, low, high)
