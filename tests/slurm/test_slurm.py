"""Sweeps on a real SLURM of this machine, disturbed in every way that a cluster disturbs jobs."""

import contextlib
import dataclasses
import itertools
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sweeps import COMMAND, TOY, environment, history, outcomes, toml, vlarl

from vlarl_bench.attempts import newest, read_attempt

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]
SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_up.sh"
MINUTES = 8 * 60
"""Seconds to wait for anything."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of a shell that uses the cluster."""
    if os.getuid() != 0:
        pytest.skip("a SLURM on this machine needs root")
    if shutil.which("slurmctld", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("SLURM is not installed; scripts/slurm_up.sh install does that on Debian")
    folder = tmp_path_factory.mktemp("slurm")
    root = str(folder / "cluster")
    ours = {"SLURM_TEST_ROOT": root, "SLURM_TEST_PORT": "36800", "SLURM_TEST_ARRAY": "3"}
    up = subprocess.run([SCRIPT, "up"], env={**os.environ, **ours}, capture_output=True, text=True)
    if up.returncode:
        pytest.skip(f"SLURM does not start here: {up.stderr.strip().splitlines()[-1]}")
    yield environment(folder, SLURM_CONF=f"{root}/slurm.conf", **ours)
    subprocess.run([SCRIPT, "down"], env={**os.environ, **ours}, check=True)


@pytest.fixture(scope="module")
def arrays(cluster, tmp_path_factory):
    """An undisturbed sweep of four seeds, one cell at a time, whose arrays hold three at most: its file, what `sweep`
    told of it, and what a live `status` showed until its end."""
    file = tmp_path_factory.mktemp("arrays") / "arrays.toml"
    file.write_text(toml({**TOY, "seeds": [0, 1, 2, 3], "parallel": 1}))
    told = vlarl(cluster, "sweep", file, "--executor", "slurm")
    shown, terminal = pty.openpty()
    status = subprocess.Popen([*COMMAND, "status", str(file)], env=cluster, stdout=terminal, stderr=terminal)
    os.close(terminal)
    live = b""
    with contextlib.suppress(OSError):  # how a terminal says that the other side has gone
        while part := os.read(shown, 2**16):
            live += part
    assert status.wait(60) == 0
    return file, told, live


@pytest.fixture(scope="module")
def calm(arrays):
    """What it ends with."""
    return outcomes(arrays[0].with_suffix(""))


def ask(env, *command):
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_until(true, what, every=0.5):
    deadline = time.monotonic() + MINUTES
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(every)


def hurry(env):
    """A requeued job would wait for two minutes, and the one that timed out keeps the limit that it was given."""
    for job in ask(env, "squeue", "--noheader", "--array", "--states=PENDING", "--format=%i").split():
        # It may have begun since: then there is nothing to change.
        now = ["scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=30"]
        subprocess.run(now, env=env, capture_output=True, check=False)


def begun(out, seed, checkpoint="000000"):
    """Whether that seed's run has a checkpoint to go on from."""
    return any((out / "runs").glob(f"*-seed{seed}-*/checkpoints/{checkpoint}"))


def of(found, seed):
    (value,) = [value for name, value in found.items() if f"-seed{seed}-" in name]
    return value


def test_cancelled_requeued_preempted_and_timed_out_cells_end_as_undisturbed_ones(
    cluster, calm, tmp_path, record_property
):
    file, out, slow = tmp_path / "stormy.toml", tmp_path / "stormy", tmp_path / "slow"
    override = [{"seeds": [2], "resources": {"partition": "scavenge"}}]
    file.write_text(toml({**TOY, "seeds": [0, 1, 2, 3], "override": override}))
    slow.touch()
    env = {**cluster, "TOY_SLOW": str(slow)}
    told = vlarl(env, "sweep", file, "--executor", "slurm")
    assert told.count("submitted job") == 2  # one array for each kind of resources
    # The same command again finds all of them in the queue or running.
    assert "submitted" not in vlarl(env, "sweep", file, "--executor", "slurm")

    wait_until(lambda: all(begun(out, seed) for seed in range(4)), "the cells begin")
    first = {seed: of(history(out), seed) for seed in range(4)}
    ask(env, "scancel", first[0].job)
    ask(env, "scontrol", "requeue", first[1].job)
    minutes = int((time.time() - first[3].begun) // 60) + 2
    ask(env, "scontrol", "update", f"JobId={first[3].job}", f"TimeLimit={minutes}")
    wait_until(lambda: all(of(history(out), seed).outcome for seed in (0, 1, 3)), "the cells are stopped")
    # A job of a partition with precedence that needs the whole node.
    ask(env, "sbatch", "--partition=main", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: of(history(out), 2).outcome, "the cell gives way")
    stopped = history(out)
    assert [of(stopped, seed).error for seed in range(4)] == [
        f"stopped by SIG{x}" for x in ("TERM", "TERM", "TERM", "USR2")
    ]
    slow.unlink()

    assert "interrupted 0" in vlarl(env, "status", file)
    assert vlarl(env, "sweep", file, "--executor", "slurm").count("submitted job") == 1

    def done():
        hurry(env)
        return "4 done" in vlarl(env, "status", file)

    wait_until(done, "all cells end", every=3)
    assert outcomes(out) == calm
    again = history(out)
    assert all(of(again, seed).job == first[seed].job for seed in (1, 2, 3))
    assert of(again, 0).job != first[0].job
    assert "4 done" in vlarl(env, "sweep", file, "--executor", "slurm")
    told = "scancel and sweep again, scontrol requeue, time limit, preemption: 4 cells, rows and weights equal"
    record_property("torture", told)


def test_arrays_follow_each_other_under_one_limit_and_status_is_live(cluster, arrays, calm, tmp_path, record_property):
    """Four cells are two arrays where MaxArraySize is 3; one cell at a time, whatever array it is in. They end with
    what cells end with that know no SLURM."""
    file, told, live = arrays
    assert told.count("submitted job") == 2
    for words in (b"running", b"queued", b"4 cells: 4 done"):
        assert words in live
    spans = sorted((attempt.begun, path.stat().st_mtime) for path, attempt in ended(file.with_suffix("")))
    assert len(spans) == 4
    assert all(one[1] <= next[0] + 0.1 for one, next in itertools.pairwise(spans)), "two ran at a time"
    here = tmp_path / "here.toml"
    here.write_text(toml({**TOY, "seeds": [0]}))
    vlarl(cluster, "sweep", here)
    assert outcomes(here.with_suffix("")).items() < calm.items()
    record_property("torture", "4 cells in 2 arrays under MaxArraySize=3, one at a time; live status to the end: equal")


def ended(out):
    return [(path, read_attempt(path)) for path in newest(out / "attempts").values()]


def test_a_killed_node_daemon_and_a_lost_node(cluster, calm, tmp_path, record_property):
    """Without its daemon a job goes on. One that was lost with its node is queued again, by SLURM or by the command."""
    file, out, slow = tmp_path / "node.toml", tmp_path / "node", tmp_path / "slow"
    file.write_text(toml({**TOY, "seeds": [0, 1]}))
    slow.touch()
    env = {**cluster, "TOY_SLOW": str(slow)}
    vlarl(env, "sweep", file, "--executor", "slurm")
    wait_until(lambda: all(begun(out, seed) for seed in (0, 1)), "the cells begin")
    first = history(out)
    root = Path(cluster["SLURM_TEST_ROOT"])
    os.kill(int((root / "slurmd.n1.pid").read_text()), signal.SIGKILL)
    lost, kept = of(first, 0), of(first, 1)
    # The lost node's job: the daemon's step manager, the cell and its run, all at once.
    step = int(Path(f"/proc/{lost.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert "slurmstepd" in Path(f"/proc/{step}/cmdline").read_text()
    for pid in (step, lost.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "running 0-1" not in vlarl(env, "status", file), "the loss is seen", every=3)
    subprocess.run([SCRIPT, "up"], env=cluster, check=True, capture_output=True, timeout=120)
    slow.unlink()

    def done():
        hurry(env)  # sooner than the node has forgotten the job; then SLURM drops it, and the cell is `interrupted`
        return "2 done" in vlarl(env, "sweep", file, "--executor", "slurm")

    wait_until(done, "both cells end", every=3)
    assert outcomes(out).items() < calm.items()
    again = history(out)
    assert of(again, 1) == dataclasses.replace(kept, outcome="done", seconds=of(again, 1).seconds)
    assert (lost.number, of(again, 0).number) == (1, 2)
    record_property("torture", "kill -9 of slurmd: one job goes on; one lost with it is queued again: rows equal")


def test_a_cell_of_two_nodes_is_one_run(cluster, calm, tmp_path, record_property):
    """A torchrun on each of two nodes shares the run; queued again in its midst it goes on, on both."""
    file, out, slow = tmp_path / "pair.toml", tmp_path / "pair", tmp_path / "slow"
    resources = {**TOY["resources"], "nodes": 2, "partition": "pair"}
    file.write_text(toml({**TOY, "seeds": [0], "resources": resources}))
    slow.touch()
    env = {**cluster, "TOY_SLOW": str(slow)}
    vlarl(env, "sweep", file, "--executor", "slurm")
    wait_until(lambda: begun(out, 0) or any(x.outcome for x in history(out).values()), "the cell begins")
    job = of(history(out), 0).job
    assert ask(env, "squeue", "--noheader", f"--jobs={job}", "--format=%D %N").split() == ["2", "n[1-2]"]
    ask(env, "scontrol", "requeue", job)
    wait_until(lambda: of(history(out), 0).outcome, "the cell is stopped")
    assert of(history(out), 0).error == "stopped by SIGTERM"
    slow.unlink()

    def done():
        hurry(env)
        return "1 done" in vlarl(env, "status", file)

    wait_until(done, "the cell ends", every=3)
    ((cell, (rows, metrics, _)),) = outcomes(out).items()
    assert [line["processes"] for line in metrics] == [2, 2]
    # An update by several processes rounds differently: what came before it is the same to the bit.
    same = [
        [row for row in rows if row["iteration"] <= 1 and row["phase"] != "final"] for rows in (rows, calm[cell][0])
    ]
    assert same[0] == same[1] != []
    assert len(rows) == len(calm[cell][0])
    record_property("torture", "one run on two nodes, scontrol requeue: its first round that of one process")
