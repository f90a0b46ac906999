"""Where a run's folder is: a disk that fills up, one that is unmounted under the run, one that is read-only.

On real mounts, which need root; elsewhere these tests say so and are skipped.
"""

import dataclasses
import hashlib
import subprocess

import pytest
from sweeps import COMMAND, TOY, here

from vlarl_bench.checkpoint import load_latest
from vlarl_bench.config import RunConfig
from vlarl_bench.options import to_arguments
from vlarl_bench.records import read_rows
from vlarl_bench.sealed import read_sealed

pytestmark = pytest.mark.torture


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def disk(tmp_path):
    """A disk of 6 MiB, mounted in two places: `kept`, and `used`, which is taken away while it is used."""
    kept, used = tmp_path / "kept", tmp_path / "used"
    for folder in (kept, used):
        folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", kept)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    mount("--bind", kept, used)
    yield kept, used
    for folder in (used, kept):
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def refused(*arguments):
    """The last line of a command that must fail."""
    return here(*arguments, status=2).splitlines()[-1]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run):
    return hashlib.sha256((run / "policy" / "model.safetensors").read_bytes()).hexdigest()


def test_a_full_an_unmounted_and_a_read_only_disk_cost_nothing(toy, finished, disk, tmp_path, record_property):
    (calm,) = (finished.with_suffix("") / "runs").iterdir()
    kept, used = disk
    run, slow = used / calm.name, tmp_path / "slow"
    config = RunConfig.from_dict(read_sealed(calm / "config.json"))

    line = refused(*to_arguments(dataclasses.replace(config, out=str(run))))
    assert line.startswith(f"vlarl-bench: error: {run}")
    assert "the disk is full; free some space and continue with --resume" in line
    full, rows = load_latest(run / "checkpoints"), read_rows(run / "episodes.jsonl")
    assert not full.problems
    assert [(row.phase, row.decoding) for row in rows].count(("base", "sampled")) == TOY["budget"]["eval_states"]

    mount("-o", "remount,size=99m", kept)
    slow.touch()
    command = [*COMMAND, "run", "--resume", str(run)]
    env = {**toy, "TOY_SLOW": str(slow)}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while "fine-tuning" not in process.stderr.readline():
            assert process.poll() is None
        subprocess.run(["umount", "-l", str(used)], check=True)
        slow.unlink()
        _, told = process.communicate(timeout=600)
    assert process.returncode == 2, told
    assert "Traceback" not in told
    line = told.splitlines()[-1]
    assert "moved, removed or unmounted while the run went on; put the folder back, and continue with --resume" in line
    assert not list(used.iterdir()), "nothing is made anew where the disk was"

    mount("--bind", kept, used)
    mount("-o", "remount,ro,bind", used)
    before = contents(run)
    line = refused("run", "--resume", run)
    assert "permission denied or read-only" in line
    assert contents(run) == before

    mount("-o", "remount,rw,bind", used)
    here("run", "--resume", run)
    assert read_rows(run / "episodes.jsonl") == read_rows(calm / "episodes.jsonl")
    assert weights(run) == weights(calm)
    assert (run / "table.md").read_bytes() == (calm / "table.md").read_bytes()
    record_property("torture", "a full, an unmounted and a read-only disk, then resumed: equal rows, table and weights")
