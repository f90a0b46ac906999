"""Cells run for real on this machine: disturbed, shared and damaged. On a real SLURM: tests/slurm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from sweeps import COMMAND, TOY, environment, here, history, outcomes, toml, vlarl

from vlarl_bench import sweep_jobs
from vlarl_bench.cli import main
from vlarl_bench.errors import BenchError
from vlarl_bench.report.pack import make_entry, metric_lines, read_pack, write_pack
from vlarl_bench.sealed import read_sealed, write_sealed
from vlarl_bench.sweep_jobs import State, choose, crowded, estimate, run_local
from vlarl_bench.sweep_slurm import queued


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def calm(env, tmp_path_factory):
    """An undisturbed sweep of two seeds."""
    file = tmp_path_factory.mktemp("calm") / "calm.toml"
    file.write_text(toml({**TOY, "seeds": [0, 1], "parallel": 2}))
    assert "2 cells: 2 missing" in here("sweep", file, "--dry-run")
    assert not file.with_suffix("").exists()  # a plan leaves nothing behind
    assert "2 cells: 2 done" in vlarl(env, "sweep", file)
    return file


def wait_until(true, what="something happens"):
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def start(env, file):
    return subprocess.Popen(
        [*COMMAND, "sweep", str(file)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def checkpointed(out, runs=1):
    return len(list(out.glob("runs/*/checkpoints/000000"))) == runs


def test_a_done_sweep_is_left_alone_and_tells_what_more_would_cost(calm):
    before = history(calm.with_suffix(""))
    assert "2 cells: 2 done" in here("sweep", calm)
    assert history(calm.with_suffix("")) == before
    more = calm.with_name("more.toml")
    more.write_text(toml({**TOY, "seeds": [0, 1, 2, 3], "out": "calm"}))
    told = here("sweep", more, "--dry-run")
    assert "done 0-1" in told
    assert "missing 2-3" in told
    seconds = sum(attempt.seconds for attempt in before.values()) / 2
    assert f"2 cells to run: about {2 * seconds / 3600:.3g} h" in told


def test_a_page_of_impossible_pairs_is_told_in_short(tmp_path):
    file = tmp_path / "mixed.toml"
    for policies, shown in ((["pi0-tiny", "openvla-tiny"], True), (["openvla-tiny", "pi0-fast-tiny"], False)):
        axes = {"algorithms": ["fpo", "dppo"], "policies": policies, "suites": ["libero_object"], "seeds": [0]}
        file.write_text(toml(axes))
        told = here("sweep", file, "--dry-run")
        assert ("'openvla-tiny' is trained by: ar-ppo" in told) == shown
        assert ("`vlarl-bench list` shows what runs on what" in told) != shown
        assert "dppo on openvla-tiny, libero_object: policy: 'openvla-tiny' lacks chain" in told
    axes = {
        "algorithms": ["sft", "fpo", "dppo", "rwfm"],
        "policies": ["openvla-tiny-pixels"],
        "suites": ["libero", "aloha"],
    }
    file.write_text(toml({**axes, "seeds": [0]}))
    told = here("sweep", file, "--dry-run")
    assert "sft on openvla-tiny-pixels, aloha: base: 'prior'; 'openvla-tiny-pixels' ships no prior for aloha" in told
    assert "train one with" not in told


def test_cells_of_a_pack_are_done_wherever_they_were_run(calm, monkeypatch):
    elsewhere = calm.with_name("elsewhere.toml")
    budget = {**TOY["budget"], "gradient_steps": 7}  # which fpo does not read
    elsewhere.write_text(toml({**TOY, "seeds": [0, 1, 2], "packed": ["one", "other"], "budget": budget}))
    assert "3 cells: 3 missing" in here("sweep", elsewhere, "--dry-run")
    for run, pack in zip(sorted((calm.with_suffix("") / "runs").iterdir()), ("one", "other"), strict=True):
        renamed = calm.with_name(f"renamed-{run.name}")
        subprocess.run(["cp", "-r", run, renamed], check=True)
        here("pack", renamed, "--out", calm.with_name(pack))
    told = here("sweep", elsewhere, "--dry-run")
    assert "done 0-1" in told
    assert "missing 2" in told
    (entry,) = read_pack(calm.with_name("one"))
    old = {**entry.manifest, "base_checkpoint": "0" * 12}  # from another prior: it hides nothing
    altered = make_entry("old", old, entry.config, None, entry.rows, metric_lines(entry.metrics))
    write_pack(calm.with_name("older"), [altered])
    elsewhere.write_text(toml({**TOY, "seeds": [0, 1, 2], "packed": ["one", "other", "older"]}))
    assert "done 0-1" in here("sweep", elsewhere, "--dry-run")
    monkeypatch.setattr(sweep_jobs, "_prior", lambda policy, suite: "1" * 12)  # another one ships by now
    assert "3 cells: 3 missing" in here("sweep", elsewhere, "--dry-run")


def test_a_done_cell_whose_folder_is_gone_is_run_again(calm, tmp_path):
    file, out = tmp_path / "again.toml", tmp_path / "again"
    file.write_text(toml({**TOY, "seeds": [0]}))
    subprocess.run(["cp", "-r", calm.with_suffix(""), out], check=True)
    (gone, *_) = (run for run in sorted((out / "runs").iterdir()) if "seed0" in run.name)
    subprocess.run(["rm", "-r", gone], check=True)
    assert "missing 0" in here("sweep", file, "--dry-run")
    assert "1 cell: 1 done" in here("sweep", file, "--executor", "debug")
    assert outcomes(out)[gone.name] == outcomes(calm.with_suffix(""))[gone.name]


def test_one_seed_of_all_rows_runs_before_the_next():
    """In the file's order of seeds, also where an override has made a row of its own of some of them."""
    cells = [SimpleNamespace(name=name, seed=seed) for name, seed in (("a", 7), ("a", 3), ("b", 3), ("b", 7), ("c", 7))]
    states = [State("missing")] * 2 + [State("interrupted"), State("missing"), State("done")]
    chosen = choose(SimpleNamespace(cells=cells, file=SimpleNamespace(seeds=(7, 3))), states, retry_failed=False)
    assert [(found.name, found.seed) for found, _ in chosen] == [("a", 7), ("b", 7), ("a", 3), ("b", 3)]


