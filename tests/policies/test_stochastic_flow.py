"""Euler steps that draw, against the authors' public code and closed forms; the exact density against known ones."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Normal

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.inputs import Rows
from vlarl_bench.policies.noise import LearnedNoise, bounded
from vlarl_bench.policies.pi0 import Pi0, Pi0Architecture
from vlarl_bench.policies.presets import PI0_TINY
from vlarl_bench.policies.stochastic_flow import StochasticFlow
from vlarl_bench.policies.vocabulary import Vocabulary

from .conftest import INSTRUCTIONS, OBJECTS, in_float64, make, observe

GOLDEN = json.loads((Path(__file__).parent / "flow_golden.json").read_text())


@dataclasses.dataclass(frozen=True)
class Nothing(Rows):
    """A context of n rows in which nothing is seen."""

    seen: torch.Tensor


def rows(n):
    return Nothing(torch.zeros(n, 1))


class Toy(StochasticFlow):
    """A flow whose velocity is given; latents are actions."""

    def __init__(self, field, chunk=1, action_dim=1, steps=5, dtype=torch.float32):
        super().__init__()
        self.field, self.chunk, self.action_dim, self.euler_steps = field, chunk, action_dim, steps
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def velocity(self, context, x, t):
        return self.scale * self.field(x, t[..., None, None])

    def features(self, context):
        return context.seen

    def unnormalise(self, latent):
        return latent


Toy.__abstractmethods__ = frozenset()


def toy_of_the_golden_numbers():
    return Toy(lambda x, t: 0.8 * torch.sin(1.5 * x) + t - 0.3, chunk=2, action_dim=3)


def golden_chain():
    return (1.3 * torch.sin(1.7 * torch.arange(72, dtype=torch.float64))).float().view(2, 6, 2, 3)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_of(policy, seeds):
    """What `explore` draws: the first noise, then that of each step."""
    shape = (policy.chunk, policy.action_dim)
    drawn = [(torch.randn(1, *shape, generator=g), torch.randn(policy.euler_steps, *shape, generator=g)) for g in seeds]
    return torch.stack([torch.cat(pair) for pair in drawn])


@pytest.mark.parametrize("level", [0.5, 0.8])
def test_the_sde_is_that_of_pi_rl(level):
    golden = GOLDEN["rlinf"][f"flow_sde {level}"]
    scored = toy_of_the_golden_numbers().log_prob(rows(2), golden_chain(), torch.ones(2, 2), level)
    torch.testing.assert_close(scored.logp.flatten(1), torch.tensor(golden["logp"]), atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scored.entropy[0, :, 0], torch.tensor(golden["entropy"]), atol=1e-5, rtol=1e-5)


def test_the_sde_is_that_of_flow_grpo():
    golden = GOLDEN["flow_grpo"]
    scored = toy_of_the_golden_numbers().log_prob(rows(2), golden_chain(), torch.ones(2, 2), 0.7)
    torch.testing.assert_close(scored.logp.mean(2), torch.tensor(golden["mean logp"]), atol=1e-4, rtol=1e-5)
    entropy = [stats.norm(scale=std).entropy() for std in golden["std"]]
    torch.testing.assert_close(scored.entropy[0, :, 0], torch.tensor(entropy).float(), atol=1e-5, rtol=1e-5)


def test_learned_noise_is_that_of_reinflow():
    golden = GOLDEN["reinflow"]
    heights, deviations = torch.tensor(golden["heights"]), torch.tensor(golden["deviations"])
    torch.testing.assert_close(bounded(heights, 0.08, 0.16), deviations)
    noise = LearnedNoise(1, 2, 3, 0.08, 0.16)
    with torch.no_grad():
        noise.layers[-1].bias.copy_(heights)
    scored = toy_of_the_golden_numbers().log_prob(rows(2), golden_chain(), torch.ones(2, 2), noise)
    torch.testing.assert_close(scored.logp.sum((1, 2)), torch.tensor(golden["logp"]), atol=1e-2, rtol=1e-5)
    # Their entropy rate is a mean over numbers of the chain; the first noise's density is a constant that ours omits.
    torch.testing.assert_close(scored.entropy.sum(2).mean(1), torch.tensor(golden["entropy rate"]))
    first = Normal(0, 1).log_prob(golden_chain()[:, 0]).sum((1, 2))
    with_first = scored.logp.sum((1, 2)) + first
    torch.testing.assert_close(with_first, torch.tensor(golden["logp with the first noise"]), atol=1e-2, rtol=1e-5)


def gaussian_flow(mean, deviation):
    """The exact velocity from N(0, 1) at t = 1 to N(mean, deviation^2) at t = 0: E[noise - latent | x]."""

    def field(x, t):
        centred, variance = x - (1 - t) * mean, t**2 + (1 - t) ** 2 * deviation**2
        return t * centred / variance - (mean + (1 - t) * deviation**2 * centred / variance)

    return field


def moments(steps, level, mean, deviation):
    """Mean and variance of what a Gaussian flow's chain ends in, carried through its (affine) steps."""
    policy = Toy(gaussian_flow(mean, deviation), steps=steps, dtype=torch.float64)
    m, v = 0.0, 1.0
    with torch.no_grad():
        for step in range(steps):
            at = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            zero, std = policy.transitions(rows(1), at, step, level)
            one, _ = policy.transitions(rows(1), at + 1, step, level)
            gain = float(one - zero)
            m, v = gain * m + float(zero), gain**2 * v + float(std) ** 2
    return m, v


