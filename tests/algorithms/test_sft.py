"""SFT's budget and schedule, on a policy small enough to watch; and the losses of the tiny policies by hand."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import TASK, ToyFlow
from vlarl_bench.algorithms.pi0_fast import Pi0Fast
from vlarl_bench.algorithms.sft import SFT, SFTSettings

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError
from vlarl_bench.policies.presets import OCTO_TINY, OPENVLA_TINY, PI0_TINY
from vlarl_bench.suite import Demonstration, Embodiment, Observation


class Imitator(ToyFlow):
    def sft_loss(self, context, actions, mask, generator, rows=slice(None)):
        noise = torch.randn(len(actions), 1, *actions.shape[1:], generator=generator)
        t = torch.rand(len(actions), 1, generator=generator)
        errors = self.draw_loss(context, actions[rows], t[rows], noise[rows]).mean((1, 3))
        return (errors * mask[rows]).sum() / mask.sum()


def demonstrations():
    seen = tuple(Observation("do it", np.array([i / 10], np.float32)) for i in range(6))
    return [Demonstration(TASK, 0, True, seen, np.full((6, 2), 0.5, np.float32))]


def rates_of(steps, rounds, warmup):
    """The learning rate of each gradient step."""
    budget = dataclasses.replace(BUDGETS["smoke"], gradient_steps=steps, iterations=rounds, batch_size=4)
    policy = Imitator()
    algorithm = SFT(SFTSettings(warmup=warmup), policy, budget, 0)
    rates = []
    inner = algorithm.optimizer.step
    algorithm.optimizer.step = lambda: (rates.append(algorithm.optimizer.param_groups[0]["lr"]), inner())
    for _ in range(rounds):
        algorithm.update(policy, demonstrations())
    return rates


@pytest.mark.parametrize(("steps", "rounds"), [(10, 5), (20, 6), (7, 3), (3, 5)])
def test_the_gradient_steps_are_those_of_the_budget_and_the_rate_never_turns_negative(steps, rounds):
    assert rates_of(steps, rounds, warmup=0) == pytest.approx([1e-3 * (1 - i / steps) for i in range(steps)])


def test_the_rate_rises_over_the_warm_up():
    expected = [1 / 4, 2 / 4, 3 / 4, 17 / 20, 16 / 20]
    assert rates_of(20, 2, warmup=3)[:5] == pytest.approx([1e-3 * share for share in expected])


def test_pi0_fast_is_sft_on_the_policies_whose_tokens_are_fasts():
    for name in registry.names("policy"):
        policy = registry.get("policy", name)
        assert registry.runs_on("pi0-fast", name) == ("pi0_fast" in policy.family), name
    assert set(Pi0Fast.__dict__) & {"update", "state_dict", "load_state_dict", "act", "Settings"} == set()
    with pytest.raises(
        BenchError, match=r"'pi0-tiny' lacks fast, .* runs on: pi0-fast-base, pi0-fast-tiny, pi0-fast-tiny-pixels;"
    ):
        registry.check_compatible("pi0-fast", "pi0-tiny")


EMBODIMENT = Embodiment(7, 3, (), chunk=4)


def recorded(seed):
    """Five steps of seven numbers, some of them beyond what a latent or a bin holds."""
    draw = np.random.default_rng(seed)
    seen = tuple(
        Observation("go", draw.normal(size=3).astype(np.float32), {"cup": draw.normal(size=7).astype(np.float32)})
        for _ in range(5)
    )
    return Demonstration(TASK, seed, True, seen, draw.normal(size=(5, 7)).astype(np.float32))


def one_step(policy):
    """(loss of one gradient step, the policy as it was before, its batch's encoded observations, actions [6, 4, 7] and
    masks, the generator's state when the loss was asked for). Gradients stay in the policy."""
    budget = dataclasses.replace(BUDGETS["smoke"], gradient_steps=1, iterations=1, batch_size=6)
    data, before, twin = [recorded(0), recorded(1)], copy.deepcopy(policy), torch.Generator().manual_seed(3)
    algorithm = SFT(SFTSettings(grad_norm=1e9), policy, budget, 3)
    loss = algorithm.update(policy, data)["sft_loss"]
    picks = torch.randint(10, (6,), generator=twin).tolist()
    seen = [data[i // 5].observations[i % 5] for i in picks]
    actions, mask = np.zeros((6, 4, 7)), np.zeros((6, 4))
    for row, i in enumerate(picks):
        rest = data[i // 5].actions[i % 5 :][:4]
        actions[row], mask[row, : len(rest)] = rest[-1], 1  # held past the end, where the network still sees it
        actions[row, : len(rest)] = rest
    assert 0 < mask.mean() < 1
    with torch.no_grad():
        context = before.encode(before.preprocess(seen))
    return loss, before, context, actions, mask, twin


def fitted(spec, **architecture):
    policy = spec.create(EMBODIMENT, ["go", "cup"], 0)
    if architecture:
        policy = type(policy)(policy.name, dataclasses.replace(policy.architecture, **architecture), policy.vocabulary)
    draw = np.random.default_rng(2)
    policy.fit_normalisation([draw.normal(0.2, 0.3, (500, 7))], draw.normal(0.1, 0.3, (500, 3)))
    return policy


def one(row):
    return torch.tensor([row])


def test_pi0s_loss_and_gradient_by_hand():
    """Black et al., 2024, eq. 1-2: (v(x_t, t) - (eps - x))^2 draw by draw, over real steps alone, at pi0's times. The
    last layer's bias moves each velocity alike, so its slope is the mean of twice the error."""
    policy = fitted(PI0_TINY)
    loss, before, context, actions, mask, twin = one_step(policy)
    latent = (actions - before.action_mean.double().numpy()) / before.action_std.double().numpy()
    time = 0.001 + 0.999 * torch.rand(6, 4, generator=twin).double().numpy() ** (2 / 3)
    noise = torch.randn(6, 4, 4, 7, generator=twin).double().numpy()
    total, slope, count = 0.0, np.zeros(7), 0
    for row in range(6):
        for k in range(4):
            t, eps = time[row, k], noise[row, k]
            x = torch.from_numpy(t * eps + (1 - t) * latent[row]).float()
            v = before.velocity(context.index(one(row)), x[None, None], torch.tensor([[t]]).float())[0, 0].detach()
            for step in range(4):
                if mask[row, step]:
                    error = v[step].double().numpy() - (eps[step] - latent[row, step])
                    total, slope, count = total + (error**2).sum(), slope + 2 * error, count + 7
    assert loss == pytest.approx(total / count, rel=1e-5)
    np.testing.assert_allclose(policy.model.action_out_proj.bias.grad.numpy(), slope / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("predicts", ["velocity", "noise"])
def test_octos_loss_and_gradient_by_hand(predicts):
    """Ho et al., 2020, eq. 14, at uniform steps: what the head says against eps or, for the velocity,
    sqrt(a) eps - sqrt(1 - a) x, where a is the product of 1 - beta up to the step."""
    policy = fitted(OCTO_TINY, predicts=predicts)
    loss, before, context, actions, mask, twin = one_step(policy)
    limit = before.architecture.max_latent
    latent = (actions - before.action_mean.double().numpy()) / before.action_std.double().numpy()
    assert (np.abs(latent[mask > 0]) > limit).any()
    latent = latent.clip(-limit, limit)
    kept = np.cumprod(1 - before.betas.double().numpy())
    draws = before.sft_draws
    steps = torch.randint(before.denoising_steps, (6, draws), generator=twin)
    noise = torch.randn(6, draws, 4, 7, generator=twin).double().numpy()
    total, slope, count = 0.0, np.zeros((4, 7)), 0
    for row in range(6):
        for k in range(draws):
            a, eps = kept[steps[row, k]], noise[row, k]
            x = torch.from_numpy(np.sqrt(a) * latent[row] + np.sqrt(1 - a) * eps).float()
            said = before.model.head(
                context.readout[one(row), None], x.flatten()[None, None], steps[row, k][None, None]
            )
            goal = eps if predicts == "noise" else np.sqrt(a) * eps - np.sqrt(1 - a) * latent[row]
            error = (said.detach().view(4, 7).double().numpy() - goal) * mask[row][:, None]
            total, slope, count = total + (error**2).sum(), slope + 2 * error, count + 7 * mask[row].sum()
    assert loss == pytest.approx(total / count, rel=1e-5)
    bias = [p for name, p in policy.model.head.named_parameters() if name.endswith("bias")][-1]
    np.testing.assert_allclose(bias.grad.numpy(), (slope / count).flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_openvlas_loss_and_gradient_by_hand(decoding):
    """Cross-entropy of each number's bin of 256 equal parts of [-1, 1], among bins alone; its slope by the logits is
    the chances less one for the right bin."""
    frozen = {} if decoding == "parallel" else {"frozen_layers": 0}
    policy, logits = fitted(OPENVLA_TINY, decoding=decoding, **frozen), []
    inner = policy.logits
    policy.logits = lambda *given: logits.append(inner(*given)) or logits[-1].retain_grad() or logits[-1]
    loss, before, context, actions, mask, _ = one_step(policy)
    del before.logits  # those of the copy, unwatched
    latent = before.normalise(torch.from_numpy(actions).float()).double().numpy()
    edges = np.linspace(-1, 1, 256)
    right = np.array([[np.searchsorted(edges, x, side="right") - 1 for x in row] for row in latent.reshape(6, 28)])
    right = right.clip(0, 255)
    with torch.no_grad():
        found = before.logits(context, torch.from_numpy(right)).double().numpy()
    total, slope = 0.0, np.zeros((6, 28, 256))
    for row in range(6):
        for number in range(28):
            if mask[row, number // 7]:
                chances = np.exp(found[row, number] - found[row, number].max())
                chances /= chances.sum()
                total -= math.log(chances[right[row, number]])
                slope[row, number] = chances
                slope[row, number, right[row, number]] -= 1
    count = 7 * mask.sum()
    assert loss == pytest.approx(total / count, rel=1e-5)
    np.testing.assert_allclose(logits[0].grad.numpy(), slope / count, rtol=1e-4, atol=1e-7)
