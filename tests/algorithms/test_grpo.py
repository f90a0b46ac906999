"""GRPO against cases by hand and the numbers of SimpleVLA-RL's and Flow-GRPO's authors."""

import dataclasses
import math

import pytest
import torch
from toy import ToyChain, ToyTokens, two_stages
from vlarl_bench.algorithms.grpo import GRPO, GRPOSettings

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError

BUDGET = BUDGETS["smoke"]


def start(make=ToyTokens, **changes):
    policy = make(0, inputs=2)
    return GRPO(GRPOSettings(**{"group_size": 4, **changes}), policy, BUDGET, 0), policy


def play(algorithm, policy, outcomes, seed=0):
    """Episodes of the two-stage world, grouped, with outcomes dealt by hand."""
    rollout = two_stages(policy, len(outcomes), seed, algorithm.act, group=algorithm.group)
    given = [dataclasses.replace(e, success=bool(o)) for e, o in zip(rollout.episodes, outcomes, strict=True)]
    return dataclasses.replace(rollout, episodes=given)


def caught(monkeypatch):
    """What `ascend` is given."""
    given = {}

    def keep(score, advantage, clip, *args, **more):
        given.update(score=score, advantage=advantage, clip=clip, **more)
        return {}

    monkeypatch.setattr("vlarl_bench.algorithms.grpo.ascend", keep)
    return given


@pytest.mark.parametrize("baseline", ["grpo", "rloo"])
def test_every_decision_has_its_episodes_advantage_and_groups_without_spread_are_left_out(monkeypatch, baseline):
    given = caught(monkeypatch)
    algorithm, policy = start(baseline=baseline)
    outcomes = [0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1]
    rollout = play(algorithm, policy, outcomes)
    metrics = algorithm.update(policy, rollout)
    assert metrics["groups_used"] == 0.5
    won, lost = (1 - 1 / 4, -1 / 4) if baseline == "grpo" else (1.0, -1 / 3)
    scale = 1 / (0.5 + 1e-6) if baseline == "grpo" else 1.0  # deviation of [0, 1, 0, 0] over n - 1
    first, last = {1: won * scale, 0: lost * scale}, {1: -lost * scale, 0: -won * scale}
    expected, rows = [], []
    for number, (outcome, episode) in enumerate(zip(outcomes, rollout.episodes, strict=True)):
        if number < 4 or number >= 12:
            expected += [(first if number < 4 else last)[outcome]] * len(episode.latents)
            rows += [number] * len(episode.latents)
    assert given["advantage"].tolist() == pytest.approx(expected, rel=1e-6)
    taken = decisions(policy, rollout)
    every = torch.arange(len(rows))
    used = torch.isin(taken.episode, torch.tensor([*range(4), *range(12, 16)])).nonzero()[:, 0]
    assert torch.equal(given["score"](every).logp, algorithm.score(policy, taken, used).logp)
    assert (given["clip"], given["clip_high"]) == (0.2, 0.28)


@pytest.mark.parametrize("outcomes", [[0] * 8, [1] * 8, [0] * 4 + [1] * 4, [0], [1]])
def test_without_spread_nothing_is_done(outcomes):
    algorithm, policy = start()
    before = policy.w.detach().clone()
    assert algorithm.update(policy, play(algorithm, policy, outcomes)) == {"groups_used": 0.0}
    assert torch.equal(policy.w, before)


def test_easy_and_hard_groups_are_left_out():
    algorithm, policy = start(accuracy_low=0.3, accuracy_high=0.7)
    outcomes = [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    assert algorithm.update(policy, play(algorithm, policy, outcomes))["groups_used"] == pytest.approx(1 / 3)


def test_first_gradient_in_closed_form():
    """d log p(k) / d b = onehot(k) - p, weighed by the advantage, averaged over executed tokens of groups in use."""
    algorithm, policy = start(lr=1.0, epochs=1, minibatch=1000, baseline="rloo")
    algorithm.optimizer = torch.optim.SGD(algorithm.optimizer.param_groups[0]["params"], lr=1.0)
    outcomes = [0, 1, 0, 0, 1, 1, 1, 1]
    rollout = play(algorithm, policy, outcomes)
    taken = decisions(policy, rollout)
    advantage = torch.tensor([-1 / 3, 1.0, -1 / 3, -1 / 3])
    expected, tokens = torch.zeros(4, 5), 0
    for n in range(len(taken)):
        if taken.episode[n] < 4:
            chances = policy.logits(taken.view(torch.tensor([n])))[0].softmax(-1).detach()
            onehot = torch.eye(5)[taken.trace[n, :, 0]]
            expected[:2] += advantage[taken.episode[n]] * (onehot - chances)[:2]  # the second action was not executed
            tokens += 2
    before = policy.b.detach().clone()
    metrics = algorithm.update(policy, rollout)
    norm = (policy.b - before).norm() / (expected / tokens).norm()
    assert norm <= 1 + 1e-5  # the gradient of all weights was clipped to 1 if it was longer
    torch.testing.assert_close((policy.b.detach() - before).view(4, 5), expected / tokens, rtol=1e-4, atol=1e-6)
    assert (metrics["clip_fraction"], metrics["ratio_off_one"]) == (0, 0)


@pytest.mark.parametrize("make", [ToyTokens, ToyChain])
def test_ratio_is_one_on_the_first_pass(make):
    algorithm, policy = start(make, epochs=1, minibatch=1000)
    metrics = algorithm.update(policy, play(algorithm, policy, [0, 1, 0, 0]))
    assert (metrics["ratio_off_one"], metrics["kl"], metrics["clip_fraction"]) == (0, 0, 0)


def test_a_chains_steps_are_judged_by_their_mean_density(monkeypatch):
    given = caught(monkeypatch)
    algorithm, policy = start(ToyChain, noise=0.3)
    rollout = play(algorithm, policy, [0, 1, 0, 0])
    algorithm.update(policy, rollout)
    assert (given["clip"], given["clip_high"]) == (0.01, None)
    taken = decisions(policy, rollout)
    got = algorithm.score(policy, taken, torch.tensor([2, 0]))
    assert got.logp.shape == got.mask.shape == (2, 4)
    for row, n in enumerate((2, 0)):
        for step in range(4):
            x, after = taken.trace[n, step].flatten(), taken.trace[n, step + 1].flatten()
            mean = 0.5 * x + taken.view(torch.tensor([n])).proprio[0] @ policy.w[step] + policy.b[step, 0]
            density = torch.distributions.Normal(mean, 0.3).log_prob(after)[:2]  # the first action was executed
            assert got.logp[row, step].item() == pytest.approx(density.mean().item(), abs=1e-5)
    assert got.entropy.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.09), rel=1e-5)


@pytest.mark.parametrize(
    "bad",
    [{"group_size": 1}, {"accuracy_low": 0.95}, {"clip_eps": 0.0}, {"temperature": 0.0}, {"epochs": 0}],
    ids=str,
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        GRPOSettings(**bad).check()
