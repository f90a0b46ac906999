import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlarl_bench.config import BUDGETS
from vlarl_bench.distributed import descend
from vlarl_bench.errors import BenchError, Diverged
from vlarl_bench.policy_gradient import (
    ActorCritic,
    Score,
    advantages,
    ascend,
    clipped_surrogate,
    gae,
    group_advantages,
    mixed,
    standardise,
    weigh_episodes,
)


def brute_force(rewards, values, next_values, terminated, ended, gamma, lam):
    """The definition: a sum of discounted temporal differences up to the end of the episode."""
    n = len(rewards)
    out = np.zeros(n)
    for i in range(n):
        for j in range(i, n):
            bootstrap = 0.0 if terminated[j] else next_values[j]
            out[i] += (gamma * lam) ** (j - i) * (rewards[j] + gamma * bootstrap - values[j])
            if ended[j]:
                break
    return out


@pytest.mark.parametrize("seed", range(20))
def test_gae_equals_the_sum_that_defines_it(seed):
    rng = np.random.default_rng(seed)
    n = 30
    ended = rng.random(n) < 0.2
    terminated = ended & (rng.random(n) < 0.5)  # the other ends are cut off by a time limit
    ended[-1] = True
    args = (rng.normal(size=n), rng.normal(size=n), rng.normal(size=n), terminated, ended, 0.97, 0.9)
    np.testing.assert_allclose(gae(*args), brute_force(*args), atol=1e-12)


def test_gae_by_hand():
    """Two episodes: one succeeds at its second decision, one is cut off and bootstraps from what it saw last."""
    got = gae(
        rewards=np.array([0.0, 1.0, 0.0]),
        values=np.array([0.5, 0.6, 0.2]),
        next_values=np.array([0.6, 9.0, 0.4]),
        terminated=np.array([False, True, False]),
        ended=np.array([False, True, True]),
        gamma=0.5,
        lam=0.5,
    )
    second = 1 - 0.6
    assert got.tolist() == pytest.approx([0.5 * 0.6 - 0.5 + 0.25 * second, second, 0.5 * 0.4 - 0.2])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [(1.0, 2.0, 2.0), (1.5, 2.0, 2.4), (0.5, 2.0, 1.0), (1.5, -2.0, -3.0), (0.5, -2.0, -1.6)],
)
def test_clipped_surrogate_by_hand(ratio, advantage, objective):
    got = clipped_surrogate(torch.tensor(ratio), torch.tensor(advantage), 0.2)
    assert float(got) == pytest.approx(objective, rel=1e-6)


def test_advantages_take_running_out_of_time_for_the_end():
    """Two decisions that fail: values 0.5 and 0.25, and 9 for what was seen last, which must not count."""

    class Critic:
        def __call__(self, features):
            return features[:, 0]

    taken = SimpleNamespace(
        reward=torch.zeros(2),
        features=torch.tensor([[0.5], [0.25]]),
        next_features=torch.tensor([[0.25], [9.0]]),
        ended=torch.tensor([False, True]),
    )
    got = advantages(taken, Critic(), 0.8, 0.5)
    assert got.tolist() == pytest.approx([0.8 * 0.25 - 0.5 + 0.4 * -0.25, -0.25])


def test_standardise_by_hand():
    task = torch.tensor([0, 0, 1, 1])
    got = standardise(torch.tensor([1.0, 3.0, 10.0, 10.0]), task)  # -1, 1, 0, 0: deviation sqrt(1/2)
    assert got.tolist() == pytest.approx([-(2**0.5), 2**0.5, 0, 0])
    assert standardise(torch.tensor([0.5, 0.51]), task[:2]).tolist() == pytest.approx([-0.1, 0.1], rel=1e-4)  # floored
    assert standardise(torch.tensor([0.7]), task[:1]).tolist() == [0.0]  # one decision has no deviation


def test_weigh_episodes_by_hand():
    got = weigh_episodes(torch.tensor([1.0, 2.0, -3.0, -3.0, -3.0, 5.0]), torch.tensor([7, 7, 2, 2, 2, 9]))
    assert got.tolist() == pytest.approx([1.0, 2.0, -2.0, -2.0, -2.0, 10.0])
    assert got.mean().item() == pytest.approx((1.5 - 3 + 5) / 3)  # each episode counts one third


OUTCOME = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
GROUP = torch.tensor([4, 4, 9, 4, 9, 2, 7, 7])  # 1 of 3, 2 of 2, 0 of 1, 1 of 2