def test_the_manifest_names_a_command_that_asks_for_the_same_run(calm):
    out = calm.with_suffix("")
    (run, *_) = sorted((out / "runs").iterdir())
    argv = json.loads((run / "manifest.json").read_text())["argv"]
    assert argv[:3] == ["run", "--algo", "fpo"]
    assert argv[argv.index("--algo.critic-steps") + 1] == "2"


def test_a_killed_run_is_failed_with_its_log_and_a_retry_ends_as_if_nothing_was(calm, env, tmp_path):
    file, out, order = tmp_path / "killed.toml", tmp_path / "killed", tmp_path / "order"
    file.write_text(toml({**TOY, "seeds": [0]}))
    order.touch()
    told = vlarl({**env, "TOY_KILL": str(order)}, "sweep", file, status=1)
    assert "1 cell: 1 failed" in told
    (failed,) = history(out).values()
    line = f"failed: {failed.cell}: the run was killed by SIGKILL: out of memory?; log: {out / failed.log}"
    assert line in " ".join(told.split())
    assert (out / failed.log).is_file()
    assert line in " ".join(here("status", file).split())
    here("sweep", file, status=1)  # without --retry-failed it stays so
    assert "1 cell: 1 done" in here("sweep", file, "--retry-failed", "--executor", "debug")
    assert outcomes(out).items() < outcomes(calm.with_suffix("")).items()


def test_kill_9_of_all_of_it_then_the_same_command_goes_on(calm, env, tmp_path):
    file, out, slow = tmp_path / "dead.toml", tmp_path / "dead", tmp_path / "slow"
    file.write_text(toml({**TOY, "seeds": [1]}))
    slow.touch()
    sweep = start({**env, "TOY_SLOW": str(slow)}, file)
    wait_until(lambda: checkpointed(out))
    sweep.kill()
    (holder,) = [attempt.pid for attempt in history(out).values()]
    os.kill(holder, signal.SIGKILL)
    sweep.wait()
    wait_until(lambda: "interrupted 1" in here("status", file), "the kernel has buried it")
    assert f"process {holder} on" in here("status", file)
    assert "1 cell: 1 done" in here("sweep", file, "--executor", "debug")
    assert outcomes(out).items() < outcomes(calm.with_suffix("")).items()
    assert [attempt.number for attempt in history(out).values()] == [2]
    file.write_text(toml({**TOY, "seeds": [2]}))
    assert f"besides: 1 cells in {out} that the file no longer names" in here("status", file)


