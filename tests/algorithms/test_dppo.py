"""DPPO against closed forms, cases by hand and numbers from its authors' code."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import ToyChain, two_stages
from vlarl_bench.algorithms.dppo import DPPO, DPPOSettings, clip_schedule

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import Decisions, decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.policies.base import LogProb
from vlarl_bench.policies.octo import Octo
from vlarl_bench.policies.presets import OCTO_TINY
from vlarl_bench.policy_gradient import ascend, gae
from vlarl_bench.suite import Embodiment

BUDGET = BUDGETS["smoke"]
QUICK = {"critic_steps": 5, "critic_width": 8}


def settings(**changes):
    return DPPOSettings(**{**QUICK, **changes})


@pytest.mark.parametrize(
    ("steps", "rate", "expected"),
    [
        (3, 2.0, [0.1, 0.1 + 0.4 * (math.e - 1) / (math.e**2 - 1), 0.5]),
        (3, 0.0, [0.1, 0.3, 0.5]),  # the formula's limit, where its denominator is 0
        (1, 3.0, [0.5]),  # the last step is the cleanest one; the authors' code divides 0 by 0 and its loss is NaN
    ],
)
def test_clip_schedule_by_hand(steps, rate, expected):
    assert clip_schedule(steps, 0.1, 0.5, rate).tolist() == pytest.approx(expected, rel=1e-6)


def scored(**changes):
    """(algorithm, policy, decisions) of a fresh round."""
    policy = ToyChain(0, inputs=2)
    algorithm = DPPO(settings(**changes), policy, BUDGET, 0)
    return algorithm, policy, decisions(policy, two_stages(policy, 6, 0, algorithm.act))


def test_score_is_the_mean_density_of_the_executed_numbers_of_the_last_steps():
    algorithm, policy, taken = scored(noise=0.3)
    i = torch.tensor([3, 0])
    got = algorithm.score(policy, taken, i, 2)
    assert got.logp.shape == got.mask.shape == (2, 2)
    assert got.mask.all()
    for row, n in enumerate(i):
        for column, step in enumerate((2, 3)):  # of 4
            x, after = taken.trace[n, step].flatten(), taken.trace[n, step + 1].flatten()
            mean = 0.5 * x + taken.view(n[None]).proprio[0] @ policy.w[step] + policy.b[step, 0]
            density = torch.distributions.Normal(mean, 0.3).log_prob(after)[:2]  # the first action was executed
            assert got.logp[row, column].item() == pytest.approx(density.clamp(-5, 2).mean().item(), abs=1e-5)
    assert got.mean_entropy.item() == pytest.approx(torch.distributions.Normal(0.0, 0.3).entropy().item(), rel=1e-5)


def test_gradient_of_the_score_in_closed_form():
    """By a number's mean it is (x' - m) / (D sigma^2) where its density is within the clamp, and 0 where it is not, was
    not executed, or is of a step before those that are fine-tuned; D counts clamped numbers as well."""
    algorithm, policy, taken = scored(noise=0.3, logp_low=-0.6, logp_high=0.2)
    i = torch.arange(len(taken))
    weight = torch.sin(torch.arange(len(taken) * 3.0)).view(-1, 3)
    got = torch.autograd.grad((weight * algorithm.score(policy, taken, i, 3).logp).sum(), [policy.b, policy.w])
    by_b, by_w, clamped = torch.zeros(4, 1, 4), torch.zeros(4, 2, 4), [0, 0, 0]
    for n in range(len(taken)):
        seen, x = taken.view(i[n : n + 1]).proprio[0], taken.trace[n].flatten(1)
        for step in (1, 2, 3):
            mean = (0.5 * x[step] + seen @ policy.w[step] + policy.b[step, 0]).detach()
            for number in (0, 1):  # those of the first action, which was executed
                z = float(x[step + 1, number] - mean[number]) / 0.3
                density = -0.5 * z**2 - math.log(0.3 * math.sqrt(2 * math.pi))
                place = 0 if density < -0.6 else 2 if density > 0.2 else 1
                clamped[place] += 1
                if place == 1:
                    slope = weight[n, step - 1] * z / 0.3 / 2
                    by_b[step, 0, number] += slope
                    by_w[step, :, number] += seen * slope
    assert min(clamped) > 3
    torch.testing.assert_close(got[0], by_b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], by_w, rtol=1e-4, atol=1e-4)


def test_densities_are_clamped_number_by_number():
    algorithm, policy, taken = scored()
    policy.log_prob = lambda *args: LogProb(
        torch.tensor([[[-9.0, 1.0, 77.0], [5.0, -1.0, 77.0]]]),
        torch.zeros(1, 2, 3),
        torch.tensor([[[True, True, False]] * 2]),
    )
    assert algorithm.score(policy, taken, torch.tensor([0]), 2).logp.tolist() == [[-2.0, 0.5]]


def test_credit_fades_towards_the_noisier_steps(monkeypatch):
    """What `ascend` is given: one advantage a decision, discounted along the last K' = 3 of 4 steps."""
    given = {}

    def keep(score, advantage, clip, *args, **more):
        given.update(advantage=advantage, clip=clip, **more)
        return {}

    monkeypatch.setattr("vlarl_bench.policy_gradient.ascend", keep)
    policy = ToyChain(0, inputs=2)
    algorithm = DPPO(settings(steps=3, clip_eps=0.01, gamma_denoising=0.5, warmup=0, target_kl=0.7), policy, BUDGET, 0)
    algorithm.update(policy, two_stages(policy, 16, 0, algorithm.act))
    assert given["target_kl"] == 0.7
    assert torch.equal(given["clip"], clip_schedule(3, 0.001, 0.01, 3.0))
    last = given["advantage"][:, 2]
    assert last.abs().sum() > 0
    assert torch.equal(given["advantage"], torch.stack([last / 4, last / 2, last], 1))


