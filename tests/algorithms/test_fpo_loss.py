"""FPO's loss, eq. 2 to 4: against closed forms, finite differences and cases by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import ToyFlow, ToyStochasticFlow, rollout
from vlarl_bench.algorithms import fpo
from vlarl_bench.algorithms.fpo import FPOSettings, actor_loss, cfm_ratio

from vlarl_bench.suite import Observation

RATIOS = ("difference", "scaled", "standardised")


def chunk_loss(*given, whole=True):
    return fpo.chunk_loss(*given, whole)


def inputs(seed=0, b=6, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    policy = ToyFlow(seed, dtype)
    latent = torch.randn(b, 2, 2, generator=g, dtype=dtype)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]] * (b // 2), dtype=dtype)
    t = torch.rand(b, k, generator=g, dtype=dtype)
    noise = torch.randn(b, k, 2, 2, generator=g, dtype=dtype)
    advantage = torch.randn(b, generator=g, dtype=dtype)[:, None]
    episodes = rollout(ToyFlow(), lambda x: True, b, 0).episodes
    context = policy.preprocess([episode.observations[0] for episode in episodes])
    return policy, context, latent, mask, t, noise, advantage


def test_chunk_loss_by_hand():
    policy, context, latent, mask, t, noise, _ = inputs()
    got = chunk_loss(policy, context, latent, mask, t, noise)
    for row in range(len(latent)):
        for draw in range(t.shape[1]):
            x1, eps, tau = latent[row], noise[row, draw], t[row, draw]
            x = tau * eps + (1 - tau) * x1
            v = (x.flatten() @ policy.w + tau * policy.u + policy.b + context.proprio[row] @ policy.v).view(2, 2)
            steps = int(mask[row].sum())
            expected = ((v - (eps - x1)) ** 2)[:steps].mean()
            assert torch.allclose(got[row, draw], expected, atol=1e-12)


def test_steps_never_executed_do_not_count():
    policy, context, latent, mask, t, noise, _ = inputs()
    first_only = torch.zeros_like(mask)
    first_only[:, 0] = 1
    garbage = noise.clone()
    # Garbage in what the mask hides changes v through W, so hide it from the velocity too.
    policy.w.data[2:, :2] = 0
    garbage[:, :, 1] += 100
    changed = chunk_loss(policy, context, latent, first_only, t, garbage)
    assert torch.allclose(changed, chunk_loss(policy, context, latent, first_only, t, noise))
    clean = chunk_loss(policy, context, latent, mask, t, noise)
    assert not torch.allclose(chunk_loss(policy, context, latent, mask, t, garbage), clean)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_is_one_and_the_gradient_finite_on_the_first_pass(ratio):
    """Trap 1: with stored draws dl is 0 for all, so its deviation is 0 and must be floored."""
    policy, context, latent, mask, t, noise, advantage = inputs()
    old = chunk_loss(policy, context, latent, mask, t, noise).detach()
    loss, rho = actor_loss(
        chunk_loss(policy, context, latent, mask, t, noise), old, advantage, FPOSettings(ratio=ratio)
    )
    assert torch.equal(rho, torch.ones_like(rho))
    gradients = torch.autograd.grad(loss, policy.actor_parameters())
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("gradient", ["through", "weight"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_first_gradient_is_the_advantage_weighted_cfm_gradient(ratio, gradient):
    """Closed form at theta = theta_old: d/dtheta of -mean(rho A) is c * mean(A dl/dtheta), where c is beta over the
    floor. The standardised reading stops the gradient at mean and deviation, so it has the same form."""
    s = FPOSettings(ratio=ratio, beta=0.7, std_floor=0.2, ratio_gradient=gradient)
    policy, context, latent, mask, t, noise, advantage = inputs()
    losses = chunk_loss(policy, context, latent, mask, t, noise)
    got = torch.autograd.grad(actor_loss(losses, losses.detach(), advantage, s)[0], policy.actor_parameters())
    scale = 1.0 if gradient == "weight" else (0.7 if ratio == "difference" else 0.7 / 0.2)
    losses = chunk_loss(policy, context, latent, mask, t, noise)
    expected = torch.autograd.grad(scale * (advantage * losses).mean(), policy.actor_parameters())
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def away(policy, *given):
    """Stored losses of a policy that the present one has moved from, in both directions."""
    old = chunk_loss(policy, *given).detach()
    return old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=old.dtype)


@torch.no_grad()
def assert_slopes(value, parameters, gradients):
    """Gradients are those of `value()` by central differences, number by number."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            kept = float(flat[i])
            found = []
            for step in (1e-6, -1e-6):
                flat[i] = kept + step
                found.append(float(value()))
            flat[i] = kept
            assert (found[0] - found[1]) / 2e-6 == pytest.approx(float(gradient.view(-1)[i]), abs=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gradient_away_from_the_old_policy_against_finite_differences(clip):
    s = FPOSettings(clip_eps=clip)
    policy, *given, advantage = inputs()
    old = away(policy, *given)

    def value():
        return actor_loss(chunk_loss(policy, *given), old, advantage, s)[0]

    actor = policy.actor_parameters()
    assert_slopes(value, actor, torch.autograd.grad(value(), actor))


@pytest.mark.parametrize("penalty", [0.0, 2.0])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("ratio", RATIOS)
def test_gradient_of_a_ratio_that_weighs_against_finite_differences(ratio, clip, penalty):
    """`weight` has no function that it is the gradient of. It is that of the loss with rho, clipped from both sides
    whatever the advantage, held at what it is here; rho is written out by hand."""
    s = FPOSettings(
        ratio_gradient="weight", ratio=ratio, clip_eps=clip, drift_penalty=penalty, beta=0.7, std_floor=1e-3
    )
    policy, *given, advantage = inputs()
    old = away(policy, *given) - 0.05  # a mean rise, which the penalty sees
    new = chunk_loss(policy, *given)
    z = (old - new).detach().numpy()
    z = z if ratio == "difference" else (z - (z.mean() if ratio == "standardised" else 0)) / z.std()
    rho = np.exp(0.7 * z)
    assert ((rho < 0.95) | (rho > 1.05)).any()
    weight = torch.from_numpy(np.clip(rho, 0.95, 1.05) if clip else rho)

    def value():
        now = chunk_loss(policy, *given)
        return (weight * advantage * now).mean() + penalty * (now - old).mean()

    assert float((new - old).detach().mean()) > 0
    actor = policy.actor_parameters()
    assert_slopes(value, actor, torch.autograd.grad(actor_loss(new, old, advantage, s)[0], actor))


def test_clipping_by_hand():
    new = torch.tensor([[1.0], [1.0], [3.0], [3.0]])
    old = torch.tensor([[2.0], [2.0], [2.0], [2.0]])  # rho = e for the first two, 1/e for the others
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    e = float(np.e)
    expected = -np.mean([1.1, -e, 1 / e, -0.9])
    loss, _ = actor_loss(new, old, advantage, FPOSettings(clip_eps=0.1))
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    unclipped, _ = actor_loss(new, old, advantage, FPOSettings(clip_eps=0.0))
    assert float(unclipped) == pytest.approx(-np.mean([e, -e, 1 / e, -1 / e]), rel=1e-6)


def test_standardising_makes_the_clip_scale_free():
    """Trap 2: ten times the step clips the same fraction, so the clip is no trust region."""
    dl = 0.01 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    s = FPOSettings(ratio="standardised", beta=0.2, std_floor=1e-6)
    assert torch.allclose(cfm_ratio(dl, s), cfm_ratio(10 * dl, s), atol=1e-5)
    clipped = float(((cfm_ratio(dl, s) - 1).abs() > 0.2).float().mean())
    assert clipped == pytest.approx(0.31, abs=0.03)  # the fraction depends on beta and e alone: z ~ N(0, 1)
    plain = FPOSettings(ratio="difference")
    assert float((cfm_ratio(10 * dl, plain) - 1).abs().mean()) > 5 * float((cfm_ratio(dl, plain) - 1).abs().mean())


def test_stopping_the_gradient_at_the_ratio_needs_the_loss_outside():
    """Trap 3: read literally, `stop gradients through rho` leaves nothing to differentiate; `weight` does not."""
    policy, context, latent, mask, t, noise, advantage = inputs()
    losses = chunk_loss(policy, context, latent, mask, t, noise)
    old = losses.detach() + 0.03
    literal = (cfm_ratio(old - losses, FPOSettings()).detach() * advantage).mean()
    assert not literal.requires_grad
    loss, rho = actor_loss(losses, old, advantage, FPOSettings(ratio_gradient="weight", clip_eps=0.0))
    got = torch.autograd.grad(loss, policy.w, retain_graph=True)[0]
    expected = torch.autograd.grad((rho.detach() * advantage * losses).mean(), policy.w)[0]
    assert torch.allclose(got, expected)


def test_removing_the_batch_mean_leaves_the_drift_free():
    """Trap 5: a rise of every loss by 0.5 is invisible to the standardised ratio, and to no other reading."""
    dl = 0.1 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for ratio in RATIOS:
        s = FPOSettings(ratio=ratio, beta=0.1)
        same = torch.allclose(cfm_ratio(dl, s), cfm_ratio(dl - 0.5, s), atol=1e-6)
        assert same == (ratio == "standardised")
    s = FPOSettings(ratio="standardised", beta=0.1, drift_penalty=2.0)
    free = dataclasses.replace(s, drift_penalty=0.0)
    advantage, old = torch.zeros(64, 4), torch.full((64, 4), 1.0)
    risen, fallen = old + 0.5, old - 0.5
    for new, penalty in ((risen, 1.0), (fallen, 0.0)):
        extra = actor_loss(new, old, advantage, s)[0] - actor_loss(new, old, advantage, free)[0]
        assert float(extra) == pytest.approx(penalty)


def test_numbers_that_pad_a_latent_do_not_count():
    policy = ToyFlow(1)
    context = policy.encode(policy.preprocess(rollout(policy, lambda x: True, 2, 0).episodes[0].observations))
    latent, mask, t, noise = torch.randn(2, 2, 2), torch.ones(2, 2), torch.rand(2, 3), torch.randn(2, 3, 2, 2)
    plain = chunk_loss(policy, context, latent, mask, t, noise)
    inner = policy.draw_loss
    policy.draw_loss = lambda *args: torch.nn.functional.pad(inner(*args), (0, 3), value=1e6)
    assert torch.equal(chunk_loss(policy, context, latent, mask, t, noise), plain)


def test_credit_of_the_chunk_and_of_each_action_by_hand():
    """One action's loss falls by as much as the other's rises: the chunk's ratio stays 1, theirs are e and 1/e."""
    policy, *given, _ = inputs()
    losses, mask = chunk_loss(policy, *given, whole=False), given[2]
    assert losses.shape == (6, 3, 2)
    whole = (losses * mask[:, None]).sum(2) / mask.sum(1)[:, None]
    assert torch.allclose(chunk_loss(policy, *given), whole, atol=1e-12)
    old, new = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 3.0])
    free = FPOSettings(clip_eps=0.0)
    assert actor_loss(new, old, torch.ones(2), free)[1].tolist() == pytest.approx([np.e, 1 / np.e])
    assert actor_loss(new.mean()[None], old.mean()[None], torch.ones(1), free)[1].tolist() == [1.0]


