"""AR-PPO against closed forms and cases by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import SIDES, ToyTokens, asked_of_epochs, two_stages
from vlarl_bench.algorithms.ar_ppo import ARPPO, ARPPOSettings

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.policy_gradient import Score, ascend

QUICK = {"critic_steps": 5, "critic_width": 8}


def settings(**changes):
    return ARPPOSettings(**{**QUICK, **changes})


def start(**changes):
    policy = ToyTokens(0, inputs=2, scale=1.0)
    return ARPPO(settings(**changes), policy, BUDGETS["quick"], 0), policy


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_log_probabilities_are_at_the_temperature_that_was_drawn_with(temperature):
    algorithm, policy = start(temperature=temperature)
    taken = decisions(policy, two_stages(policy, 6, 0, algorithm.act))
    i = torch.tensor([4, 1])
    got = algorithm.score(policy, taken, i)
    logits = (taken.view(i).proprio @ policy.w + policy.b).view(2, 4, 5)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    assert got.mask.tolist() == [[True, True, False, False]] * 2  # the second action was never executed
    torch.testing.assert_close(got.logp[:, :2], expected.log_prob(taken.trace[i, :, 0])[:, :2])
    torch.testing.assert_close(got.mean_entropy, expected.entropy()[:, :2].mean())


def test_a_higher_temperature_draws_more_evenly():
    shares = {}
    for temperature in (0.3, 1.0, 3.0):
        algorithm, policy = start(temperature=temperature)
        context = policy.preprocess([two_stages(policy, 1, 0).episodes[0].observations[0]] * 4000)
        drawn = algorithm.act(policy, context, [torch.Generator().manual_seed(i) for i in range(4000)]).trace[:, 0, 0]
        expected = (policy.logits(context)[0, 0] / temperature).softmax(-1)
        found = torch.bincount(drawn, minlength=5) / 4000
        torch.testing.assert_close(found, expected.detach(), atol=0.03, rtol=0)
        shares[temperature] = found.max()
    assert shares[0.3] > shares[1.0] > shares[3.0]


def test_ratio_of_a_token_or_of_the_chunk():
    """The chunk's log-probability is the sum over its executed tokens, as in VLA-RL's code."""
    algorithm, policy = start()
    taken = decisions(policy, two_stages(policy, 6, 0, algorithm.act))
    i = torch.arange(len(taken))
    tokens = algorithm.score(policy, taken, i)
    chunk = start(ratio="chunk")[0].score(policy, taken, i)
    assert chunk.logp.shape == chunk.mask.shape == (len(taken), 1)
    torch.testing.assert_close(chunk.logp[:, 0], tokens.logp[:, 0] + tokens.logp[:, 1])
    assert chunk.mask.all()
    torch.testing.assert_close(chunk.mean_entropy, tokens.mean_entropy)


def formula(n, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + n).view(shape).float()


def test_the_authors_numbers():
    """`forward` of GuanxingLu/vlarl at 31abc0b and the loss of its training loop, run on `formula`'s logits: 4 chunks
    of 4 tokens out of 5, temperature 1.5. The gradient is of pg_loss by a shift of the logits; their approxkl is
    another estimator (0.03210 here), so `kl` is held against mean(exp(d) - 1 - d) of their log-ratios."""
    algorithm, policy = start(ratio="chunk", temperature=1.5)
    tokens = torch.tensor([[4, 3, 0, 2], [4, 2, 0, 3], [4, 1, 0, 4], [3, 0, 1, 4]])
    theta, moved = torch.zeros(2, requires_grad=True), iter([0.0, 0.0, 0.0, 0.15])  # asked, old, first step, second
    taken = decisions(policy, two_stages(policy, 4, 0, algorithm.act))
    taken = dataclasses.replace(taken, trace=tokens[..., None], mask=torch.ones(4, 2), row=torch.arange(4))

    def logits(context):
        found = 2 * formula(2, 4, 4, 5) + next(moved) * formula(3, 4, 4, 5)
        return found + theta[0] * formula(4, 4, 4, 5) + theta[1] * formula(5, 4, 4, 5)

    policy.logits = logits
    expected = [
        *(-1.4213440418243408, -1.6485165357589722, -1.8811438083648682, -2.7674272060394287),
        *(-3.029129981994629, -3.1099328994750977, -1.4803712368011475, -2.565861463546753),
        *(-0.9395129680633545, -3.2300517559051514, -2.89491605758667, -0.9842285513877869),
        *(-0.8096017241477966, -2.6196699142456055, -2.507786273956299, -3.0319221019744873),
    ]
    order = torch.arange(4)
    by_token = ARPPO.score(start(temperature=1.5)[0], policy, taken, order)
    assert by_token.logp.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    metrics = ascend(
        lambda i: in_order(algorithm.score(policy, taken, order), i),  # the formula's logits know no other order
        formula(6, 4),
        0.2,
        torch.optim.SGD([theta], lr=0.0),
        torch.Generator().manual_seed(0),
        epochs=2,
        minibatch=4,
        grad_norm=1e9,
    )
    assert theta.grad.tolist() == pytest.approx([0.06355977803468704, -0.3302110433578491], rel=1e-5)
    assert metrics["kl"] == pytest.approx(0.025742709636688232, rel=1e-5)
    # Theirs counts a ratio as clipped where that changes the loss (1 of 4), ours where it is out of range (2 of 4).
    assert metrics["clip_fraction"] == pytest.approx(0.5 / 2)  # mean of both steps


def in_order(score, i):
    return Score(*(column[i] for column in score))


def test_curriculum_by_hand():
    algorithm, policy = start(curriculum=0.5)
    rollout = two_stages(policy, 8, 0, algorithm.act)
    left, right = (SIDES[side].key for side in (-1.0, 1.0))
    wins = {left: [True, True, True, False], right: [False] * 4}
    turn = {left: iter(wins[left]), right: iter(wins[right])}
    episodes = [dataclasses.replace(e, success=next(turn[e.job.task.key])) for e in rollout.episodes]
    algorithm.update(policy, dataclasses.replace(rollout, episodes=episodes))
    weights = np.exp([(0.5 - 0.75) / 0.5, (0.5 - 0.0) / 0.5, 0.0])  # the third was never tried
    np.testing.assert_allclose(algorithm.task_weights([left, right, "toy/new"]), weights / weights.sum())
    resumed = start(curriculum=0.5)[0]
    resumed.load_state_dict(algorithm.state_dict())
    np.testing.assert_array_equal(resumed.task_weights([left, right]), algorithm.task_weights([left, right]))
    assert start()[0].task_weights([left, right]) is None
    cold = start(curriculum=1e-4)[0]
    cold.success = {left: 0.0, right: 1.0}
    assert cold.task_weights([left, right]).tolist() == [1.0, 0.0]  # and no overflow


def test_epochs_are_taken_as_the_settings_say(monkeypatch):
    given = asked_of_epochs(monkeypatch)
    asked = {"clip_eps": 0.07, "epochs": 3, "minibatch": 5, "entropy": 0.3}
    algorithm, policy = start(**asked)
    algorithm.update(policy, two_stages(policy, 8, 0, algorithm.act))
    assert given == asked


def test_only_the_critic_learns_while_it_warms_up():
    algorithm, policy = start(warmup=2)
    before = policy.w.detach().clone()
    for number in range(3):
        assert torch.equal(policy.w, before)
        metrics = algorithm.update(policy, two_stages(policy, 16, number, algorithm.act))
        assert ("clip_fraction" in metrics) == (number == 2)
    assert not torch.equal(policy.w, before)
    assert torch.equal(policy.prefix, torch.ones(1))


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"clip_eps": 1.0}, {"curriculum": -1.0}, {"epochs": 0}, {"gae_lambda": 0.0}], ids=str
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        settings(**bad).check()
