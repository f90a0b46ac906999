"""How much must be played to tell two success rates apart, before anything is played."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, ncf, norm
from scipy.stats import t as student

from .errors import BenchError

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Power:
    """An answer, and how sure the test then is to see the difference."""

    n: int
    """Episodes or seeds, for each of the two policies or methods."""
    power: float


def check_rates(first: float, second: float, power: float, alpha: float) -> None:
    """Raises BenchError for what is no pair of rates to tell apart."""
    for name, rate in (("first", first), ("second", second)):
        if not 0 < rate < 1:
            raise BenchError(f"{name}: {rate:g}; give a success rate between 0 and 1, such as 0.653")
    if first == second:
        raise BenchError(f"second: {second:g} equals first; equal rates cannot be told apart")
    if not 0 < alpha < 1:
        raise BenchError(f"alpha: {alpha:g}; it must be between 0 and 1, such as 0.05")
    if not alpha < power < 1:
        raise BenchError(f"power: {power:g}; it must be between alpha ({alpha:g}) and 1, such as 0.8")


def episodes_needed(first: float, second: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Independent episodes of each policy for the two-sided z-test with a pooled rate (Fleiss, Levin and Paik, 2003,
    sec. 4.3, without the continuity correction)."""
    middle, spread = (first + second) / 2, first * (1 - first) + second * (1 - second)
    reach = norm.isf(alpha / 2) * math.sqrt(2 * middle * (1 - middle)) + norm.ppf(power) * math.sqrt(spread)
    return math.ceil((reach / (first - second)) ** 2)


def z_test_power(first: float, second: float, n: int, alpha: float = 0.05) -> float:
    """Exact power of that test with n episodes of each: the chance of all outcomes that it rejects on."""
    k = np.arange(n + 1)
    chances = binom.pmf(k, n, second)
    total = 0.0
    critical = norm.isf(alpha / 2)
    for successes, chance in zip(k, binom.pmf(k, n, first), strict=True):
        if chance < 1e-12:  # at most 1e-12 of power for each left out
            continue
        pooled = (successes + k) / (2 * n)
        rejects = (k - successes) ** 2 > critical**2 * 2 * n * pooled * (1 - pooled)
        total += chance * float(chances[rejects].sum())
    return total


def pairs_needed(first: float, second: float, power: float = 0.8, alpha: float = 0.05, agreement: float = 0.0) -> Power:
    """Pairs of episodes for the exact McNemar test, and its exact power with so many.

    agreement: correlation of the two outcomes of a pair, 0 where the initial state tells nothing. The power of
    an exact test saws up and down with n, so n is found to about half a per cent and a few more pairs do no harm.
    """
    if not -1 <= agreement <= 1:
        raise BenchError(f"agreement: {agreement:g}; a correlation is in [-1, 1]")
    common = first * second + agreement * math.sqrt(first * (1 - first) * second * (1 - second))
    gained, lost = second - common, first - common
    if min(gained, lost) < 0 or common < max(0.0, first + second - 1):
        raise BenchError(f"agreement: {agreement:g} is impossible between rates of {first:g} and {second:g}")
    low, high = 1, 2
    while mcnemar_power(gained, lost, high, alpha) < power:
        low, high = high, 2 * high
        if high > 2**20:
            raise BenchError(f"second: {second:g} is too near {first:g}; over a million pairs are needed")
    while high - low > max(1, low // 200):  # to half a per cent: finer would be below the sawteeth
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(gained, lost, middle, alpha) >= power else (middle, high)
    return Power(high, mcnemar_power(gained, lost, high, alpha))


def mcnemar_power(gained: float, lost: float, n: int, alpha: float = 0.05) -> float:
    """Exact power of the two-sided exact McNemar test over n pairs that are gained or lost with these chances."""
    changed = gained + lost
    m = np.arange(n + 1)
    # Reject when the smaller of gains and losses is at most c(m), the largest with 2 P(Binomial(m, 1/2) <= c) <= alpha.
    c = binom.ppf(alpha / 2, m, 0.5)
    c = np.where(2 * binom.cdf(c, m, 0.5) > alpha, c - 1, c)
    share = gained / changed
    rejects = binom.cdf(c, m, share) + binom.sf(m - c - 1, m, share)
    return float((binom.pmf(m, n, changed) * np.where(c < 0, 0.0, rejects)).sum())


def seeds_needed(
    first: float, second: float, episodes: int, seed_spread: float, power: float = 0.8, alpha: float = 0.05
) -> Power:
    """Training seeds of each method for the two-sided paired t-test over seeds, as reports make it, with `episodes`
    played of each.

    seed_spread: standard deviation, between seeds, of the success rate that infinitely many episodes would show. The
    seeds' rates are taken as normal, and those of the two methods as independent although they share a seed, so the
    power is that of Student's noncentral t.
    """
    if episodes < 1:
        raise BenchError(f"episodes: {episodes}; it must be at least 1")
    if not 0 <= seed_spread < 0.5:
        raise BenchError(
            f"seed_sd: {seed_spread:g}; it must be at least 0 and below 0.5: a standard deviation of rates"
        )
    for n in range(2, MOST_SEEDS + 1):
        found = seeds_power(first, second, episodes, seed_spread, n, alpha)
        if found >= power:
            return Power(n, found)
    raise BenchError(
        f"seed_sd: with {seed_spread:g} and {episodes} episodes a seed, over {MOST_SEEDS} seeds are needed"
    )


def seeds_power(first: float, second: float, episodes: int, seed_spread: float, n: int, alpha: float = 0.05) -> float:
    """Power of the paired t-test over n seeds, of which two methods played each."""
    variance = 2 * seed_spread**2 + (first * (1 - first) + second * (1 - second)) / episodes
    shift, freedom = abs(first - second) / math.sqrt(variance / n), n - 1
    critical = student.isf(alpha / 2, freedom)
    return float(ncf.sf(critical**2, 1, freedom, shift**2))  # t squared; SciPy's noncentral t itself can be NaN
