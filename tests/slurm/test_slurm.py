"""Sweeps on a real SLURM of this machine, disturbed in every way that a cluster disturbs jobs."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from sweeps import TOY, environment, history, outcomes, toml, vlarl

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
    own = {**os.environ, "SLURM_TEST_ROOT": str(folder / "cluster"), "SLURM_TEST_PORT": "36800"}
    up = subprocess.run([SCRIPT, "up"], env=own, capture_output=True, text=True)
    if up.returncode:
        pytest.skip(f"SLURM does not start here: {up.stderr.strip().splitlines()[-1]}")
    yield environment(folder, SLURM_CONF=str(folder / "cluster" / "slurm.conf"))
    subprocess.run([SCRIPT, "down"], env=own, check=True)


def ask(env, *command):
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_until(true, what):
    deadline = time.monotonic() + MINUTES
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def begun(out, seed, checkpoint="000000"):
    """Whether that seed's run has a checkpoint to go on from."""
    return any((out / "runs").glob(f"*-seed{seed}-*/checkpoints/{checkpoint}"))


def of(found, seed):
    (value,) = [value for name, value in found.items() if f"-seed{seed}-" in name]
    return value


def test_cancelled_requeued_preempted_and_timed_out_cells_end_as_undisturbed_ones(cluster, tmp_path):
    calm = tmp_path / "calm.toml"
    calm.write_text(toml({**TOY, "seeds": [0, 1, 2, 3], "parallel": 2}))
    vlarl(cluster, "sweep", calm)

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
        for job in ask(env, "squeue", "--noheader", "--array", "--states=PENDING", "--format=%i").split():
            # A requeued job would wait for two minutes, and the one that timed out keeps the limit that it was given.
            # It may have begun since: then there is nothing to change.
            now = ["scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=30"]
            subprocess.run(now, env=env, capture_output=True, check=False)
        return "4 done" in vlarl(env, "status", file)

    wait_until(done, "all cells end")
    assert outcomes(out) == outcomes(tmp_path / "calm")
    again = history(out)
    assert all(of(again, seed).job == first[seed].job for seed in (1, 2, 3))
    assert of(again, 0).job != first[0].job
    assert "4 done" in vlarl(env, "sweep", file, "--executor", "slurm")