def formula(n, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + n).view(shape)


def test_the_authors_numbers(monkeypatch):
    """`PPODiffusion.loss` of irom-princeton/dppo at cc7234ad, run on `formula`'s numbers in float64: 3 decisions, 4
    fine-tuned steps, 3 actions of which 2 count (reward_horizon), norm_adv off. The gradient is minus that of pg_loss
    by a shift of each step's log-probabilities."""
    b, k, h, a = 3, 4, 3, 2
    theta = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    old = -1.5 + 4 * formula(1, b, k, h, a)
    moves = iter([0.0, 0.0, 0.1])  # the old policy, the first step, the second

    class Table:
        def log_prob(self, context, trace, mask, noise):
            logp = old + next(moves) * formula(2, b, k, h, a) + theta[:, None, None] * formula(3, b, k, h, a)
            logp, counted = logp[context].flatten(2), mask.bool().repeat_interleave(a, 1)[:, None].expand(b, k, h * a)
            return LogProb(logp, torch.zeros_like(logp), counted)

    algorithm, _, taken = scored()
    mask = torch.tensor([[1.0, 1.0, 0.0]] * b)
    taken = dataclasses.replace(taken, context=torch.arange(b), row=torch.arange(b), mask=mask, trace=torch.zeros(b, 1))
    monkeypatch.setattr(Decisions, "view", lambda self, i: i)
    metrics = ascend(
        lambda i: algorithm.score(Table(), taken, i, k),
        formula(4, b)[:, None] * 0.9 ** torch.arange(k - 1, -1, -1, dtype=torch.float64),
        clip_schedule(k, 0.005, 0.03, 3.0),
        torch.optim.SGD([theta], lr=0.0),
        torch.Generator().manual_seed(0),
        epochs=2,
        minibatch=b,
        grad_norm=1e9,
    )
    assert metrics["clip_fraction"] == pytest.approx(0.25 / 2)  # theirs is of the second step, ours the mean of both
    assert metrics["kl"] == pytest.approx(0.00011083459614015985, rel=1e-5)
    expected = [-0.0013126983735348464, 0.0020719335882918213, 0.0005618661496376923, -0.0016992812115973529]
    assert (-theta.grad).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_authors_densities_and_loss():
    """`get_logprobs` and `loss` of the same code, with a chain that its `p_mean_var` made: 6 cosine steps of which the
    last 4 count, a network that predicts 0.5 sin(x) + 0.05 t + theta_0 cos(2x) + 0.3 theta_1 x, predicted latents
    clipped at 5, 3 actions of which 2 count, gamma_denoising 0.9, clip 0.005 to 0.03. Each step of the chain drew
    1.5 * formula deviations."""
    embodiment = Embodiment(2, 0, (), chunk=3)
    tiny = OCTO_TINY.create(embodiment, ["go"])
    policy = Octo("octo-tiny", dataclasses.replace(tiny.architecture, denoising_steps=6), tiny.vocabulary)
    theta = torch.zeros(2, requires_grad=True)
    policy.predict = lambda context, x, t: (
        0.5 * x.sin() + 0.05 * t[..., None, None] + theta[0] * (2 * x).cos() + 0.3 * theta[1] * x
    )
    x = 1.2 * formula(1, 3, 5, 3, 2).float()[:, 0]
    trace = [torch.zeros_like(x)] * 2 + [x]  # the first two steps are not scored
    with torch.no_grad():
        for k, deviation in enumerate(policy.deviations(0.1)[2:]):
            mean = policy.means(None, x[:, None], torch.full((3, 1), 3 - k))[:, 0]
            x = mean + deviation * 1.5 * formula(2 + k, 3, 3, 2).float()
            trace.append(x)
    algorithm, _, taken = scored(noise=0.1, steps=4, gamma_denoising=0.9, clip_base=0.005, clip_eps=0.03)
    order = torch.arange(3)
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    taken = dataclasses.replace(taken, trace=torch.stack(trace, 1), mask=mask, row=order)
    old = algorithm.score(policy, taken, order, 4)
    expected = [
        *(-1.0032528638839722, -0.589013397693634, 0.020719483494758606, 0.7636334896087646),
        *(-0.9605526924133301, -0.5264959931373596, -0.07401368021965027, 0.7799615859985352),
        *(-0.8714063167572021, -0.6007790565490723, -0.1013345718383789, 0.876983642578125),
    ]
    assert old.logp.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    moved = iter([(0.0, 0.0)] * 2 + [(0.02, -0.03)])

    def score(i):
        with torch.no_grad():
            theta.copy_(torch.tensor(next(moved)))
        return algorithm.score(policy, taken, i, 4)

    metrics = ascend(
        score,
        formula(4, 3).float()[:, None] * 0.9 ** torch.arange(3, -1, -1),
        clip_schedule(4, 0.005, 0.03, 3.0),
        torch.optim.SGD([theta], lr=0.0),
        torch.Generator().manual_seed(0),
        epochs=2,
        minibatch=3,
        grad_norm=1e9,
    )
    assert metrics["clip_fraction"] == pytest.approx(0.5 / 2)  # theirs is of the second step, ours the mean of both
    assert metrics["kl"] == pytest.approx(0.00021106128406245261, rel=1e-3)  # a difference of float32 numbers near 1
    assert theta.grad.tolist() == pytest.approx([0.03465481847524643, -0.16248580813407898], rel=1e-5)


