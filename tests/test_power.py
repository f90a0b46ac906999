import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.power import (
    check_rates,
    episodes_needed,
    mcnemar_power,
    pairs_needed,
    seeds_needed,
    seeds_power,
    z_test_power,
)


@pytest.mark.parametrize(("first", "second", "n"), [(0.598, 0.653, 1215), (0.97, 0.98, 3826)])
def test_published_gaps_need_that_many_episodes(first, second, n):
    assert episodes_needed(first, second) == episodes_needed(second, first) == n
    assert z_test_power(first, second, n) == pytest.approx(0.8, abs=0.005)


def test_the_power_of_the_z_test_is_what_its_simulation_shows():
    rng, n = np.random.default_rng(0), 100
    a, b = rng.binomial(n, 0.5, 100_000), rng.binomial(n, 0.7, 100_000)
    pooled = (a + b) / (2 * n)
    rejects = np.abs(a - b) / n > 1.959964 * np.sqrt(2 * pooled * (1 - pooled) / n)
    assert z_test_power(0.5, 0.7, n) == pytest.approx(rejects.mean(), abs=0.005)


def test_the_power_of_mcnemar_is_the_sum_over_all_outcomes():
    n, gained, lost = 14, 0.4, 0.1
    total = 0.0
    for g in range(n + 1):
        for l in range(n + 1 - g):  # noqa: E741
            chance = np.prod([*range(1, n + 1)], dtype=float) / np.prod(
                [*range(1, g + 1), *range(1, l + 1), *range(1, n - g - l + 1)], dtype=float
            )
            chance *= gained**g * lost**l * (1 - gained - lost) ** (n - g - l)
            total += chance * bool(g + l and binomtest(g, g + l).pvalue <= 0.05)
    assert mcnemar_power(gained, lost, n) == pytest.approx(total)


def test_pairs_that_agree_need_fewer():
    alone, paired = pairs_needed(0.6, 0.7), pairs_needed(0.6, 0.7, agreement=0.5)
    assert alone.power >= 0.8 and paired.power >= 0.8
    assert paired.n < 0.7 * alone.n
    with pytest.raises(BenchError, match="agreement: nan; a correlation is in"):
        pairs_needed(0.6, 0.7, agreement=float("nan"))
    with pytest.raises(BenchError, match="agreement: 1 is impossible"):
        pairs_needed(0.6, 0.7, agreement=1.0)


def test_the_power_over_seeds_is_what_its_simulation_shows():
    rng, n, played, spread = np.random.default_rng(1), 5, 150, 0.05
    rates = [rng.normal(mean, spread, (20_000, n)) for mean in (0.5, 0.6)]
    seen = [rng.binomial(played, rate) / played for rate in rates]
    simulated = (ttest_1samp(seen[0] - seen[1], 0, axis=1).pvalue < 0.05).mean()
    assert seeds_power(0.5, 0.6, played, spread, n) == pytest.approx(simulated, abs=0.015)
    # SciPy 1.17 has NaN for the noncentral t here: more power for more seeds, none skipped
    powers = [seeds_power(0.54, 0.75, 150, 0.05, n, 0.00064) for n in range(2, 16)]
    assert powers == sorted(powers) and powers[-1] < 1.0001
    needed = seeds_needed(0.5, 0.6, played, spread)
    assert seeds_power(0.5, 0.6, played, spread, needed.n - 1) < 0.8 <= needed.power


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((59.8, 0.65, 0.8, 0.05), "first: 59.8; give a success rate between 0 and 1"),
        ((0.5, 0.5, 0.8, 0.05), "equal rates"),
        ((0.5, 0.6, 1.0, 0.05), "power: 1;"),
        ((0.5, 0.6, 0.8, 0.0), "alpha: 0;"),
    ],
)
def test_what_is_no_pair_of_rates_is_refused(rates, words):
    with pytest.raises(BenchError, match=words):
        check_rates(*rates)


def test_the_command_says_how_many(capsys):
    assert cli.main(["power", "0.598", "0.653", "--seed-sd", "0.03", "--episodes", "500"]) == 0
    out = capsys.readouterr().out
    assert "1,215 episodes" in out
    assert "seeds" in out and "pairs" in out and "--alpha divided by the number of pairs" in out
    assert cli.main(["power", "59.8", "65.3"]) == 2
    assert "such as 0.653" in capsys.readouterr().err
