"""Who is separated from whom, and what is not tested."""

import dataclasses
import functools

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from vlarl_bench.protocol import Protocol
from vlarl_bench.report.comparisons import best, change, change_text, reach_notes, separation
from vlarl_bench.report.methods import compared_methods
from vlarl_bench.report.rows import Rows
from vlarl_bench.report.runs import read_run, read_runs


def at_most(limit):
    """Succeeds on the first `limit` of the eight episodes of a task."""
    return lambda task, state, repeat: 2 * (state - 4) + repeat < limit


def made(make_run, wins, base=1):
    """A run for each seed of each method, which wins so many of eight episodes."""
    return [
        make_run(f"{name}{seed}", base=at_most(base), final=at_most(limit), seed=seed, algorithm=name)
        for name, limits in wins.items() for seed, limit in enumerate(limits)
    ]  # fmt: skip


def test_seeds_that_all_differ_alike_claim_nothing(make_run):
    methods = compared_methods(read_runs(made(make_run, {"strong": (7, 6, 7), "weak": (3, 2, 3)})))
    differences, p, reach = separation(methods, "suite_a")
    assert differences[1, 2] == pytest.approx(0.5) and differences[2, 1] == pytest.approx(-0.5)
    assert p[1, 2] == 1.0 and best(methods, "suite_a") == []  # every seed differs by 0.5: Student's t is undefined
    assert reach[1, 2] == 0


def test_where_few_episodes_change_the_exact_test_is_the_larger_p(make_run):
    one_task = functools.partial(make_run, tasks=("suite_a/pick_it_up",))
    methods = compared_methods(read_runs(made(one_task, {"better": (2, 2, 3)})))
    assert ttest_1samp([1 / 8, 1 / 8, 2 / 8], 0).pvalue < 0.06
    assert separation(methods, "suite_a").p[0, 1] == 0.125  # four initial states, all of them one episode better


def test_best_is_found_where_seeds_vary_and_never_of_one_seed(make_run):
    folders = made(make_run, {"strong": (8, 7, 8, 7), "weak": (2, 2, 3, 2)})
    assert best(compared_methods(read_runs(folders)), "suite_a") == [1]
    alone = compared_methods(read_runs([folders[0], folders[4]]))
    assert best(alone, "suite_a") == [] and np.isnan(separation(alone, "suite_a").p).all()


def test_what_is_no_test_takes_no_part_in_the_correction(make_run):
    folders = made(make_run, {"strong": (8, 7, 8, 7), "weak": (2, 2, 3, 2)})
    before = separation(compared_methods(read_runs(folders)), "suite_a")
    raw = ttest_1samp([6 / 8, 5 / 8, 5 / 8, 5 / 8], 0).pvalue
    assert before.p[1, 2] == pytest.approx(raw, rel=1e-6)  # the only pair of trained methods
    against_base = [ttest_1samp(np.array(wins) - 1, 0).pvalue for wins in ((8, 7, 8, 7), (2, 2, 3, 2))]
    assert before.p[0, 1:] == pytest.approx(np.sort(against_base) * [2, 1])  # a family of two, corrected apart
    single = make_run("single0", base=at_most(1), final=at_most(5), algorithm="xsingle")
    elsewhere = [  # another base policy
        dataclasses.replace(run, manifest=run.manifest | {"base_checkpoint": "1" * 12, "algorithm": "elsewhere"})
        for run in read_runs(folders[:4])
    ]
    methods = compared_methods([*read_runs([*folders, single]), *elsewhere])
    names = [method.name for method in methods]
    after = separation(methods, "suite_a")
    strong, weak, one, other = map(names.index, ("strong", "weak", "xsingle", "elsewhere"))
    assert after.p[strong, weak] == before.p[1, 2]
    assert np.isnan(after.p[strong, [one, other]]).all()
    assert best(methods, "suite_a") == [other]  # `strong` has a rival of one seed, `elsewhere` has its base alone


def test_decodings_do_not_compete(make_run):
    """Neither is a method that was decoded without noise set against one with it, nor does it widen the correction."""
    sampled = made(make_run, {"strong": (8, 7, 8, 7), "weak": (2, 2, 3, 2)})
    before = separation(compared_methods(read_runs(sampled)), "suite_a")
    quiet = Protocol("quiet", 1, "state", {"suite_a": 200}, 10, 8, (0, 1), (4, 5, 6, 7), decoding="zero-noise")
    greedy = [
        read_run(make_run(f"g{i}", base=at_most(1), final=at_most(n), seed=i, algorithm="greedy", protocol=quiet))
        for i, n in enumerate((6, 5, 6, 5))
    ]
    methods = compared_methods([*read_runs(sampled), *greedy])
    names = [method.name for method in methods]
    after, strong, weak = separation(methods, "suite_a"), names.index("strong"), names.index("weak")
    assert np.isnan(after.p[names.index("greedy"), [strong, weak]]).all()
    assert after.p[strong, weak] == before.p[1, 2]


def test_the_reach_is_where_the_first_of_a_family_would_be_separated(make_run):
    methods = compared_methods(read_runs(made(make_run, {"a": (8, 7, 8), "b": (2, 2, 3), "c": (5, 4, 2)})))
    seen = np.array([6, 5, 5]) / 8
    least = student.isf(0.025 / 3, 2) * seen.std(ddof=1) / 3**0.5
    found = separation(methods, "suite_a")
    assert found.reach[1, 2] == pytest.approx(least)
    middle = 100 * np.median(found.reach[[1, 1, 2], [2, 3, 3]])
    (note,) = reach_notes(methods, ["suite_a"])
    assert "3 of 3 pairs of methods are tested" in note and f"must differ by {middle:.1f} points" in note


def test_missing_episodes_leave_a_change_without_interval_and_a_pair_untested(make_run):
    runs = read_runs(made(make_run, {"a": (8, 7, 8, 7), "b": (2, 2, 3, 2)}))
    whole = change(*compared_methods(runs)[1::-1], "suite_a")
    assert whole["complete"] and change_text(whole) == f"+{100 * (7.5 - 1) / 8:.1f} [+69.8, +92.7]"
    rows = list(runs[0].rows)
    rows.pop(next(i for i, row in enumerate(rows) if row.phase == "final"))
    runs[0] = dataclasses.replace(runs[0], rows=Rows.of(rows))
    methods = compared_methods(runs)
    part = change(methods[1], methods[0], "suite_a")
    assert not part["complete"] and part["low"] is part["p"] is None and change_text(part).endswith(" INCOMPLETE")
    assert np.isnan(separation(methods, "suite_a").p[1, :]).all()
    assert not np.isnan(separation(methods, "suite_a").p[0, 2])
