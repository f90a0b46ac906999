"""How often each interval holds the truth, over simulated experiments whose truth is known. Nominal: 95%.

    python scripts/interval_coverage.py                       # 10,000 experiments a line
    python scripts/interval_coverage.py --experiments 400     # a look
    python scripts/interval_coverage.py --only over_seeds     # one part

Seeds are clusters: logit p = task + seed + seed-and-task, the last two normal with deviations 0.4 and 0.3, and 50
episodes are played for each seed and task. A truth is what infinitely many seeds would give on the same ten tasks. The
standard error of a coverage of 95% over 10,000 experiments is 0.2 points.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy.special import expit
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from vlarl_bench import stats

TASKS, EPISODES, SEED_SPREAD, CELL_SPREAD = 10, 50, 0.4, 0.3
EASE = np.linspace(-1.0, 2.5, TASKS)
BETTER = 0.3
"""By how much, in logits, the second method is better where two are compared."""
PROFILE_AT = 0.6

Line = tuple[str, str, float]
Estimator = Callable[..., np.ndarray]


def main() -> None:
    """One line an interval and setting."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiments", type=int, default=10_000)
    parts = (single_policies, before_and_after, over_seeds, efficiency, ranks, families, bootstraps)
    parser.add_argument("--only", choices=[part.__name__ for part in parts])
    options = parser.parse_args()
    print("| interval | setting | coverage |\n| --- | --- | --- |")
    for part in parts:
        if options.only not in (None, part.__name__):
            continue
        for interval, setting, coverage in part(options.experiments):
            print(f"| {interval} | {setting} | {100 * coverage:.1f}% |", flush=True)


def simulate(rng: np.random.Generator, experiments: int, seeds: int, shift: float = 0.0) -> np.ndarray:
    """Success rates [experiments, seeds, TASKS]."""
    logits = EASE + shift + SEED_SPREAD * rng.standard_normal((experiments, seeds, 1))
    logits = logits + CELL_SPREAD * rng.standard_normal((experiments, seeds, TASKS))
    return rng.binomial(EPISODES, expit(logits)) / EPISODES


def estimators() -> dict[str, Estimator]:
    """What is estimated from one array of scores."""
    return {
        "mean": stats.mean,
        "IQM": stats.iqm,
        "optimality gap, target 0.9": partial(stats.optimality_gap, target=0.9),
        f"performance profile at {PROFILE_AT}": lambda x: stats.performance_profile(x, [PROFILE_AT])[..., 0],
    }


def over_seeds(experiments: int) -> Iterator[Line]:
    """`seeds_estimate`, and `seeds_interval` of a paired difference."""
    rng = np.random.default_rng(1)
    crowd, better = simulate(rng, 1, 200_000)[0], simulate(rng, 1, 200_000, BETTER)[0]
    # Independent pairs of seeds estimate the same chance as all pairs do.
    improvement = float(((better > crowd) + 0.5 * (better == crowd)).mean())
    for name, estimator in estimators().items():
        truth = float(estimator(crowd))
        for seeds in (3, 5, 10, 20):
            found = [stats.seeds_estimate(estimator, each) for each in simulate(rng, experiments, seeds)]
            yield f"seeds_estimate: {name}", f"{seeds} seeds", covered(found, truth)
    for seeds in (3, 5, 10, 20):
        pairs = zip(simulate(rng, experiments, seeds, BETTER), simulate(rng, experiments, seeds), strict=True)
        found = [stats.seeds_estimate(stats.probability_of_improvement, *pair) for pair in pairs]
        yield "seeds_estimate: probability of improvement", f"{seeds} seeds a method", covered(found, improvement)
    truth = float(better.mean() - crowd.mean())
    for seeds in (3, 5, 10):
        gains = simulate(rng, experiments, seeds, BETTER).mean(2) - simulate(rng, experiments, seeds).mean(2)
        intervals = [stats.seeds_interval(gain) for gain in gains]
        hits = [interval is not None and interval[0] <= truth <= interval[1] for interval in intervals]
        yield "seeds_interval: difference", f"{seeds} seeds", float(np.mean(hits))


