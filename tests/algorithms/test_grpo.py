"""GRPO against cases by hand and the numbers of the authors of SimpleVLA-RL, RIPT and Flow-GRPO."""

import dataclasses
import math

import pytest
import torch
from toy import ToyChain, ToyTokens, two_stages
from vlarl_bench.algorithms.grpo import GRPO, GRPOSettings

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.policy_gradient import Score, ascend, group_advantages

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


def test_episodes_weigh_alike_however_long_they_are(monkeypatch):
    given = caught(monkeypatch)
    algorithm, policy = start(weigh="episode")
    rollout = play(algorithm, policy, [0, 1, 1, 0])
    first, second, *others = rollout.episodes
    n = len(first.latents)
    cut = {name: getattr(second, name)[:1] for name in ("latents", "traces", "actions")}
    second = dataclasses.replace(second, observations=second.observations[:2], **cut)
    algorithm.update(policy, dataclasses.replace(rollout, episodes=[first, second, *others]))
    parts = given["advantage"].split([n, 1, n, n])
    sums = [part.sum().item() for part in parts]
    assert n > 1
    assert sums == pytest.approx([-sums[1], sums[1], sums[1], -sums[1]], rel=1e-6)
    assert parts[1].item() == pytest.approx(n * parts[2][0].item(), rel=1e-6)


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


def test_first_gradient_of_a_chain_in_closed_form():
    """Of a step's mean density of D executed numbers it is (x' - m) / (D sigma^2) by each of their means; a decision's
    steps all have its episode's advantage, and what was not executed has no slope."""
    algorithm, policy = start(ToyChain, lr=1.0, epochs=1, minibatch=1000, baseline="rloo", noise=2.0)
    algorithm.optimizer = torch.optim.SGD(algorithm.optimizer.param_groups[0]["params"], lr=1.0)
    rollout = play(algorithm, policy, [0, 1, 0, 0, 1, 1, 1, 1])
    taken = decisions(policy, rollout)
    advantage = torch.tensor([-1 / 3, 1.0, -1 / 3, -1 / 3])
    by_b, by_w, units = torch.zeros(4, 1, 4), torch.zeros(4, 2, 4), 0
    for n in range(len(taken)):
        if taken.episode[n] < 4:
            seen, x = taken.view(torch.tensor([n])).proprio[0], taken.trace[n].flatten(1)
            for step in range(4):
                mean = (0.5 * x[step] + seen @ policy.w[step] + policy.b[step, 0]).detach()
                slope = advantage[taken.episode[n]] * (x[step + 1] - mean) / (2 * 2.0**2)
                by_b[step, 0, :2] += slope[:2]
                by_w[step, :, :2] += seen[:, None] * slope[:2]
                units += 1
    by_b, by_w = by_b / units, by_w / units
    assert by_b.norm() ** 2 + by_w.norm() ** 2 < 1  # else it would be clipped
    before = [policy.b.detach().clone(), policy.w.detach().clone()]
    algorithm.update(policy, rollout)
    for now, was, expected in zip((policy.b, policy.w), before, (by_b, by_w), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(now.detach() - was, expected, rtol=1e-4, atol=1e-6)


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
    assert got.mean_entropy.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.09), rel=1e-5)


def formula(n, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + n).view(shape)


OUTCOME = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1, 0, 1])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3, 3])


def second_step(advantage, units, mask, move, clip, clip_high=None):
    """Gradient of `ascend`'s loss by a shift of each unit, where the policy has moved by `move` formula(2)."""
    theta = torch.zeros(units, dtype=torch.float64, requires_grad=True)
    moves = iter([0.0, 0.0, move])  # the old policy, the first step, the second
    n = len(advantage)

    def score(i):
        logp = -1.5 + formula(1, n, units) + next(moves) * formula(2, n, units) + theta * formula(3, n, units)
        return Score(logp[i], mask[i], torch.zeros(len(i)), torch.zeros(len(i)))

    optimizer, generator = torch.optim.SGD([theta], lr=0.0), torch.Generator().manual_seed(0)
    ascend(score, advantage, clip, optimizer, generator, 2, 100, clip_high=clip_high, grad_norm=1e9)
    return theta.grad.tolist()


