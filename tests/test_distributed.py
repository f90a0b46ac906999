"""Runs that several processes share."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from sweeps import COMMAND, environment

from vlarl_bench.distributed import check_same, from_first, gathered, own, spread, started
from vlarl_bench.errors import BenchError
from vlarl_bench.records import read_metrics, read_rows

RUN = [
    *("run", "--algo", "fpo", "--suite", "toy-arm", "--budget", "smoke", "--budget.iterations", "2", "--no-video"),
    *("--budget.episodes", "3", "--algo.critic-steps", "2", "--algo.critic-width", "8", "--algo.epochs", "1"),
    *("--tasks", "one", "--workers", "1", "--slots", "2", "--threads", "1"),
]


def rows(folder):
    drop = ("run", "fingerprint")
    return {
        row.key[1:]: {key: value for key, value in row.to_json().items() if key not in drop}
        for row in read_rows(folder / "episodes.jsonl")
    }


def alive(marker):
    """Process ids of those whose environment has the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_process_ends_the_others_and_another_number_of_them_goes_on(tmp_path):
    calm, stormy, kill = tmp_path / "calm", tmp_path / "stormy", tmp_path / "kill"
    env = environment(tmp_path, TOY_KILL=str(kill), MARKER=f"vlarl-{os.getpid()}-{tmp_path.name}")
    subprocess.run([*COMMAND, *RUN, "--out", calm], env=env, check=True, capture_output=True, timeout=600)

    started = [*COMMAND, *RUN, "--out", stormy, "--processes", "2"]
    process = subprocess.Popen(started, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (stormy / "checkpoints" / "000001").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    kill.touch()  # a simulator kills the process that it belongs to, whichever that is
    _, told = process.communicate(timeout=600)
    assert process.returncode == 2
    assert [line for line in told.splitlines() if "error" in line] == [
        f"vlarl-bench: error: processes: number {number} was killed by SIGKILL (out of memory?); go on with --resume"
        for number in range(2)
        if f"number {number} was" in told
    ]
    assert "2 processes" in told
    assert not alive(env["MARKER"])
    done = subprocess.run(
        [*COMMAND, "run", "--resume", stormy, "--processes", "3"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]

    alone, shared = rows(calm), rows(stormy)
    assert shared.keys() == alone.keys()
    for key, row in alone.items():
        if key[1] <= 1 and key[0] != "final":  # before anything was learned by several
            assert shared[key] == row
        assert (shared[key]["seed"], shared[key]["protocol"]) == (row["seed"], row["protocol"])
    first, second = read_metrics(stormy / "metrics.jsonl")
    assert (first["processes"], second["processes"]) == (2, 3)
    expected = read_metrics(calm / "metrics.jsonl")[0]
    drop = ("processes", "seconds")
    assert {k: v for k, v in first.items() if k not in drop} == pytest.approx(
        {k: v for k, v in expected.items() if k not in drop}, rel=1e-3, abs=1e-5
    )
    assert (first["flops"], first["gradient_steps"]) == (expected["flops"], expected["gradient_steps"])
    assert {path.name for path in stormy.iterdir()} == {path.name for path in calm.iterdir()}


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
