"""FPO against closed forms, finite differences and brute force; each trap of the method is a test."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import TASK, ToyFlow, rollout
from vlarl_bench.algorithms.fpo import FPO, FPOSettings, actor_loss, cfm_ratio, chunk_loss

from vlarl_bench.config import BUDGETS
from vlarl_bench.critics import QEnsemble
from vlarl_bench.errors import BenchError

BUDGET = dataclasses.replace(BUDGETS["smoke"], iterations=20)
RATIOS = ("difference", "scaled", "standardised")


def settings(**changes):
    return FPOSettings(**changes)


def inputs(seed=0, b=6, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    policy = ToyFlow(seed, dtype)
    latent = torch.randn(b, 2, 2, generator=g, dtype=dtype)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]] * (b // 2), dtype=dtype)
    t = torch.rand(b, k, generator=g, dtype=dtype)
    noise = torch.randn(b, k, 2, 2, generator=g, dtype=dtype)
    advantage = torch.randn(b, generator=g, dtype=dtype)
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
    loss, rho = actor_loss(chunk_loss(policy, context, latent, mask, t, noise), old, advantage, settings(ratio=ratio))
    assert torch.equal(rho, torch.ones_like(rho))
    gradients = torch.autograd.grad(loss, policy.actor_parameters())
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("gradient", ["through", "weight"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_first_gradient_is_the_advantage_weighted_cfm_gradient(ratio, gradient):
    """Closed form at theta = theta_old: d/dtheta of -mean(rho A) is c * mean(A dl/dtheta), where c is beta over the
    floor. The standardised reading stops the gradient at mean and deviation, so it has the same form."""
    s = settings(ratio=ratio, beta=0.7, std_floor=0.2, ratio_gradient=gradient)
    policy, context, latent, mask, t, noise, advantage = inputs()
    losses = chunk_loss(policy, context, latent, mask, t, noise)
    got = torch.autograd.grad(actor_loss(losses, losses.detach(), advantage, s)[0], policy.actor_parameters())
    scale = 1.0 if gradient == "weight" else (0.7 if ratio == "difference" else 0.7 / 0.2)
    losses = chunk_loss(policy, context, latent, mask, t, noise)
    expected = torch.autograd.grad(scale * (advantage[:, None] * losses).mean(), policy.actor_parameters())
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gradient_away_from_the_old_policy_against_finite_differences(clip):
    s = settings(clip_eps=clip)
    policy, context, latent, mask, t, noise, advantage = inputs()
    old = chunk_loss(policy, context, latent, mask, t, noise).detach() + 0.1 * torch.randn(6, 3, dtype=torch.float64)

    def value():
        return actor_loss(chunk_loss(policy, context, latent, mask, t, noise), old, advantage, s)[0]

    gradients = torch.autograd.grad(value(), policy.actor_parameters())
    for parameter, gradient in zip(policy.actor_parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            kept = float(flat[i])
            flat[i] = kept + 1e-6
            up = float(value())
            flat[i] = kept - 1e-6
            down = float(value())
            flat[i] = kept
            assert (up - down) / 2e-6 == pytest.approx(float(gradient.view(-1)[i]), abs=1e-6)


def test_clipping_by_hand():
    new = torch.tensor([[1.0], [1.0], [3.0], [3.0]])
    old = torch.tensor([[2.0], [2.0], [2.0], [2.0]])  # rho = e for the first two, 1/e for the others
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    e = float(np.e)
    expected = -np.mean([1.1, -e, 1 / e, -0.9])
    loss, _ = actor_loss(new, old, advantage, settings(clip_eps=0.1))
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    unclipped, _ = actor_loss(new, old, advantage, settings(clip_eps=0.0))
    assert float(unclipped) == pytest.approx(-np.mean([e, -e, 1 / e, -1 / e]), rel=1e-6)


def test_standardising_makes_the_clip_scale_free():
    """Trap 2: ten times the step clips the same fraction, so the clip is no trust region."""
    dl = 0.01 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    s = settings(ratio="standardised", beta=0.2, std_floor=1e-6)
    assert torch.allclose(cfm_ratio(dl, s), cfm_ratio(10 * dl, s), atol=1e-5)
    clipped = float(((cfm_ratio(dl, s) - 1).abs() > 0.2).float().mean())
    assert clipped == pytest.approx(0.31, abs=0.03)  # the fraction depends on beta and e alone: z ~ N(0, 1)
    plain = settings(ratio="difference")
    assert float((cfm_ratio(10 * dl, plain) - 1).abs().mean()) > 5 * float((cfm_ratio(dl, plain) - 1).abs().mean())


def test_stopping_the_gradient_at_the_ratio_needs_the_loss_outside():
    """Trap 3: read literally, `stop gradients through rho` leaves nothing to differentiate; `weight` does not."""
    policy, context, latent, mask, t, noise, advantage = inputs()
    losses = chunk_loss(policy, context, latent, mask, t, noise)
    old = losses.detach() + 0.03
    literal = (cfm_ratio(old - losses, settings()).detach() * advantage[:, None]).mean()
    assert not literal.requires_grad
    loss, rho = actor_loss(losses, old, advantage, settings(ratio_gradient="weight", clip_eps=0.0))
    got = torch.autograd.grad(loss, policy.w, retain_graph=True)[0]
    expected = torch.autograd.grad((rho.detach() * advantage[:, None] * losses).mean(), policy.w)[0]
    assert torch.allclose(got, expected)


def test_removing_the_batch_mean_leaves_the_drift_free():
    """Trap 5: a rise of every loss by 0.5 is invisible to the standardised ratio, and to no other reading."""
    dl = 0.1 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for ratio in RATIOS:
        s = settings(ratio=ratio, beta=0.1)
        same = torch.allclose(cfm_ratio(dl, s), cfm_ratio(dl - 0.5, s), atol=1e-6)
        assert same == (ratio == "standardised")
    s = settings(ratio="standardised", beta=0.1, drift_penalty=2.0)
    free = dataclasses.replace(s, drift_penalty=0.0)
    advantage, old = torch.zeros(64), torch.full((64, 4), 1.0)
    risen, fallen = old + 0.5, old - 0.5
    for new, penalty in ((risen, 1.0), (fallen, 0.0)):
        extra = actor_loss(new, old, advantage, s)[0] - actor_loss(new, old, advantage, free)[0]
        assert float(extra) == pytest.approx(penalty)


def test_exploration_steps_follow_the_flow():
    """Eq. 7: K = 1 is the sampled chunk, each further step moves it by eta v at the chosen flow time; no noise."""
    policy = ToyFlow()
    algorithm = FPO(settings(explore_steps=3, explore_size=0.2, explore_time=0.4), policy, BUDGET, 0)
    plain = FPO(settings(explore_steps=1), policy, BUDGET, 0)
    context = policy.preprocess(rollout(policy, lambda x: True, 1, 0).episodes[0].observations[:1])
    with torch.no_grad():
        x = policy.sample(context, [torch.Generator().manual_seed(7)]).latent
        assert torch.equal(plain.act(policy, context, [torch.Generator().manual_seed(7)]).latent, x)
        for _ in range(2):
            x = x - 0.2 * policy.velocity(context, x[:, None], torch.tensor([[0.4]]))[:, 0]
        assert torch.allclose(algorithm.act(policy, context, [torch.Generator().manual_seed(7)]).latent, x)


@pytest.mark.parametrize("target", ["td", "return"])
@pytest.mark.parametrize("members", [1, 3])
def test_critics_reach_the_discounted_return(target, members):
    """Three decisions, success at the end: Q = 0.81, 0.9, 1 for gamma 0.9, whatever the chunk (eq. 5-6)."""
    torch.manual_seed(0)
    policy = ToyFlow()
    s = settings(gamma=0.9, critics=members, critic_steps=700, critic_lr=3e-3, critic_target=target, polyak=0.1)
    s = dataclasses.replace(s, critic_width=64, critic_batch=48)
    algorithm = FPO(s, policy, BUDGET, 0)
    data = rollout(policy, lambda x: True, 16, 0, length=3)
    algorithm.update(policy, data)
    stored = algorithm.replay[0]
    with torch.no_grad():
        q = algorithm.critic(stored["features"], stored["latent"])
    assert q.shape == (members, 48)
    assert torch.allclose(q, torch.tensor([0.81, 0.9, 1.0]).repeat(16).expand_as(q), atol=0.1)


@pytest.mark.parametrize("where", ["fresh", "stored"])
def test_the_value_after_a_decision_is_the_value_at_the_next(where):
    algorithm = FPO(settings(value_chunk=where, critic_steps=0), ToyFlow(), BUDGET, 0)
    algorithm.update(ToyFlow(), rollout(ToyFlow(), lambda x: True, 4, 0, length=3))
    data = algorithm.replay[0]
    inside = ~data["ended"][:-1]
    assert torch.equal(data["next_value_chunk"][:-1][inside], data["value_chunk"][1:][inside])
    assert torch.equal(data["value_chunk"], data["latent"]) == (where == "stored")


def test_the_drift_is_told_also_where_the_ratio_cannot_see_it():
    """The standardised ratio has mean 1 whatever the losses do; the metric must not be made from it."""
    policy = ToyFlow(1)
    changes = {"ratio": "standardised", "beta": 0.1, "lr": 0.05, "drift_penalty": 0.0, "critic_steps": 10}
    algorithm = FPO(settings(**changes), policy, BUDGET, 0)
    drifts = [algorithm.update(policy, rollout(policy, wants, 64, i))["cfm_drift"] for i in range(4)]
    assert max(map(abs, drifts)) > 1e-3


def test_timeouts_are_failures_or_bootstraps():
    policy = ToyFlow()
    data = rollout(policy, lambda x: False, 2, 0, length=2)
    for bootstrap in (False, True):
        algorithm = FPO(settings(bootstrap_time_limit=bootstrap, critic_target="td", critic_steps=0), policy, BUDGET, 0)
        algorithm.update(policy, data)
        assert algorithm.replay[0]["terminated"].tolist() == ([False] * 4 if bootstrap else [False, True] * 2)
        assert algorithm.replay[0]["ended"].tolist() == [False, True] * 2


def wants(x):
    """A one-step problem: succeed if the first action is positive."""
    return x[0, 0] > 0


def success_rate(policy, seed):
    return np.mean([e.success for e in rollout(policy, wants, 200, seed).episodes])


@pytest.mark.parametrize(
    "changes", [{}, {"ratio": "scaled", "beta": 0.1}, {"explore_steps": 2}, {"critics": 1}], ids=str
)
def test_it_learns_a_one_step_problem(changes):
    policy = ToyFlow(1)
    toy = {"lr": 1e-2, "clip_eps": 0.05, "minibatch": 16, "critic_steps": 25, "critic_width": 32}
    algorithm = FPO(settings(**toy, **changes), policy, BUDGET, 0)
    before = success_rate(policy, 999)
    for i in range(12):
        metrics = algorithm.update(policy, rollout(policy, wants, 64, i, act=algorithm.act))
        assert all(np.isfinite(value) for value in metrics.values())
    assert success_rate(policy, 999) > before + 0.2


def test_update_trains_the_actor_only_and_repeats_bitwise():
    results = []
    for _ in range(2):
        policy = ToyFlow(1)
        algorithm = FPO(settings(critic_steps=10), policy, BUDGET, 3)
        algorithm.update(policy, rollout(policy, wants, 16, 0))
        results.append({k: v.clone() for k, v in policy.state_dict().items()})
        assert torch.equal(policy.prefix, torch.ones(1))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert not torch.equal(results[0]["w"], ToyFlow(1).w)


def test_ablation_without_the_ratio_climbs_the_critic():
    policy = ToyFlow(1)
    algorithm = FPO(settings(ratio="none", lr=1e-2, minibatch=16, critic_steps=50, critic_width=32), policy, BUDGET, 0)
    before = success_rate(policy, 999)
    for i in range(10):
        metrics = algorithm.update(policy, rollout(policy, wants, 64, i))
    assert "chunk_value" in metrics
    assert success_rate(policy, 999) > before + 0.2


@pytest.mark.parametrize(
    "bad",
    [
        *({"lr": 0.0}, {"tau_min": 1.0}, {"clip_eps": 1.5}, {"draws": 0}),
        *({"gamma": 1.2}, {"explore_steps": 0}, {"critics": 0}, {"bootstrap_time_limit": True}),
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.*{next(iter(bad))}"):
        settings(**bad).check()


def test_the_learning_rate_falls_to_zero_over_the_run_also_across_a_resume():
    budget = dataclasses.replace(BUDGETS["smoke"], iterations=4)
    policy = ToyFlow(1)
    algorithm = FPO(settings(lr=0.4, critic_steps=1), policy, budget, 0)
    rates = []
    for i in range(4):
        algorithm.update(policy, rollout(policy, wants, 8, i))
        rates.append(algorithm.optimizer.param_groups[0]["lr"])
        resumed = FPO(settings(lr=0.4, critic_steps=1), policy, budget, 0)
        resumed.load_state_dict(algorithm.state_dict())
        algorithm = resumed
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    steady = FPO(settings(lr=0.4, anneal_lr=False, critic_steps=1), policy, budget, 0)
    for i in range(2):
        steady.update(policy, rollout(policy, wants, 8, i))
    assert steady.optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("low", [0.0, 0.2, 0.6])
def test_no_tau_below_the_smallest(low):
    policy, seen = ToyFlow(1), []
    inner = policy.draw_loss

    def watched(context, latent, t, noise):
        seen.append(t)
        return inner(context, latent, t, noise)

    policy.draw_loss = watched
    algorithm = FPO(settings(tau_min=low, draws=16, critic_steps=1), policy, BUDGET, 0)
    algorithm.update(policy, rollout(policy, wants, 64, 0))
    drawn = torch.cat([t.flatten() for t in seen])
    assert low <= float(drawn.min()) < low + 0.05
    assert 0.95 < float(drawn.max()) <= 1
    seen.clear()
    policy.capabilities = policy.capabilities - {"flow"}  # as diffusion, whose decoder looks everywhere
    algorithm.update(policy, rollout(policy, wants, 64, 0))
    assert float(torch.cat([t.flatten() for t in seen]).min()) < 0.05


def test_critics_see_small_differences_between_states():
    """Features that share a large offset and differ by little are spread out; a constant one stays finite."""
    critic = QEnsemble(1, 2, 1, 32, torch.Generator().manual_seed(0))
    features = torch.tensor([[100.0, 0.0], [100.1, 0.0]]).repeat(8, 1)
    critic.standardise(features)
    seen = (features - critic.mean) / critic.std
    assert torch.allclose(seen[:2, 0], torch.tensor([-1.0, 1.0]), atol=1e-3)
    assert torch.isfinite(critic(features, torch.zeros(16, 1))).all()  # the constant one too
    kept = critic.mean.clone()
    critic.standardise(features + 5)
    assert torch.equal(critic.mean, kept)


def test_a_task_that_always_fails_is_not_pushed_away():
    """Critics that cannot tell two tasks apart make the hard one nothing but bad examples, unless centred by task."""
    moved = {}
    for centre in ("task", "batch"):
        policy = ToyFlow(1)
        data = rollout(policy, wants, 24, 0)
        other = dataclasses.replace(TASK, name="hard")
        failed = [
            dataclasses.replace(e, job=dataclasses.replace(e.job, task=other), success=False) for e in data.episodes
        ]
        only_hard = dataclasses.replace(data, episodes=[*data.episodes, *failed])
        algorithm = FPO(settings(advantage_centre=centre, critic_steps=50, critic_width=32), policy, BUDGET, 0)
        seen = {}

        def keep(*args, seen=seen):
            seen["advantage"] = args[-1]
            return {}

        algorithm._ascend_surrogate = keep
        algorithm.update(policy, only_hard)
        moved[centre] = seen["advantage"][24:].mean().item()
    assert moved["task"] == pytest.approx(0.0, abs=1e-5)
    assert moved["batch"] < -0.3


def test_numbers_that_pad_a_latent_do_not_count():
    policy = ToyFlow(1)
    context = policy.encode(policy.preprocess(rollout(policy, wants, 2, 0).episodes[0].observations))
    latent, mask, t, noise = torch.randn(2, 2, 2), torch.ones(2, 2), torch.rand(2, 3), torch.randn(2, 3, 2, 2)
    plain = chunk_loss(policy, context, latent, mask, t, noise)
    inner = policy.draw_loss
    policy.draw_loss = lambda *args: torch.nn.functional.pad(inner(*args), (0, 3), value=1e6)
    assert torch.equal(chunk_loss(policy, context, latent, mask, t, noise), plain)


@pytest.mark.parametrize("changes", [{"explore_steps": 2}, {"ratio": "none"}], ids=str)
def test_what_follows_a_velocity_needs_a_policy_that_has_one(changes):
    policy = ToyFlow(1)
    policy.capabilities = frozenset({"denoising", "diffusion"})
    FPO(settings(), policy, BUDGET, 0)
    with pytest.raises(BenchError, match=f"^algo.{next(iter(changes))}: .* only flow policies have"):
        FPO(settings(**changes), policy, BUDGET, 0)
