import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import brunnermunzel, permutation_test, ttest_1samp
from scipy.stats import t as student

from vlarl_bench import stats
from vlarl_bench.stats import (
    difference_interval,
    mcnemar_p,
    paired_result,
    seeds_interval,
    sign_flip_p,
    wilson_interval,
)


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + z^2/20) / (1 + z^2/10), half z sqrt(0.8*0.2/10 + z^2/400) / (1 + z^2/10)
    z = 1.959963984540054
    centre = (0.8 + z * z / 20) / (1 + z * z / 10)
    half = z * math.sqrt(0.016 + z * z / 400) / (1 + z * z / 10)
    assert wilson_interval(8, 10) == pytest.approx((centre - half, centre + half))
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe's worked value
    assert wilson_interval(0, 10) == pytest.approx((0.0, z * z / (10 + z * z)))
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_mcnemar_by_hand():
    # 6 discordant pairs, 5 gained: 2 * (C(6,5) + C(6,6)) / 2^6
    assert mcnemar_p(5, 1) == pytest.approx(14 / 64)
    assert mcnemar_p(10, 0) == pytest.approx(2 / 1024)
    assert mcnemar_p(0, 0) == 1.0


def test_sign_flip_by_hand():
    # |sum| >= 3 over (+-2, +-1): 2+1 and -2-1, of four patterns
    assert sign_flip_p([2, 1]) == pytest.approx(2 / 4)
    # sums of (+-2, +-2, +-1): 5, 3, 1, -1 (from +2-2..), ...; |sum| >= 5 twice in eight
    assert sign_flip_p([2, 2, 1]) == pytest.approx(2 / 8)
    assert sign_flip_p([2, -2, 1]) == 1.0
    assert sign_flip_p([0, 0]) == 1.0
    assert sign_flip_p([]) == 1.0