def test_a_pause_is_no_signal():
    code = """
from vlarl_bench.sweep_cell import _listen, _next_signal
signals = _listen()
print("waits", flush=True)
for seconds in (1, 60):
    print(_next_signal(signals, seconds), flush=True)
"""
    waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waits\n"
    time.sleep(0.5)
    waiting.send_signal(signal.SIGSTOP)
    time.sleep(1)
    waiting.send_signal(signal.SIGCONT)
    assert waiting.stdout.readline() == "None\n"
    waiting.send_signal(signal.SIGTERM)
    assert waiting.communicate()[0] == "15\n"


@pytest.mark.parametrize(
    ("parallel", "workers", "threads", "processes", "told"),
    [
        (1, 8, 8, 1, ""),  # one run may ask for what it likes
        (4, 1, 1, 1, ""),
        (2, 2, 2, 1, ""),
        (4, 2, 1, 1, "4 cells at a time keep 8 cores busy, and this machine has 4: learners wait for each other; set "
                     "run.workers and run.threads to 1, or parallel to 2"),
        (9, 1, 2, 1, "5 cells at a time keep 10 cores busy"),  # no more than there are
        (2, 1, 1, 3, "2 cells at a time keep 6 cores busy"),
    ],
)  # fmt: skip
def test_more_at_a_time_than_there_are_cores_is_told(monkeypatch, parallel, workers, threads, processes, told):
    monkeypatch.setattr(sweep_jobs, "cores", lambda: 4)
    config = SimpleNamespace(workers=workers, threads=threads)
    cells = [SimpleNamespace(config=config, row=SimpleNamespace(resources=SimpleNamespace(processes=processes)))] * 5
    assert crowded(cells, parallel).startswith(told)
    assert bool(crowded(cells, parallel)) == bool(told)


def test_ctrl_c_stops_also_a_cell_that_is_just_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_jobs, "COMMAND", (sys.executable, "-c", "import time; time.sleep(120)"))
    interrupted = threading.Event()

    def say(line):
        if line == "first: begins":
            interrupted.set()
            raise KeyboardInterrupt
        if line == "second: begins":
            assert interrupted.wait(60)
            time.sleep(1)  # the first one has stopped everything by now

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_local(SimpleNamespace(out=tmp_path), [(SimpleNamespace(name=n), 0) for n in ("first", "second")], 2, say)
    assert time.monotonic() - begun < 60


