"""Trials: which settings, on which states, and what is kept of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.records import read_rows
from vlarl_bench.tune import choices


def test_the_first_trial_is_the_default_and_the_others_are_drawn_once():
    method = registry.get("algorithm", "fpo")
    drawn = choices("fpo", 8, seed=0)
    assert drawn[0] == method.Settings()
    assert len(set(drawn)) == 8
    assert drawn == choices("fpo", 8, seed=0) != choices("fpo", 8, seed=1)
    assert drawn[:5] == choices("fpo", 5, seed=0)  # more trials later go on with the same ones
    everything = choices("fpo", 27, seed=0)
    assert {settings.lr for settings in everything} == set(method.search["lr"])
    for trials in (0, 28):
        with pytest.raises(BenchError, match=r"^trials: .* 27 combinations of lr, clip_eps, epochs"):
            choices("fpo", trials, seed=0)
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


def test_trials_are_runs_that_stay_and_are_not_run_again(tmp_path):
    numbers = {"tasks": 1, "iterations": 1, "episodes": 2, "eval-states": 1, "eval-repeats": 1}
    command = [str(Path(sys.executable).parent / "vlarl-bench"), "tune", "--algo", "fpo", "--out", str(tmp_path)]
    command += [word for name, number in numbers.items() for word in (f"--budget.{name}", str(number))]
    done = subprocess.run([*command, "--trials", "2"], capture_output=True, text=True, timeout=600, check=True)
    folder = tmp_path / "fpo-pi0-tiny-libero_object"
    text = (folder / "trials.md").read_text()
    assert text in done.stdout
    assert "| 0 | 0.0001 | 0.05 | 4 |" in text
    assert "protocol tiny-state-tuning@2" in text
    assert "Best: trial " in text
    assert "--algo.clip-eps" in text
    for trial in ("trial00", "trial01"):
        rows = read_rows(folder / trial / "episodes.jsonl")
        assert {row.init_state for row in rows} <= set(range(25))
    before = (folder / "trial00" / "episodes.jsonl").stat().st_mtime_ns
    again = subprocess.run([*command, "--trials", "2"], capture_output=True, text=True, timeout=600, check=True)
    assert again.stdout.strip() == text.strip()
    assert (folder / "trial00" / "episodes.jsonl").stat().st_mtime_ns == before
    other = subprocess.run([*command, "--trials", "2", "--seed", "1"], capture_output=True, text=True, timeout=600)
    assert other.returncode == 2
    assert "holds a trial of other settings; choose another folder with --out" in other.stderr
