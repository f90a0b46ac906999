"""What is said of a published run and its repetition. One is run again for real, at smoke size, by `.ci/run`."""

import dataclasses

import pytest

from vlarl_bench import cli
from vlarl_bench.report.pack import make_entry, metric_lines, read_pack, write_pack
from vlarl_bench.report.runs import read_all
from vlarl_bench.reproduce import verdict

from .report.conftest import make_run  # noqa: F401  (a fixture)


@pytest.fixture
def runs(make_run):  # noqa: F811
    """Published: 16 of 32 successes; the same again, 17 of 32, and 32 of 32."""

    def half(task, state, repeat):
        return (state + repeat) % 2 == 0

    outcomes = {
        "published": half,
        "same": half,
        "inside": lambda *at: half(*at) or at == ("suite_a/pick_it_up", 4, 1),
        "outside": lambda *_: True,
    }
    return {name: read_all([make_run(name, base=half, final=after)])[0] for name, after in outcomes.items()}


def test_equal_rows_a_rate_inside_and_one_outside(runs):
    text, agrees = verdict(runs["published"], runs["same"])
    assert agrees
    assert "the same weights and the same episodes" in text
    text, agrees = verdict(runs["published"], runs["inside"])
    assert agrees
    assert text == "published 8/16 50.0% [28.0%, 72.0%], again 9/16 56.2%: inside the interval"
    text, agrees = verdict(runs["published"], runs["outside"])
    assert not agrees
    assert "OUTSIDE" in text


def test_equal_outcomes_of_other_weights_are_not_the_same_rows(runs):
    rows = runs["same"].rows
    rows.column("checkpoint")[:] = "1" * 12
    text, agrees = verdict(runs["published"], dataclasses.replace(runs["same"], rows=rows))
    assert agrees
    assert text.endswith("inside the interval")


def test_what_cannot_be_run_again_is_told_in_one_line(tmp_path, capsys):
    entry = next(entry for entry in read_pack("results/main") if entry.config["algorithm"] == "fpo")
    manifest = {**entry.manifest, "base_checkpoint": "0" * 12}
    altered = make_entry("altered", manifest, entry.config, None, entry.rows, metric_lines(entry.metrics))
    write_pack(tmp_path / "copy", [altered])
    for run, told in (
        (tmp_path / "copy", "it started from 000000000000, and --base prior is"),
        (tmp_path, "manifest.json"),
    ):
        assert cli.main(["reproduce", str(run), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    assert not (tmp_path / "out").exists()
