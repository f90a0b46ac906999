"""Trials: which settings, on which states, and what is kept of them."""

import dataclasses
import re
import shutil
import tomllib
from pathlib import Path
from unittest import mock

import pytest
from sweeps import here

from vlarl_bench import registry, sweep_jobs
from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError
from vlarl_bench.options import Tune
from vlarl_bench.report.runs import read_all
from vlarl_bench.sweep import plan_sweep, read_sweep
from vlarl_bench.sweep_jobs import packed_runs
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


@pytest.mark.parametrize("name", ["tuning", "tuning-suites", "tuning-tokens"])
def test_a_default_that_moves_changes_no_published_trial(name, monkeypatch):
    """The files spell out what the trials had, so every packed run is still one of them, whatever prior ships now."""
    monkeypatch.setattr(sweep_jobs, "_prior", lambda *of: mock.ANY)
    results = Path(__file__).parents[1] / "results"
    found = set(packed_runs(read_sweep(results / f"{name}.toml")).values())
    assert len(found) == len(read_all([results / name])) > 0


@pytest.mark.parametrize("observation", ["state", "pixels"])
@pytest.mark.parametrize("suite", ["libero_object", "aloha"])
def test_tuning_never_sees_a_held_out_state(suite, observation):
    found = registry.get("suite", suite)
    tiny, tuning = (found.protocol(observation, name) for name in ("tiny", "tuning"))
    assert tuning.train_states + tuning.eval_states == tiny.train_states
    assert 5 * len(tuning.train_states) == 3 * len(tiny.train_states)
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


def test_settings_that_are_texts_or_truths_are_trials_as_well(tmp_path, monkeypatch):
    search = {"ratio": ("difference", "scaled"), "anneal_lr": (True, False)}
    monkeypatch.setattr(registry.get("algorithm", "fpo"), "search", search)
    file = tmp_path / "tuning.toml"
    file.write_text(trials(Tune(numbers=BUDGETS["smoke"], algo=("fpo",), trials=4), tmp_path))
    lines = report(read_sweep(file)).splitlines()
    assert "| 0 | difference | True |  |  |  |  |  |" in lines
    assert sorted(line.split(" | ")[1:3] for line in lines if re.match(r"\| \d", line)) == [
        [ratio, anneal] for ratio in ("difference", "scaled") for anneal in ("False", "True")
    ]


def test_what_a_file_varies_beyond_the_searched_is_told_as_well(tmp_path):
    file = tmp_path / "tuning.toml"
    written = trials(Tune(numbers=BUDGETS["smoke"], algo=("dsrl",), trials=2), tmp_path)
    file.write_text(written.replace("settings = { ", "settings = { critics = 3, "))
    lines = report(read_sweep(file)).splitlines()
    assert "| trial | lr | bound | repeat | critics | before | after | gradient steps | TFLOP |  |" in lines
    assert [line.split(" | ")[4] for line in lines if re.match(r"\| \d", line)] == ["2", "3"]


def test_trials_are_runs_that_stay_and_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = dataclasses.replace(BUDGETS["smoke"], tasks=1, episodes=2)
    asked = Tune(numbers=numbers, algo=("dsrl",), policy=("pi0-tiny",), suite="libero_object", trials=2)
    file = Path("tuning.toml")
    text = trials(asked, Path("tuning")).replace('"libero_object"', '"toy-arm"')
    file.write_text(text.replace("run = {", 'run = { tasks = ["one"], slots = 2,'))
    told = here("tune", file, "--executor", "debug")
    assert "2 cells: 2 done" in told
    text = Path("tuning/trials.md").read_text()
    assert text in told
    default = registry.get("algorithm", "dsrl").Settings()
    searched = rf"{default.lr:g} \| {default.bound:g} \| {default.repeat}"
    assert re.search(rf"^\| 0 \| {searched} \| [01]/[12] \| [01]/[12] \|", text, flags=re.MULTILINE)
    assert "protocol `tuning`" in text
    assert "Best: trial " in text
    assert "[settings.dsrl]\nlr = " in text
    runs = sorted(Path("tuning/runs").iterdir())
    before = [(run / "episodes.jsonl").stat().st_mtime_ns for run in runs]
    assert text in here("tune", file)
    assert [(run / "episodes.jsonl").stat().st_mtime_ns for run in runs] == before
    Path("other.toml").write_text(file.read_text().replace('"tuning"', '"tiny"'))
    Path("seeds.toml").write_text(file.read_text().replace("seeds = [0]", "seeds = [0, 1]"))
    for wrong, line in (
        ((), "algo: missing; name algorithms, or a file"),
        (("other.toml",), "other.toml: run.protocol: 'tiny'; trials are under 'tuning'"),
        (("seeds.toml",), "seeds.toml: seeds: [0, 1]; all trials share one"),
        ((file, "--trials", "3"), "trials: only without a sweep file; write it into tuning.toml"),
        (("--algo", "dsrl"), "out: tuning.toml says something else than these options"),
    ):
        assert line in here("tune", *wrong, status=2)
    # As in another session: of all this only the file and a pack of the runs are left.
    here("pack", *runs, "--out", "packed")
    shutil.rmtree("tuning")
    file.write_text('packed = ["packed"]\n' + file.read_text())
    assert text in here("tune", "tuning.toml")
    assert not Path("tuning/runs").exists() or not list(Path("tuning/runs").iterdir())
