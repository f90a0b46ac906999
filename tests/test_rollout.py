"""Rollouts on real simulators: the same jobs give the same episodes, and no process outlives its pool."""

import dataclasses
import os
import signal
import time

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.rollout import Job, Pool, episode_seed, run_episodes

SUITE = registry.get("suite", "libero_object")
PROTOCOL = SUITE.protocol("state")


@pytest.fixture(scope="module")
def policy():
    spec = registry.get("policy", "pi0-tiny")
    return spec.create(SUITE.action_dim, SUITE.proprio_dim, [task.instruction for task in SUITE.tasks], seed=0)


@pytest.fixture(scope="module")
def short():
    """The same protocol with episodes of 20 steps: a chunk of 8, one of 8, one cut to 4."""
    return dataclasses.replace(PROTOCOL, horizon={"libero_object": 20})


def jobs():
    return [Job(SUITE.tasks[i % 2], i, 0, episode_seed(0, i)) for i in range(5)]


def play(policy, protocol, workers, order=None):
    wanted = jobs() if order is None else [jobs()[i] for i in order]
    with Pool(SUITE, protocol, workers) as pool:
        return run_episodes(pool, policy, wanted, protocol, slots=3)


def test_workers_and_order_change_nothing(policy, short):
    one = play(policy, short, workers=1)
    order = [4, 2, 0, 3, 1]
    two = play(policy, short, workers=2, order=order)
    for place, index in enumerate(order):
        first, second = one[index], two[place]
        assert first.job == second.job
        assert first.executed == second.executed == [8, 8, 4]
        np.testing.assert_array_equal(np.stack(first.latents), np.stack(second.latents))
        for a, b in zip(first.observations, second.observations, strict=True):
            np.testing.assert_array_equal(a.proprio, b.proprio)
            for name in a.objects:
                np.testing.assert_array_equal(a.objects[name], b.objects[name])


def test_a_dead_worker_is_one_clear_line_and_leaves_nobody_behind(policy, short):
    with Pool(SUITE, short, workers=2) as pool:
        pool.call("open", {0: SUITE.tasks[0], 1: SUITE.tasks[0]})
        processes = list(pool._processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[1].join()
        with pytest.raises(BenchError, match=r"environment worker 1 died \(exit code -9\).*--workers 1"):
            run_episodes(pool, policy, jobs(), short, slots=2)
    assert not any(process.is_alive() for process in processes)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from vlarl_bench import registry\n"
        "from vlarl_bench.rollout import Pool\n"
        "if __name__ == '__main__':\n"
        "    suite = registry.get('suite', 'libero_object')\n"
        "    pool = Pool(suite, suite.protocol('state'), 2)\n"
        "    print(*(process.pid for process in pool._processes), flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.2)


def test_seeds_depend_on_every_part():
    seeds = {
        episode_seed(*parts)
        for parts in [(0, "eval", "t", 1), (1, "eval", "t", 1), (0, "train", "t", 1), (0, "eval", "t", 2)]
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