def test_an_advantage_that_depends_on_the_state_alone_moves_fpo_and_no_likelihood():
    """The mean gradient over a policy's own chunks in one state, in standard errors: of a log-probability it is 0."""
    policy, n, batches = ToyStochasticFlow(), 200, 40
    context = policy.preprocess([Observation("", np.zeros(1, np.float32), {}, {})] * n)
    mask, g = torch.ones(n, 2), torch.Generator().manual_seed(0)

    def of_loss(generators):
        latent, t = policy.sample(context, generators).latent, torch.rand(n, 1, generator=g)
        noise = torch.randn(n, 1, 2, 2, generator=g)
        return chunk_loss(policy, context, latent, mask, t, noise).mean()

    def of_likelihood(generators):
        trace = policy.explore(context, generators, 0.5).trace
        return policy.log_prob(context, trace, mask, 0.5).logp.sum((1, 2)).mean()

    errors = {}
    for mean in (of_loss, of_likelihood):
        found = []
        for batch in range(batches):
            value = mean([torch.Generator().manual_seed(batch * n + row) for row in range(n)])
            found.append(torch.autograd.grad(value, (policy.w, policy.u, policy.b)))
        gradients = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in found])
        errors[mean] = (gradients.mean(0) / (gradients.std(0) / batches**0.5)).abs()
    assert errors[of_loss].max() > 20
    assert errors[of_likelihood].max() < 4
