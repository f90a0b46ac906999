"""Costs against what was written down."""

import dataclasses

import pytest

from vlarl_bench.cli import main
from vlarl_bench.errors import BenchError
from vlarl_bench.records import MetricsLog
from vlarl_bench.report.cost import cost_table
from vlarl_bench.report.lint import lint
from vlarl_bench.report.render import to_json
from vlarl_bench.report.runs import read_runs

TRAIN = ((1, False), (1, True), (2, True), (2, True), (3, True), (3, True))
"""Half of the first round succeed, and all of the second and third."""


def run(make_run, name, seed, cpu=3600.0, **more):
    folder = make_run(
        name, base=lambda *_: False, final=lambda task, state, repeat: repeat == 0, seed=seed, train=TRAIN, **more
    )
    with MetricsLog(folder / "metrics.jsonl") as log:
        for i in (1, 2, 3):
            line = {"iteration": i, "env_steps": 200 * i, "gradient_steps": 10 * i + seed, "flops": 1e12 * i}
            log.append(line | ({"cpu_seconds": cpu * i} if cpu else {}))
    return folder


def test_costs_are_medians_over_seeds_of_the_whole_and_of_the_way_to_the_threshold(make_run):
    folders = [run(make_run, f"a{seed}", seed) for seed in range(3)]
    (line,) = cost_table(read_runs(folders), 0.75).records
    assert line["gain"]["value"] == pytest.approx(0.5)
    # halfway between rounds 1 and 2, which were played after no update and after one
    assert line["env_steps"] == {"whole": 600, "reached": 100}
    assert line["gradient_steps"] == {"whole": 31, "reached": 5.5}
    assert line["flops"] == {"whole": 3e12, "reached": 0.5e12}
    assert line["cpu_seconds"] == {"whole": 10800, "reached": 1800}
    (text,) = cost_table(read_runs(folders), 0.75).lines
    assert text[-5:] == ("+50.0", "100 of 600", "5.5 of 31", "0.5 of 3", "0.5 of 3")
    (text,) = cost_table(read_runs(folders), 0.5).lines
    assert text[-4] == "at the start of 600"


def test_the_gain_has_its_interval(make_run):
    (text,) = cost_table(read_runs([run(make_run, "a0", 0)])).lines
    assert text[5].startswith("+50.0 [+")


def test_a_run_that_was_stopped_reached_nothing(make_run):
    (whole,) = read_runs([run(make_run, "a0", 0)])
    stopped = dataclasses.replace(whole, stopped={"iteration": 3, "reason": "collapsed"})
    assert cost_table([whole], 0.5).records[0]["env_steps"]["reached"] == 0
    assert cost_table([stopped], 0.5).records[0]["env_steps"]["reached"] is None


def test_the_round_that_destroyed_the_policy_is_paid_for(make_run):
    (whole,) = read_runs([run(make_run, "a0", 0)])
    spent = {"env_steps": 800, "gradient_steps": 41, "flops": int(4e12)}
    stopped = {"iteration": 4, "reason": "collapsed", "spent": spent, "seconds": 9.0, "cpu_seconds": 14400.0}
    (line,) = cost_table([dataclasses.replace(whole, stopped=stopped)], 0.5).records
    assert [line[name]["whole"] for name in ("env_steps", "gradient_steps", "flops")] == list(spent.values())
    assert line["cpu_seconds"]["whole"] == 14400
    told = {"iteration": 4, "reason": "collapsed", "spent": spent}  # as until 2026-11-30
    (line,) = cost_table([dataclasses.replace(whole, stopped=told)], 0.5).records
    assert (line["flops"]["whole"], line["cpu_seconds"]["whole"]) == (4e12, 10800)
    with pytest.raises(BenchError, match=r"stopped.json: not .*; spent.flops is 'much'; it must be an integer"):
        dataclasses.replace(whole, stopped=told | {"spent": spent | {"flops": "much"}})


def test_what_is_first_played_in_a_later_round_had_cost_what_was_spent_by_then(make_run):
    (whole,) = read_runs([run(make_run, "a0", 0)])
    later = dataclasses.replace(whole, rows=whole.rows.where(whole.rows.column("iteration") != 1))
    assert cost_table([later], 0.5).records[0]["env_steps"]["reached"] == 200


def test_missing_episodes_are_marked(make_run, tmp_path):
    table = cost_table(read_runs([run(make_run, "a0", 0, skip=(4,))]))
    assert table.lines[0][5] == "+50.0 INCOMPLETE"
    (tmp_path / "cost.json").write_text(to_json(table))
    assert lint([str(tmp_path / "cost.json")]) == []


def test_what_was_not_reached_or_not_counted_is_said(make_run, capsys):
    never = [run(make_run, "a0", 0, cpu=None)]
    (text,) = cost_table(read_runs(never), 1.0).lines
    assert text[-4:] == ("200 of 600", "10 of 30", "1 of 3", "-")
    supervised = make_run("s0", base=lambda *_: False, final=lambda *_: True, algorithm="s")
    with MetricsLog(supervised / "metrics.jsonl") as log:
        log.append({"iteration": 1, "env_steps": 0, "gradient_steps": 9, "flops": 1e12})
    (text,) = cost_table(read_runs([supervised]), 1.0).lines
    assert text[-4:] == ("0", "9", "1", "-")
    without = make_run("b0", base=lambda *_: False, final=lambda *_: True, algorithm="b")
    assert not cost_table(read_runs([without])).lines  # an older run, of which only the rows are left
    assert main(["table", *map(str, never), "--layout", "cost", "--format", "markdown"]) == 0
    assert "What a gain costs" in capsys.readouterr().out