@settings(max_examples=40, deadline=None)
@given(gained=st.integers(0, 60), lost=st.integers(0, 60), same=st.integers(0, 5))
def test_sign_flip_of_single_pairs_is_exact_mcnemar(gained, lost, same):
    assert sign_flip_p([1] * gained + [-1] * lost + [0] * same) == pytest.approx(mcnemar_p(gained, lost), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(totals=st.lists(st.integers(-3, 3), min_size=2, max_size=8))
def test_sign_flip_is_the_exhaustive_permutation_test(totals):
    data = np.array(totals, dtype=float)
    zero = np.zeros_like(data)
    exact = permutation_test(
        (data, zero),
        lambda x, y, axis=-1: np.abs((x - y).sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_p(totals) == pytest.approx(exact.pvalue)


def test_many_clusters_give_a_finite_tiny_p():
    assert 0 < sign_flip_p([2] * 500) < 1e-100


def episodes(outcomes: dict[tuple[int, int], bool]) -> dict[tuple[str, str, int, int], bool]:
    return {("s", "t", state, repeat): success for (state, repeat), success in outcomes.items()}


def test_paired_result_by_hand():
    base = episodes({(0, 0): False, (0, 1): False, (1, 0): True, (1, 1): True, (2, 0): False, (3, 0): False})
    final = episodes({(0, 0): True, (0, 1): True, (1, 0): True, (1, 1): False, (2, 0): True, (9, 0): True})
    result = paired_result(base, final)
    assert (result.n_pairs, result.n_clusters, result.gained, result.lost) == (5, 3, 3, 1)
    assert result.difference == pytest.approx(2 / 5)
    # cluster totals 2, -1, 1: |+-2 +-1 +-1| >= 2 for 2+1-1, 2-1+1, 2+1+1 and their mirrors: 6 of 8
    assert result.p_value == pytest.approx(6 / 8)
    assert result.mcnemar_p == pytest.approx(2 * (4 + 1) / 16)
    # the two imagined clusters have the average size 5/3:
    totals, sizes = [2, -1, 1, 5 / 3, -5 / 3], [2, 2, 1, 5 / 3, 5 / 3]
    centre = 2 / sum(sizes)
    variance = 5 / 4 * sum((a - centre * b) ** 2 for a, b in zip(totals, sizes, strict=True)) / sum(sizes) ** 2
    half = 2.7764451 * math.sqrt(variance)  # t with 4 degrees of freedom
    assert (result.low, result.high) == pytest.approx((max(-1, centre - half), min(1, centre + half)), abs=1e-6)


def test_paired_result_is_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = (episodes({(i, r): bool(rng.random() < p) for i in range(20) for r in range(2)}) for p in (0.3, 0.7))
    there, back = paired_result(a, b), paired_result(b, a)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert there.p_value == back.p_value
    assert (there.gained, there.lost) == (back.lost, back.gained)


def test_without_pairs_nothing_is_claimed():
    result = paired_result({}, episodes({(0, 0): True}))
    assert (result.n_pairs, result.difference, result.low, result.high, result.p_value) == (0, 0.0, -1.0, 1.0, 1.0)


def test_an_interval_has_width_even_if_every_cluster_changed_alike():
    low, high = difference_interval([2] * 25, [2] * 25)
    assert 0.7 < low < 0.9
    assert high == 1.0
    low, high = difference_interval([0] * 25, [2] * 25)
    assert low < 0 < high


def simulate(states: int, repeats: int, before: float, after: float, spread: float, seed: int, times: int = 800):
    """Success chances of each initial state are Beta with the given mean; a larger spread ties repeats together."""
    rng = np.random.default_rng(seed)
    shape = (times, states, 1)
    chances = [rng.beta(mean / spread, (1 - mean) / spread, shape) for mean in (before, after)]
    wins = [rng.random((times, states, repeats)) < chance for chance in chances]
    return (wins[1].astype(int) - wins[0]).sum(axis=2)


@pytest.mark.parametrize(
    ("states", "repeats", "before", "after", "spread"),
    [(75, 2, 0.4, 0.6, 0.5), (25, 2, 0.3, 0.5, 2.0), (25, 1, 0.9, 0.98, 0.1), (50, 4, 0.5, 0.5, 2.0)],
)
def test_the_interval_covers_the_true_difference(states, repeats, before, after, spread):
    totals = simulate(states, repeats, before, after, spread, seed=1)
    sizes = np.full(states, repeats)
    covered = 0
    for each in totals:
        low, high = difference_interval(each, sizes)
        covered += low <= after - before <= high
    # Nominal 95%; the bound leaves three standard errors of 800 draws, so the test fails for an interval below 93%.
    assert covered / len(totals) > 0.93


def test_the_p_value_keeps_its_promise_where_mcnemar_does_not():
    totals = simulate(40, 4, 0.5, 0.5, 2.0, seed=2, times=600)
    rejected = np.mean([sign_flip_p(each) < 0.05 for each in totals])
    assert rejected < 0.07
    rng = np.random.default_rng(3)
    chances = [rng.beta(0.25, 0.25, (600, 40, 1)) for _ in range(2)]
    wins = [rng.random((600, 40, 4)) < chance for chance in chances]
    gained, lost = (wins[1] & ~wins[0]).sum(axis=(1, 2)), (wins[0] & ~wins[1]).sum(axis=(1, 2))
    naive = np.mean([mcnemar_p(int(g), int(n)) < 0.05 for g, n in zip(gained, lost, strict=True)])
    assert naive > 0.10


def test_seeds_interval_by_hand():
    # mean 0.2, s = 0.1, n = 3: t(2) = 4.302653; t = 0.2 / (0.1 / sqrt 3) = 3.4641
    low, high, p = seeds_interval([0.1, 0.2, 0.3]) or (0, 0, 0)
    assert (low, high) == pytest.approx((0.2 - 4.302653 * 0.1 / math.sqrt(3), 0.2 + 4.302653 * 0.1 / math.sqrt(3)))
    assert p == pytest.approx(0.0742, abs=1e-4)
    assert seeds_interval([0.1]) is None
    assert seeds_interval([0.1, 0.1]) is None
    assert seeds_interval([0.1 + 0.2, 0.3, 0.3]) is None  # equal but for rounding


GOLDEN = json.loads((Path(__file__).parent / "stats_golden.json").read_text())["cases"]


@pytest.mark.parametrize("golden", GOLDEN)
def test_aggregates_are_rliables(golden):
    # made by scripts/bench_rliable.py --golden, with rliable 1.2.0
    scores, others = np.array(golden["scores"]), np.array(golden["others"])
    tasks = min(scores.shape[1], others.shape[1])
    ours = {
        "mean": stats.mean(scores),
        "iqm": stats.iqm(scores),
        "optimality_gap": stats.optimality_gap(scores),
        "optimality_gap_0.6": stats.optimality_gap(scores, 0.6),
        "probability_of_improvement": stats.probability_of_improvement(scores[:, :tasks], others[:, :tasks]),
        "performance_profile": stats.performance_profile(scores, np.linspace(0, 1, 11)),
    }
    for name, value in ours.items():
        assert value == pytest.approx(golden[name], abs=1e-9), name


def test_aggregates_take_many_experiments_at_once():
    scores = np.random.default_rng(0).random((7, 2, 4, 5))
    for estimator in (stats.mean, stats.iqm, stats.optimality_gap, lambda x: stats.performance_profile(x, [0.2, 0.7])):
        one_by_one = [[estimator(scores[i, j]) for j in range(2)] for i in range(7)]
        assert estimator(scores) == pytest.approx(np.array(one_by_one))
    assert stats.probability_of_improvement(scores, scores[:, :, :3]).shape == (7, 2)


def test_the_estimate_of_a_mean_is_students_interval_over_seeds():
    scores = np.array([[0.2, 0.4], [0.5, 0.5], [0.9, 0.7]])
    found, by_hand = stats.seeds_estimate(stats.mean, scores), ttest_1samp(scores.mean(1), 0).confidence_interval(0.95)
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == (max(0, by_hand.low), min(1, by_hand.high))
    inside = stats.seeds_estimate(stats.mean, scores, bounds=(-9, 9))
    assert (inside.low, inside.high) == pytest.approx((by_hand.low, by_hand.high))


def test_one_seed_or_equal_seeds_have_no_interval():
    assert stats.seeds_estimate(stats.mean, np.array([[0.5, 0.7]])) == stats.Estimate(0.6)
    assert stats.seeds_estimate(stats.iqm, np.full((4, 3), 0.3)).low is None


def test_the_chance_to_improve_is_brunner_and_munzels_on_one_task():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.3, 1, 12), rng.normal(0, 2, 9)
    found = stats.seeds_estimate(stats.probability_of_improvement, x[:, None], y[:, None], bounds=(-9, 9))
    oracle = brunnermunzel(y, x)  # its statistic is (chance - 1/2) / standard error
    error = (found.value - 0.5) / oracle.statistic
    assert found.high - found.value == pytest.approx(student.ppf(0.975, 8) * error)


@pytest.mark.parametrize(("seeds", "estimator"), [(3, stats.mean), (5, stats.iqm), (10, stats.optimality_gap)])
def test_the_interval_over_seeds_covers(seeds, estimator):
    # 800 experiments of scripts/interval_coverage.py, the full count; the bound leaves 3 standard errors below 95%
    rng = np.random.default_rng(7)

    def simulate(experiments, n):
        logits = np.linspace(-1, 2.5, 10) + 0.4 * rng.standard_normal((experiments, n, 1))
        return rng.binomial(50, expit(logits + 0.3 * rng.standard_normal((experiments, n, 10)))) / 50

    truth = estimator(simulate(1, 50_000)[0])
    found = [stats.seeds_estimate(estimator, each) for each in simulate(800, seeds)]
    assert 0.925 < np.mean([each.low <= truth <= each.high for each in found]) < 0.975


def test_the_bootstrap_resamples_what_it_says():
    rng = np.random.default_rng(0)
    scores = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    whole = stats.hierarchical_bootstrap(scores, 500, rng, levels=("seed",))
    assert whole.shape == (500, 2, 3)
    assert {tuple(row) for row in whole.reshape(-1, 3).tolist()} == {tuple(row) for row in scores.tolist()}
    tasks = stats.hierarchical_bootstrap(scores, 500, rng, levels=("task",))
    assert all(set(tasks[:, s].ravel()) == set(scores[s]) for s in range(2))
    episodes = stats.hierarchical_bootstrap(scores, 20_000, rng, ("episode",), np.full((2, 3), 10))
    assert episodes.mean(0) == pytest.approx(scores, abs=0.01)
    assert episodes.var(0) == pytest.approx(scores * (1 - scores) / 10, rel=0.05)
    assert (stats.hierarchical_bootstrap(scores, 3, rng, levels=()) == scores).all()


def test_the_bootstrap_of_seeds_has_the_variance_of_a_mean():
    scores = np.random.default_rng(2).random((6, 4))
    drawn = stats.mean(stats.hierarchical_bootstrap(scores, 40_000, np.random.default_rng(3), levels=("seed",)))
    assert drawn.var() == pytest.approx(scores.mean(1).var() / 6, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_with_bonferroni(p):
    # adjusted p of hypothesis i: the largest, over all sets that contain it, of |set| * min(set)
    members = range(len(p))
    sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(members, size)]
    closed = [min(1.0, max(len(s) * min(p[j] for j in s) for s in sets if i in s)) for i in members]
    assert stats.holm(p) == pytest.approx(closed)


def test_ranks_by_hand():
    # a is separated above b and c; b and c are not separated
    differences = np.array([[0, 0.2, 0.3], [-0.2, 0, 0.1], [-0.3, -0.1, 0]])
    p = np.array([[1, 0.01, 0.001], [0.01, 1, 0.4], [0.001, 0.4, 1]])
    assert stats.rank_intervals(differences, p).tolist() == [[1, 1], [2, 3], [2, 3]]
    assert stats.rank_intervals(differences, np.ones((3, 3))).tolist() == [[1, 3]] * 3


def test_sample_efficiency_by_hand():
    # level 0.2 to 10, up to 0.6 at 20, level to 40: (2 + 4 + 12) / 40
    assert stats.area_under_curve([10, 20], [0.2, 0.6], 40) == pytest.approx(18 / 40)
    assert stats.area_under_curve([10, 20], [0.2, 0.6], 15) == pytest.approx((2 + 5 * 0.3) / 15)
    assert stats.steps_to([10, 20, 30], [0.2, 0.6, 0.5], 0.5) == pytest.approx(17.5)
    assert stats.steps_to([10, 20, 30, 40], [0.2, 0.6, 0.4, 0.6], 0.5) == math.inf  # never twice in a row
    assert stats.steps_to([10, 20], [0.2, 0.6], 0.1) == 10
    assert stats.steps_to([10, 20], [0.2, 0.6], 0.7) == math.inf == stats.steps_to([10], [0.9], 0.7)


def test_the_median_counts_seeds_that_never_got_there():
    # order statistics 2 and 9 of ten: 1 - 2 * (1 + 10) / 2^10 = 97.9%
    found = stats.median_interval([5, 1, 2, 3, 4, 6, 7, 8, math.inf, math.inf])
    assert (found.value, found.low, found.high) == (5.5, 2, math.inf)
    assert stats.median_interval([1, 2, 3, 4, 5]).low is None


def test_seeds_are_part_of_what_makes_a_pair():
    base = {(seed, "s", "t", 0, 0): False for seed in range(3)}
    after = {(seed, "s", "t", 0, 0): True for seed in (0, 1, 2, 3)}
    result = paired_result(base, after)
    assert (result.n_pairs, result.n_clusters, result.gained) == (3, 3, 3)
