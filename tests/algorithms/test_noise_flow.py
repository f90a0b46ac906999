"""FPO's other latent, trap 4: a flow over the noise of a frozen policy, against closed forms and integration."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import PaddedFlow, ToyChain, ToyFlow, rollout, two_stages
from vlarl_bench.algorithms.fpo import FPO, FPOSettings, chunk_loss

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.noise_flow import BOUND, NoiseFlow
from vlarl_bench.policies.presets import OCTO_TINY, PI0_TINY
from vlarl_bench.policies.store import content_hash, save_policy
from vlarl_bench.suite import Embodiment, Observation

BUDGET = dataclasses.replace(BUDGETS["smoke"], iterations=20)


def start(**changes):
    policy = ToyFlow(0, inputs=2)
    settings = {"latent": "noise", "lr": 1e-2, "critic_steps": 5, "critic_width": 8, **changes}
    return FPO(FPOSettings(**settings), policy, BUDGET, 0), policy


def moved(flow, policy, context):
    """Weights that take it away from N(0, I)."""
    flow.steering.standardise(policy.features(context))
    with torch.no_grad():
        for n, (name, parameter) in enumerate(flow.steering.named_parameters()):
            far = 0.1 if name.startswith("log_deviation") else 0.02
            parameter += far * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
    hidden = flow.steering.layers((policy.features(context) - flow.steering.mean) / flow.steering.std)
    shape = (len(context), 2, 2)
    return (
        (BOUND * flow.steering.centre(hidden)).view(shape).detach(),
        (BOUND * flow.steering.log_deviation(hidden).exp()).view(shape).detach(),
    )


def seen(policy):
    return policy.preprocess([episode.observations[0] for episode in two_stages(policy, 4, 0).episodes])


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def test_it_begins_as_the_flow_from_noise_to_noise():
    """v = (2t - 1) / (t^2 + (1 - t)^2) x, before features were seen and after; that is what conditional flow matching
    asks for: of all multiples of x_t it is the nearest to eps - x_0."""
    policy = ToyFlow(0, inputs=2)
    flow, context = NoiseFlow(policy, 0), seen(policy)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 3, 2, 2, generator=g), torch.rand(4, 3, generator=g)
    expected = ((2 * t - 1) / (t**2 + (1 - t) ** 2))[..., None, None] * x
    for _ in range(2):
        torch.testing.assert_close(flow.velocity(context, x, t), expected, rtol=1e-5, atol=1e-6)
        flow.steering.standardise(policy.features(context))
    eps, clean = torch.randn(2, 200_000, generator=g, dtype=torch.float64)
    for tau in (0.05, 0.3, 0.5, 0.9):
        noisy = tau * eps + (1 - tau) * clean
        nearest = float((noisy * (eps - clean)).mean() / (noisy**2).mean())
        assert nearest == pytest.approx((2 * tau - 1) / (tau**2 + (1 - tau) ** 2), abs=0.02)


def test_integrating_the_velocity_ends_where_it_draws():
    policy = ToyFlow(0, inputs=2)
    flow, context = NoiseFlow(policy, 0), seen(policy)
    mean, deviation = moved(flow, policy, context)
    assert mean.abs().max() > 0.3 and (deviation - 1).abs().max() > 0.1
    unit = torch.stack([torch.randn(2, 2, generator=g) for g in seeds(4)])
    drawn = flow.sample(context, seeds(4))
    torch.testing.assert_close(drawn, mean + deviation * unit, rtol=1e-3, atol=1e-3)
    x, steps = unit[:, None], 2000
    for step in range(steps):
        x = x - flow.velocity(context, x, torch.full((4, 1), 1 - step / steps)).detach() / steps
    torch.testing.assert_close(x[:, 0], drawn, rtol=5e-3, atol=5e-3)
    assert torch.equal(flow.sample_round(context, seeds(4)), drawn)


def test_loss_and_gradient_in_closed_form():
    """The error is (t (x - m) - (1 - t) d^2 eps) / D with D = t^2 + (1 - t)^2 d^2: its square falls by 2 error t / D
    as m rises."""
    policy = ToyFlow(0, inputs=2)
    flow, context = NoiseFlow(policy, 0), seen(policy)
    mean, deviation = (value[:, None] for value in moved(flow, policy, context))
    g = torch.Generator().manual_seed(1)
    x, eps, t = torch.randn(4, 2, 2, generator=g), torch.randn(4, 3, 2, 2, generator=g), torch.rand(4, 3, generator=g)
    tau = t[..., None, None]
    below = tau**2 + (1 - tau) ** 2 * deviation**2
    error = (tau * (x[:, None] - mean) - (1 - tau) * deviation**2 * eps) / below
    loss = flow.draw_loss(context, x, t, eps)
    torch.testing.assert_close(loss, error**2, rtol=1e-4, atol=1e-4)
    slope = torch.autograd.grad(loss.sum(), flow.steering.centre.bias)[0] / BOUND
    torch.testing.assert_close(slope.view(2, 2), (-2 * error * tau / below).sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_it_decodes_through_the_frozen_policy_and_the_flow_alone_learns():
    algorithm, policy = start()
    weights = {name: p.detach().clone() for name, p in policy.named_parameters() if not name.startswith("steering.")}
    context = seen(policy)
    base = ToyFlow(0, inputs=2)
    acted = algorithm.act(policy, context, seeds(4))
    torch.testing.assert_close(acted.latent, base.sample(context, seeds(4)).latent, rtol=1e-5, atol=1e-5)
    unit = torch.stack([torch.randn(2, 2, generator=g) for g in seeds(4)])
    torch.testing.assert_close(acted.trace, unit, rtol=1e-2, atol=0)
    for number in range(3):
        data = two_stages(policy, 24, number, algorithm.act)
        for i, episode in enumerate(data.episodes):
            episode.success = i % 3 == 0
        metrics = algorithm.update(policy, data)
        assert all(math.isfinite(value) for value in metrics.values())
    acted = algorithm.act(policy, context, seeds(4))
    noise = BOUND * torch.tanh(acted.trace / BOUND)
    assert (noise - unit).abs().max() > 0.01
    torch.testing.assert_close(acted.latent, base.decode(context, noise).latent, rtol=1e-5, atol=1e-5)
    # What is judged and stored is the policy with its flow.
    torch.testing.assert_close(policy.sample(context, seeds(4)).latent, acted.latent, rtol=1e-5, atol=1e-5)
    for name, parameter in policy.named_parameters():
        assert name.startswith("steering.") == parameter.requires_grad
        assert name.startswith("steering.") or torch.equal(parameter, weights[name])


def test_what_was_drawn_is_the_latent_and_all_of_it_counts():
    """One action in two is executed, but the noise of the other has its part in it."""
    algorithm, policy = start()
    data = two_stages(policy, 8, 0, algorithm.act)
    algorithm.update(policy, data)
    drawn = torch.from_numpy(np.stack([trace for episode in data.episodes for trace in episode.traces]))
    assert torch.equal(algorithm.replay[0]["latent"], drawn)
    judged = algorithm.noise.judged(decisions(policy, data))
    assert judged.mask.min() == 1 and torch.equal(judged.latent, drawn)
    fresh = algorithm.replay[0]["value_chunk"]
    assert fresh.shape == drawn.shape and fresh.std().item() == pytest.approx(1, abs=0.3)


def test_noise_that_pads_an_action_is_noise_too():
    """A network looks at all of its noise, so here what pads an action counts."""
    policy = PaddedFlow(0, inputs=2)
    algorithm = FPO(FPOSettings(latent="noise", critic_steps=2, critic_width=8), policy, BUDGET, 0)
    data = two_stages(policy, 8, 0, algorithm.act)
    metrics = algorithm.update(policy, data)
    assert all(math.isfinite(value) for value in metrics.values())
    assert algorithm.replay[0]["latent"].shape[1:] == (2, 5)
    x, eps, t = torch.randn(4, 2, 5), torch.randn(4, 3, 2, 5), torch.rand(4, 3)
    loss = chunk_loss(algorithm.noise, seen(policy), x, torch.ones(4, 2), t, eps, True)
    torch.testing.assert_close(loss, algorithm.noise.draw_loss(seen(policy), x, t, eps).mean((2, 3)))


def test_exploration_steps_follow_the_flow_over_noise():
    algorithm, policy = start(explore_steps=3, explore_size=0.2, explore_time=0.4)
    context = seen(policy)
    moved(algorithm.noise, policy, context)
    with torch.no_grad():
        x = algorithm.noise.sample(context, seeds(4))
        for _ in range(2):
            x = x - 0.2 * algorithm.noise.velocity(context, x[:, None], torch.full((4, 1), 0.4))[:, 0]
        acted = algorithm.act(policy, context, seeds(4))
    torch.testing.assert_close(acted.trace, x)
    assert torch.equal(acted.latent, policy.decode(context, BOUND * torch.tanh(acted.trace / BOUND)).latent)


@pytest.mark.parametrize("changes", [{}, {"ratio": "none"}, {"explore_steps": 2}, {"chunk_credit": False}], ids=str)
@pytest.mark.parametrize("spec", [PI0_TINY, OCTO_TINY], ids=lambda spec: spec.name)
def test_a_policy_that_carries_one_is_stored_and_loaded(spec, changes, tmp_path):
    """Octo has no velocity of its own; its flow over noise has one."""
    policy = spec.create(Embodiment(7, 3, (), chunk=8), ["go", "cup"], 0)
    see = [
        Observation("go", np.random.default_rng(i).normal(size=3).astype(np.float32), {"cup": np.eye(7, dtype="f4")[i]})
        for i in range(4)
    ]
    settings = FPOSettings(latent="noise", lr=1e-3, critic_steps=2, critic_width=8, draws=2, **changes)
    algorithm = FPO(settings, policy, BUDGET, 0)
    data = rollout(policy, lambda x: x[0, 0] > 0, 6, 0, length=2, act=algorithm.act, see=lambda i: see[i])
    for number, episode in enumerate(data.episodes):
        episode.success = number % 2 == 0
    algorithm.update(policy, data)
    save_policy(tmp_path / "policy", policy, {"made_by": "a test"})
    loaded = spec.load(tmp_path / "policy")
    assert content_hash(loaded) == content_hash(policy)
    with torch.no_grad():
        expected, found = (p.sample(p.encode(p.preprocess(see)), seeds(4)).latent for p in (policy, loaded))
        unmoved = spec.create(Embodiment(7, 3, (), chunk=8), ["go", "cup"], 0)
        plain = unmoved.sample(unmoved.encode(unmoved.preprocess(see)), seeds(4)).latent
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_a_policy_that_cannot_decode_from_given_noise():
    with pytest.raises(BenchError, match=r"^algo.latent: 'noise'; the policy does not decode from noise"):
        FPO(FPOSettings(latent="noise"), ToyChain(0, inputs=2), BUDGET, 0)