@pytest.mark.parametrize("level", [0.3, 0.7])
def test_the_sde_keeps_the_marginals_as_steps_get_short(level):
    """Every level ends in the flow's own distribution. At few steps neither the ODE nor the SDE does."""
    few, many = moments(10, level, 0.4, 0.6), moments(1000, level, 0.4, 0.6)
    assert abs(many[1] - 0.36) < min(2e-3, abs(few[1] - 0.36) / 10)
    assert many[0] == pytest.approx(0.4, abs=1e-4)


def test_what_was_sampled_has_the_probability_that_is_scored():
    policy = toy_of_the_golden_numbers()
    noise = noise_of(policy, generators(*range(4)))
    for level in (0.2, 1.0):
        sample = policy.explore(rows(4), generators(*range(4)), level)
        x, trace, logp = noise[:, 0], [noise[:, 0]], []
        for i, t in enumerate((1.0, 0.8, 0.6, 0.4, 0.2)):
            v = 0.8 * torch.sin(1.5 * x) + t - 0.3
            sigma = level * math.sqrt(t / (1 - t if t < 1 else 0.2))
            score = -(x + (1 - t) * v) / t
            std = sigma * math.sqrt(0.2)
            x = x - 0.2 * v + 0.2 * sigma**2 / 2 * score + std * noise[:, i + 1]
            trace.append(x)
            logp.append(-0.5 * noise[:, i + 1].flatten(1) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi))
        torch.testing.assert_close(sample.trace, torch.stack(trace, 1), atol=1e-5, rtol=1e-5)
        assert torch.equal(sample.latent, sample.trace[:, -1])
        scored = policy.log_prob(rows(4), sample.trace, torch.ones(4, 2), level)
        torch.testing.assert_close(scored.logp, torch.stack(logp, 1), atol=1e-5, rtol=1e-5)
        assert scored.mask.all()


