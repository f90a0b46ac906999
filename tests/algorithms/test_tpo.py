"""TPO against log-probabilities added up by hand, its closed-form gradient, and the numbers of GRAPE's authors."""

import copy
import dataclasses
import math

import pytest
import torch
from toy import PaddedFlow, ToyFlow, ToyTokens, two_stages
from vlarl_bench.algorithms.tpo import TPO, TPOSettings, preference_loss

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError, Diverged
from vlarl_bench.metering import Meter
from vlarl_bench.policies.tokens import likelihood

BUDGET = BUDGETS["smoke"]


def start(make=ToyTokens, seed=0, **changes):
    """Unless told else, the reference is the base policy, which a test can move away from, and all decisions count."""
    policy = make(0, inputs=2)
    ours = {"group_size": 4, "epochs": 1, "reference": "base", "counted": "episode"}
    return TPO(TPOSettings(**{**ours, **changes}), policy, BUDGET, seed), policy


def play(algorithm, policy, outcomes, seed=0):
    rollout = two_stages(policy, len(outcomes), seed, algorithm.act, group=algorithm.group)
    given = [dataclasses.replace(e, success=bool(o)) for e, o in zip(rollout.episodes, outcomes, strict=True)]
    return dataclasses.replace(rollout, episodes=given)


def steepest(algorithm):
    """Plain gradient descent, whose step tells the gradient."""
    algorithm.optimizer = torch.optim.SGD(algorithm.actor, lr=algorithm.settings.lr)


def by_hand(policy, episode, temperature, most):
    """Log-probability of an episode, a mean over its first `most` decisions: all tokens of first, executed actions, one
    by one."""
    total = 0.0
    for seen, trace in list(zip(episode.observations, episode.traces, strict=False))[:most]:
        logits = policy.logits(policy.preprocess([seen]))[0].detach() / temperature
        for place in (0, 1):
            total += float(logits[place, trace[place, 0]] - logits[place].exp().sum().log())
    return total / len(episode.traces[:most])


def test_preference_loss_by_hand():
    won, lost = torch.tensor([1.0, 3.0]), torch.tensor([2.0])
    loss, margin = preference_loss(won, lost, 0.5)
    assert margin.tolist() == [[-0.5], [0.5]]
    assert loss.item() == pytest.approx((math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-0.5))) / 2, rel=1e-6)


