"""RWFM against closed forms: weights, exploration, window."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import PaddedFlow, ToyFlow, two_stages
from vlarl_bench.algorithms.rwfm import RWFM, RWFMSettings, bump, observations, stored

from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError
from vlarl_bench.rollout import Episode, Job
from vlarl_bench.suite import Observation, Task

BUDGET = BUDGETS["smoke"]


def start(**changes):
    policy = ToyFlow(0, inputs=2)
    return RWFM(RWFMSettings(**{"gradient_steps": 3, "minibatch": 16, **changes}), policy, BUDGET, 0), policy


def play(algorithm, policy, outcomes, seed=0):
    rollout = two_stages(policy, len(outcomes), seed, algorithm.act)
    given = [dataclasses.replace(e, success=bool(o)) for e, o in zip(rollout.episodes, outcomes, strict=True)]
    return dataclasses.replace(rollout, episodes=given)


class OneParameter(ToyFlow):
    """The loss of a decision is theta times its first latent number, so the gradient tells who counts."""

    def draw_loss(self, context, latent, t, noise):
        return (self.u[0] * latent[:, :1, :1])[:, None].expand_as(noise) + 0 * noise


@pytest.mark.parametrize(("weight", "alpha"), [("exponential", 2.0), ("exponential", 0.0), ("filtered", 2.0)])
def test_weights_in_closed_form(weight, alpha):
    """The mean gradient over very many decisions is sum(w x) / sum(w), with w = exp(alpha R) or R."""
    policy = OneParameter(0, inputs=2)
    settings = RWFMSettings(lr=1.0, weight=weight, alpha=alpha, gradient_steps=1, minibatch=40_000, grad_norm=1e9)
    algorithm = RWFM(settings, policy, BUDGET, 0)
    algorithm.optimizer = torch.optim.SGD(algorithm.actor, lr=1.0)
    rollout = play(algorithm, policy, [1, 0, 0, 1, 0, 0])
    x = np.array([float(latent[0, 0]) for e in rollout.episodes for latent in e.latents])
    r = np.array([float(e.success) for e in rollout.episodes for _ in e.latents])
    w = r if weight == "filtered" else np.exp(alpha * r)
    before = policy.u[0].item()
    metrics = algorithm.update(policy, rollout)
    assert before - policy.u[0].item() == pytest.approx((w * x).sum() / w.sum(), abs=0.02 * np.abs(x).max())
    counted = w[w > 0]
    assert metrics["effective_share"] == pytest.approx(counted.sum() ** 2 / (counted**2).sum() / len(counted), rel=1e-4)


def test_steps_never_executed_do_not_count():
    algorithm, policy = start(draws=1, tau_min=0.4)
    rollout = play(algorithm, policy, [1, 1])
    (episode, *_) = [stored(e) for e in rollout.episodes]
    batch = policy.preprocess(observations(episode))
    before = algorithm.generator.get_state()
    everything = torch.arange(len(episode["latent"]))
    loss = algorithm._losses(policy, batch, episode["latent"], episode["mask"], everything)
    algorithm.generator.set_state(before)
    t = 0.4 + 0.6 * torch.rand(len(loss), 1, generator=algorithm.generator)
    noise = torch.randn(len(loss), 1, 2, 2, generator=algorithm.generator)
    assert episode["mask"].tolist() == [[1, 0]] * len(loss)
    torch.testing.assert_close(loss, policy.draw_loss(batch, episode["latent"], t, noise)[:, 0, 0].mean(-1))


def padded(wrong, monkeypatch):
    monkeypatch.setattr(PaddedFlow, "wrong", wrong)
    policy = PaddedFlow(0, inputs=2)
    return RWFM(RWFMSettings(gradient_steps=3, minibatch=16, explore_size=0.3), policy, BUDGET, 0), policy


def test_numbers_that_pad_a_latent_do_not_count(monkeypatch):
    """Neither in the loss and its gradient nor in `cfm_loss`, however wrong the network is about them."""
    found = []
    for wrong in (0.0, 1e4):
        algorithm, policy = padded(wrong, monkeypatch)
        metrics = algorithm.update(policy, play(algorithm, policy, [1, 0, 0, 1]))
        found.append((metrics, *(p.detach() for p in policy.actor_parameters())))
    assert found[0][0] == found[1][0]
    for plain, other in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(plain, other)
    assert not torch.equal(found[0][1], PaddedFlow(0, inputs=2).w)


def test_bumps_leave_numbers_that_pad_a_latent_alone(monkeypatch):
    algorithm, policy = padded(0.0, monkeypatch)
    context = policy.preprocess([two_stages(policy, 1, 0).episodes[0].observations[0]] * 2)
    plain, bent = (
        f([torch.Generator().manual_seed(i) for i in range(2)])
        for f in (lambda g: policy.sample(context, g), lambda g: algorithm.act(policy, context, g))
    )
    assert torch.equal(bent.latent[..., 2:], plain.latent[..., 2:])
    assert (bent.latent[..., :2] != plain.latent[..., :2]).any()
    assert torch.equal(bent.actions, bent.latent[..., :2])


@pytest.mark.parametrize("weight", ["filtered", "exponential"])
def test_without_a_success(weight):
    """Filtered, nothing is done; weighted, all count the same."""
    algorithm, policy = start(weight=weight)
    before = policy.b.detach().clone()
    metrics = algorithm.update(policy, play(algorithm, policy, [0] * 4))
    assert all(math.isfinite(value) for value in metrics.values())
    if weight == "filtered":
        assert set(metrics) == {"cfm_loss", "episodes_imitated"}
        assert metrics["episodes_imitated"] == 0
        assert torch.equal(policy.b, before)
    else:
        assert metrics["effective_share"] == pytest.approx(1)


def test_the_window_forgets():
    algorithm, policy = start(weight="filtered", window=2)
    seen = []
    for number, outcomes in enumerate(([1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0])):
        seen.append(algorithm.update(policy, play(algorithm, policy, outcomes, number))["episodes_imitated"])
    assert seen == [3, 3, 1, 3]


def test_the_policy_acts_with_the_average_of_its_weights():
    """Gradient steps go on from the last weights, also after a checkpoint; the policy has their running average."""
    (plain, last), (averaged, policy), (again, resumed) = (start(ema=e, gradient_steps=1) for e in (0.0, 0.75, 0.75))
    average = policy.b.detach().clone()
    for number in range(3):
        rollout = play(plain, last, [1, 0, 1, 1], number)
        plain.update(last, rollout)
        averaged.update(policy, rollout)
        average = 0.75 * average + 0.25 * last.b.detach()
        assert torch.allclose(policy.b, average, atol=1e-7)
        assert all(map(torch.equal, averaged.learned, last.actor_parameters()))
        again.update(resumed, rollout)
        assert torch.equal(resumed.b, policy.b)
        state, weights = copy.deepcopy((again.state_dict(), resumed.state_dict()))
        again, resumed = start(ema=0.75, gradient_steps=1)
        again.load_state_dict(state)
        resumed.load_state_dict(weights)
    assert not torch.equal(policy.b, last.b)


def test_a_stored_episode_shows_the_same_again():
    """Text, poses and pictures, and not what was seen last."""
    rng = np.random.default_rng(0)
    episode = Episode(Job(Task("toy", "a", "do a"), 3, 0, 0), success=True)
    for i in range(3):
        pose = rng.normal(size=7).astype(np.float32)
        picture = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        episode.observations.append(Observation("do a", np.array([i], np.float32), {"cup": pose}, {"top": picture}))
    for steps in (2, 1):
        episode.latents.append(rng.normal(size=(2, 2)).astype(np.float32))
        episode.actions.append(np.zeros((steps, 2), np.float32))
    kept = stored(episode)
    again = observations(kept)
    assert len(again) == 2
    for seen, expected in zip(again, episode.observations, strict=False):
        assert seen.instruction == expected.instruction
        np.testing.assert_array_equal(seen.proprio, expected.proprio)
        np.testing.assert_array_equal(seen.objects["cup"], expected.objects["cup"])
        np.testing.assert_array_equal(seen.images["top"], expected.images["top"])
        assert seen.images["top"].dtype == np.uint8
    assert kept["mask"].tolist() == [[1, 1], [1, 0]]
    assert kept["outcome"].tolist() == [1, 1]


def test_a_bump_is_smooth_bounded_and_of_one_sign():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        got = bump(generator, 16, 3, 0.5)
        centre, width, height = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))
        assert got.shape == (16, 3)
        for number in range(3):
            for step in range(16):
                z = ((step + 0.5) / 16 - float(centre[number])) / (1 / 16 + 3 / 16 * float(width[number]))
                assert float(got[step, number]) == pytest.approx(
                    0.5 * (2 * float(height[number]) - 1) * math.exp(-z * z / 2), abs=1e-6
                )
    assert got.abs().max() <= 0.5
    assert bump(generator, 1, 2, 0.5).isfinite().all()  # the authors' widths are whole steps, and 0 for short chunks


def test_exploring_adds_a_bump_to_the_policys_own_sample():
    algorithm, policy = start(explore_size=0.3)
    context = policy.preprocess([two_stages(policy, 1, 0).episodes[0].observations[0]] * 2)
    plain = policy.sample(context, [torch.Generator().manual_seed(i) for i in range(2)])
    bent = algorithm.act(policy, context, [torch.Generator().manual_seed(i) for i in range(2)])
    assert torch.equal(bent.actions, bent.latent)
    for row in range(2):
        generator = torch.Generator().manual_seed(row)
        policy.sample(context.index(torch.tensor([row])), [generator])
        torch.testing.assert_close(bent.latent[row] - plain.latent[row], bump(generator, 2, 2, 0.3))
    calm = start(explore_size=0.0)[0].act(policy, context, [torch.Generator().manual_seed(i) for i in range(2)])
    assert torch.equal(calm.latent, plain.latent)


@pytest.mark.parametrize("bad", [{"alpha": 21.0}, {"window": 0}, {"explore_size": -0.1}, {"lr": 0.0}], ids=str)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        RWFMSettings(**bad).check()
