import math

import numpy as np
import pytest
from scipy.special import comb

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.report.runs import read_run
from vlarl_bench.report.sequential import log_e_values, replay


def test_by_hand():
    """With a uniform share of gains an order of s gains in n has chance 1 / ((n + 1) C(n, s)); with a half 2^-n."""
    signs = np.array([1, 0, -1, 1, 1])
    expected = [2**n / ((n + 1) * comb(n, gained)) for n, gained in ((1, 1), (1, 1), (2, 1), (3, 2), (4, 3))]
    assert np.exp(log_e_values(signs)) == pytest.approx(expected)
    assert log_e_values(-signs) == pytest.approx(log_e_values(signs))


def test_it_is_a_martingale_where_nothing_changed():
    """The next e-value, gain or loss, averages to this one: exactly, wherever it stands."""
    for gained in range(8):
        for lost in range(8):
            path = np.array([1] * gained + [-1] * lost)
            here = math.exp(log_e_values(path)[-1]) if len(path) else 1.0
            following = [math.exp(log_e_values(np.append(path, step))[-1]) for step in (1, -1)]
            assert np.mean(following) == pytest.approx(here)


def test_looking_after_every_pair_does_not_cheat():
    """Over 10,000 experiments in which nothing changed; a fixed test that looks as often errs several times as much."""
    rng = np.random.default_rng(1)
    signs = rng.choice([-1, 0, 1], (10_000, 200), p=[0.25, 0.5, 0.25])
    errs = (log_e_values(signs) >= math.log(20)).any(axis=1).mean()
    assert 0.005 < errs < 0.05
    totals, n = np.cumsum(signs, axis=1), np.maximum(np.cumsum(signs != 0, axis=1), 1)
    assert (np.abs(totals) > 1.96 * np.sqrt(n))[:, 10:].any(axis=1).mean() > 0.15


def test_replay_stops_where_it_may(make_run, outcomes):
    tasks = tuple(f"suite_a/task_{i}" for i in range(8))
    run = read_run(make_run("gains", base=outcomes["never"], final=outcomes["half"], tasks=tasks))
    found = replay(run)
    # Gains only: 2^n / (n + 1) first reaches 20 with the 8th of 32 units, each of two pairs.
    assert (found.pairs, found.used, found.stopped) == (64, 16, True)
    assert (found.gained, found.lost, found.e_value) == (8, 0, pytest.approx(2**8 / 9))
    same = replay(read_run(make_run("same", base=outcomes["half"], final=outcomes["half"], tasks=tasks)))
    assert (same.used, same.stopped, same.gained, same.lost, same.e_value) == (64, False, 0, 0, 1)


def test_what_cannot_be_replayed_is_refused(make_run, outcomes):
    for folder, words in (
        (make_run("eval", evaluated=outcomes["half"]), "no episodes before and after"),
        (
            make_run("part", base=outcomes["half"], final=outcomes["half"], skip=(5,)),
            "4 evaluation episodes are missing",
        ),
    ):
        with pytest.raises(BenchError, match=words):
            replay(read_run(folder))


def test_the_command(make_run, outcomes, capsys):
    tasks = tuple(f"suite_a/task_{i}" for i in range(8))
    folders = [
        str(make_run(name, base=outcomes["never"], final=outcomes[final], tasks=tasks))
        for name, final in (("gains", "always"), ("same", "never"))
    ]
    assert cli.main(["power", "--sequential", *folders]) == 0
    stops, goes_on = capsys.readouterr().out.splitlines()
    assert "gains: stops after 16 of 64 pairs of episodes, 48 saved (75%)" in stops
    assert "same: does not stop in 64 pairs of episodes, 0 saved (0%)" in goes_on
    for wrong, words in ((["--alpha", "1"], "alpha: 1"), ([], "no episodes before")):
        evaluation = str(make_run(f"eval{len(wrong)}", evaluated=outcomes["half"]))
        assert cli.main(["power", "--sequential", evaluation, *wrong]) == 2
        assert words in capsys.readouterr().err