def test_advantages_where_the_authors_end_an_episode_and_where_they_do_not():
    """Their loop, lifted out of `train_ppo_diffusion_agent.py` and run: gamma 0.9, lambda 0.8, one environment, two
    episodes of 3 decisions. Where the first one terminates ours are the same. Where it runs out of time theirs go on
    into the second one: -0.0012 for its first decision, and its future is worth the 0.2 of another episode's start."""
    values = np.array([0.3, 0.5, 0.7, 0.2, 0.4, 0.6])
    following, last = np.append(values[1:], 0.25), np.array([False, False, True, False, False, False])

    def ours(reward, next_values, terminated):
        return gae(np.array(reward), values, next_values, terminated, last, 0.9, 0.8).tolist()

    theirs = [0.39912, 0.346, 0.3, 0.06639999691009524, -0.1300000042915344, -0.37500000596046446]
    assert ours([0, 0, 1.0, 0, 0, 0], following, last) == pytest.approx(theirs, rel=1e-5)
    cut = [-0.0011843339533007535, -0.20997824160180661, -0.47219200222473134]
    none = np.zeros(6, bool)
    seen = np.where(last, 0.9, following)  # what was seen last is worth 0.9
    delta = [0.9 * 0.5 - 0.3, 0.9 * 0.7 - 0.5, 0.9 * 0.9 - 0.7]
    by_hand = [delta[0] + 0.72 * (delta[1] + 0.72 * delta[2]), delta[1] + 0.72 * delta[2], delta[2]]
    found = ours([0.0] * 6, seen, none)
    assert found[:3] == pytest.approx(by_hand)
    assert found[3:] == pytest.approx(theirs[3:], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(found, cut, strict=False)) > 0.3
    # `advantages` says that nothing is to come: docs/methods/dppo.md has these numbers, and why.
    assert ours([0.0] * 6, seen, last)[:3] == pytest.approx([-0.11928, -0.374, -0.7])


def test_only_the_critic_learns_while_it_warms_up():
    policy = ToyChain(0, inputs=2)
    algorithm = DPPO(settings(warmup=2), policy, BUDGETS["quick"], 0)
    start = policy.w.detach().clone()
    for number in range(3):
        assert torch.equal(policy.w, start)
        metrics = algorithm.update(policy, two_stages(policy, 16, number, algorithm.act))
        assert ("clip_fraction" in metrics) == (number == 2)
    assert not torch.equal(policy.w, start)
    assert torch.equal(policy.prefix, torch.ones(1))


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"noise": 0.0}, {"clip_base": 0.5}, {"gamma_denoising": 1.1}, {"logp_low": 3.0}], ids=str
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        settings(**bad).check()
