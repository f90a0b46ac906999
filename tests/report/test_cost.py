"""Costs against what was written down."""

import pytest

from vlarl_bench.cli import main
from vlarl_bench.records import MetricsLog
from vlarl_bench.report.cost import cost_table
from vlarl_bench.report.runs import read_runs

TRAIN = ((1, False), (1, True), (2, True), (2, True))  # half of the first round succeed, and all of the second


def run(make_run, name, seed, cpu=3600.0, **more):
    folder = make_run(
        name, base=lambda *_: False, final=lambda task, state, repeat: repeat == 0, seed=seed, train=TRAIN, **more
    )
    with MetricsLog(folder / "metrics.jsonl") as log:
        for i in (1, 2):
            line = {"iteration": i, "env_steps": 200 * i, "gradient_steps": 10 * i + seed, "flops": 1e12 * i}
            log.append(line | ({"cpu_seconds": cpu * i} if cpu else {}))
    return folder


def test_costs_are_medians_over_seeds_of_the_whole_and_of_the_way_to_the_threshold(make_run):
    folders = [run(make_run, f"a{seed}", seed) for seed in range(3)]
    (line,) = cost_table(read_runs(folders), 0.75).records
    assert line["gain"] == pytest.approx(0.5)
    assert line["env_steps"] == {"whole": 400, "reached": 300}
    assert line["gradient_steps"] == {"whole": 21, "reached": 16}
    assert line["flops"] == {"whole": 2e12, "reached": 1.5e12}
    assert line["cpu_seconds"] == {"whole": 7200, "reached": 5400}
    (text,) = cost_table(read_runs(folders), 0.75).lines
    assert text[-5:] == ("+50.0", "300 of 400", "16 of 21", "1.5 of 2", "1.5 of 2")


def test_what_was_not_reached_or_not_counted_is_said(make_run, capsys):
    never = [run(make_run, "a0", 0, cpu=None)]
    (text,) = cost_table(read_runs(never), 1.0).lines
    assert text[-4:] == ("400 of 400", "20 of 20", "2 of 2", "-")
    supervised = make_run("s0", base=lambda *_: False, final=lambda *_: True, algorithm="s")
    with MetricsLog(supervised / "metrics.jsonl") as log:
        log.append({"iteration": 1, "env_steps": 0, "gradient_steps": 9, "flops": 1e12})
    (text,) = cost_table(read_runs([supervised]), 1.0).lines
    assert text[-4:] == ("0", "9", "1", "-")
    without = make_run("b0", base=lambda *_: False, final=lambda *_: True, algorithm="b")
    assert not cost_table(read_runs([without])).lines  # an older run, of which only the rows are left
    assert main(["table", *map(str, never), "--layout", "cost", "--format", "markdown"]) == 0
    assert "What a gain costs" in capsys.readouterr().out