@pytest.mark.parametrize("learned", [False, True])
def test_the_density_of_a_chain_integrates_to_that_of_its_samples(learned):
    """Two steps of one number and a velocity that is not linear: brute force over the middle draw."""
    policy = Toy(lambda x, t: 1.5 * torch.tanh(2 * x) + t, steps=2)
    noise = 0.6
    if learned:
        noise = LearnedNoise(1, 1, 1, 0.2, 0.9)
        torch.nn.init.normal_(noise.layers[-1].weight, generator=generators(1)[0])
    middle, last, start = torch.linspace(-8, 8, 1601), torch.linspace(-8, 8, 161), 0.7

    def density(z):
        trace = torch.stack((torch.full_like(middle, start), middle, torch.full_like(middle, z)), 1)[..., None, None]
        with torch.no_grad():
            return policy.log_prob(rows(1601), trace, torch.ones(1601, 1), noise).logp.sum((1, 2)).exp()

    marginal = np.array([integrate.trapezoid(density(z), middle) for z in last.tolist()])
    assert integrate.trapezoid(marginal, last) == pytest.approx(1, abs=1e-3)
    n = 20_000
    with torch.no_grad():
        x, draw = torch.full((n, 1, 1), start), torch.randn(n, 2, 1, 1, generator=generators(0)[0])
        for step in range(2):
            mean, std = policy.transitions(rows(n), x[:, None], step, noise)
            x = (mean + std * draw[:, step : step + 1])[:, 0]
    edges = [0, 70, 75, 80, 85, 160]  # -8, -1, -0.5, 0, 0.5, 8
    counted = torch.histogram(x.flatten(), last[edges].contiguous()).hist / n
    pieces = [slice(low, high + 1) for low, high in itertools.pairwise(edges)]
    expected = [integrate.trapezoid(marginal[piece], last[piece]) for piece in pieces]
    np.testing.assert_allclose(counted, expected, atol=0.015)


def test_what_was_not_executed_or_not_drawn_counts_for_nothing():
    policy = toy_of_the_golden_numbers()
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    levels = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5]])
    whole = policy.log_prob(rows(2), golden_chain(), torch.ones(2, 2), 0.5)
    part = policy.log_prob(rows(2), golden_chain(), mask, levels)
    expected = torch.ones(2, 5, 2, 3, dtype=torch.bool)
    expected[0, :, 1] = False
    expected[0, [0, 2, 3, 4]] = False
    assert torch.equal(part.mask, expected.flatten(2))
    for found, all_of_it in ((part.logp, whole.logp), (part.entropy, whole.entropy)):
        assert torch.equal(found, torch.where(part.mask, all_of_it, 0))
    policy.zero_grad()
    part.logp.sum().backward()
    assert policy.scale.grad.isfinite()


def test_a_step_at_level_zero_is_one_of_the_ode():
    """pi_RL draws at one random step and follows the ODE elsewhere."""
    policy = toy_of_the_golden_numbers()
    levels = torch.zeros(2, 5)
    levels[0, 1] = levels[1, 3] = 0.5
    trace = policy.explore(rows(2), generators(0, 1), levels).trace
    noise = noise_of(policy, generators(0, 1))
    for i, t in enumerate((1.0, 0.8, 0.6, 0.4, 0.2)):
        ode = trace[:, i] - (0.8 * torch.sin(1.5 * trace[:, i]) + t - 0.3) / 5
        moved = (trace[:, i + 1] - ode).abs().amax((1, 2)) > 1e-5
        assert moved.tolist() == [i == 1, i == 3]
    assert torch.equal(trace[:, 0], noise[:, 0])


