"""FPO as it acts, judges and updates; its loss is in `test_fpo_loss.py`. Each trap of the method is a test."""

import dataclasses
import tomllib
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import TASK, ToyFlow, rollout, two_stages
from vlarl_bench.algorithms import fpo
from vlarl_bench.algorithms.fpo import FPO, FPOSettings, actor_loss

from vlarl_bench.config import BUDGETS, settings_before
from vlarl_bench.critics import QEnsemble
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.policy_gradient import standardise

BUDGET = dataclasses.replace(BUDGETS["smoke"], iterations=20)


def settings(**changes):
    return FPOSettings(**changes)


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
    changes = {"ratio": "standardised", "beta": 0.1, "lr": 0.05, "critic_steps": 10}
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


def test_what_is_to_come_is_worth_the_least_that_target_critics_say():
    """Eq. 5, of two that say 0.8 and 0.2 everywhere; nothing is won and nothing is over. The critics say 0."""
    algorithm = FPO(
        settings(critic_target="td", bootstrap_time_limit=True, gamma=0.9, critic_steps=1), ToyFlow(), BUDGET, 0
    )
    for member, value in zip(algorithm.target.members, (0.8, 0.2), strict=True):
        torch.nn.init.constant_(member[1].bias, value)
    metrics = algorithm.update(ToyFlow(), rollout(ToyFlow(), lambda x: False, 4, 0, length=2))
    assert metrics["critic_loss"] == pytest.approx((0.9 * 0.2) ** 2)


def test_critics_forget_rounds_beyond_the_window():
    policy = ToyFlow(1)
    algorithm = FPO(settings(window=2, critic_steps=1), policy, BUDGET, 0)
    rounds = [rollout(policy, wants, 4, i) for i in range(3)]
    for data in rounds:
        algorithm.update(policy, data)
    assert len(algorithm.replay) == 2
    for kept, data in zip(algorithm.replay, rounds[1:], strict=True):
        assert torch.equal(kept["latent"], decisions(policy, data).latent)


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


def test_a_task_that_always_fails_is_not_pushed_away(monkeypatch):
    """Critics that cannot tell two tasks apart make the hard one nothing but bad examples, unless centred by task."""
    moved, found = {}, []
    monkeypatch.setattr(fpo, "standardise", lambda *given: found.append(standardise(*given)) or found[-1])
    for centre in ("task", "batch"):
        policy = ToyFlow(1)
        data = rollout(policy, wants, 24, 0)
        other = dataclasses.replace(TASK, name="hard")
        failed = [
            dataclasses.replace(e, job=dataclasses.replace(e.job, task=other), success=False) for e in data.episodes
        ]
        only_hard = dataclasses.replace(data, episodes=[*data.episodes, *failed])
        algorithm = FPO(settings(advantage_centre=centre, critic_steps=50, critic_width=32), policy, BUDGET, 0)
        algorithm.update(policy, only_hard)
        moved[centre] = found.pop()[24:].mean().item()
    assert moved["task"] == pytest.approx(0.0, abs=1e-5)
    assert moved["batch"] < -0.3


@pytest.mark.parametrize("changes", [{"explore_steps": 2}, {"ratio": "none"}], ids=str)
def test_what_follows_a_velocity_needs_a_policy_that_has_one(changes):
    policy = ToyFlow(1)
    policy.capabilities = frozenset({"denoising"})
    FPO(settings(), policy, BUDGET, 0)
    with pytest.raises(BenchError, match=f"^algo.{next(iter(changes))}: .* only flow policies have"):
        FPO(settings(**changes), policy, BUDGET, 0)


def test_the_same_draws_score_both_policies_in_all_epochs():
    """Trap 1: fresh (tau, eps) would make dl pure noise, and the standardised ratio would blow it up."""
    policy = ToyFlow(1)
    algorithm = FPO(settings(draws=3, epochs=3, minibatch=4, critic_steps=1), policy, BUDGET, 0)
    data, inner, drawn = rollout(policy, wants, 8, 0), policy.draw_loss, {}

    def watched(context, latent, t, noise):
        for row in range(len(latent)):
            drawn.setdefault(tuple(latent[row].flatten().tolist()), []).append((t[row], noise[row]))
        return inner(context, latent, t, noise)

    policy.draw_loss = watched
    assert algorithm.update(policy, data)["ratio_off_one"] > 0
    assert len(drawn) == 8
    for pairs in drawn.values():
        assert len(pairs) == 4  # the old policy, and three epochs
        for t, noise in pairs:
            assert torch.equal(t, pairs[0][0])
            assert torch.equal(noise, pairs[0][1])
    assert len({t for pairs in drawn.values() for t in pairs[0][0].tolist()}) == 8 * 3
    # Another round has draws of its own.
    before = dict(drawn)
    drawn.clear()
    algorithm.update(policy, data)
    assert all(not torch.equal(drawn[key][0][0], before[key][0][0]) for key in before)


