"""DSRL against closed forms, cases by hand and the numbers of its authors' code: for pi0, and the SAC of the rest."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from toy import ToyFlow, two_stages
from vlarl_bench.algorithms.dsrl import DSRL, DSRLSettings
from vlarl_bench.algorithms.fpo import FPO, FPOSettings
from vlarl_bench.algorithms.sft import SFT, SFTSettings

from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError

GOLDEN = json.loads((Path(__file__).parent / "dsrl_golden.json").read_text())
BUDGET = BUDGETS["smoke"]
QUICK = {"utd": 0.1, "batch": 8, "width": 8, "critic_width": 8, "repeat": False, "temperature_lr_ratio": 1.0}


def start(**changes):
    """(algorithm, policy), nothing learned yet."""
    policy = ToyFlow(0, inputs=2)
    return DSRL(DSRLSettings(**{**QUICK, **changes}), policy, BUDGET, 0), policy


def formula(n, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + n).view(shape).float()


def fill(net, n):
    """Weights by formula, and features as they are."""
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(0.5 * formula(n + i, *parameter.shape))
    net.std.fill_(1.0)


def filled(rows=6, **changes):
    """An algorithm whose networks follow the formula, and a batch and draws that do."""
    policy = ToyFlow(0, inputs=3)
    algorithm = DSRL(DSRLSettings(**{**QUICK, "width": 5, "critic_width": 5, **changes}), policy, BUDGET, 0)
    for n, net in enumerate((algorithm.steering, algorithm.critic, algorithm.target), 1):
        fill(net, n)
    with torch.no_grad():
        algorithm.steering.layers[0].weight.copy_(0.5 * formula(1, 5, 4)[:, :3])  # theirs sees the time, times 0
        algorithm.log_temperature.fill_(math.log(0.2))
    none = torch.zeros(rows, 1)  # of the time: only the critics see it
    batch = {
        "features": torch.cat((formula(4, rows, 3), none), 1),
        "action": formula(5, rows, 2, 2),
        "next_features": torch.cat((formula(6, rows, 3), none), 1),
        "ended": torch.tensor([False, False, True, False, True, False])[:rows],
        "reward": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])[:rows],
    }
    return algorithm, batch, policy


def test_the_numbers_of_sac():
    """Three gradient steps of `SAC.train` of stable-baselines3 2.9.2, which the authors' code (ajwagen/dsrl at 8d21b9c)
    calls, on the same networks, transitions and draws: SiLU, two layers of 5, two critics, tau 0.1, gamma 0.9, learning
    rate 0.01, ent_coef auto_0.2, target_entropy -2, and `Normal.rsample` made to return mean + deviation * formula."""
    changes = {"lr": 1e-2, "critic_lr": 1e-2, "polyak": 0.1, "gamma": 0.9, "target_entropy": -0.5, "critic_norm": False}
    algorithm, batch, _ = filled(entropy_in_target=True, bounded=False, **changes)
    expected = [
        (-0.73434978723526, 1.0477921962738037, 0.19999998807907104, -6.898514270782471),
        (-0.956742525100708, 1.3169718980789185, 0.19800996780395508, -7.76414155960083),
        (-0.8733109831809998, 1.122890591621399, 0.19603709876537323, -7.530851364135742),
    ]
    for n, numbers in enumerate(expected):
        found = algorithm.step(batch, formula(11 + 2 * n, 6, 2, 2), formula(12 + 2 * n, 6, 2, 2))
        names = ("actor_loss", "critic_loss", "temperature", "temperature_loss")
        assert [found[name] for name in names] == pytest.approx(numbers, rel=1e-5)
    assert algorithm.log_temperature.item() == pytest.approx(-1.63946533203125, rel=1e-5)
    last = [0.20718567073345184, 0.3699471354484558, -0.292775958776474, -0.29307660460472107, 0.36973822116851807]
    assert algorithm.target.members[0][1].weight[0].tolist() == pytest.approx(last, rel=1e-5)
    _, logp = algorithm._draw(batch["features"], formula(17, 6, 2, 2))
    densities = [-2.67087411, -2.44980621, -2.70076489, -2.67638731, -2.32953382, -2.52098393]
    assert logp.tolist() == pytest.approx(densities, rel=1e-5)


def filled_for_pi0(bias, **changes):
    """The same with one noise a chunk and normalised critics, as the defaults and the authors' code for pi0 have it."""
    changes = {"repeat": True, "lr": 1e-2, "critic_lr": 1e-2, "polyak": 0.1, "gamma": 0.9, **changes}
    algorithm, batch, _ = filled(**changes)
    batch["action"] = formula(5, 6, 1, 2)
    for net in (algorithm.critic, algorithm.target):
        for number, member in enumerate(net.members):
            torch.nn.init.constant_(member[1].bias, bias - 0.1 * number)
            for layer in member[0]:
                if isinstance(layer, torch.nn.LayerNorm):
                    layer.eps = 1e-6  # flax's default; torch's is 1e-5
    return algorithm, batch