def test_learned_noise_draws_what_it_says_and_learns():
    policy, noise = toy_of_the_golden_numbers(), LearnedNoise(1, 2, 3, 0.08, 0.16, seed=3)
    torch.nn.init.normal_(noise.layers[-1].weight, generator=generators(1)[0])
    sample = policy.explore(rows(4), generators(*range(4)), noise)
    x = sample.trace[:, :-1]
    t = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    std = noise(torch.zeros(4, 1), x, t.expand(4, 5))
    assert std.min() >= 0.08
    assert std.max() <= 0.16
    assert std.std() > 0.005
    mean = x - 0.2 * (0.8 * torch.sin(1.5 * x) + t[:, None, None] - 0.3)
    scored = policy.log_prob(rows(4), sample.trace, torch.ones(4, 2), noise)
    expected = Normal(mean, std)
    torch.testing.assert_close(scored.logp, expected.log_prob(sample.trace[:, 1:]).flatten(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.entropy, expected.entropy().flatten(2))
    eps = noise_of(policy, generators(*range(4)))[:, 1:]
    teacher = (-0.5 * eps**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(2)
    torch.testing.assert_close(scored.logp, teacher, atol=1e-5, rtol=1e-5)
    (scored.logp.sum() + scored.entropy.sum()).backward()
    assert all(p.grad.abs().max() > 0 for p in noise.parameters())
    assert policy.scale.grad.abs() > 0


def test_learned_noise_begins_in_the_middle_and_the_same_from_a_seed():
    before = torch.get_rng_state()
    first, again, other = (LearnedNoise(4, 2, 3, 0.04, 0.16, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.layers[0].weight, again.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)
    x, t = torch.randn(5, 2, 2, 3), torch.rand(5, 2)
    torch.testing.assert_close(first(torch.randn(5, 4), x, t), torch.full((5, 2, 2, 3), 0.08))
    constant = LearnedNoise(4, 2, 3, 0.1, 0.1)
    torch.nn.init.normal_(constant.layers[-1].weight)
    torch.testing.assert_close(constant(torch.randn(5, 4), x, t), torch.full((5, 2, 2, 3), 0.1))


@pytest.mark.parametrize(("least", "most"), [(0.0, 0.1), (0.2, 0.1), (0.1, math.inf), (math.nan, 0.1)])
def test_bounds_that_are_none(least, most):
    with pytest.raises(BenchError, match=r"^noise: least .*0 < least <= most"):
        LearnedNoise(4, 2, 3, least, most)


@pytest.mark.parametrize(
    "noise",
    [0.0, -1.0, math.nan, math.inf, torch.zeros(2, 4), -torch.ones(2, 5), torch.full((2, 5), math.nan)],
    ids=str,
)
def test_levels_that_are_none(noise):
    policy = toy_of_the_golden_numbers()
    with pytest.raises(BenchError, match=r"^noise: ") as error:
        policy.explore(rows(2), generators(0, 1), noise)
    assert "\n" not in str(error.value)
    with pytest.raises(BenchError, match=r"^noise: "):
        policy.log_prob(rows(2), golden_chain(), torch.ones(2, 2), noise)


def test_exact_density_of_a_gaussian_flow():
    policy = Toy(gaussian_flow(0.4, 0.6), chunk=3, action_dim=2, dtype=torch.float64)
    latent = torch.randn(7, 3, 2, generator=generators(0)[0])
    expected = Normal(0.4, 0.6).log_prob(latent.double()).sum((1, 2))
    torch.testing.assert_close(policy.ode_log_prob(rows(7), latent, 32), expected, atol=1e-5, rtol=0)
    errors = [(policy.ode_log_prob(rows(7), latent, steps) - expected).abs().max() for steps in (4, 8, 16)]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]  # of fourth order


def mixture_flow(means, deviation):
    """The exact velocity to a mixture of equal Gaussians in two dimensions, [M, 2] means."""

    def field(x, t):
        centred = x[..., None, :] - (1 - t)[..., None] * means  # [B, K, 1, M, 2]
        variance = (t**2 + (1 - t) ** 2 * deviation**2)[..., None]
        weight = (-0.5 * centred.square().sum(-1, keepdim=True) / variance).softmax(-2)
        latent = means + (1 - t)[..., None] * deviation**2 * centred / variance
        return (weight * (t[..., None] * centred / variance - latent)).sum(-2)

    return field


def test_exact_density_of_a_mixture_and_its_integral():
    means, deviation = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64), 0.4
    policy = Toy(mixture_flow(means, deviation), chunk=1, action_dim=2, dtype=torch.float64)
    line = torch.linspace(-3.5, 3.5, 36, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    found = policy.ode_log_prob(rows(len(grid)), grid[:, None], 48)
    components = Normal(means, deviation).log_prob(grid[:, None]).sum(-1)
    expected = components.logsumexp(1) - math.log(3)
    inside = expected > -12
    torch.testing.assert_close(found[inside], expected[inside], atol=2e-3, rtol=0)
    assert (found.exp().sum() * (7 / 35) ** 2).item() == pytest.approx(1, abs=1e-3)


def small_pi0(chunk, action_dim):
    """An untrained pi0 of few numbers, bent, and one observation."""
    sizes = {"layers": 2, "heads": 2, "head_dim": 16, "prefix_width": 32, "prefix_mlp": 32, "expert_width": 32}
    a = Pi0Architecture("state", action_dim, 8, chunk, expert_mlp=32, **sizes)
    policy = Pi0("pi0-tiny", a, Vocabulary.of([*INSTRUCTIONS, *OBJECTS]), seed=1)
    with torch.no_grad():
        bend(policy, 11)
        return policy, policy.encode(policy.preprocess([observe(0)]))


def bend(policy, fast):
    """Makes more of actions and velocities than random weights do, whose flow has hardly a divergence. And time enters
    through waves of periods from 0.004 to 4, fastest first: only without the `fast` ones do few steps solve the field.
    """
    embed = policy.model.embed_action_time
    embed.action_in_proj.weight.mul_(8)
    policy.model.action_out_proj.weight.mul_(4)
    waves = embed.action_time_mlp_in.weight[:, policy.architecture.expert_width :]
    waves.unflatten(1, (2, -1))[:, :, :fast].zero_()  # sines, then cosines


def test_exact_density_of_pi0_integrates_to_one():
    policy, context = small_pi0(1, 1)
    line = torch.linspace(-6, 6, 121)
    many = context.index(torch.zeros(121, dtype=torch.long))
    logp = policy.ode_log_prob(many, line[:, None, None], 16)
    assert integrate.trapezoid(logp.exp(), line) == pytest.approx(1, abs=1e-3)
    # And it is not just the normal distribution that the noise has.
    assert (logp - Normal(0, 1).log_prob(line.double())).abs().max() > 0.1


def test_exact_density_of_pi0_is_the_change_of_volume_of_fine_euler_steps():
    """Another way to the same number: log|det| of each of many Euler maps, from a known noise to its latent."""
    policy, context = small_pi0(2, 2)
    steps = 100
    x = torch.randn(1, 2, 2, generator=generators(1)[0])
    start = logp = Normal(0, 1).log_prob(x).sum().double()
    for step in range(steps):
        t = torch.full((1, 1), 1 - step / steps)

        def euler(x, t=t):
            return x - policy.velocity(context, x.view(1, 1, 2, 2), t).flatten() / steps

        jacobian = torch.autograd.functional.jacobian(euler, x.flatten())
        logp = logp - jacobian.double().slogdet().logabsdet
        x = euler(x.flatten()).detach().view(1, 2, 2)
    assert policy.ode_log_prob(context, x, 32).item() == pytest.approx(logp.item(), abs=5e-3)
    assert abs(logp - start) > 0.1


def test_exact_density_of_pi0_tiny_is_approached_in_the_fourth_order(float64):
    """To what another solver makes of differences of velocities, over the first two actions of a chunk."""
    tiny = make(PI0_TINY)
    policy = Pi0("pi0-tiny", dataclasses.replace(tiny.architecture, chunk=2), tiny.vocabulary)
    policy.load_state_dict(tiny.state_dict())
    x = torch.randn(1, 2, 7, generator=generators(1)[0])
    with torch.no_grad():
        bend(policy, 36)
        context = policy.encode(in_float64(policy.preprocess([observe(0)])))

    def flow(t, state):
        aside = 1e-4 * np.eye(14)
        points = torch.from_numpy(state[:-1] + np.r_[np.zeros((1, 14)), aside, -aside]).view(1, 29, 2, 7)
        with torch.no_grad():
            here, up, down = policy.velocity(context, points, torch.full((1, 29), t)).view(29, 14).split((1, 14, 14))
        return np.r_[here[0], (up - down).trace() / 2e-4]

    *end, change = integrate.solve_ivp(flow, (0, 1), np.r_[x.flatten(), 0], "DOP853", rtol=1e-5, atol=1e-9).y[:, -1]
    exact = stats.norm.logpdf(end).sum() + change
    errors = [abs(policy.ode_log_prob(context, x, steps).item() - exact) for steps in (4, 8, 16)]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]
    assert errors[2] < 1e-5
    assert abs(change) > 0.1


def test_exact_density_needs_steps():
    with pytest.raises(BenchError, match=r"^steps: 0"):
        Toy(gaussian_flow(0.0, 1.0)).ode_log_prob(rows(1), torch.zeros(1, 1, 1), 0)
