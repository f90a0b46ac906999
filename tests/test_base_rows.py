"""Base evaluations that are taken over: the rows that playing would have given, or none at all."""

import dataclasses
import shutil

import pytest
from sweeps import TOY as SWEEP
from sweeps import here, toml
from toy_suite import installed

from vlarl_bench import base_rows, plan, run
from vlarl_bench.cli import main
from vlarl_bench.config import RunConfig
from vlarl_bench.records import log_line, read_rows
from vlarl_bench.sealed import read_sealed
from vlarl_bench.sweep_cell import _arguments

BUDGET = ["--budget", "smoke", "--budget.episodes", "3", "--budget.eval-states", "2", "--budget.iterations", "1"]
TOY = ["run", "--suite", "toy-arm", "--tasks", "one", *BUDGET, "--slots", "2", "--workers", "1", "--threads", "1"]
RWFM = [*TOY, "--algo", "rwfm", "--algo.gradient-steps", "2", "--algo.minibatch", "8", "--no-video"]
DPPO = [*TOY, "--algo", "dppo", "--algo.critic-steps", "2", "--algo.epochs", "1", "--no-video"]


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """As from a commit, whatever the state of this checkout."""
    for module in (plan, base_rows):
        monkeypatch.setattr(module, "code_version", lambda: "0.1.0+g123456789abc")
    with installed():
        yield


@pytest.fixture
def played(monkeypatch):
    """How many episodes each evaluation has played."""
    counts, inner = [], run.run_shared

    def counting(pool, policy, jobs, *rest, **options):
        counts.append(len(jobs))
        return inner(pool, policy, jobs, *rest, **options)

    monkeypatch.setattr(run, "run_shared", counting)
    return counts


def vlarl(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def rows(folder):
    return [dataclasses.replace(row, run="") for row in read_rows(folder / "episodes.jsonl")]


def test_what_another_run_has_played_is_not_played_again_and_is_the_same(tmp_path, played, capsys):
    vlarl(*RWFM, "--out", tmp_path / "runs" / "first")
    vlarl(*DPPO, "--out", tmp_path / "alone")
    assert played == [2, 2, 2, 2] * 2  # with noise and without, before and after
    played.clear()
    second = tmp_path / "runs" / "second"
    vlarl(*DPPO, "--out", second, "--base-from", tmp_path / "runs")
    assert played == [2, 2]
    assert rows(second) == rows(tmp_path / "alone")
    assert {row.run for row in read_rows(second / "episodes.jsonl")} == {"second"}
    assert "base evaluation: first has played the same, and its 4 episodes are taken over" in capsys.readouterr().err
    said = [read_sealed(tmp_path / run / "manifest.json")["evaluation"].get("base_from") for run in ("alone", second)]
    assert said == [None, "first"]


def test_what_is_not_the_same_is_played(tmp_path, played, monkeypatch):
    first = tmp_path / "runs" / "first"
    vlarl(*RWFM, "--out", first)

    def before(name, *changes):
        """How many episodes were played before training."""
        played.clear()
        vlarl(*DPPO, *changes, "--out", tmp_path / name, "--base-from", tmp_path / "runs")
        return played[:-2]

    assert before("same") == []
    assert before("seed", "--seed", "1") == [2, 2]
    assert before("threads", "--threads", "2") == [2, 2]
    assert before("slots", "--slots", "3") == [2, 2]
    assert before("repeats", "--budget.eval-repeats", "2") == [4, 2]
    monkeypatch.setattr(base_rows, "fingerprint_hash", lambda: "another")
    assert before("machine") == [2, 2]


@pytest.mark.parametrize("code", ["0.1.0+g123456789abc", "0.1.0+g123456789abc.dirty", "0.1.0+unknown", "0.1.0"])
def test_code_that_is_no_commit_s_is_never_taken_for_the_same(tmp_path, monkeypatch, code):
    for module in (plan, base_rows):
        monkeypatch.setattr(module, "code_version", lambda: code)
    vlarl(*RWFM, "--out", tmp_path / "runs" / "first")
    stored = read_sealed(tmp_path / "runs" / "first" / "config.json")
    again = plan.plan_run(RunConfig.from_dict({**stored, "out": str(tmp_path / "again")}))
    checkpoint = read_rows(tmp_path / "runs" / "first" / "episodes.jsonl")[0].checkpoint
    assert base_rows.played_by_another(again, checkpoint, tmp_path / "runs")[0] == ("first" if code[-1] == "c" else "")


def test_a_run_that_is_not_whole_or_damaged_is_passed_over(tmp_path, played):
    first = tmp_path / "runs" / "first"
    vlarl(*RWFM, "--out", first)
    base = [row for row in read_rows(first / "episodes.jsonl") if row.phase == "base"]
    (first / "episodes.jsonl").write_bytes(b"".join(log_line(row.to_json()) for row in base[:-1]))
    shutil.copytree(first, tmp_path / "runs" / "damaged")
    (tmp_path / "runs" / "damaged" / "episodes.jsonl").write_bytes(b"{}\n")
    (tmp_path / "runs" / "no-run").mkdir()
    played.clear()
    vlarl(*DPPO, "--out", tmp_path / "runs" / "second", "--base-from", tmp_path / "runs")
    assert played == [2, 2, 2, 2]


def test_there_is_no_such_folder(tmp_path, capsys):
    assert main([*RWFM, "--out", str(tmp_path / "run"), "--base-from", str(tmp_path / "none")]) == 2
    assert "base_from: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_cells_of_a_sweep_play_what_they_share_once(tmp_path):
    file = tmp_path / "pair.toml"
    file.write_text(toml({**SWEEP, "algorithms": ["fpo", "dsrl"], "seeds": [0]}))
    assert "2 cells: 2 done" in here("sweep", file, "--executor", "debug")
    first, second = sorted((tmp_path / "pair" / "runs").iterdir(), key=lambda run: run.name.startswith("dsrl"))
    taken = [read_sealed(run / "manifest.json")["evaluation"].get("base_from") for run in (first, second)]
    assert taken == [None, first.name]


def test_a_cell_in_its_own_process_is_told_where_the_others_are(tmp_path):
    """And only as it begins: what goes on plays what it owes itself."""
    out = tmp_path / "runs" / "run"
    vlarl(*RWFM, "--out", out)
    config = RunConfig.from_dict(read_sealed(out / "config.json"))
    assert "--base-from" not in _arguments(config, "")
    shutil.rmtree(out)
    assert _arguments(config, "")[-2:] == ["--base-from", str(tmp_path / "runs")]