@pytest.mark.parametrize("where", ["fresh", "stored"])
def test_a_sampled_baseline_is_noisy_and_a_stored_one_takes_the_advantage_away(where):
    """Trap 6, in a one-step problem whose critics know the truth: Q(s, x) is what x comes to. With V(s) read at a
    fresh x' the advantage r - Q(s, x') is right in the mean, r - p, and has the deviation of a success; read at the
    chunk itself it is 0 for good and bad chunks alike."""
    policy = ToyFlow(1)
    algorithm = FPO(settings(value_chunk=where), policy, BUDGET, 0)

    def truth(features, chunks):
        return torch.stack([(chunks[:, 0, 0] > 0).float()] * 2)

    algorithm.critic = truth
    data = rollout(policy, wants, 24, 0)
    outcome = torch.tensor([float(episode.success) for episode in data.episodes])
    assert 0 < outcome.mean() < 1
    taken = decisions(policy, data)
    found = torch.stack([algorithm._advantages(algorithm._data(policy, taken)) for _ in range(200)])
    if where == "stored":
        assert torch.equal(found, torch.zeros(200, 24))
        return
    p = np.mean([episode.success for episode in rollout(policy, wants, 4000, 1).episodes])
    noise = (p * (1 - p)) ** 0.5
    assert noise > 0.1
    assert found.std(0).mean().item() == pytest.approx(noise, rel=0.1)
    assert (found.mean(0) - (outcome - p)).abs().max().item() < 5 * noise / 200**0.5


def collected(monkeypatch, **changes):
    """(what `actor_loss` is given in one update, the decisions)."""
    policy, given = ToyFlow(1, inputs=2), []
    algorithm = FPO(settings(critic_steps=5, critic_width=8, **changes), policy, BUDGET, 0)

    def watched(new, old, advantage, s):
        given.append((new.detach().clone(), old, advantage))
        return actor_loss(new, old, advantage, s)

    monkeypatch.setattr(fpo, "actor_loss", watched)
    data = two_stages(policy, 24, 0)
    for number, episode in enumerate(data.episodes):
        episode.success = number % 3 == 0
    algorithm.update(policy, data)
    return given, decisions(policy, data)


@pytest.mark.parametrize("whole", [True, False])
def test_one_advantage_serves_all_draws_and_actions_that_were_executed(monkeypatch, whole):
    """In the two-stage world one action of two is executed, so both have a ratio for each draw."""
    given, taken = collected(monkeypatch, chunk_credit=whole, draws=3, epochs=1, minibatch=1000)
    ((new, old, advantage),) = given
    assert new.shape == old.shape == advantage.shape == (3 * len(taken),)
    assert torch.equal(new, old)
    assert (advantage.view(-1, 3) == advantage[::3, None]).all()
    assert len(advantage.unique()) > 2


def test_every_executed_action_is_judged_and_no_other(monkeypatch):
    policy = ToyFlow(1)
    data = rollout(policy, wants, 6, 0)
    for episode in data.episodes[:2]:
        episode.actions[0] = episode.actions[0][:1]
    judged = []
    monkeypatch.setattr(fpo, "actor_loss", lambda new, *given: judged.append(len(new)) or actor_loss(new, *given))
    algorithm = FPO(settings(chunk_credit=False, draws=3, epochs=2, minibatch=1000, critic_steps=1), policy, BUDGET, 0)
    metrics = algorithm.update(policy, data)
    assert judged == [(2 * 1 + 4 * 2) * 3] * 2
    assert np.isfinite(metrics["cfm_loss"])


@pytest.mark.parametrize("over", ["round", "minibatch"])
@pytest.mark.parametrize("centre", ["task", "batch"])
def test_advantages_are_standardised_over_the_round_or_each_minibatch(monkeypatch, over, centre):
    """Eq. 4 has them standardised per minibatch."""
    changes = {"advantage_over": over, "advantage_centre": centre, "minibatch": 20, "draws": 1, "epochs": 1}
    given, _ = collected(monkeypatch, **changes)
    assert len(given) > 2
    parts = [advantage for _, _, advantage in given]
    for advantage in parts if over == "minibatch" else [torch.cat(parts)]:
        assert advantage.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantage.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    if over == "round":
        assert max(abs(advantage.mean().item()) for advantage in parts) > 1e-3


def test_runs_of_before_there_was_a_choice_did_as_the_defaults_do():
    before = settings_before("fpo")
    assert before == {"latent": "action", "chunk_credit": True, "advantage_over": "round"}
    assert all(getattr(settings(), name) == value for name, value in before.items())


def test_the_ablation_has_every_reading_and_every_component():
    """Each other choice of a setting that has some, in a line of its own, and the paper's Table II."""
    file = tomllib.loads((Path(__file__).parents[2] / "results" / "ablation.toml").read_text())
    lines = [item["settings"] for item in file["ablations"].values()]
    for line in lines:
        settings(**line).check()
    alone = [set(line) - {"lr", "beta", "std_floor"} for line in lines]
    for name, kind in typing.get_type_hints(FPOSettings).items():
        choices = {True, False} if kind is bool else set(typing.get_args(kind))
        if name == "anneal_lr":
            continue  # no reading
        changed = {name, "critic_target"} if name == "bootstrap_time_limit" else {name}
        found = {line[name] for line, names in zip(lines, alone, strict=True) if names == changed}
        assert found >= choices - {getattr(settings(), name)}, name
    for name, value in (("clip_eps", 0), ("critics", 1), ("tau_min", 0), ("drift_penalty", 0), ("gae_lambda", 0.3)):
        assert {name: value} in lines
    assert any(line.get("explore_steps", 1) > 1 and len(line) == 1 for line in lines)
