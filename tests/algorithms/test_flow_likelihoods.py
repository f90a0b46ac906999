"""ReinFlow, Flow-SDE and Flow-Noise against numbers from their authors' code and closed forms."""

import dataclasses
from unittest import mock

import pytest
import torch
from golden import GOLDEN, copy_of_the_golden_flow, formula, seen, surrogate_gradient
from torch.distributions import Normal
from toy import ToyStochasticFlow, asked_of_epochs, two_stages
from vlarl_bench.algorithms.flow_noise import FlowNoise
from vlarl_bench.algorithms.flow_sde import FlowSDE
from vlarl_bench.algorithms.reinflow import ReinFlow

from vlarl_bench import policy_gradient
from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError

BUDGET = BUDGETS["smoke"]
N, STEPS = 6, 4
LEARNED = pytest.mark.parametrize("cls", [ReinFlow, FlowNoise], ids=["reinflow", "flow-noise"])


def make(cls, policy, **changes):
    return cls(cls.Settings(**{"critic_steps": 5, "critic_width": 8, **changes}), policy, BUDGET, 0)


def scored(cls, **changes):
    """(algorithm, policy, decisions) of a fresh round, every second episode a success."""
    policy = ToyStochasticFlow(0, inputs=2)
    algorithm = make(cls, policy, **changes)
    if cls is not FlowSDE:  # noise that is not the same everywhere
        torch.nn.init.normal_(algorithm.noise.layers[-1].weight, generator=torch.Generator().manual_seed(1))
    data = two_stages(policy, 8, 0, algorithm.act)
    for number, episode in enumerate(data.episodes):
        episode.success = number % 4 < 2
    return algorithm, policy, data, decisions(policy, data)


def golden_setup(cls):
    """The golden flow, its chain, and deviations that are the same everywhere."""
    policy, chain = copy_of_the_golden_flow(), torch.tensor(GOLDEN["chain"], dtype=torch.float64)
    settings = {"noise": 0.5} if cls is FlowSDE else {"noise_least": 0.08, "noise_most": 0.16}
    algorithm = make(cls, policy, **settings, **({"numbers": "sum"} if cls is FlowNoise else {}))
    learning = policy.actor_parameters()
    if cls is not FlowSDE:
        algorithm.noise.double()
        with torch.no_grad():
            algorithm.noise.layers[-1].bias.copy_(formula(11, 4))
        learning = [*learning, *algorithm.noise.parameters()]
    return algorithm, policy, chain, learning


def assert_golden(algorithm, policy, taken, learning, golden, old, advantage, clip, entropy=0.0):
    """Loss without the entropy bonus, mean ratio, and gradients. Returns the metrics, and `held`, the share of rows at
    which the clip changes the loss."""
    with (
        mock.patch.object(policy_gradient, "descend", wraps=policy_gradient.descend) as descend,
        mock.patch.object(policy_gradient, "clipped_surrogate", wraps=policy_gradient.clipped_surrogate) as clipped,
    ):
        metrics = surrogate_gradient(
            lambda i: algorithm.score(policy, taken, i), old, advantage, clip, learning, entropy=entropy
        )
    loss = descend.call_args.args[1].item() + entropy * golden["entropy"][0]
    assert loss == pytest.approx(golden["loss"], rel=1e-5)
    ratio, gain, *bounds = clipped.call_args.args
    assert ratio.mean().item() == pytest.approx(golden["ratio mean"], rel=1e-5)
    assert policy.b.grad.tolist() == pytest.approx(golden["gradient of b"], rel=1e-6)
    assert policy.u.grad.tolist() == pytest.approx(golden["gradient of u"], rel=1e-6)
    if "gradient of heights" in golden:
        assert algorithm.noise.layers[-1].bias.grad.tolist() == pytest.approx(golden["gradient of heights"], rel=1e-6)
    held = policy_gradient.clipped_surrogate(ratio, gain, *bounds) < ratio * gain
    return metrics | {"held": held.double().mean().item()}


