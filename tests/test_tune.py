"""Trials: which settings, on which states, and what is kept of them."""

import shutil
import tomllib
from pathlib import Path

import pytest

from vlarl_bench import registry
from vlarl_bench.cli import main
from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError
from vlarl_bench.options import Tune
from vlarl_bench.records import read_rows
from vlarl_bench.sweep import plan_sweep, read_sweep
from vlarl_bench.tune import choices, report, trials


def test_the_first_trial_is_the_default_and_the_others_are_drawn_once():
    method = registry.get("algorithm", "fpo")
    drawn = choices("fpo", 8, seed=0)
    assert drawn[0] == method.Settings()
    assert len(set(drawn)) == 8
    assert drawn == choices("fpo", 8, seed=0) != choices("fpo", 8, seed=1)
    assert drawn[:5] == choices("fpo", 5, seed=0)  # more trials later go on with the same ones
    everything = choices("fpo", 27, seed=0)
    assert {settings.lr for settings in everything} == set(method.search["lr"])
    for count in (0, 28):
        with pytest.raises(BenchError, match=r"^trials: .* 27 combinations of lr, clip_eps, epochs"):
            choices("fpo", count, seed=0)
    with pytest.raises(BenchError, match="'sft' names no settings"):
        choices("sft", 1, seed=0)


@pytest.mark.parametrize("observation", ["state", "pixels"])
@pytest.mark.parametrize("suite", ["libero_object", "aloha"])
def test_tuning_never_sees_a_held_out_state(suite, observation):
    found = registry.get("suite", suite)
    tiny, tuning = (found.protocol(observation, name) for name in ("tiny", "tuning"))
    assert tuning.train_states + tuning.eval_states == tiny.train_states
    assert len(tuning.train_states) == 15
    assert not set(tuning.eval_states) & set(tiny.eval_states)
    assert tuning.name == f"{tiny.name}-tuning"
    assert tuning.hash != tiny.hash


def test_the_file_stands_for_as_many_trials_of_every_method(tmp_path):
    asked = Tune(
        numbers=BUDGETS["smoke"], algo=("fpo", "ar-ppo"), policy=("pi0-tiny", "openvla-tiny"), trials=3, seed=4
    )
    sweep = plan_sweep(tomllib.loads(trials(asked, tmp_path)), tmp_path / "tuning.toml")
    found = [(row.algorithm, row.policy, row.config.settings) for row in sweep.rows if not row.impossible]
    assert found == [
        (name, policy, settings)
        for name, policy in (("fpo", "pi0-tiny"), ("ar-ppo", "openvla-tiny"))
        for settings in choices(name, 3, seed=4)
    ]
    assert {(c.config.protocol, c.config.seed, c.config.budget) for c in sweep.cells} == {
        ("tuning", 4, BUDGETS["smoke"])
    }
    file = tmp_path / "tuning.toml"
    file.write_text(trials(asked, tmp_path))
    text = report(read_sweep(file))
    assert text.count("## ") == 2
    assert "Best" not in text


def test_trials_are_runs_that_stay_and_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    numbers = {"tasks": 1, "iterations": 1, "episodes": 2, "eval-states": 1, "eval-repeats": 1}
    command = ["tune", "--algo", "dsrl", "--trials", "2", "--workers", "1", "--threads", "1"]
    command += [word for name, number in numbers.items() for word in (f"--budget.{name}", str(number))]
    assert main(["tune"]) == 2
    assert "algo: missing; name algorithms, or a file" in capsys.readouterr().err
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "2 cells: 2 done" in told
    text = Path("tuning/trials.md").read_text()
    assert text in told
    assert "| 0 | 0.0003 | 1 | 1 | 0/1 |" in text or "| 0 | 0.0003 | 1 | 1 | 1/1 |" in text
    assert "protocol `tuning`" in text
    assert "Best: trial " in text
    assert "[settings.dsrl]\nlr = " in text
    runs = sorted(Path("tuning/runs").iterdir())
    for run in runs:
        assert {row.init_state for row in read_rows(run / "episodes.jsonl")} <= set(range(25))
    before = [(run / "episodes.jsonl").stat().st_mtime_ns for run in runs]
    for again in (command, ["tune", "tuning.toml"]):
        assert main(again) == 0
        assert text in capsys.readouterr().out
    assert [(run / "episodes.jsonl").stat().st_mtime_ns for run in runs] == before
    Path("other.toml").write_text(Path("tuning.toml").read_text().replace('"tuning"', '"tiny"'))
    assert main(["tune", "other.toml"]) == 2
    assert "other.toml: run.protocol: 'tiny'; trials are under 'tuning'" in capsys.readouterr().err
    assert main(["tune", "tuning.toml", "--trials", "3"]) == 2
    assert "trials: only without a sweep file; write it into tuning.toml" in capsys.readouterr().err
    assert main([*command, "--seed", "1"]) == 2
    assert "out: tuning.toml says something else than these options" in capsys.readouterr().err
    # As in another session: of all this only the file and a pack of the runs are left.
    assert main(["pack", *map(str, runs), "--out", "packed"]) == 0
    shutil.rmtree("tuning")
    file = Path("tuning.toml")
    file.write_text('packed = "packed"\n' + file.read_text())
    assert main(["tune", "tuning.toml"]) == 0
    assert text in capsys.readouterr().out
    assert not Path("tuning/runs").exists() or not list(Path("tuning/runs").iterdir())
