"""Runs that several processes share."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sweeps import COMMAND, TOY, environment, toml, vlarl

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS, RunConfig
from vlarl_bench.distributed import check_same, from_first, gathered, own, spread, started
from vlarl_bench.errors import BenchError
from vlarl_bench.plan import plan_run
from vlarl_bench.progress import Progress
from vlarl_bench.records import read_metrics, read_rows
from vlarl_bench.run import _demonstrations
from vlarl_bench.sweep import Resources
from vlarl_bench.sweep_commands import check_executor
from vlarl_bench.sweep_slurm import across

RUN = ["run", "--algo", "fpo", "--suite", "toy-arm", "--tasks", "one", "--budget", "smoke"]
FAULTS = Path(__file__).parent / "faults"


def rows(folder):
    drop = ("run", "fingerprint")
    return {
        row.key[1:]: {key: value for key, value in row.to_json().items() if key not in drop}
        for row in read_rows(folder / "episodes.jsonl")
    }


def test_a_killed_process_ends_the_others_and_another_number_of_them_goes_on(tmp_path):
    env = environment(tmp_path, TOY_KILL=str(tmp_path / "kill"))
    script = [sys.executable, FAULTS / "shared_runs.py", tmp_path]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = json.loads(done.stdout.splitlines()[-1])
    assert sorted(ended["killed"]["codes"]) == [-signal.SIGKILL, 1]
    assert ended["killed"]["seconds"] < 60
    assert "processes: another process of this run ended" in done.stderr
    assert ended["resumed"]["codes"] == [0, 0, 0]

    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    alone, shared = rows(calm), rows(stormy)
    assert shared.keys() == alone.keys()
    assert len(alone) == (2 + 2) + 2 * 3 + (2 + 2)  # each evaluation with noise and without
    for key, row in alone.items():
        if row["phase"] == "base" or row["iteration"] == 1:  # nothing was learned by several yet
            assert shared[key] == row
        assert (shared[key]["seed"], shared[key]["protocol"]) == (row["seed"], row["protocol"])
    played = {key[0]: row["checkpoint"] for key, row in shared.items()}
    assert played["base"] != played["final"]
    first, second = read_metrics(stormy / "metrics.jsonl")
    assert (first.pop("processes"), second["processes"]) == (2, 3)
    expected = read_metrics(calm / "metrics.jsonl")[0]
    for name in ("iteration", "env_steps", "gradient_steps", "flops"):
        assert first[name] == expected[name]
    for name in ("seconds", "cpu_seconds"):
        del first[name], expected[name]
    assert first == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert {path.name for path in stormy.iterdir()} == {path.name for path in calm.iterdir()}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (
            "os.kill(os.getpid(), 9)",
            "BenchError: processes: number 1 was killed by SIGKILL (out of memory?); go on with --resume",
        ),
        ("sys.exit(3)", ""),
    ],
)
def test_where_one_process_fails_the_launcher_ends_the_others(tmp_path, second, told):
    """A suite in the way, so that the processes are up and gone in a moment: the first one waits, the second fails."""
    env = environment(tmp_path)
    site = tmp_path / "site"
    site.joinpath("trap.py").write_text(
        "import os, sys, time\n"
        "if os.environ.get('RANK') == '0': time.sleep(600)\n"
        f"if os.environ.get('RANK') == '1': {second}\n"
        "from toy_suite import ToySuite\n"
    )
    entry = site / "vlarl_toy-1.0.dist-info" / "entry_points.txt"
    entry.write_text("[vlarl_bench.suites]\ntoy-arm = trap:ToySuite\n")
    code = f"import sys, vlarl_bench.distributed as d; sys.exit(d.launch(2, {RUN}))"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500)
    assert time.monotonic() - began < 300
    assert told in done.stderr
    assert told or (done.returncode, done.stderr) == (3, "")


def test_a_cell_of_a_sweep_is_shared_by_its_processes(tmp_path):
    env, file = environment(tmp_path), tmp_path / "shared.toml"
    resources, budget = {**TOY["resources"], "processes": 2}, {**TOY["budget"], "iterations": 1}
    file.write_text(toml({**TOY, "seeds": [0], "resources": resources, "budget": budget}))
    vlarl(env, "sweep", file)
    (run,) = (tmp_path / "shared" / "runs").iterdir()
    (line,) = read_metrics(run / "metrics.jsonl")
    assert line["processes"] == 2
    assert (run / "table.md").is_file()
    (log,) = (tmp_path / "shared" / "logs").iterdir()
    assert log.read_text().count("2 processes") == 1  # one of them tells


def test_processes_that_share_a_run_do_not_wait_for_demonstrations(tmp_path, monkeypatch):
    """Making many takes longer than a process that says nothing is waited for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlarl_bench.run.world_size", lambda: 2)
    budget = dataclasses.replace(BUDGETS["smoke"], demos=3)
    settings = registry.get("algorithm", "sft").Settings()
    config = RunConfig("sft", "libero_object", "pi0-tiny", budget, settings, "unused", base="scratch")
    told = r"demos: demos has fewer than 3 of libero_object/.*`vlarl-bench demos --suite libero_object --mode state "
    with pytest.raises(BenchError, match=told), Progress() as progress:
        _demonstrations(plan_run(config), config, progress)


