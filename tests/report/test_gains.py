"""Gains against counts that were written down."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from vlarl_bench.errors import BenchError
from vlarl_bench.report.gains import gains_table
from vlarl_bench.report.lint import lint
from vlarl_bench.report.render import to_json
from vlarl_bench.report.runs import pooled, read_runs


def run(make_run, name, seed, better, **more):
    """Half of the base policy's episodes succeed; afterwards the second half of so many initial states, too."""
    return make_run(
        name,
        base=lambda task, state, repeat: repeat == 0,
        final=lambda task, state, repeat: repeat == 0 or state < 4 + better,
        seed=seed,
        **more,
    )


def test_a_line_says_what_was_before_and_after_and_whether_that_is_a_gain(make_run):
    runs = read_runs([run(make_run, f"a{seed}", seed, better) for seed, better in enumerate((2, 3, 4))])
    table = gains_table(runs)
    (line,), (record,) = table.lines, table.records
    n = record["episodes"]
    each = n // 3
    assert line[:6] == ("suite_a", "fpo", f"pi0-tiny {'0' * 12}", "0 / 0", "3", f"{n // 2}/{n} 50%")
    changes = np.array([sum(r.evaluated.column("success")) - sum(r.base.column("success")) for r in runs]) / each
    assert record["gain"]["value"] == pytest.approx(changes.mean())
    assert record["p_holm"] == pytest.approx(ttest_1samp(changes, 0).pvalue)  # of a family of one, and the larger p
    assert line[-1] == f"{record['p_holm']:.4f}"


def test_one_seed_has_an_interval_and_no_test(make_run):
    table = gains_table(read_runs([run(make_run, "a", 0, 3)]))
    assert "[" in table.lines[0][-2] and table.lines[0][-1] == "-" and table.records[0]["p_holm"] is None


def test_before_counts_the_methods_own_seeds_alone(make_run):
    """Several methods share a base policy, which was played with the seeds of all."""
    folders = [run(make_run, f"a{seed}", seed, 3) for seed in range(3)] + [run(make_run, "b", 0, 1, algorithm="dppo")]
    records = {record["algorithm"]: record for record in gains_table(read_runs(folders)).records}
    assert records["fpo"]["base_episodes"] == 3 * records["dppo"]["base_episodes"] > 0
    assert [record["algorithm"] for record in gains_table(read_runs(folders)).records] == ["fpo", "dppo"]


def test_missing_episodes_are_marked(make_run, tmp_path):
    table = gains_table(read_runs([run(make_run, "a", 0, 3, skip=(4,))]))
    assert "INCOMPLETE" in table.lines[0][-2]
    (tmp_path / "gains.json").write_text(to_json(table))
    assert lint([str(tmp_path / "gains.json")]) == []


def test_what_is_gained_without_noise_stands_beside(make_run, outcomes):
    quiet = (outcomes["always"], outcomes["half"])  # repeat 0 alone: all of 8 and all of 8
    runs = [run(make_run, f"a{seed}", seed, better, noiseless=quiet) for seed, better in enumerate((2, 3))]
    worse = [
        run(make_run, f"b{seed}", seed, better, algorithm="dppo", noiseless=(outcomes["always"], outcomes["never"]))
        for seed, better in enumerate((3, 4, 4))
    ]
    table = gains_table(read_runs([*runs, *worse]))
    assert table.columns[-1].startswith("without noise")
    assert [line[-1] for line in table.lines] == [
        "24/24 to 0/24, -100.0",  # seeds that agree give no interval
        "16/16 to 16/16, +0.0",
    ]
    found = [each for each in lint(runs + worse) if "without noise" in each]
    assert len(found) == 1 and "dppo gains 45.8 points and, without noise, none (24/24 to 0/24" in found[0]
    older = run(make_run, "c", 0, 1, algorithm="rwfm")
    assert [line[-1] for line in gains_table(read_runs([*runs, older])).lines][-1] == "-"


def test_suites_of_a_group_as_one(make_run):
    """Tasks of one name in two suites stay two. Half of suite_a's episodes are won before and all after; of suite_b's
    half, and of each seed another share."""

    def final(share):
        return lambda task, state, repeat: repeat == 0 or task.startswith("suite_a") or state < 4 + share

    runs = [
        make_run(
            f"a{seed}",
            base=lambda task, state, repeat: repeat == 0,
            final=final(seed),
            tasks=("suite_a/pick_it_up", "suite_b/pick_it_up"),
            seed=seed,
        )
        for seed in range(3)
    ]
    (record,) = gains_table([pooled(run) for run in read_runs(runs)]).records
    apart = {record["suite"]: record for record in gains_table(read_runs(runs)).records}
    assert record["suite"] == "suite"
    for count in ("episodes", "successes", "base_episodes", "base_successes"):
        assert record[count] == apart["suite_a"][count] + apart["suite_b"][count]
    changes = np.array([1 / 2, 1 / 2 + 1 / 8, 1 / 2 + 2 / 8]) / 2  # a half of suite_a, an eighth more of suite_b a seed
    assert record["gain"]["value"] == pytest.approx(changes.mean())
    assert record["p_holm"] == pytest.approx(ttest_1samp(changes, 0).pvalue)
    assert pooled(pooled(read_runs(runs)[0])).manifest == pooled(read_runs(runs)[0]).manifest


def test_without_runs():
    with pytest.raises(BenchError, match="none given"):
        gains_table([])