def test_mixed_groups_by_hand():
    assert mixed(OUTCOME, GROUP).tolist() == [True, True, False, True, False, False, True, True]
    assert mixed(OUTCOME, GROUP, low=0.4).tolist() == [False] * 6 + [True] * 2
    assert mixed(OUTCOME, GROUP, high=0.4).tolist() == [True, True, False, True] + [False] * 4
    tenth, group = torch.tensor([1.0] + [0.0] * 9), torch.zeros(10)
    assert mixed(tenth, group, 0.1, 0.9).all()  # the bounds belong to the range
    assert mixed(1 - tenth, group, 0.1, 0.9).all()


def test_group_advantages_by_hand():
    third = 3**0.5 / 3  # deviation over n - 1 of one success in three
    got = group_advantages(OUTCOME, GROUP, "grpo").tolist()
    half = 0.5 / (0.5**0.5 + 1e-6)
    expected = [2 / 3 / (third + 1e-6), -1 / 3 / (third + 1e-6), 0, -1 / 3 / (third + 1e-6), 0, 0, half, -half]
    assert got == pytest.approx(expected, rel=1e-6)
    got = group_advantages(OUTCOME, GROUP, "rloo").tolist()
    assert got == pytest.approx([1, -0.5, 0, -0.5, 0, 0, 1, -1])


class Categorical:
    """N decisions of U units, each a categorical over 3 values; `theta` [U, 3] are logits, the same for all."""

    def __init__(self, n=12, units=2, masked=True, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.theta = torch.randn(units, 3, generator=g, dtype=torch.float64).requires_grad_()
        self.drawn = torch.randint(3, (n, units), generator=g)
        self.mask = torch.rand(n, units, generator=g) < 0.7 if masked else torch.ones(n, units, dtype=torch.bool)
        self.advantage = torch.randn(n, generator=g, dtype=torch.float64)

    def __call__(self, i):
        logp = self.theta.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).sum().expand(len(i))
        drawn = torch.full((len(i),), logp.shape[0])
        return Score(logp[torch.arange(logp.shape[0]), self.drawn[i]], self.mask[i], entropy, drawn)


def nothing(i):
    """No entropy, of no draws."""
    return torch.zeros(len(i)), torch.zeros(len(i))


def step(score, parameter, advantage, clip=0.2, epochs=1, minibatch=100, lr=1.0, grad_norm=1e9, **more):
    """(how far plain gradient ascent moved the parameter, metrics)."""
    before = parameter.detach().clone()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([parameter], lr=lr)
    metrics = ascend(score, advantage, clip, optimizer, generator, epochs, minibatch, grad_norm=grad_norm, **more)
    return parameter.detach() - before, metrics


def test_first_gradient_of_a_categorical_in_closed_form():
    """d log p(k) / d logits = onehot(k) - p, weighed by the advantage, averaged over the units that count."""
    score = Categorical()
    chances, onehot = score.theta.detach().softmax(-1), torch.eye(3, dtype=torch.float64)[score.drawn]
    weight = (score.advantage[:, None] * score.mask)[..., None]
    expected = (weight * (onehot - chances)).sum(0) / score.mask.sum()
    moved, metrics = step(score, score.theta, score.advantage)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)
    assert (metrics["clip_fraction"], metrics["ratio_off_one"], metrics["kl"]) == (0, 0, 0)


def test_first_gradient_of_a_gaussian_in_closed_form():
    """d log N(x; m, s^2) / dm = (x - m) / s^2; one advantage for each unit."""
    g = torch.Generator().manual_seed(1)
    mean, deviation = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_(), 0.3
    x = mean.detach() + deviation * torch.randn(10, 3, generator=g, dtype=torch.float64)
    advantage = torch.randn(10, 3, generator=g, dtype=torch.float64)

    def score(i):
        logp = -0.5 * ((x[i] - mean) / deviation) ** 2
        return Score(logp, torch.ones(len(i), 3, dtype=torch.bool), *nothing(i))

    expected = (advantage * (x - mean.detach()) / deviation**2).sum(0) / 30
    torch.testing.assert_close(step(score, mean, advantage, lr=1.0)[0], expected, rtol=1e-9, atol=1e-12)