@pytest.mark.parametrize(
    ("executor", "resources", "told"),
    [
        ("local", {"nodes": 2}, "resources.nodes: 2; more than one need --executor slurm"),
        ("debug", {"nodes": 2}, "resources.nodes: 2; more than one need --executor slurm"),
        ("debug", {"processes": 2}, "resources.processes: 2; --executor debug runs cells in its own process"),
    ],
)
def test_what_an_executor_cannot_do_is_one_line(executor, resources, told):
    with pytest.raises(BenchError, match=re.escape(told)):
        check_executor(executor, Resources(**resources))
    check_executor("slurm", Resources(**resources))


@pytest.mark.parametrize("field", ["nodes", "processes"])
def test_a_cell_has_a_node_and_a_process_at_least(field):
    with pytest.raises(BenchError, match=f"resources.{field}: 0; it must be at least 1"):
        Resources(**{field: 0}).check("resources")


def test_nodes_are_those_of_a_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(BenchError, match=re.escape("resources.nodes: 2; more than one need --executor slurm")):
        across(2, 4, ["run"])


def test_one_process_needs_none_of_it():
    assert own(3).tolist() == [0, 1, 2]
    assert (gathered("x"), from_first("x")) == (["x"], "x")
    assert torch.equal(spread(lambda i: 2 * i, torch.tensor([5, 6])), torch.tensor([0, 2]))
    check_same("the policy", "x")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE: 'two'; "),
        ("RANK", "", "RANK: ''; "),
        ("MASTER_ADDR", "", "MASTER_ADDR: ''; "),
        ("MASTER_PORT", "x", "MASTER_PORT: 'x'; "),
    ],
)
def test_what_a_launcher_says_is_checked(monkeypatch, name, value, told):
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, word in {**right, name: value}.items():
        monkeypatch.setenv(key, word)
    with pytest.raises(BenchError, match=told):
        started()
    monkeypatch.setenv(name, right[name])
    assert started() == 2
    monkeypatch.delenv("WORLD_SIZE")
    assert started() == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--processes", "0"], "processes: 0; it must be in [1, 1024]"),
        (["--processes", "3"], "processes: 3; a launcher has started 2 already (WORLD_SIZE)"),
    ],
)
def test_a_number_of_processes_that_cannot_be_is_one_line(tmp_path, arguments, told):
    env = environment(tmp_path, WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500")
    done = subprocess.run([*COMMAND, *RUN, *arguments], env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (2, f"vlarl-bench: error: {told}\n")
