"""Our inner loop against the stock environment, and snapshots against themselves."""

import contextlib
import io
import os

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.errors import BenchError

CASES = [("libero_object", 0), ("libero_spatial", 4)]


def ours(suite_name, index):
    suite = registry.get("suite", suite_name)
    return suite.open(suite.tasks[index], suite.protocol("state"))


def stock(suite_name, index, state):
    """LIBERO's own ControlEnv after reset, set_init_state and the settle steps."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    with contextlib.redirect_stdout(io.StringIO()):
        suite = benchmark.get_benchmark(suite_name)()
        task = suite.get_task(index)
        env = ControlEnv(
            bddl_file_name=os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            horizon=10**9,
        )
        env.seed(0)
        env.reset()
        env.set_init_state(suite.get_task_init_states(index)[state])
    for _ in range(10):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    return env


@pytest.mark.parametrize(("suite_name", "index"), CASES)
def test_same_states_and_success_as_stock_for_200_random_steps(suite_name, index):
    simulator = ours(suite_name, index)
    env = stock(suite_name, index, 3)
    # Another state first, to show that resets leave nothing behind.
    simulator.reset(7)
    simulator.step(np.full((3, 7), 0.5))
    simulator.reset(3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = rng.uniform(-1.5, 1.5, 7)  # beyond the limits too: both clip
        action[3:6] *= rng.random() < 0.7  # no rotation asked for is a case of its own
        env.step(action)
        simulator.step(action[None])
        # Rounding (1e-16) differs where sums are taken in another order; contacts magnify it, in velocities most.
        theirs, mine = env.sim.data, simulator.data
        np.testing.assert_allclose(mine.qpos, theirs.qpos, atol=1e-9, rtol=0)
        np.testing.assert_allclose(mine.qvel, theirs.qvel, atol=1e-7, rtol=0)
        assert simulator.success() == env.check_success()
    env.close()
    simulator.close()


@pytest.mark.parametrize(("suite_name", "index"), CASES[:1])
def test_snapshots_replay_bitwise_also_between_other_episodes(suite_name, index):
    simulator = ours(suite_name, index)
    actions = np.random.default_rng(1).uniform(-1, 1, (6, 8, 7))
    simulator.reset(0)
    straight = []
    for chunk in actions:
        simulator.step(chunk)
        straight.append(simulator.observe())
    simulator.reset(0)
    for i, chunk in enumerate(actions):
        simulator.step(chunk)
        again, seen = simulator.save(), simulator.observe()
        simulator.reset(5)  # somebody else's episode
        simulator.step(actions[0])
        simulator.restore(again)
        for found in (seen, simulator.observe()):
            np.testing.assert_array_equal(found.proprio, straight[i].proprio)
            for name in found.objects:
                np.testing.assert_array_equal(found.objects[name], straight[i].objects[name])
    simulator.close()


def test_unknown_initial_state_is_refused():
    simulator = ours("libero_object", 0)
    with pytest.raises(BenchError, match=r"init state: 50 of libero_object/.*; it has 0 to 49"):
        simulator.reset(50)
    simulator.close()
