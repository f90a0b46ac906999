"""The script that plays many runs' policies on LIBERO-PRO: which evaluations, of which tasks."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from vlarl_bench.files import sole_writer
from vlarl_bench.registry import get
from vlarl_bench.report.runs import read_all

ROOT = Path(__file__).parents[1]


def test_each_suite_is_played_with_the_run_s_own_tasks_of_it_and_the_base_policy_once_a_seed():
    evaluations = runpy.run_path(str(ROOT / "scripts" / "robustness.py"))["evaluations"]
    runs = read_all([ROOT / "results" / "main"])
    planned = dict(one for run in runs for one in evaluations(run, ["swap", "task"]))
    bases = {(run.manifest["policy"], run.start, run.manifest["seed"]) for run in runs}
    assert len(planned) == 3 * 2 * (len(runs) + len(bases))
    for name, command in planned.items():
        options = dict(zip(command[::2], command[1::2], strict=True))
        assert name.startswith(f"{options['--suite']}-")
        known = {task.name for task in get("suite", options["--suite"]).tasks}
        assert len(options["--tasks"].split(",")) == 2
        assert known >= set(options["--tasks"].split(","))


@pytest.fixture
def play(monkeypatch):
    """`play(out) -> (status, the commands that it gave)`, whose evaluations end at once."""
    given = []
    monkeypatch.setattr(subprocess, "call", lambda command: given.append(command) or 3)
    function = runpy.run_path(str(ROOT / "scripts" / "robustness.py"))["play"]
    return lambda out: (function(out, ["--suite", "libero_pro_goal_swap"], "1 of 1"), given)


def test_an_evaluation_is_a_command_of_its_own_as_its_manifest_will_say(play, tmp_path):
    asked = ["eval", "--suite", "libero_pro_goal_swap", "--out", str(tmp_path / "swap")]
    assert play(tmp_path / "swap") == (3, [[sys.executable, "-P", "-m", "vlarl_bench", *asked]])


def test_what_was_interrupted_is_played_again(play, tmp_path):
    (tmp_path / "swap").mkdir()
    (tmp_path / "swap" / "config.json").write_text("{}")
    status, given = play(tmp_path / "swap")
    assert status == 3 and len(given) == 1
    assert not (tmp_path / "swap").exists()


def test_what_is_finished_is_left_alone(play, tmp_path):
    (tmp_path / "swap").mkdir()
    (tmp_path / "swap" / "table.md").write_text("")
    assert play(tmp_path / "swap") == (0, [])
    assert (tmp_path / "swap" / "table.md").exists()


def test_what_another_call_is_playing_is_left_alone_from_its_first_moment(play, tmp_path, capsys):
    (tmp_path / "swap").mkdir()
    with sole_writer(tmp_path / ".playing" / "swap"):
        assert play(tmp_path / "swap") == (0, [])
    assert (tmp_path / "swap").exists()
    assert capsys.readouterr().err.startswith("passed over: ")