def test_second_step_follows_the_clipped_surrogate_by_finite_differences():
    """The step after the first starts where some units are beyond the clip: they have no slope left, the others do."""
    clip, high = torch.tensor([0.05, 0.3]), 0.4
    score = Categorical()
    start = score.theta.detach().clone()
    first, _ = step(score, score.theta, score.advantage, clip, clip_high=high, lr=2.0, entropy=0.1)
    here = score.theta.detach().clone()
    again = Categorical()
    total, metrics = step(again, again.theta, again.advantage, clip, epochs=2, clip_high=high, lr=2.0, entropy=0.1)
    assert metrics["clip_fraction"] > 0

    def objective(theta):
        """The definition, element by element."""
        new, old = theta.log_softmax(-1), start.log_softmax(-1)
        gained = 0.0
        for n, u in score.mask.nonzero().tolist():
            ratio = float((new[u, score.drawn[n, u]] - old[u, score.drawn[n, u]]).exp())
            bounded = min(max(ratio, 1 - float(clip[u])), 1 + high)
            a = float(score.advantage[n])
            gained += min(ratio * a, bounded * a)
        return gained / int(score.mask.sum()) + 0.1 * float(-(new.exp() * new).sum(-1).mean())

    slope = torch.zeros_like(here)
    for k in np.ndindex(*here.shape):
        shift = torch.zeros_like(here)
        shift[k] = 1e-6
        slope[k] = (objective(here + shift) - objective(here - shift)) / 2e-6
    torch.testing.assert_close(total - first, 2.0 * slope, rtol=1e-5, atol=1e-7)


def test_metrics_by_hand():
    """One unit a decision, ratios e^0.1, e^-0.5 and a masked one at the second of two steps."""
    shift = torch.zeros(3, requires_grad=True)
    calls = iter([0.0, 0.0, 1.0])

    def score(i):
        now = torch.tensor([0.1, -0.5, 9.0]) * next(calls)
        entropy, drawn = torch.tensor([2.1, 1.4, 0.0]), torch.tensor([3, 2, 0])
        mask = torch.tensor([[True], [True], [False]])
        return Score((now[i] + 0 * shift[i])[:, None], mask[i], entropy[i], drawn[i])

    _, metrics = step(score, shift, torch.ones(3), clip=0.2, epochs=2)
    ratios = np.exp([0.1, -0.5])
    assert metrics["clip_fraction"] == pytest.approx(0.5 / 2)  # of two steps; the first moved nothing yet
    assert metrics["ratio_off_one"] == pytest.approx(np.abs(ratios - 1).mean() / 2)
    assert metrics["kl"] == pytest.approx((ratios - 1 - [0.1, -0.5]).mean())  # of the last epoch
    assert metrics["entropy"] == pytest.approx(0.7)


@pytest.mark.parametrize(("limit", "moved"), [(1.0, [-0.6, -0.8]), (1e9, [-3.0, -4.0])])
def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it(limit, moved):
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    descend(torch.optim.SGD([p], lr=1.0), 3 * p[0] + 4 * p[1], limit)
    assert p.tolist() == pytest.approx(moved, rel=1e-5)


def test_unless_told_otherwise_no_step_follows_a_gradient_longer_than_one():
    score, far = Categorical(), Categorical()
    assert step(far, far.theta, 100 * far.advantage)[0].norm() > 2
    before, optimizer = score.theta.detach().clone(), torch.optim.SGD([score.theta], lr=1.0)
    ascend(score, 100 * score.advantage, 0.2, optimizer, torch.Generator().manual_seed(0), 1, 100)
    assert (score.theta - before).norm().item() == pytest.approx(1, rel=1e-4)


def test_a_score_that_does_not_repeat_is_an_error():
    calls = iter(range(10))
    shift = torch.zeros(1, requires_grad=True)

    def score(i):
        return Score((shift + 0.01 * next(calls))[None], torch.ones(1, 1, dtype=torch.bool), *nothing(i))

    with pytest.raises(BenchError, match=r"ratio: off 1 by 0\.01"):
        step(score, shift, torch.ones(1))


def test_a_score_that_is_no_number_has_destroyed_the_policy():
    shift = torch.zeros(1, requires_grad=True)

    def score(i):
        return Score((shift + math.nan)[None], torch.ones(1, 1, dtype=torch.bool), *nothing(i))

    with pytest.raises(Diverged, match="the ratio of the policy to itself is not finite before gradient step 1"):
        step(score, shift, torch.ones(1))


def test_it_stops_before_it_goes_further_than_the_target():
    far = Categorical()
    _, metrics = step(far, far.theta, far.advantage, epochs=50, lr=5.0, clip=0.9)
    assert metrics["kl"] > 0.05
    near, one = Categorical(), Categorical()
    moved, metrics = step(near, near.theta, near.advantage, epochs=50, lr=5.0, clip=0.9, target_kl=1e-6)
    assert torch.equal(moved, step(one, one.theta, one.advantage, lr=5.0)[0])  # the second step was not taken
    assert metrics["kl"] > 1e-6  # and what stopped it is told