def test_a_job_that_cannot_be_queued_again_says_so_and_its_cell_can_go_on(env, tmp_path):
    env, file, out = {**env, "PATH": ""}, tmp_path / "late.toml", tmp_path / "late"
    file.write_text(toml({**TOY, "seeds": [0]}))
    vlarl(env, "sweep", file, "--executor", "slurm", status=2)  # there is none; the cell is prepared by then
    (cell,) = [path.stem for path in out.glob("cells/*.json")]
    job = subprocess.Popen(
        [*COMMAND, "sweep-cell", str(out), cell, "0"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows = out / "runs" / cell / "episodes.jsonl"
    wait_until(lambda: rows.exists() and rows.stat().st_size)
    job.send_signal(signal.SIGUSR2)  # as SLURM does before the job's time is over
    told, wrong = job.communicate(timeout=60)
    assert job.returncode == 75
    assert f"{cell}: slurm: scontrol does not answer" in told
    assert "Traceback" not in wrong
    assert history(out)[cell].outcome == "interrupted"


def test_two_people_on_one_sweep_and_cancel(calm, env, tmp_path):
    file, out, slow = tmp_path / "two.toml", tmp_path / "two", tmp_path / "slow"
    file.write_text(toml({**TOY, "seeds": [0, 1]}))
    slow.touch()
    both = [start({**env, "TOY_SLOW": str(slow)}, file) for _ in range(2)]
    wait_until(lambda: checkpointed(out, 2))
    assert "2 cells: 2 running" in here("status", file, "--once")
    told = here("cancel", file)
    assert told.count(": stopped") == 2
    for process in both:
        assert process.wait(60) == 0
    assert [attempt.outcome for attempt in history(out).values()] == ["interrupted"] * 2
    slow.unlink()
    both = [start(env, file) for _ in range(2)]
    for process in both:
        assert process.wait(300) == 0
    assert "2 cells: 2 done" in here("status", file)
    assert [attempt.number for attempt in history(out).values()] == [2, 2]  # nobody ran a cell twice
    assert outcomes(out) == outcomes(calm.with_suffix(""))
    assert here("cancel", file).strip() == "nothing runs or waits"


def test_what_was_altered_in_a_sweeps_folder_is_named_and_never_run(calm, env, tmp_path):
    """A run's configuration, a cell's, and a pickle that somebody put there."""
    file, out = tmp_path / "hurt.toml", tmp_path / "hurt"
    file.write_text(toml({**TOY, "seeds": [0]}))
    (cell,) = [cell for cell in history(calm.with_suffix("")) if "-seed0-" in cell]
    for folder in ("cells", "attempts", "runs"):
        (out / folder).mkdir(parents=True)
    run = out / "runs" / cell
    subprocess.run(["cp", "-r", calm.with_suffix("") / "runs" / cell, run], check=True)
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    for name in ("runs", "cells", "attempts"):
        (out / name / f"{cell}.pkl").write_bytes(evil)
    (run / "checkpoints" / "state.pkl").write_bytes(evil)
    config = read_sealed(run / "config.json")
    write_sealed(run / "config.json", {**config, "slots": 3})
    told = vlarl(env, "sweep", file, status=1)
    assert "config.json: slots is 3, but the sweep's cell has 2" in told
    write_sealed(run / "config.json", config)
    path = out / "cells" / f"{cell}.json"
    content = path.read_text()
    path.write_text(content.replace('"slots": 2', '"slots": 4'))
    assert f"{path}: damaged" in here("sweep", file, "--retry-failed", status=2)
    path.write_text(content)
    assert "1 cell: 1 done" in here("sweep", file, "--retry-failed", "--executor", "debug")
    assert not (tmp_path / "owned").exists()


def test_options_write_the_file_that_they_stand_for_and_go_on_with_it(tmp_path, capsys, monkeypatch):
    asked = ["sweep", "--algo", "fpo", "dppo", "--suite", "libero_object", "--seeds", "0", "3", "--budget", "smoke"]
    asked += ["--out", str(tmp_path / "mine")]
    assert main([*asked, "--dry-run"]) == 0
    assert "4 cells: 4 missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a plan leaves nothing behind"
    monkeypatch.setenv("PATH", "")
    assert main([*asked, "--executor", "slurm"]) == 2
    assert "slurm: scontrol does not answer" in capsys.readouterr().err
    file = tmp_path / "mine.toml"
    axes = 'algorithms = ["fpo", "dppo"]\npolicies = ["pi0-tiny"]\nsuites = ["libero_object"]\nseeds = [0, 3]\n'
    assert file.read_text() == axes + 'budget = "smoke"\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.toml"]
    assert main([*asked, "--dry-run"]) == 0
    assert main([*asked, "--seeds", "4", "--dry-run"]) == 2
    assert f"out: {file} says something else than these options" in capsys.readouterr().err


@pytest.mark.torture
def test_executor_debug_ends_with_the_same_rows(calm, tmp_path):
    pytest.importorskip("tensorboard")
    file = tmp_path / "here.toml"
    file.write_text(toml({**TOY, "seeds": [0], "tracker": "tensorboard"}))
    assert "1 cell: 1 done" in here("sweep", file, "--executor", "debug")
    assert list(tmp_path.glob("here/runs/*/tensorboard/events.*"))
    assert outcomes(tmp_path / "here").items() < outcomes(calm.with_suffix("")).items()


def test_estimates_take_the_finished_cells_that_are_most_alike():
    def cell(name, policy, suite):
        return SimpleNamespace(name=name, row=SimpleNamespace(algorithm="a", policy=policy, suite=suite))

    cells = [cell("1", "p", "s"), cell("2", "p", "s"), cell("3", "p", "t"), cell("4", "p", "s"), cell("5", "q", "u")]
    cells += [cell("6", "p", "v")]
    done = [SimpleNamespace(word="done", attempt=SimpleNamespace(seconds=s)) for s in (10.0, 20.0, 60.0)]
    left = [SimpleNamespace(word="missing", attempt=None)] * 3
    assert estimate(cells, [*done, *left]) == {"4": 15.0, "5": 30.0, "6": 30.0}


def test_cells_of_a_cluster_that_does_not_answer_are_neither_taken_nor_lost(tmp_path, monkeypatch):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'cannot reach the controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=os.pathsep)
    submissions = tmp_path / "sweep" / "submissions"
    submissions.mkdir(parents=True)
    write_sealed(submissions / "4d0e3dcc.json", {"job": "1", "cells": ["fpo-seed0"]})
    assert queued(tmp_path / "sweep", ["another-cell"]) == {}
    with pytest.raises(BenchError, match=r"squeue: cannot reach the controller - cells .*; if it is gone .* delete /"):
        queued(tmp_path / "sweep", ["fpo-seed0"])
    (submissions / "4d0e3dcc.json").unlink()
    assert queued(tmp_path / "sweep", ["fpo-seed0"]) == {}