def covered(found: list[stats.Estimate], truth: float) -> float:
    """Share of the estimates whose interval holds the truth; one without an interval claims nothing, and does."""
    return float(np.mean([e.low is None or e.high is None or e.low <= truth <= e.high for e in found]))


def single_policies(experiments: int) -> Iterator[Line]:
    """Wilson's interval where its assumption holds, and where it does not: with repeats of initial states, as a truth
    of these states and of others like them; and pooled over training seeds."""
    rng = np.random.default_rng(2)
    for n in (50, 150, 500):
        rates = rng.uniform(0.05, 0.95, experiments)
        intervals = [stats.wilson_interval(int(k), n) for k in rng.binomial(n, rates)]
        hits = [low <= rate <= high for (low, high), rate in zip(intervals, rates, strict=True)]
        yield "wilson_interval", f"one policy, {n} independent episodes", float(np.mean(hits))
    repeated, rate, n = np.random.default_rng(8), 0.4, 150
    low, high = np.array([stats.wilson_interval(k, n) for k in range(n + 1)]).T
    for spread in (0.5, 2.0):
        chances = repeated.beta(rate / spread, (1 - rate) / spread, (experiments, n // 2))
        wins = repeated.binomial(2, chances).sum(1)
        for whose, rates in (("of these states", chances.mean(1)), ("of any such states", np.full(experiments, rate))):
            inside = (low[wins] <= rates) & (rates <= high[wins])
            setting = f"one policy, {n // 2} states x 2 that correlate by {spread / (1 + spread):.2f}, {whose}"
            yield "wilson_interval", setting, float(inside.mean())
    truth, n = float(simulate(rng, 1, 200_000).mean()), 5 * TASKS * EPISODES
    pooled = [stats.wilson_interval(round(n * rate), n) for rate in simulate(rng, experiments, 5).mean((1, 2))]
    hits = [low <= truth <= high for low, high in pooled]
    yield "wilson_interval", "**pooled over 5 training seeds: never shown**", float(np.mean(hits))


def before_and_after(experiments: int) -> Iterator[Line]:
    """`difference_interval`: initial states are the clusters, and two repeats of one go together."""
    rng = np.random.default_rng(3)
    for states, repeats, before, after, spread in (
        (25, 2, 0.3, 0.5, 2.0),
        (75, 2, 0.4, 0.6, 0.5),
        (50, 4, 0.5, 0.5, 2),
    ):
        chances = [rng.beta(m / spread, (1 - m) / spread, (experiments, states, 1)) for m in (before, after)]
        wins = [(rng.random((experiments, states, repeats)) < chance).sum(2) for chance in chances]
        intervals = [stats.difference_interval(gain, np.full(states, repeats)) for gain in wins[1] - wins[0]]
        hits = [low <= after - before <= high for low, high in intervals]
        yield "difference_interval", f"{states} states x {repeats}, {before} to {after}", float(np.mean(hits))


def efficiency(experiments: int) -> Iterator[Line]:
    """Areas under curves of seeds that learn at different speeds, and the median of the steps to a threshold."""
    rng, steps = np.random.default_rng(4), np.arange(1, 11) * 1000.0

    def curves(n: int) -> np.ndarray:
        speed = np.exp(0.4 * rng.standard_normal((n, 1)))
        return rng.binomial(EPISODES, 0.2 + 0.7 * (1 - np.exp(-speed * steps / 4000))) / EPISODES

    crowd = curves(20_000)
    truth = float(np.mean([stats.area_under_curve(steps, each, steps[-1]) for each in crowd]))
    median = float(np.median([stats.steps_to(steps, each, 0.7) for each in crowd]))
    for seeds in (5, 10):
        areas, middles = [], []
        for each in curves(experiments * seeds).reshape(experiments, seeds, -1):
            area = np.array([[stats.area_under_curve(steps, curve, steps[-1])] for curve in each])
            areas.append(stats.seeds_estimate(stats.mean, area))
            middles.append(stats.median_interval([stats.steps_to(steps, curve, 0.7) for curve in each]))
        yield "seeds_estimate: area under the curve", f"{seeds} seeds", covered(areas, truth)
        if seeds > 5:
            yield (
                "median_interval: steps to a threshold",
                f"{seeds} seeds (exact, so at least 95%)",
                covered(middles, median),
            )


def ranks(experiments: int) -> Iterator[Line]:
    """All ranks of four methods at once, the tests being Student's t over five paired seeds with Holm's correction."""
    rng, shifts = np.random.default_rng(5), (0.0, 0.0, 0.4, 0.8)
    right = 0
    pairs = [(i, j) for i in range(4) for j in range(i)]
    for _ in range(experiments):
        means = np.stack([simulate(rng, 1, 5, shift)[0].mean(1) for shift in shifts])
        p, differences = np.ones((4, 4)), means.mean(1)[:, None] - means.mean(1)
        raw = [found[2] if (found := stats.seeds_interval(means[i] - means[j])) else 1.0 for i, j in pairs]
        for (i, j), value in zip(pairs, stats.holm(raw), strict=True):
            p[i, j] = p[j, i] = value
        low, high = stats.rank_intervals(differences, p).T
        # The two equal methods share ranks 3 and 4.
        right += bool((low <= [3, 3, 2, 1]).all() and (high >= [4, 4, 2, 1]).all())
    yield "rank_intervals", "4 methods, two equal, 5 seeds (at least 95%)", right / experiments


def families(experiments: int) -> Iterator[Line]:
    """No false claim among all 28 pairs of eight equal methods, corrected by Holm: Student's t paired by seed, as
    reports test, and for comparison with one variance for all methods, which no report does."""
    rng, pairs = np.random.default_rng(7), np.array([(i, j) for i in range(8) for j in range(i)])
    for name, spreads in (("equal spreads", [0.03] * 8), ("one spread four times the others", [0.03] * 7 + [0.12])):
        for seeds in (3, 5):
            rates = np.array(spreads)[:, None] * rng.standard_normal((experiments, 8, seeds))
            gaps = rates[:, pairs[:, 0]] - rates[:, pairs[:, 1]]
            pooled = np.sqrt(2 / seeds * rates.var(2, ddof=1).mean(1))[:, None]
            tests = {
                "Holm, paired t over seeds (at least 95%)": ttest_1samp(gaps, 0, axis=2).pvalue,
                "Holm, one variance for all methods": 2 * student.sf(abs(gaps.mean(2)) / pooled, 8 * (seeds - 1)),
            }
            for test, p in tests.items():
                clean = [bool((stats.holm(each) >= 0.05).all()) for each in p]
                yield test, f"8 equal methods, {name}, {seeds} seeds", float(np.mean(clean))


def bootstraps(experiments: int) -> Iterator[Line]:
    """Percentiles of bootstraps, for comparison: no table shows them."""
    rng = np.random.default_rng(6)
    resampled: tuple[tuple[stats.Level, ...], ...] = (("seed",), ("seed", "task", "episode"))
    crowd = simulate(rng, 1, 200_000)[0]
    for name, estimator in (("mean", stats.mean), ("IQM", stats.iqm)):
        truth = float(estimator(crowd))
        for seeds in (5, 10, 20):
            data = simulate(rng, experiments, seeds)
            for levels in resampled:
                hits = 0
                for scores in data:
                    played = np.full(scores.shape, EPISODES) if "episode" in levels else None
                    drawn = estimator(stats.hierarchical_bootstrap(scores, 500, rng, levels, played))
                    low, high = np.percentile(drawn, [2.5, 97.5])
                    hits += low <= truth <= high
                yield f"bootstrap percentiles of {', '.join(levels)}: {name}", f"{seeds} seeds", hits / experiments


if __name__ == "__main__":
    main()
