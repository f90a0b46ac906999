"""`kill -9` at random moments of a run, then resume: rows, table and weights end as if nothing had been.

By `make torture` on the real LIBERO; in CI on a toy suite. The killed runs' clocks jump by years, too.
"""

import hashlib
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from sweeps import COMMAND
from torture import SHARE, count

from vlarl_bench import registry

pytestmark = [pytest.mark.torture, pytest.mark.timeout(3600)]
OFTEN = ("fpo", "dppo", "ar-ppo") if SHARE else ("fpo",)
"""Methods that are killed 20 times, all others once."""
POLICIES = ("pi0-tiny", "pi0-fast-tiny", "openvla-tiny", "octo-tiny")
SMALL = ["--budget", "smoke", "--budget.iterations", "2", "--budget.episodes", "2", "--budget.eval-states", "1"]
SMALL += ["--budget.demos", "1", "--budget.gradient-steps", "3", "--budget.batch-size", "8", "--slots", "2"]
SMALL += ["--workers", "1", "--threads", "1", "--no-video"]
SHORT = {"epochs": 1, "critic_steps": 3, "critic_width": 16, "utd": 0.1, "gradient_steps": 3, "group_size": 2}
"""Settings that only cost time here, for those methods that have them."""
CLOCK = Path(__file__).parents[1] / "faults" / "jumping_clock"


def arguments(method):
    policy = next(policy for policy in POLICIES if registry.runs_on(method, policy))
    suite = ["--suite", "libero"] if SHARE else ["--suite", "toy-arm", "--tasks", "one"]
    known = vars(registry.get("algorithm", method).Settings())
    short = [x for k, v in SHORT.items() if k in known for x in (f"--algo.{k.replace('_', '-')}", str(v))]
    return ["run", "--algo", method, "--policy", policy, *suite, *SMALL, *short]


def start(method, folder, env):
    """Begins the run or, where it has begun, continues it, as its user would."""
    config = folder / "config.json"
    begun = config.exists() and config.stat().st_size
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    what = ["run", "--resume", str(folder)] if begun else [*arguments(method), "--out", str(folder)]
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / "log", "ab") as log:
        # Demonstrations go to the working folder, and are made once.
        return subprocess.Popen([*COMMAND, *what], env=env, cwd=folder.parents[1], stdout=log, stderr=log)


def outcome(folder):
    """Digests of what must not depend on how the run went."""
    files = ("episodes.jsonl", "table.md", "policy/model.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}


@pytest.mark.parametrize("method", registry.names("algorithm") if SHARE else OFTEN)
def test_kill_9_at_random_moments_changes_nothing(method, toy, tmp_path, record_property):
    kills, rng = count(1, 20) if method in OFTEN else 1, random.Random(method)
    begun, calm = time.monotonic(), tmp_path / "undisturbed" / "run"
    assert start(method, calm, toy).wait() == 0, (calm.parent / "log").read_text()[-3000:]
    seconds, wanted = time.monotonic() - begun, outcome(calm)
    jumping = {**toy, "PYTHONPATH": f"{CLOCK}:{toy['PYTHONPATH']}"}
    killed, runs, moments = 0, 0, []
    while killed < kills or moments[-1] != "end":
        folder = tmp_path / str(runs) / "run"
        process = start(method, folder, jumping)
        begun, moment = time.monotonic(), rng.uniform(0, seconds)
        try:
            status = process.wait(moment if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            moments.append(f"{moment:.1f}")
        else:
            assert status == 0, (folder.parent / "log").read_text()[-3000:]
            assert outcome(folder) == wanted
            runs, seconds = runs + 1, time.monotonic() - begun  # the load may have changed
            moments.append("end")
    told = ", ".join(moments)
    record_property("torture", f"kills: {kills}, after {told} s; runs that then ended: {runs}, all of them equal")