@pytest.mark.parametrize("counted", ["episode", "success"])
def test_loss_is_that_of_log_probabilities_added_up_by_hand(counted):
    """Three groups, one of them without a pair; the policy has moved from its reference, by a lot."""
    algorithm, policy = start(beta=0.3, temperature=1.5, lr=0.0, counted=counted)
    base = ToyTokens(0, inputs=2)
    with torch.no_grad():
        policy.b += 0.5 * torch.sin(torch.arange(20.0))
    outcomes = [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    rollout = play(algorithm, policy, outcomes)
    length = [len(episode.latents) for episode in rollout.episodes]
    assert length[8:] == [3, 3, 3, 2]  # so that of the last group's failures something is cut off
    ratio, losses, preferred = {}, [], []
    for group in (range(4), range(8, 12)):
        longest = max(length[e] for e in group if outcomes[e])
        for e in group:
            both = [
                by_hand(p, rollout.episodes[e], 1.5, longest if counted == "success" else None) for p in (policy, base)
            ]
            ratio[e] = both[0] - both[1]
        margins = [0.3 * (ratio[w] - ratio[n]) for w in group for n in group if outcomes[w] > outcomes[n]]
        losses.append(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins))
        preferred.append(sum(m > 0 for m in margins) / len(margins))
    steepest(algorithm)
    metrics = algorithm.update(policy, rollout)
    assert metrics["groups_used"] == pytest.approx(2 / 3)
    assert metrics["tpo_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["preference_accuracy"] == pytest.approx(sum(preferred) / 2)
    assert "cfm_loss" not in metrics


def test_first_gradient_in_closed_form():
    """At the reference every margin is 0, so the gradient is -beta / 2 (mean of wins - mean of failures) of
    d log pi(episode) / db, which is the mean over decisions of onehot - chances."""
    algorithm, policy = start(beta=0.2, grad_norm=1e9, lr=1.0)
    outcomes = [1, 0, 0, 1]
    rollout = play(algorithm, policy, outcomes)
    expected = torch.zeros(4, 5)
    for episode, outcome in zip(rollout.episodes, outcomes, strict=True):
        for seen, trace in zip(episode.observations, episode.traces, strict=False):
            chances = policy.logits(policy.preprocess([seen]))[0].detach().softmax(-1)
            push = torch.eye(5)[torch.from_numpy(trace[:, 0])] - chances
            expected[:2] += 0.2 / 2 * (1 if outcome else -1) * push[:2] / 2 / len(episode.traces)
    steepest(algorithm)
    before = policy.b.detach().clone()
    metrics = algorithm.update(policy, rollout)
    torch.testing.assert_close((policy.b.detach() - before).view(4, 5), expected, rtol=1e-4, atol=1e-6)
    assert metrics["tpo_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["tpo_log_ratio_won"] == metrics["tpo_log_ratio_lost"] == 0


def test_the_surrogate_is_half_the_squared_error_at_stored_draws():
    algorithm, policy = start(ToyFlow, beta=0.4, lr=0.0, deviation=0.5, tau_min=0.3)
    with torch.no_grad():
        policy.b += 0.3
    outcomes = [1, 0, 0, 1] + [1] * 4  # the second group has no pairs, and counts in `cfm_loss`
    rollout = play(algorithm, policy, outcomes)
    taken = decisions(policy, rollout)
    twin = torch.Generator().manual_seed(0)  # the algorithm's own generator draws the same
    n = len(taken)
    t, noise = 0.3 + 0.7 * torch.rand(n, 4, generator=twin), torch.randn(n, 4, 2, 2, generator=twin)
    base = ToyFlow(0, inputs=2)
    ratio, errors = [0.0] * 8, []
    for i in range(n):
        view, x = taken.view(torch.tensor([i])), taken.latent[i : i + 1]
        now, then = (p.draw_loss(view, x, t[i : i + 1], noise[i : i + 1])[0, :, 0].detach() for p in (policy, base))
        length = len(rollout.episodes[int(taken.episode[i])].latents)
        ratio[int(taken.episode[i])] += float(-0.5 / 0.25 * (now.sum(1) - then.sum(1)).mean()) / length
        errors.append(now.mean().item())
    margins = [0.4 * (ratio[w] - ratio[k]) for w in (0, 3) for k in (1, 2)]
    steepest(algorithm)
    metrics = algorithm.update(policy, rollout)
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 4
    assert metrics["tpo_surrogate_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["cfm_loss"] == pytest.approx(sum(errors) / n, rel=1e-5)
    assert "tpo_loss" not in metrics


def test_gradient_of_the_surrogate_against_finite_differences():
    """Away from the reference. The loss is written out in float64, from the draws that the algorithm will make."""
    algorithm, policy = start(ToyFlow, beta=0.4, lr=1.0, deviation=0.5, tau_min=0.3, grad_norm=1e9)
    with torch.no_grad():
        policy.b += 0.3
        policy.w *= 0.8
    outcomes = [1, 0, 0, 1]
    rollout = play(algorithm, policy, outcomes)
    taken, twin = decisions(policy, rollout), torch.Generator().manual_seed(0)
    n = len(taken)
    t, noise = 0.3 + 0.7 * torch.rand(n, 4, generator=twin), torch.randn(n, 4, 2, 2, generator=twin)
    exact = ToyFlow(0, torch.float64, inputs=2), ToyFlow(0, torch.float64, inputs=2)
    for flow, weights in zip(exact, (policy, ToyFlow(0, inputs=2)), strict=True):
        flow.load_state_dict(weights.state_dict())
    proprio = taken.view(torch.arange(n)).proprio.double()

    @torch.no_grad()
    def loss():
        x, eps, tau = taken.latent.double()[:, None], noise.double(), t.double()[..., None, None]
        errors = []
        for flow in exact:
            at = (tau * eps + (1 - tau) * x).flatten(2)
            v = at @ flow.w + t.double()[..., None] * flow.u + flow.b + (proprio @ flow.v)[:, None]
            errors.append(((v.view_as(eps) - (eps - x)) ** 2)[:, :, 0].sum(2).mean(1))  # of the first action
        ratio = [0.0] * 4
        for row in range(n):
            episode = int(taken.episode[row])
            change = float(errors[0][row] - errors[1][row])
            ratio[episode] -= 0.5 / 0.5**2 * change / len(rollout.episodes[episode].latents)
        return sum(math.log1p(math.exp(-0.4 * (ratio[w] - ratio[k]))) for w in (0, 3) for k in (1, 2)) / 4

    expected = {}
    for name, parameter in exact[0].named_parameters():
        flat, slopes = parameter.data.view(-1), []
        for k in range(len(flat)):
            value = []
            for step in (1e-5, -1e-5):
                flat[k] += step
                value.append(loss())
                flat[k] -= step
            slopes.append((value[0] - value[1]) / 2e-5)
        expected[name] = torch.tensor(slopes).view_as(parameter)
    steepest(algorithm)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    algorithm.update(policy, rollout)
    for name in ("w", "u", "b", "v"):
        moved = before[name] - dict(policy.named_parameters())[name].detach()
        assert expected[name].abs().max() > 1e-2
        torch.testing.assert_close(moved, expected[name], rtol=1e-3, atol=1e-5)


def test_numbers_that_pad_a_latent_do_not_count(monkeypatch):
    """Neither in the surrogate and its gradient nor in `cfm_loss`, however wrong the network is about them."""
    found = []
    for wrong in (0.0, 1e4):
        monkeypatch.setattr(PaddedFlow, "wrong", wrong)
        algorithm, policy = start(PaddedFlow)
        rollout = play(algorithm, policy, [1, 0, 0, 1])
        found.append((algorithm.update(policy, rollout), *(p.detach() for p in policy.actor_parameters())))
    assert found[0][0] == found[1][0]
    for plain, padded in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(plain, padded)
    assert not torch.equal(found[0][1], PaddedFlow(0, inputs=2).w)


@pytest.mark.parametrize("make", [ToyTokens, ToyFlow])
@pytest.mark.parametrize("outcomes", [[0] * 8, [0] * 4 + [1] * 4, [1]])
def test_without_pairs_nothing_is_done(make, outcomes):
    algorithm, policy = start(make)
    before = policy.b.detach().clone()
    assert algorithm.update(policy, play(algorithm, policy, outcomes)) == {"groups_used": 0.0}
    assert torch.equal(policy.b, before)


def test_the_reference_is_the_base_policy_also_after_a_checkpoint():
    algorithm, policy = start()
    base = [parameter.detach().clone() for parameter in policy.actor_parameters()]
    algorithm.update(policy, play(algorithm, policy, [1, 0, 0, 1]))
    resumed, other = start(seed=1)
    other.load_state_dict(policy.state_dict())
    with torch.no_grad():
        resumed.reference[0].zero_()
    resumed.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    for reference in (algorithm.reference, resumed.reference):
        assert all(torch.equal(a, b) for a, b in zip(reference, base, strict=True))
    rollout = play(algorithm, policy, [1, 0, 0, 1], 1)
    assert algorithm.update(policy, rollout) == resumed.update(other, rollout)
    assert torch.equal(policy.b, other.b)


def test_the_reference_is_the_policy_as_each_round_began():
    """So every round's first step is from margins of 0, whatever rounds before did; the base's are others by then."""
    found = {}
    for reference in ("round", "base"):
        algorithm, policy = start(reference=reference, lr=0.1)
        for seed in (0, 1):
            found[reference] = algorithm.update(policy, play(algorithm, policy, [1, 0, 0, 1], seed))
    assert found["round"]["tpo_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["base"]["tpo_loss"] != pytest.approx(math.log(2), rel=1e-2)


def test_a_policy_with_neither_tokens_nor_a_denoising_loss():
    policy = ToyTokens()
    policy.capabilities = frozenset({"likelihood", "chain"})
    with pytest.raises(BenchError, match="policy: 'toy' has neither tokens nor a denoising loss"):
        TPO(TPOSettings(), policy, BUDGET, 0)


def test_a_gradient_that_is_not_finite_ends_a_run_as_it_does_for_all_methods():
    algorithm, policy = start()
    rollout = play(algorithm, policy, [1, 0, 0, 1])
    with torch.no_grad():
        policy.w[0, 0] = float("nan")
    with Meter(policy), pytest.raises(Diverged, match="the gradient of w is not finite at gradient step 1"):
        algorithm.update(policy, rollout)


def formula(n, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + n).view(shape).float()


def test_grapes_numbers():
    """`get_batch_logps` of aiming-lab/GRAPE at 89986c7, TPO-Train/finetune.py, and the loss of its inner loop, which
    adds up 8 steps of 7 tokens: 0.1 (pi_w - pi_l - ref_w + ref_l). Logits are 2 formula(n), n = 1 to 4 for those four,
    labels (7 k + n k^2) mod 11 with n = 3 for the success and 5 for the failure; gradient by a shift of all logits."""
    k = torch.arange(56)
    won, lost = ((7 * k + n * k**2).remainder(11).view(8, 7) for n in (3, 5))
    shift = torch.zeros(11, requires_grad=True)
    logp = [
        likelihood(2 * formula(n, 8, 7, 11) + moved, labels, 1.0)[0].sum()
        for n, moved, labels in ((1, shift, won), (2, shift, lost), (3, 0, won), (4, 0, lost))
    ]
    loss, _ = preference_loss((logp[0] - logp[2])[None], (logp[1] - logp[3])[None], 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(1.3209164142608643, rel=1e-5)
    expected = [-0.1255764365196228, 0.8325391411781311, 0.7662568092346191, -0.04365980625152588, -0.8179948925971985]
    expected += [0.12352129817008972, 0.3747639060020447, -0.8243933320045471, 0.364629864692688, 0.09104976058006287]
    assert shift.grad.tolist() == pytest.approx([*expected, -0.7411360144615173], abs=1e-5)


@pytest.mark.parametrize(
    "bad", [{"beta": 0.0}, {"group_size": 1}, {"epochs": 0}, {"temperature": -1.0}, {"draws": 0}], ids=str
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        TPOSettings(**bad).check()