def test_simple_vla_rls_numbers():
    """`compute_grpo_outcome_advantage` and `compute_policy_loss` of PRIME-RL/SimpleVLA-RL at 7c51662,
    verl/trainer/ppo/core_algos.py, run on `formula`'s numbers: 10 episodes of one decision, 5 tokens, of which those
    with formula(9) > -0.7 count, clip ratios 0.2 and 0.28. There a group of one has its outcome for an advantage."""
    half, third = [0.8660238981246948, -0.8660238981246948], [0.5773492455482483, -1.1546986103057861]
    theirs = [*half, half[1], half[0], *third, third[0], 0.9999990463256836, -0.7071057558059692, 0.7071057558059692]
    ours = group_advantages(OUTCOME, GROUP, "grpo")
    assert ours[GROUP != 2].tolist() == pytest.approx(theirs[:7] + theirs[8:], rel=1e-5)
    assert ours[7] == 0
    advantage = torch.tensor(theirs, dtype=torch.float64)
    got = second_step(advantage, 5, formula(9, 10, 5) > -0.7, 0.3, 0.2, 0.28)
    expected = [0.12013180366074974, -0.027281085872395146, -0.01927969606449155, -0.027257079679047478]
    assert got == pytest.approx([*expected, 0.1069430895119445], rel=1e-5)


def test_ripts_numbers():
    """`RLOptimizer.optimize` of Ariostgx/ript-vla at 440990e, ript/algos/rl_optimizers/rl_optimizer.py, run whole on
    three groups of 4 episodes of one decision, log-probabilities and mask by `formula` as above, clip ranges 0.2 and
    0.28, 2 epochs of one batch: its leave-one-out advantages, first of successes, then of rewards formula(4), and the
    gradient of its loss in the second epoch."""
    outcome, group = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0]), torch.arange(3).repeat_interleave(4)
    most, third = 0.6666666269302368, 0.3333333134651184
    theirs = [most, -most, -most, most, third, third, -1, third, -third, -third, 1, -third]
    assert group_advantages(outcome, group, "rloo").tolist() == pytest.approx(theirs, rel=1e-6)
    real = [-0.9791761636734009, -0.7043535113334656, 1.2281713485717773, 0.4553583264350891, -1.2278850078582764]
    real += [-0.008399173617362976, 1.4107322692871094, -0.17444810271263123, -1.1558640003204346, 0.6897490620613098]
    real += [1.2248027324676514, -0.7586877942085266]
    assert group_advantages(formula(4, 12), group, "rloo").tolist() == pytest.approx(real, rel=1e-5)
    got = second_step(torch.tensor(theirs, dtype=torch.float64), 5, formula(9, 12, 5) > -0.7, 0.3, 0.2, 0.28)
    expected = [0.00725329760927201, -0.036267126658022404, 0.03824674245855189, -0.0019365363127564726]
    assert got == pytest.approx([*expected, 0.03505195171985709], rel=1e-5)


def test_flow_grpos_numbers():
    """`PerPromptStatTracker(global_std=False).update` of yifan123/flow_grpo at ac4c86e and the policy loss of its
    scripts/train_sd3.py (lines 881 to 893), run on the same, 4 steps, clip range 0.01. It divides by the deviation over
    n plus 1e-4, we by that over n - 1, s, plus 1e-6. So theirs is ours times (s + 1e-6) / (sqrt(1 - 1/n) s + 1e-4), and
    times sqrt(n / (n - 1)) alone where rewards are a thousand times as large. Its log-probability is checked in
    tests/policies."""
    half, third = [0.9998000399920016, -0.9998000399920016], [0.7069568129996042, -1.4139136259992082]
    theirs = torch.tensor([*half, half[1], half[0], *third, third[0], 0, half[1], half[0]], dtype=torch.float64)
    ours = group_advantages(OUTCOME, GROUP, "grpo").double()
    big_half, big_third = [0.9999998000000401, -0.9999998000000401], [0.7071066311865795, -1.4142132623731587]
    big = [*big_half, big_half[1], big_half[0], *big_third, big_third[0], 0, big_half[1], big_half[0]]
    of_big = group_advantages(1000 * OUTCOME, GROUP, "grpo").double()
    for number, n, variance in ((0, 4, 1 / 3), (1, 3, 1 / 3), (3, 2, 1 / 2)):  # of two of 4, two of 3 and one of 2
        group, s = number == GROUP, math.sqrt(variance)
        factor = (s + 1e-6) / (math.sqrt(1 - 1 / n) * s + 1e-4)
        assert (ours[group] * factor).tolist() == pytest.approx(theirs[group].tolist(), rel=1e-6)
        expected = torch.tensor(big)[group].tolist()
        assert (of_big[group] * math.sqrt(n / (n - 1))).tolist() == pytest.approx(expected, rel=1e-6)
    got = second_step(theirs, 4, torch.ones(10, 4, dtype=torch.bool), 0.02, 0.01)
    expected = [0.009247280996255781, 0.043519170841803415, 0.05242199114154611, 0.01680492105777601]
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "bad",
    [{"group_size": 1}, {"accuracy_low": 0.95}, {"clip_eps": 0.0}, {"temperature": 0.0}, {"epochs": 0}],
    ids=str,
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        GRPOSettings(**bad).check()
