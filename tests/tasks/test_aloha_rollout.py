"""Episodes of both ALOHA tasks at once, through worker processes."""

import dataclasses

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.pool import Pool
from vlarl_bench.rollout import Job, episode_seed, run_episodes

SUITE = registry.get("suite", "aloha")


def play(mode, workers, order):
    protocol = SUITE.protocol(mode)
    steps = dict.fromkeys(protocol.horizon, 2 * protocol.execute + 5)
    protocol = dataclasses.replace(protocol, horizon=steps)
    jobs = [Job(SUITE.tasks[i % 2], i, 0, episode_seed(0, i)) for i in order]
    spec = registry.get("policy", "pi0-tiny")
    if mode == "pixels":  # the shipped pixel policy looks through LIBERO's cameras
        spec = dataclasses.replace(registry.get("policy", "pi0-tiny-pixels"), cameras=protocol.cameras)
    words = [task.instruction for task in SUITE.tasks] + ["cube", "peg", "socket"]
    policy = spec.create(SUITE.embodiment(protocol), words, seed=0)
    with Pool(SUITE, protocol, workers) as pool:
        episodes = run_episodes(pool, policy, jobs, protocol, slots=3)
    return {episode.job.init_state: episode for episode in episodes}


@pytest.mark.parametrize("mode", ["state", "pixels"])
def test_workers_and_order_change_nothing(mode):
    one, two = play(mode, 1, [0, 1, 2, 3]), play(mode, 2, [3, 1, 0, 2])
    assert one.keys() == two.keys()
    for state, episode in one.items():
        again = two[state]
        assert episode.executed == again.executed == [20, 20, 5]
        for mine, theirs in zip(episode.actions, again.actions, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        for mine, theirs in zip(episode.observations, again.observations, strict=True):
            np.testing.assert_array_equal(mine.proprio, theirs.proprio)
            for shown, other in ((mine.objects, theirs.objects), (mine.images, theirs.images)):
                assert shown.keys() == other.keys()
                for name in shown:
                    np.testing.assert_array_equal(shown[name], other[name])
