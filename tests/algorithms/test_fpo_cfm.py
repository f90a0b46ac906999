"""FPO-CFM against numbers from its authors' code, finite differences and cases by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import GOLDEN, copy_of_the_golden_flow, formula, seen, surrogate_gradient
from toy import ToyFlow, asked_of_epochs, two_stages
from vlarl_bench.algorithms.fpo_cfm import FPOCFM, FPOCFMSettings, chunk_loss, surrogate

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.policy_gradient import gae

PLUS_PLUS = json.loads((Path(__file__).parent / "fpo_cfm_golden.json").read_text())
BUDGET = BUDGETS["smoke"]


def settings(**changes):
    return FPOCFMSettings(**{"critic_steps": 5, "critic_width": 8, **changes})


def start(**changes):
    policy = ToyFlow(0, inputs=2)
    return FPOCFM(settings(**changes), policy, BUDGET, 0), policy


@pytest.mark.parametrize("ratio", ["mean", "sample"])
def test_the_authors_numbers(ratio):
    """Losses, ratios and the gradient of the clipped surrogate: their action of four numbers is our chunk of 2 x 2."""
    golden, n = GOLDEN["fpo"], 6
    policy, taken = copy_of_the_golden_flow(), seen(n, latent=formula(7, n, 2, 2))
    algorithm = FPOCFM(settings(ratio=ratio), policy, BUDGET, 0)
    tau, eps = (formula(9, n, 3) + 1) / 2, formula(8, n, 3, 2, 2)

    def losses():
        found = -algorithm.score(policy, taken, torch.arange(n), tau, eps).logp
        return found.detach()

    expected = {name: torch.tensor(golden[f"{name} loss"], dtype=torch.float64) for name in ("old", "new")}
    if ratio == "mean":
        expected = {name: loss.mean(1, keepdim=True) for name, loss in expected.items()}
    torch.testing.assert_close(losses(), expected["old"], rtol=1e-7, atol=1e-9)
    old = -losses()
    with torch.no_grad():
        for parameter in (policy.w, policy.u, policy.b, policy.v):
            parameter += 0.05 * formula(10, *parameter.shape)
    torch.testing.assert_close(losses(), expected["new"], rtol=1e-7, atol=1e-9)
    assert (old + losses()).neg().exp().mean().item() == pytest.approx(golden[ratio]["ratio mean"], rel=1e-7)
    metrics = surrogate_gradient(
        lambda i: algorithm.score(policy, taken, i, tau, eps), old, formula(5, n), 0.05, policy.actor_parameters()
    )
    assert metrics["clip_fraction"] == pytest.approx(golden[ratio]["clipped"] / 2, rel=1e-6)  # of the second step alone
    assert policy.b.grad.tolist() == pytest.approx(golden[ratio]["gradient of b"], rel=1e-7)
    assert policy.u.grad.tolist() == pytest.approx(golden[ratio]["gradient of u"], rel=1e-7)


@pytest.mark.parametrize("objective", ["clip", "spo", "aspo"])
@pytest.mark.parametrize(("numbers", "huber"), [("mean", 0.0), ("steps", 0.0), ("steps", 0.5)])
def test_gradient_is_that_of_finite_differences(objective, numbers, huber):
    n = 6
    policy, taken = copy_of_the_golden_flow(), seen(n, latent=formula(7, n, 2, 2))
    taken = dataclasses.replace(taken, mask=torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 3, dtype=torch.float64))
    algorithm = FPOCFM(settings(numbers=numbers, huber=huber), policy, BUDGET, 0)
    tau, eps, advantage = (formula(9, n, 3) + 1) / 2, formula(8, n, 3, 2, 2), formula(5, n)
    old = algorithm.score(policy, taken, torch.arange(n), tau, eps).logp.detach()
    with torch.no_grad():
        policy.b += 0.02

    def loss():
        ratio = (algorithm.score(policy, taken, torch.arange(n), tau, eps).logp - old).exp()
        return -surrogate(ratio, advantage[:, None], objective, 0.05).mean()

    surrogate_gradient(
        lambda i: algorithm.score(policy, taken, i, tau, eps),
        old,
        advantage,
        0.05,
        policy.actor_parameters(),
        objective=lambda ratio, gain: surrogate(ratio, gain, objective, 0.05),
    )
    for parameter in (policy.b, policy.u):
        for k in range(4):
            value = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[k] += step
                    value.append(loss().item())
                    parameter[k] -= step
            assert parameter.grad[k].item() == pytest.approx((value[0] - value[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_chunk_loss_counts_what_was_executed():
    error = torch.arange(8.0).view(1, 1, 4, 2).repeat(1, 2, 1, 1)
    error[:, 1] *= 10
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert chunk_loss(error, mask, "steps").tolist() == [[3.0, 30.0]]  # (0 + 1) / 2 and (2 + 3) / 2 are executed
    assert chunk_loss(error, mask, "mean").tolist() == [[1.5, 15.0]]


@pytest.mark.parametrize("objective", ["clip", "spo", "aspo"])
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("steps", {"numbers": "steps", "huber": 0.5}),
        ("mean", {"numbers": "mean", "huber": 0.5}),
        ("steps, one ratio", {"numbers": "steps", "huber": 0.5, "ratio": "mean"}),
        ("steps, squared", {"numbers": "steps"}),
    ],
)
def test_the_numbers_of_fpo_plus_plus(case, changes, objective):
    """Losses, ratios, some of them at the clamp, and each trust region's loss and gradient; half of the chunks were
    executed in part."""
    golden, n = PLUS_PLUS[case], 6
    policy, taken = copy_of_the_golden_flow(), seen(n, latent=formula(7, n, 2, 2))
    taken = dataclasses.replace(taken, mask=torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 3, dtype=torch.float64))
    algorithm = FPOCFM(settings(**changes), policy, BUDGET, 0)
    tau, eps = (formula(9, n, 3) + 1) / 2, formula(8, n, 3, 2, 2)

    def score(i):
        return algorithm.score(policy, taken, i, tau, eps)

    every, passes = torch.arange(n), []
    old = score(every).logp.detach()
    with torch.no_grad():
        for parameter in (policy.w, policy.u, policy.b, policy.v):
            parameter += 0.05 * formula(10, *parameter.shape)
    for found, name in ((old, "old loss"), (score(every).logp.detach(), "new loss")):
        torch.testing.assert_close(-found, torch.tensor(golden[name], dtype=torch.float64), rtol=1e-7, atol=0)

    def kept(ratio, gain):
        gained = surrogate(ratio, gain, objective, 0.05)
        passes.append((ratio.detach(), -gained.mean().item()))
        return gained

    metrics = surrogate_gradient(
        score, old, formula(5, n), 0.05, policy.actor_parameters(), objective=kept, log_ratio_limit=0.1
    )
    (_, _), (ratio, loss) = passes  # the first is that of the old policy
    theirs = torch.tensor(golden["ratio"], dtype=torch.float64)  # in order; ours are shuffled
    torch.testing.assert_close(ratio.flatten().sort().values, theirs.flatten().sort().values, rtol=1e-7, atol=0)
    assert loss == pytest.approx(golden[objective]["loss"], rel=1e-7)
    assert metrics["clip_fraction"] == pytest.approx(golden["clip"]["clipped"] / 2, rel=1e-6)  # of the second alone
    assert policy.b.grad.tolist() == pytest.approx(golden[objective]["gradient of b"], rel=1e-7)
    assert policy.u.grad.tolist() == pytest.approx(golden[objective]["gradient of u"], rel=1e-7)


def test_the_advantages_of_fpo_plus_plus():
    value, reward = formula(12, 9).numpy(), formula(13, 8).numpy()
    ended = np.isin(range(8), (2, 6))
    found = gae(reward, value[:8], value[1:], ended, ended, 0.99, 0.95)
    assert found.tolist() == pytest.approx(PLUS_PLUS["advantage"], rel=1e-7)


def test_padding_of_the_latent_does_not_count():
    algorithm, policy = start()
    taken = decisions(policy, two_stages(policy, 4, 0))
    tau, eps = torch.rand(len(taken), 3), torch.randn(len(taken), 3, 2, 2)
    plain = algorithm.score(policy, taken, torch.arange(4), tau, eps).logp
    inner = policy.draw_loss
    policy.draw_loss = lambda *args: torch.nn.functional.pad(inner(*args), (0, 3), value=1e6)
    assert torch.equal(algorithm.score(policy, taken, torch.arange(4), tau, eps).logp, plain)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.2, 2.0, {"clip": 2.1, "spo": 2.4 - 2 / 0.1 * 0.04, "aspo": 2.1}),
        (0.8, 2.0, {"clip": 1.6, "spo": 1.6 - 2 / 0.1 * 0.04, "aspo": 1.6}),
        (1.2, -2.0, {"clip": -2.4, "spo": -2.4 - 2 / 0.1 * 0.04, "aspo": -2.4 - 0.8}),
        (0.8, -2.0, {"clip": -1.9, "spo": -1.6 - 0.8, "aspo": -1.6 - 0.8}),
    ],
)
def test_surrogate_by_hand(ratio, advantage, expected):
    """At clip range 0.05."""
    for objective, value in expected.items():
        got = surrogate(torch.tensor(ratio), torch.tensor(advantage), objective, 0.05)
        assert float(got) == pytest.approx(value, rel=1e-5), objective


def test_branches_of_aspo_do_not_leak():
    """The gradient of each element is that of its own branch, whatever its neighbours take."""
    ratio = torch.tensor([1.2, 0.9, 1.2, 0.8], requires_grad=True)
    surrogate(ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), "aspo", 0.05).sum().backward()
    assert ratio.grad.tolist() == pytest.approx([0.0, 1.0, -1 - 0.2 / 0.05, -1 + 0.2 / 0.05], rel=1e-4)


def test_the_same_draws_score_both_policies_in_all_epochs():
    algorithm, policy = start(draws=3, epochs=3, minibatch=4, tau_min=0.4)
    inner, drawn = policy.draw_loss, {}

    def watched(context, latent, t, noise):
        for row in range(len(latent)):
            drawn.setdefault(tuple(latent[row].flatten().tolist()), []).append((t[row], noise[row]))
        return inner(context, latent, t, noise)

    policy.draw_loss = watched
    data = two_stages(policy, 4, 0)
    for number, episode in enumerate(data.episodes):
        episode.success = number < 2  # one of each task
    metrics = algorithm.update(policy, data)
    assert metrics["ratio_off_one"] > 0
    for pairs in drawn.values():
        assert len(pairs) == 4  # the old policy, and three epochs
        for t, noise in pairs:
            assert torch.equal(t, pairs[0][0])
            assert torch.equal(noise, pairs[0][1])
            assert t.shape == (3,) and t.min() >= 0.4
    assert len({pairs[0][0][0].item() for pairs in drawn.values()}) == len(drawn)


def test_epochs_are_taken_as_the_settings_say(monkeypatch):
    given = asked_of_epochs(monkeypatch)
    asked = {"clip_eps": 0.07, "epochs": 3, "minibatch": 5, "target_kl": 0.7, "log_ratio_limit": 2.0}
    algorithm, policy = start(objective="aspo", **asked)
    algorithm.update(policy, two_stages(policy, 16, 0))
    objective, old = given.pop("objective"), given.pop("old")
    assert given == asked and old.shape[1] == algorithm.settings.draws
    ratio, gain = torch.tensor([0.8, 1.2])[:, None], torch.tensor([-1.0, 1.0])
    assert torch.equal(objective(ratio, gain), surrogate(ratio, gain, "aspo", 0.07))


def test_metrics_have_no_entropy_and_say_the_loss_of_fresh_draws():
    algorithm, policy = start()
    metrics = algorithm.update(policy, two_stages(policy, 16, 0))
    assert "entropy" not in metrics
    assert metrics["cfm_loss"] > 0


@pytest.mark.parametrize(
    "bad",
    [{"draws": 0}, {"tau_min": 1.0}, {"clip_eps": 0.0}, {"log_ratio_limit": 0.0}, {"huber": -1.0}, {"critic_width": 0}]
    + [{"lr": 0.0}],
    ids=str,
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        settings(**bad).check()