def column(numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_reinflows_numbers():
    algorithm, policy, chain, learning = golden_setup(ReinFlow)
    golden, taken = GOLDEN["reinflow"], seen(N, trace=chain)
    score = algorithm.score(policy, taken, torch.arange(N))
    torch.testing.assert_close(score.logp, column(golden["logp"]), rtol=1e-7, atol=1e-7)
    assert score.mean_entropy.item() == pytest.approx(golden["entropy"][0], rel=1e-7)
    advantage = formula(5, N)
    advantage = (advantage - advantage.mean()) / advantage.std()  # as their loss does first
    old = column(golden["old"])
    metrics = assert_golden(algorithm, policy, taken, learning, golden, old, advantage, 0.01, entropy=0.03)
    assert metrics["kl"] == pytest.approx(golden["kl"], rel=1e-5)
    # the mean over two steps, and in the first all ratios are 1
    assert 2 * metrics["clip_fraction"] == pytest.approx(golden["clipped"], rel=1e-5)
    assert metrics["held"] == 0.5


def test_flow_sdes_numbers():
    """The hybrid: of each chain the one step that drew counts."""
    algorithm, policy, chain, learning = golden_setup(FlowSDE)
    golden = GOLDEN["flow-sde"]
    label = torch.tensor(golden["step"], dtype=torch.float64)[:, None, None, None].expand(-1, 1, 2, 2)
    taken = seen(N, trace=torch.cat((chain, label), 1))
    score = algorithm.score(policy, taken, torch.arange(N))
    torch.testing.assert_close(score.logp, column(golden["logp"]), rtol=1e-7, atol=1e-7)
    metrics = assert_golden(algorithm, policy, taken, learning, golden, column(golden["old"]), formula(5, N), 0.2)
    assert metrics["held"] == pytest.approx(golden["clipped"], rel=1e-5), "they count what the clip changes"


def test_flow_noises_numbers():
    """Their mean is over the steps and the first noise, whose density no weight changes: ours is over the steps."""
    algorithm, policy, chain, learning = golden_setup(FlowNoise)
    golden, taken = GOLDEN["flow-noise"], seen(N, trace=chain)
    first = Normal(0.0, 1.0).log_prob(chain[:, 0]).sum((1, 2))[:, None]
    theirs = column(golden["logp"])
    score = algorithm.score(policy, taken, torch.arange(N))
    torch.testing.assert_close((score.logp * STEPS + first) / (STEPS + 1), theirs, rtol=1e-7, atol=1e-7)
    entropy = (score.mean_entropy * STEPS + Normal(0.0, 1.0).entropy()) / (STEPS + 1)
    assert entropy.item() == pytest.approx(golden["entropy"][0], rel=1e-6)

    def like_theirs(policy, taken, i):
        ours = FlowNoise.score(algorithm, policy, taken, i)
        return ours._replace(logp=(ours.logp * STEPS + first[i]) / (STEPS + 1))

    algorithm.score = like_theirs
    metrics = assert_golden(algorithm, policy, taken, learning, golden, column(golden["old"]), formula(5, N), 0.2)
    assert metrics["held"] == pytest.approx(golden["clipped"], rel=1e-5), "they count what the clip changes"


def steps_by_hand(policy, taken, n):
    """[4, 2] executed numbers after each step of decision n, and means of the flow's own steps."""
    context = taken.view(torch.tensor([n]))
    means, drawn, starts = [], [], []
    for step in range(STEPS):
        x = taken.trace[n : n + 1, step]
        v = policy.velocity(context, x[:, None], torch.tensor([[1 - step / STEPS]]))[:, 0]
        starts.append(x)
        means.append((x - v / STEPS)[0, 0])  # the first action is the one that was executed
        drawn.append(taken.trace[n, step + 1, 0])
    return torch.stack(drawn), torch.stack(means), torch.cat(starts)


@LEARNED
@pytest.mark.parametrize("numbers", ["mean", "sum"])
def test_learned_noise_score_is_the_density_of_the_executed_numbers(cls, numbers):
    algorithm, policy, _, taken = scored(cls, numbers=numbers)
    got = algorithm.score(policy, taken, torch.tensor([3, 0]))
    for row, n in enumerate((3, 0)):
        drawn, means, starts = steps_by_hand(policy, taken, n)
        features = taken.view(torch.tensor([n])).proprio
        t = torch.tensor([[1.0, 0.75, 0.5, 0.25]])
        deviations = algorithm.noise(features, starts[None], t)[0, :, 0]
        density = Normal(means, deviations).log_prob(drawn).sum()  # of 4 steps of 2 numbers
        divisor = {("mean", ReinFlow): 8, ("sum", ReinFlow): 1, ("mean", FlowNoise): 8, ("sum", FlowNoise): 4}
        assert got.logp[row].item() == pytest.approx(density.item() / divisor[numbers, cls], rel=1e-4)
    assert got.mask.tolist() == [[True], [True]]


def test_each_number_has_the_mean_over_steps_of_its_density():
    algorithm, policy, _, taken = scored(FlowNoise, numbers="each")
    got = algorithm.score(policy, taken, torch.tensor([3]))
    drawn, means, starts = steps_by_hand(policy, taken, 3)
    t = torch.tensor([[1.0, 0.75, 0.5, 0.25]])
    deviations = algorithm.noise(taken.view(torch.tensor([3])).proprio, starts[None], t)[0, :, 0]
    density = Normal(means, deviations).log_prob(drawn).mean(0)  # of 2 numbers, over 4 steps
    assert got.mask.tolist() == [[True, True, False, False]]  # the second action was not executed
    torch.testing.assert_close(got.logp[0, :2], density, rtol=1e-4, atol=1e-5)
    whole = dataclasses.replace(algorithm.settings, numbers="sum")
    algorithm.settings = whole
    torch.testing.assert_close(
        algorithm.score(policy, taken, torch.tensor([3])).logp[0, 0], density.sum(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("numbers", ["mean", "sum"])
def test_the_hybrid_draws_and_scores_one_random_step(numbers):
    algorithm, policy, _, taken = scored(FlowSDE, numbers=numbers, noise=0.6)
    steps = taken.trace[:, -1, 0, 0].long()
    assert set(steps.tolist()) == {0, 1, 2, 3}
    got = algorithm.score(policy, taken, torch.arange(len(taken)))
    for n, chosen in enumerate(steps.tolist()):
        drawn, means, starts = steps_by_hand(policy, taken, n)
        moved = (drawn - means).abs().amax(1) > 1e-5
        assert moved.tolist() == [step == chosen for step in range(STEPS)]
        t, d = 1 - chosen / STEPS, 1 / STEPS
        sigma = 0.6 * (t / max(1 - t, d)) ** 0.5
        x, v = starts[chosen, 0], (starts[chosen, 0] - means[chosen]) * STEPS
        mean = means[chosen] - d * sigma**2 / (2 * t) * (x + (1 - t) * v)
        density = Normal(mean, sigma * d**0.5).log_prob(drawn[chosen]).sum().item()
        assert got.logp[n].item() == pytest.approx(density / (2 if numbers == "mean" else 1), rel=1e-3, abs=1e-4)
    assert got.mask.all()


def test_without_the_hybrid_all_steps_draw():
    algorithm, policy, _, taken = scored(FlowSDE, hybrid=False, noise=0.5)
    assert (taken.trace[:, -1] == -1).all()
    got = algorithm.score(policy, taken, torch.arange(3))
    found = policy.log_prob(taken.view(torch.arange(3)), taken.trace[:3, :-1], taken.mask[:3], 0.5)
    torch.testing.assert_close(got.logp[:, 0], found.logp.sum((1, 2)) / STEPS)
    assert found.mask.sum().item() == 3 * STEPS * 2


def test_an_episodes_own_generator_picks_its_step():
    algorithm, policy, _, taken = scored(FlowSDE)
    context = taken.view(torch.arange(3))

    def act(*seeds):
        return algorithm.act(policy, context, [torch.Generator().manual_seed(seed) for seed in seeds]).trace

    first, again, others = act(0, 1, 2), act(0, 1, 2), act(0, 8, 9)
    assert torch.equal(first, again)
    assert torch.equal(first[0], others[0])


@pytest.mark.parametrize("cls", [ReinFlow, FlowNoise, FlowSDE])
def test_what_was_not_executed_counts_for_nothing(cls):
    algorithm, policy, _, taken = scored(cls)
    i = torch.tensor([2])
    whole = dataclasses.replace(taken, mask=torch.ones_like(taken.mask))
    part, all_of_it = algorithm.score(policy, taken, i), algorithm.score(policy, whole, i)
    assert part.logp.sum().item() != pytest.approx(all_of_it.logp.sum().item())
    nothing = dataclasses.replace(taken, mask=torch.zeros_like(taken.mask))
    none = algorithm.score(policy, nothing, i)
    assert not none.mask.any()
    assert not none.logp.any() and none.mean_entropy.item() == 0


@pytest.mark.parametrize("cls", [ReinFlow, FlowNoise, FlowSDE])
def test_gradient_is_that_of_finite_differences(cls):
    algorithm, policy, chain, learning = golden_setup(cls)
    label = torch.tensor([0, 1, 2, 3, 1, 0])[:, None, None, None].expand(-1, 1, 2, 2)
    taken = seen(N, trace=torch.cat((chain, label), 1) if cls is FlowSDE else chain)
    taken = dataclasses.replace(taken, mask=torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 3, dtype=torch.float64))
    advantage = formula(5, N)
    with torch.no_grad():
        old = algorithm.score(policy, taken, torch.arange(N)).logp - 0.1 * formula(12, N)[:, None]

    def loss():
        score = algorithm.score(policy, taken, torch.arange(N))
        ratio, gain = (score.logp - old).exp(), advantage[:, None]
        return -torch.minimum(ratio * gain, ratio.clamp(0.95, 1.05) * gain).mean() - 0.02 * score.mean_entropy

    surrogate_gradient(lambda i: algorithm.score(policy, taken, i), old, advantage, 0.05, learning, entropy=0.02)
    watched = [policy.b, policy.u] + ([] if cls is FlowSDE else [algorithm.noise.layers[-1].bias])
    for parameter in watched:
        for k in range(4):
            value = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[k] += step
                    value.append(loss().item())
                    parameter[k] -= step
            assert parameter.grad[k].item() == pytest.approx((value[0] - value[1]) / 2e-6, rel=1e-5, abs=1e-7)


@LEARNED
def test_the_noise_network_learns_beside_the_actor_and_is_kept_in_the_state(cls):
    algorithm, policy, data, _ = scored(cls)
    before = {name: tensor.clone() for name, tensor in algorithm.noise.state_dict().items()}
    start = policy.b.detach().clone()
    algorithm.update(policy, data)
    assert not torch.equal(policy.b, start)
    after = algorithm.noise.state_dict()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("noise" in name for name in policy.state_dict())
    other = make(cls, ToyStochasticFlow(0, inputs=2))
    other.load_state_dict(algorithm.state_dict())
    assert all(torch.equal(other.noise.state_dict()[name], tensor) for name, tensor in after.items())


@LEARNED
def test_an_entropy_bonus_makes_more_noise(cls):
    """With no advantage at all, entropy is all there is to gain."""
    algorithm, policy, data, taken = scored(cls, entropy=1.0, lr=1e-2, noise_most=0.16)
    before = algorithm.score(policy, taken, torch.arange(4)).mean_entropy.item()
    for episode in data.episodes:
        episode.success = False
    for _ in range(3):
        algorithm.update(policy, data)
    assert algorithm.score(policy, taken, torch.arange(4)).mean_entropy.item() > before + 0.05


@pytest.mark.parametrize("cls", [ReinFlow, FlowNoise, FlowSDE])
def test_epochs_are_taken_as_the_settings_say(monkeypatch, cls):
    given = asked_of_epochs(monkeypatch)
    asked = {"clip_eps": 0.07, "epochs": 3, "minibatch": 5, "target_kl": 0.7}
    asked |= {} if cls is FlowSDE else {"entropy": 0.3}
    algorithm, policy, data, _ = scored(cls, **asked)
    algorithm.update(policy, data)
    assert given == asked


SHARED = [{"clip_eps": 0.0}, {"target_kl": 0.0}, {"epochs": 0}, {"warmup": -1}, {"gamma": 0.0}]
NOISE = [{"noise_least": 0.0}, {"noise_least": 0.2}, {"noise_width": 0}, {"entropy": -0.1}]


@pytest.mark.parametrize(
    ("cls", "bad"),
    [(cls, bad) for cls in (ReinFlow, FlowNoise) for bad in SHARED + NOISE]
    + [(FlowSDE, bad) for bad in [*SHARED, {"noise": 0.0}]],
    ids=str,
)
def test_settings_out_of_range(cls, bad):
    with pytest.raises(BenchError, match=f"algo.{next(iter(bad))}"):
        cls.Settings(**bad).check()


def test_flow_sde_can_weigh_episodes_alike(monkeypatch):
    algorithm, policy, _, _ = scored(FlowSDE, weigh="episode")
    given = []
    monkeypatch.setattr(algorithm.learner, "judge", lambda taken: (torch.arange(len(taken)) + 1.0, {}))
    monkeypatch.setattr(algorithm.learner, "ascend", lambda score, advantage, *a, **more: given.append(advantage) or {})
    rollout = two_stages(policy, 6, 0, algorithm.act)
    first, *others = rollout.episodes
    cut = {name: getattr(first, name)[:1] for name in ("latents", "traces", "actions")}
    first = dataclasses.replace(first, observations=first.observations[:2], **cut)
    rollout = dataclasses.replace(rollout, episodes=[first, *others])
    algorithm.update(policy, rollout)
    counts = [len(e.latents) for e in rollout.episodes]
    share = given[0] / (torch.arange(sum(counts)) + 1.0)
    assert counts[0] < counts[1]
    assert [part.sum().item() for part in share.split(counts)] == pytest.approx([sum(counts) / 6] * 6)
