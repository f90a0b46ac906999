"""What methods are given by real rollouts: chunks of several environment steps, and groups from one snapshot."""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import ToyFlow
from vlarl_bench.algorithms.fpo import FPO, FPOSettings
from vlarl_bench.algorithms.grpo import GRPOSettings

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.plan import Plan
from vlarl_bench.policies.base import Sample
from vlarl_bench.policy_gradient import advantages
from vlarl_bench.pool import Pool
from vlarl_bench.rollout import Job, Rollout, run_episodes

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from faulty_suite import FaultySuite

SUITE = FaultySuite()
PROTOCOL = SUITE.protocol("state")  # episodes of 20 steps in chunks of 4; from state 3 the 17th step succeeds


class Arm(ToyFlow):
    """The toy flow, of the shape that the suite's arm takes."""

    chunk, action_dim = 5, 7  # an action more than is executed


def play(policy, jobs, workers, slots, act=None):
    with Pool(SUITE, PROTOCOL, workers) as pool:
        return run_episodes(pool, policy, jobs, PROTOCOL, slots, act or policy_samples)


def policy_samples(policy, context, generators):
    return policy.sample(context, generators)


@pytest.fixture(scope="module")
def mixed():
    """Success in the middle of a chunk, running out of time, success again; of two tasks."""
    policy = Arm(0, inputs=8)
    jobs = [Job(SUITE.tasks[i % 2], state, 0, i) for i, state in enumerate((3, 1, 3))]
    episodes = play(policy, jobs, workers=1, slots=2)
    assert [(e.executed, e.success) for e in episodes] == [
        ([4, 4, 4, 4, 1], True),
        ([4, 4, 4, 4, 4], False),
        ([4, 4, 4, 4, 1], True),
    ]
    return policy, Rollout(episodes, {"faulty": 5})


def seen_value(policy, observation, k):
    """A value of an observation after k of five decisions: some function of what a critic sees."""
    features = policy.features(policy.encode(policy.preprocess([observation])))[0]
    return float(torch.cat((features, torch.tensor([k / 5]))).mul(torch.arange(1.0, 10.0)).sum().sin())


def brute_force(policy, episodes, gamma, lam, bootstrap):
    """Discounted sums of temporal differences, decision by decision; only what was cut off may be bootstrapped."""
    found = []
    for episode in episodes:
        n = len(episode.executed)
        value = [seen_value(policy, seen, k) for k, seen in enumerate(episode.observations)]
        for k in range(n):
            total = 0.0
            for j in range(k, n):
                last = j == n - 1
                reward = float(last and episode.success)
                future = 0.0 if last and (episode.success or not bootstrap) else value[j + 1]
                total += (gamma * lam) ** (j - k) * (reward + gamma * future - value[j])
            found.append(total)
    return found


def critic(features):
    return features.mul(torch.arange(1.0, 10.0)).sum(1).sin()


def test_gae_over_chunks_is_the_sum_that_defines_it(mixed):
    policy, rollout = mixed
    taken = decisions(policy, rollout)
    assert taken.mask.sum(1).tolist() == [4, 4, 4, 4, 1] + [4] * 5 + [4, 4, 4, 4, 1]
    got = advantages(taken, critic, 0.9, 0.7)
    assert got.tolist() == pytest.approx(brute_force(policy, rollout.episodes, 0.9, 0.7, bootstrap=False), abs=1e-5)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_fpos_gae_over_chunks_ends_or_bootstraps_at_the_time_limit(mixed, bootstrap):
    """Its critics, of which the least counts, here see no chunk."""
    policy, rollout = mixed
    settings = FPOSettings(gamma=0.9, gae_lambda=0.7, critic_target="td", bootstrap_time_limit=bootstrap)
    algorithm = FPO(settings, policy, BUDGETS["smoke"], 0)
    algorithm.critic = lambda features, chunks: torch.stack((critic(features) + 1, critic(features)))
    data = algorithm._data(policy, decisions(policy, rollout))
    expected = brute_force(policy, rollout.episodes, 0.9, 0.7, bootstrap)
    assert algorithm._advantages(data).tolist() == pytest.approx(expected, abs=1e-5)
    other = brute_force(policy, rollout.episodes, 0.9, 0.7, not bootstrap)
    assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) > 0.1


def test_episodes_of_a_group_begin_in_one_snapshot_whatever_slot_and_worker_they_are_in():
    """As `grpo` and `tpo` collect them. The map is chaotic, so where all decide alike any difference at the start
    would show at the end; where they draw they part after the first chunk."""
    policy, size = Arm(0, inputs=8), GRPOSettings(group_size=4).group_size
    stub = SimpleNamespace(config=SimpleNamespace(seed=0), protocol=PROTOCOL, tasks=SUITE.tasks[::2])
    jobs = Plan.train_jobs(stub, 1, 16, group=size)
    groups = [list(range(start, start + size)) for start in range(0, 16, size)]
    assert len({(job.task, job.init_state) for job in jobs}) == len(groups)

    def alike(policy, context, generators):
        chunk = context.proprio[:, None, :7].expand(-1, 5, -1) - 0.3
        return Sample(actions=chunk, latent=chunk)

    # Three slots of two workers: a group's first three are in both, and its fourth follows another episode.
    fixed, drawn = play(policy, jobs, 2, 3, alike), play(policy, jobs, 2, 3)
    for group in groups:
        for a, b in itertools.combinations(group, 2):
            same(fixed[a].observations, fixed[b].observations)
            same(drawn[a].observations[:1], drawn[b].observations[:1])
            assert not np.array_equal(drawn[a].observations[1].proprio, drawn[b].observations[1].proprio)
    first = [episode.observations[0].proprio.tobytes() for episode in drawn]
    assert len(set(first)) == len(groups)


def same(mine, theirs):
    """Two lists of observations are equal bit by bit."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert dataclasses.asdict(a).keys() == dataclasses.asdict(b).keys()
        assert a.instruction == b.instruction
        assert a.proprio.tobytes() == b.proprio.tobytes()
        assert {name: pose.tobytes() for name, pose in a.objects.items()} == {
            name: pose.tobytes() for name, pose in b.objects.items()
        }