@pytest.mark.parametrize(("reduction", "critics"), [("min", 2), ("mean", 3)])
def test_the_numbers_of_the_code_for_pi0(reduction, critics):
    """Three updates at the default settings but for sizes and rates: no entropy in the target, one noise a chunk,
    normalised critics, whose values stay in [0, 1] here. Two losses are another multiple of the same: theirs of the
    critics is a mean over them, ours half the sum; theirs of the temperature T is T times what ours is log T times."""
    golden = GOLDEN[f"{reduction} of {critics}"]
    algorithm, batch = filled_for_pi0(0.3, critics=critics, critic_reduction=reduction)
    chosen = algorithm.settings
    assert (chosen.entropy_in_target, chosen.bounded, chosen.critic_norm, chosen.repeat) == (False, True, True, True)
    keys = ("actor_loss", "q_pi_in_actor", "entropy", "temperature", "critic_loss", "temperature_loss")
    for n, numbers in enumerate(zip(*(golden["steps"][key] for key in keys), strict=True)):
        actor, value, entropy, temperature, critic, slope = numbers
        found = algorithm.step(batch, formula(11 + 2 * n, 6, 1, 2), formula(12 + 2 * n, 6, 1, 2))
        same = [found["actor_loss"], found["noise_value"], 2 * found["entropy"], found["temperature"]]
        assert same == pytest.approx([actor, value, entropy, temperature], rel=1e-5)
        assert found["critic_loss"] == pytest.approx(critic * critics / 2, rel=1e-5)
        assert found["temperature_loss"] == pytest.approx(slope * math.log(temperature) / temperature, rel=1e-5)
    assert algorithm.log_temperature.item() == pytest.approx(golden["log temperature"], rel=1e-5)
    with torch.no_grad():
        action, logp = algorithm._draw(batch["features"], formula(17, 6, 1, 2))
        slow = algorithm.target(batch["features"], batch["action"])
    torch.testing.assert_close(action[:, 0], torch.tensor(golden["actions"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(logp, torch.tensor(golden["log-densities"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(slow, torch.tensor(golden["slow values"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["min", "mean"])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_target_of_the_code_for_pi0(reduction, entropy):
    """Where values are below 0: without our bound, by the loss of the critics; with it another."""
    theirs = GOLDEN["critic loss"][reduction]["entropy" if entropy else "rewards"]
    algorithm, batch = filled_for_pi0(-0.5, critic_reduction=reduction, entropy_in_target=entropy, bounded=False)
    found = algorithm.step(batch, formula(11, 6, 1, 2), formula(12, 6, 1, 2))
    assert found["critic_loss"] == pytest.approx(theirs, rel=1e-5)
    algorithm, batch = filled_for_pi0(-0.5, critic_reduction=reduction)
    found = algorithm.step(batch, formula(11, 6, 1, 2), formula(12, 6, 1, 2))
    assert found["critic_loss"] != pytest.approx(theirs, rel=1e-2)


def test_the_density_of_the_code_for_pi0_is_that_of_the_unscaled_noise():
    """Theirs is of w, ours of w / b: they differ by log b a number, and by nothing at their b of 1."""
    golden = GOLDEN["magnitude 0.7"]
    algorithm, batch = filled_for_pi0(0.3)
    assert algorithm.settings.bound == 0.7
    noise, logp = algorithm.steering(batch["features"][:, :3], formula(17, 6, 1, 2))
    torch.testing.assert_close(noise[:, 0], torch.tensor(golden["noise"]), rtol=1e-5, atol=0)
    assert torch.equal(noise[:, 0], noise[:, 1])
    theirs = torch.tensor(golden["log-densities"])
    torch.testing.assert_close(logp - 2 * math.log(0.7), theirs, rtol=1e-5, atol=0)


def test_density_of_the_noise():
    """The tanh-Gaussian of torch.distributions, in units of the bound; finite where tanh is 1."""
    algorithm, batch, _ = filled(bound=1.5)
    steering, features, unit = algorithm.steering.double(), batch["features"][:, :3].double(), 0.7 * formula(9, 6, 2, 2)
    noise, logp = steering(features, unit.double())
    hidden = steering.layers(features)
    normal = torch.distributions.Normal(steering.centre(hidden), steering.log_deviation(hidden).exp())
    oracle = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(logp, oracle.log_prob((noise / 1.5).flatten(1)).sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        steering(features, torch.zeros(6, 2, 2).double())[0].flatten(1), 1.5 * normal.mean.tanh()
    )
    far, logp = steering(features, 60 * torch.ones(6, 2, 2).double())
    assert far.abs().max() == 1.5
    assert logp.isfinite().all()


def test_actor_gradient_against_finite_differences():
    """Of E[temperature log pi - min Q]: eq. 18 with its reparametrisation."""
    algorithm, batch, _ = filled()
    for net in (algorithm.steering, algorithm.critic):
        net.double()
    features, unit = batch["features"].double(), formula(9, 6, 2, 2).double()

    def loss():
        action, logp = algorithm._draw(features, unit)
        return (0.2 * logp - algorithm.critic(features, action).amin(0)).mean()

    parameters = list(algorithm.steering.parameters())
    for parameter, slope in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        flat, at = parameter.data.view(-1), slope.view(-1)
        for k in range(0, len(flat), 7):
            here, values = flat[k].item(), []
            for shift in (1e-5, -1e-5):
                flat[k] = here + shift
                with torch.no_grad():
                    values.append(loss().item())
            flat[k] = here
            assert at[k].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("reduction", ["min", "mean"])
@pytest.mark.parametrize(("entropy", "bounded"), [(True, False), (False, False), (False, True)])
def test_critic_goal_by_hand(entropy, bounded, reduction):
    """r where an episode ends; else r + gamma (min or mean of the slow critics [- temperature log pi]) at a fresh
    noise; the actor climbs the same of the critics."""
    algorithm, batch, _ = filled(
        rows=4,
        critic_lr=1e-9,
        lr=1e-9,
        gamma=0.9,
        entropy_in_target=entropy,
        bounded=bounded,
        critic_reduction=reduction,
    )
    reduced = {"min": min, "mean": lambda *values: sum(values) / len(values)}[reduction]
    later = formula(12, 4, 2, 2)
    with torch.no_grad():
        for member in algorithm.target.members:
            member[1].bias -= 0.5
        noise, logp = algorithm._draw(batch["next_features"], later)
        slow = algorithm.target(batch["next_features"], noise)
        now = algorithm.critic(batch["features"], batch["action"])
        chosen, chosen_logp = algorithm._draw(batch["features"], formula(11, 4, 2, 2))
        climbed = algorithm.critic(batch["features"], chosen)
    assert any(not 0 <= reduced(*slow[:, row].tolist()) <= 1 for row in (0, 1, 3))  # the bound has something to do
    goal = []
    for row in range(4):
        value = reduced(*slow[:, row].tolist()) - entropy * 0.2 * logp[row].item()
        value = min(1.0, max(0.0, value)) if bounded else value
        reward = batch["reward"][row].item()
        goal.append(reward if batch["ended"][row] else reward + 0.9 * value)
    assert batch["ended"].tolist() == [False, False, True, False]
    by_hand = sum((now[m, row].item() - goal[row]) ** 2 for m in range(2) for row in range(4)) / 4 / 2
    found = algorithm.step(batch, formula(11, 4, 2, 2), later)
    assert found["critic_loss"] == pytest.approx(by_hand, rel=1e-5)
    actor = sum(0.2 * chosen_logp[row].item() - reduced(*climbed[:, row].tolist()) for row in range(4)) / 4
    assert found["actor_loss"] == pytest.approx(actor, rel=1e-5)


@pytest.mark.parametrize("target", [-30.0, 0.6])
def test_temperature_follows_the_entropy(target):
    """It falls where there is more entropy than is aimed at, and rises where there is less; slope by hand."""
    algorithm, batch, _ = filled(target_entropy=target, lr=1e-3)
    before = algorithm.log_temperature.item()
    with torch.no_grad():
        _, logp = algorithm._draw(batch["features"], formula(11, 6, 2, 2))
    algorithm.step(batch, formula(11, 6, 2, 2), formula(12, 6, 2, 2))
    slope = -(logp.mean().item() + 4 * target)  # of the loss, by log temperature; 4 numbers
    assert algorithm.log_temperature.grad.item() == pytest.approx(slope, rel=1e-5)
    assert (algorithm.log_temperature.item() > before) == (target > 0)


@pytest.mark.parametrize("ratio", [1.0, 15.0])
def test_a_step_of_the_temperature_is_a_multiple_of_the_actors(ratio):
    """Adam's first step is the learning rate."""
    algorithm, batch, _ = filled(target_entropy=-30.0, lr=1e-3, temperature_lr_ratio=ratio)
    before = algorithm.log_temperature.item()
    algorithm.step(batch, formula(11, 6, 2, 2), formula(12, 6, 2, 2))
    assert before - algorithm.log_temperature.item() == pytest.approx(ratio * 1e-3, rel=1e-3)


def test_it_steers_and_leaves_the_rest_alone():
    algorithm, policy = start(bound=0.5)
    weights = {name: p.detach().clone() for name, p in policy.named_parameters() if not name.startswith("steering.")}
    data = two_stages(policy, 16, 0, algorithm.act)
    context = policy.preprocess([episode.observations[0] for episode in data.episodes])
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(len(context))]  # noqa: E731
    base = torch.stack([torch.randn(2, 2, generator=g) for g in seeds()])
    assert torch.equal(policy.start(context, seeds()), base)  # nothing is steered before something was learned
    acted = algorithm.act(policy, context, seeds())
    assert torch.equal(acted.trace, base.clamp(-0.5, 0.5))
    assert torch.equal(acted.latent, policy.decode(context, acted.trace).latent)

    metrics = algorithm.update(policy, data)
    assert all(math.isfinite(value) for value in metrics.values())
    steered = policy.start(context, seeds())
    assert torch.equal(steered, policy.steering(policy.features(context), base)[0])
    assert steered.abs().max() < 0.5
    assert torch.equal(algorithm.act(policy, context, seeds()).trace, steered)
    assert torch.equal(policy.sample(context, seeds()).latent, policy.decode(context, steered).latent)
    middle = policy.steering(policy.features(context), torch.zeros(len(context), 2, 2))[0]
    assert torch.equal(policy.sample(context, None).latent, policy.decode(context, middle).latent)
    for name, parameter in policy.named_parameters():
        assert name.startswith("steering.") == parameter.requires_grad
        assert name.startswith("steering.") or torch.equal(parameter, weights[name])


def test_one_actions_noise_serves_the_chunk():
    """With `repeat` all is as if a chunk were one action: density, entropy aimed at, and what critics see."""
    algorithm, policy = start(bound=0.5, repeat=True)
    data = two_stages(policy, 16, 0, algorithm.act)
    context = policy.preprocess([episode.observations[0] for episode in data.episodes])
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(len(context))]  # noqa: E731
    base = torch.stack([torch.randn(2, 2, generator=g) for g in seeds()])
    acted = algorithm.act(policy, context, seeds())
    assert torch.equal(acted.trace, base[:, :1].clamp(-0.5, 0.5).expand(-1, 2, -1))
    assert torch.equal(acted.latent, policy.decode(context, acted.trace).latent)
    algorithm.update(policy, data)
    assert algorithm.replay["action"].shape[1:] == (1, 2)
    assert algorithm.target_entropy == -0.5 * 2
    steered, logp = policy.steering(policy.features(context), base)
    assert torch.equal(steered[:, 0], steered[:, 1])
    hidden = policy.steering.layers((policy.features(context) - policy.steering.mean) / policy.steering.std)
    normal = torch.distributions.Normal(policy.steering.centre(hidden), policy.steering.log_deviation(hidden).exp())
    oracle = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(logp, oracle.log_prob(steered[:, 0] / 0.5).sum(1), rtol=1e-3, atol=1e-4)


def test_replay_keeps_rounds_and_no_more_than_it_may():
    algorithm, policy = start(capacity=50)
    rounds = [two_stages(policy, 8, number, algorithm.act) for number in range(4)]
    sizes = []
    for data in rounds:
        algorithm.update(policy, data)
        sizes.append(len(algorithm.replay["reward"]))
    counts = [sum(len(episode.latents) for episode in data.episodes) for data in rounds]
    assert sizes == [min(50, sum(counts[: n + 1])) for n in range(4)]
    assert sizes[0] < sizes[1] and sizes[-1] == 50
    last = torch.from_numpy(rounds[-1].episodes[-1].traces[-1])
    torch.testing.assert_close(algorithm.replay["action"][-1], last / algorithm.settings.bound)


def test_the_actors_rate_falls_to_zero_over_the_run_also_across_a_resume():
    budget, rates = dataclasses.replace(BUDGET, iterations=4), []
    algorithm = DSRL(DSRLSettings(**QUICK, lr=0.4), ToyFlow(0, inputs=2), budget, 0)
    for number in range(4):
        policy = ToyFlow(0, inputs=2)
        resumed = DSRL(DSRLSettings(**QUICK, lr=0.4), policy, budget, 0)
        resumed.load_state_dict(algorithm.state_dict())
        algorithm = resumed
        algorithm.update(policy, two_stages(policy, 8, number, algorithm.act))
        optimizers = (algorithm.optimizer, algorithm.critic_optimizer, algorithm.temperature_optimizer)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    assert rates == [[pytest.approx(rate), 3e-4, 0.4] for rate in (0.4, 0.3, 0.2, 0.1)]


def test_a_steered_base_is_refused():
    """Its weights are what its noise was chosen for, by whoever would train them."""
    algorithm, policy = start()
    with pytest.raises(BenchError, match="steered"):
        DSRL(DSRLSettings(**QUICK), policy, BUDGET, 0)
    algorithm.update(policy, two_stages(policy, 8, 0, algorithm.act))
    with pytest.raises(BenchError, match="steered"):
        FPO(FPOSettings(), policy, BUDGET, 0)
    with pytest.raises(BenchError, match="steered"):
        SFT(SFTSettings(), policy, BUDGET, 0)


@pytest.mark.parametrize(
    "bad",
    [{"bound": 0.0}, {"utd": 0.0}, {"batch": 0}, {"polyak": 1.5}, {"gamma": 0.0}, {"target_entropy": 0.7}]
    + [{"bounded": True, "entropy_in_target": True}],
    ids=str,
)
def test_settings_out_of_range(bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        DSRLSettings(**bad).check()