def test_every_decision_counts_once_an_epoch():
    seen = []
    score = Categorical(masked=False)

    def watched(i):
        seen.append(i)
        return score(i)

    step(watched, score.theta, score.advantage, epochs=2, minibatch=5, lr=0.0)
    assert [len(i) for i in seen] == [5, 5, 2] + [4, 4, 4] * 2  # no step on a handful
    assert all(torch.cat(seen[k : k + 3]).sort().values.tolist() == list(range(12)) for k in (0, 3, 6))
    assert not torch.equal(torch.cat(seen[3:6]), torch.cat(seen[6:9]))


def jump(by, advantage, **more):
    """Gradient of the loss where one unit's log-ratio is `by`, in the second step; in the first one it is 0."""
    shift, calls = torch.zeros(1, requires_grad=True), []

    def score(i):
        calls.append(i)
        return Score((shift + by * (len(calls) == 3))[None], torch.ones(1, 1, dtype=torch.bool), *nothing(i))

    _, metrics = step(score, shift, torch.tensor([advantage]), epochs=2, lr=0.0, **more)
    return shift.grad.item(), metrics


@pytest.mark.parametrize(("by", "ratio"), [(10.0, math.exp(3)), (-10.0, math.exp(-3)), (2.0, math.exp(2))])
def test_a_log_ratio_beyond_the_limit_counts_as_it_and_keeps_its_gradient(by, ratio):
    def unclipped(ratio, advantage):
        return ratio * advantage

    gradient, metrics = jump(by, -1.0, log_ratio_limit=3.0, objective=unclipped)
    assert gradient == pytest.approx(ratio, rel=1e-5)
    assert metrics["ratio_off_one"] == pytest.approx(abs(ratio - 1) / 2, rel=1e-5)


def test_another_objective_takes_the_place_of_the_clip():
    assert jump(1.0, 1.0)[0] == 0  # clipped
    assert jump(1.0, 1.0, objective=lambda ratio, advantage: ratio * advantage)[0] == pytest.approx(-math.e)


def test_what_all_score_before_need_not_be_computed_again():
    score, seen = Categorical(), []

    def watched(i):
        seen.append(i)
        return score(i)

    old = score(torch.arange(12)).logp.detach()
    moved, _ = step(watched, score.theta, score.advantage, old=old)
    again = Categorical()
    assert torch.equal(moved, step(again, again.theta, again.advantage)[0])
    assert len(seen) == 1


def judging(iterations, warmup=0):
    """(an actor-critic, two episodes of two decisions, of which the first succeeds)."""
    critic = {"critic_width": 4, "critic_lr": 1e-3, "critic_steps": 2, "critic_batch": 4, "window": 2}
    settings = SimpleNamespace(lr=0.5, warmup=warmup, gamma=0.9, gae_lambda=0.5, **critic)
    budget = dataclasses.replace(BUDGETS["smoke"], iterations=iterations)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    learner = ActorCritic(settings, SimpleNamespace(feature_dim=1), optimizer, budget, 0)
    taken = SimpleNamespace(
        features=torch.rand(4, 2),
        next_features=torch.rand(4, 2),
        reward=torch.tensor([0.0, 1.0, 0.0, 0.0]),
        ended=torch.tensor([False, True, False, True]),
        task=torch.zeros(4),
        returns=lambda gamma: torch.tensor([gamma, 1.0, 0.0, 0.0]),
    )
    return learner, taken


@pytest.mark.parametrize(("warmup", "iterations", "alone"), [(1, 1, 0), (0, 3, 0), (2, 5, 2), (5, 3, 2)])
def test_the_critic_warms_up_alone_but_the_last_round_trains_the_policy(warmup, iterations, alone):
    learner, taken = judging(iterations, warmup)
    found, rates = [], []
    for _ in range(iterations):
        found.append(learner.judge(taken))
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5 * (1 - i / iterations) for i in range(iterations)])
    assert [advantage is None for advantage, _ in found] == [True] * alone + [False] * (iterations - alone)
    assert all("critic_loss" in metrics for _, metrics in found)
    assert found[-1][0].shape == (4,)


def test_a_round_is_judged_by_the_settings_discounts_and_within_its_tasks():
    learner, taken = judging(iterations=2)
    taken.task, discounts = torch.tensor([0, 0, 1, 1]), []
    inner = taken.returns
    taken.returns = lambda gamma: discounts.append(gamma) or inner(gamma)
    found, _ = learner.judge(taken)
    assert torch.equal(found, standardise(advantages(taken, learner.critic, 0.9, 0.5), taken.task))
    assert discounts == [0.9]
