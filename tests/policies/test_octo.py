"""octo-tiny: the denoising chain and its likelihood against closed forms, and what the diffusion seam promises."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.octo import Octo, Subwords
from vlarl_bench.policies.octo_model import OctoArchitecture
from vlarl_bench.policies.presets import OCTO_BASE, OCTO_SMALL, OCTO_TINY, OCTO_TINY_PIXELS
from vlarl_bench.policies.vocabulary import Vocabulary
from vlarl_bench.suite import Embodiment

from .conftest import INSTRUCTIONS, OBJECTS, in_float64, make, observe
from .octo_golden import tokenizer_json


@pytest.fixture(params=[OCTO_TINY, OCTO_TINY_PIXELS], ids=lambda spec: spec.name)
def spec(request):
    return request.param


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draws(n, k, steps=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, 8, 7, generator=g), torch.randint(steps, (n, k), generator=g)


def chain(policy, context, noise, least):
    """Written out again, from Ho et al., 2020, eq. 6-7, with velocities: trace and log-density of each step's draw."""
    f = [np.cos((t / 10 + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(11)]
    betas = [min(1 - f[t + 1] / f[t], 0.999) for t in range(10)]
    kept = np.cumprod([1, *(1 - beta for beta in betas)])
    x, trace, logp = noise[:, 0], [noise[:, 0]], []
    for i, t in enumerate(reversed(range(10))):
        a, after = kept[t], kept[t + 1]
        with torch.no_grad():
            velocity = policy.model.head(context.readout, x.flatten(1), torch.full((len(x),), t)).view(x.shape)
        latent = (np.sqrt(after) * x - np.sqrt(1 - after) * velocity).clamp(-5, 5)
        mean = np.sqrt(a) * betas[t] / (1 - after) * latent + np.sqrt(1 - betas[t]) * (1 - a) / (1 - after) * x
        deviation = max(np.sqrt((1 - a) / (1 - after) * betas[t]), least)
        drawn = mean + deviation * noise[:, i + 1]
        if deviation:
            logp.append(torch.distributions.Normal(mean, deviation).log_prob(drawn).flatten(1))
        trace.append(drawn)
        x = drawn.clamp(-5, 5)
    return torch.stack(trace, 1), torch.stack(logp, 1)


def noise_of(policy, seeds):
    shape = (policy.denoising_steps + 1, policy.chunk, policy.action_dim)
    return torch.stack([torch.randn(shape, generator=g) for g in generators(*seeds)])


def test_sample_and_explore_are_the_chain(policy, context):
    noise = noise_of(policy, range(5))
    trace, _ = chain(policy, context, noise, 0.0)
    sample = policy.sample(context, generators(*range(5)))
    torch.testing.assert_close(sample.latent, trace[:, -1].clamp(-5, 5), atol=1e-4, rtol=1e-5)
    assert sample.trace is None
    trace, _ = chain(policy, context, noise, 0.3)
    explored = policy.explore(context, generators(*range(5)), 0.3)
    torch.testing.assert_close(explored.trace, trace, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(explored.latent, explored.trace[:, -1].clamp(-5, 5))
    torch.testing.assert_close(explored.actions, policy.unnormalise(explored.latent))
    zero, _ = chain(policy, context, torch.zeros_like(noise), 0.0)
    torch.testing.assert_close(policy.sample(context, None).latent, zero[:, -1].clamp(-5, 5), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("least", [0.05, 0.5])
def test_log_probability_of_what_was_sampled_is_that_of_what_is_scored(policy, context, least):
    explored = policy.explore(context, generators(*range(5)), least)
    _, expected = chain(policy, context, noise_of(policy, range(5)), least)
    mask = torch.ones(5, 8)
    found = policy.log_prob(context, explored.trace, mask, least)
    assert found.logp.shape == found.entropy.shape == found.mask.shape == (5, 10, 56)
    assert found.mask.all()
    torch.testing.assert_close(found.logp.mean((1, 2)), expected.mean((1, 2)), atol=1e-5, rtol=1e-5)
    # Divided by a deviation of 0.05, rounding shows in single numbers.
    torch.testing.assert_close(found.logp, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("least", [0.05, 0.5])
def test_a_decision_has_the_log_probability_that_it_was_drawn_with(spec, least, float64):
    """To 1e-5 in all its numbers, where float32 has each to 2e-4."""
    policy = make(spec)
    with torch.no_grad():
        context = policy.encode(in_float64(policy.preprocess([observe(i, spec) for i in range(5)])))
    trace = policy.explore(context, generators(*range(5)), least).trace
    _, expected = chain(policy, context, noise_of(policy, range(5)), least)
    mask = torch.ones(5, 8)
    mask[1, 3:] = 0
    with torch.no_grad():
        found = policy.log_prob(context, trace, mask, least)
    assert found.logp.dtype == torch.float64
    expected = (expected.unflatten(2, (8, 7)) * mask[:, None, :, None]).flatten(2)
    torch.testing.assert_close(found.logp.sum((1, 2)), expected.sum((1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logp, expected, atol=1e-5, rtol=0)


def test_entropy_and_mask_by_hand(policy, context):
    trace = policy.explore(context, generators(*range(5)), 0.2).trace
    mask = torch.ones(5, 8)
    mask[1, 3:] = 0
    found = policy.log_prob(context, trace, mask, 0.2)
    assert found.mask[1, :, :21].all()
    assert not found.mask[1, :, 21:].any()
    assert not found.logp[1, :, 21:].any()
    assert not found.entropy[1, :, 21:].any()
    kept = (1 - policy.betas.double()).cumprod(0).tolist()
    variances = [float(policy.betas[t]) * (1 - kept[t - 1]) / (1 - kept[t]) if t else 0.0 for t in reversed(range(10))]
    expected = [stats.norm(scale=max(variance**0.5, 0.2)).entropy() for variance in variances]
    torch.testing.assert_close(found.entropy[0, :, 0], torch.tensor(expected).float())
    full = policy.log_prob(context, trace, torch.ones(5, 8), 0.2)
    assert torch.equal(full.logp[1, :, :21], found.logp[1, :, :21])


def one_number(policy, slope=0.0):
    """Makes the head predict slope * x from nothing but x: silu(h) - silu(-h) = h."""
    head = policy.model.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        x = head.input.weight.shape[1] - 1
        head.input.weight[0, x], head.input.weight[1, x] = 1, -1
        head.output.weight[0, 0], head.output.weight[0, 1] = slope, -slope
    return policy


def single(steps, limit=5.0, posterior=False):
    a = OctoArchitecture("state", 1, 3, chunk=1, width=16, layers=1, heads=2, mlp=16, word_width=8, head_width=8)
    a = dataclasses.replace(a, denoising_steps=steps, max_latent=limit, posterior=posterior)
    policy = Octo("octo-tiny", a, Vocabulary.of([*INSTRUCTIONS, *OBJECTS]))
    seen = dataclasses.replace(observe(0), proprio=np.zeros(3, np.float32))
    with torch.no_grad():
        return policy, policy.encode(policy.preprocess([seen]))


def rows(context, n):
    return context.index(torch.zeros(n, dtype=torch.long))


def test_a_linear_chain_ends_in_its_closed_form():
    """With noise predicted as slope * x and no clipping, everything is Gaussian: the last variance is a recursion."""
    policy, context = single(8, limit=1e6)
    one_number(policy, 0.9)
    n, least = 40_000, 0.3
    variance, betas = 1.0, policy.betas.double()
    for t in reversed(range(8)):
        kept = (1 - betas[: t + 1]).prod()
        gain = (1 - betas[t] / (1 - kept).sqrt() * 0.9) / (1 - betas[t]).sqrt()
        variance = gain**2 * variance + max(betas[t] if t else 0, least**2)
    seeds = [torch.Generator().manual_seed(i) for i in range(n)]
    sample = policy.explore(rows(context, n), seeds, least)
    assert sample.latent.mean().item() == pytest.approx(0, abs=4 * float(variance / n) ** 0.5)
    assert sample.latent.var().item() == pytest.approx(float(variance), rel=0.04)
    # And every density is known.
    trace = sample.trace[:2000]
    logp = policy.log_prob(rows(context, 2000), trace, torch.ones(2000, 1), least).logp.sum((1, 2))
    x, expected = trace.flatten(1).double(), 0.0
    for i, t in enumerate(reversed(range(8))):
        kept = (1 - betas[: t + 1]).prod()
        gain = (1 - betas[t] / (1 - kept).sqrt() * 0.9) / (1 - betas[t]).sqrt()
        deviation = max(betas[t].sqrt().item() if t else 0, least)
        expected = expected + torch.from_numpy(stats.norm(gain * x[:, i], deviation).logpdf(x[:, i + 1]))
    torch.testing.assert_close(logp.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("posterior", [False, True])
def test_the_density_of_a_chain_integrates_to_that_of_its_samples(posterior):
    """Two steps, one number, a network that is not linear and a clip that bites: brute force over the middle draw."""
    policy, context = single(2, 1.5, posterior)
    least, start = 0.4, 0.7
    middle = torch.linspace(-40, 40, 8001)
    last = torch.linspace(-4, 4, 81)

    def density(m, z):
        trace = torch.stack((torch.full_like(m, start), m, z), 1)[..., None, None]
        with torch.no_grad():
            return policy.log_prob(rows(context, len(m)), trace, torch.ones(len(m), 1), least).logp.sum((1, 2)).exp()

    marginal = [integrate.trapezoid(density(middle, torch.full_like(middle, z)), middle) for z in last.tolist()]
    assert integrate.trapezoid(marginal, last) == pytest.approx(1, abs=0.01)
    # Chains from that start: a generator whose first number is drawn anew, then replaced by the start.
    noise = torch.randn(20_000, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = start
    with torch.no_grad():
        trace, _ = chain_from(policy, rows(context, len(noise)), noise, least)
    counted = torch.histogram(trace[:, -1].flatten(), torch.tensor([-4.0, -1, 0, 1, 4])).hist / len(noise)
    pieces = [slice(0, 31), slice(30, 41), slice(40, 51), slice(50, 81)]
    expected = [integrate.trapezoid(marginal[piece], last[piece]) for piece in pieces]
    np.testing.assert_allclose(counted, expected, atol=0.015)


def chain_from(policy, context, noise, least):
    x, trace, limit = noise[:, 0], [noise[:, 0]], policy.architecture.max_latent
    for i, deviation in enumerate(policy.deviations(least)):
        t = torch.full((len(x), 1), policy.denoising_steps - 1 - i)
        drawn = policy.means(context, x[:, None], t)[:, 0] + deviation * noise[:, i + 1]
        trace.append(drawn)
        x = drawn.clamp(-limit, limit)
    return torch.stack(trace, 1), x


@pytest.mark.parametrize("posterior", [False, True])
def test_a_head_that_knows_the_noise_denoises_to_the_latent(posterior):
    """x_t = sqrt(a) latent + sqrt(1 - a) noise: for a latent of zero the noise is x / sqrt(1 - a), whatever it was."""
    policy, context = single(10, 5.0, posterior)
    noise, zero = torch.randn(1, 4, 1, 1), torch.zeros(1, 1, 1)
    t = torch.tensor([[0, 3, 7, 9]])
    one_number(policy, 1.0)
    scale = (1 - policy.kept[t]).sqrt()[..., None, None]
    expected = (scale * noise - noise) ** 2  # it predicts x itself
    torch.testing.assert_close(policy.denoising_loss(context, zero, t, noise), expected)
    with torch.no_grad():
        # One step of an exact head from x_0 = sqrt(1 - a_0) noise ends at the latent.
        x = (1 - policy.kept[0]).sqrt() * noise[:, :1]
        policy.predict = lambda context, x, t: x / (1 - policy.kept[t]).sqrt()[..., None, None]
        torch.testing.assert_close(policy.means(context, x, t[:, :1]), torch.zeros(1, 1, 1, 1), atol=1e-6, rtol=0)


def test_without_a_clip_the_posterior_has_the_authors_mean():
    """The two samplers are one formula, with the predicted latent or the predicted noise in it."""
    (authors, context), (posterior, _) = single(10, 1e9, False), single(10, 1e9, True)
    x, t = torch.randn(1, 10, 1, 1, generator=generators(0)[0]), torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(authors.means(context, x, t), posterior.means(context, x, t), atol=1e-4, rtol=1e-4)
    assert (authors.deviations(0.0) >= posterior.deviations(0.0)).all()


def test_denoising_loss_takes_k_draws_and_clips_latents(policy, context):
    noise, t = draws(5, 3)
    latent = 3 * torch.randn(5, 8, 7, generator=generators(1)[0])
    together = policy.denoising_loss(context, latent, t, noise)
    assert together.shape == (5, 3, 8, 7)
    for k in range(3):
        alone = policy.denoising_loss(context, latent, t[:, k : k + 1], noise[:, k : k + 1])
        torch.testing.assert_close(together[:, k : k + 1], alone, atol=1e-5, rtol=1e-4)
    clipped = policy.denoising_loss(context, latent.clamp(-5, 5), t, noise)
    assert (latent.abs() > 5).any()
    assert torch.equal(together, clipped)


def test_draw_loss_is_that_of_what_the_head_predicts_at_the_step_a_time_falls_in(policy, context):
    noise, _ = draws(5, 3)
    latent, steps = torch.randn(5, 8, 7, generator=generators(1)[0]), policy.denoising_steps
    step = torch.tensor([0, steps // 2, steps - 1]).expand(5, 3)
    expected = policy.denoising_loss(context, latent, step, noise) / policy.kept[step][..., None, None]
    assert policy.architecture.predicts == "velocity"
    for t in ((step + 0.5) / steps, torch.tensor([0.0, 0.5, 1.0]).expand(5, 3)):
        assert torch.equal(policy.draw_loss(context, latent, t, noise), expected)


def test_sft_loss_counts_only_real_steps(policy, context):
    actions, mask = policy.unnormalise(torch.zeros(5, 8, 7)), torch.zeros(5, 8)
    mask[0, :3] = mask[1, :8] = 1
    with torch.no_grad():
        for parameter in policy.model.head.output.parameters():
            parameter.zero_()
    loss = policy.sft_loss(context, actions, mask, generators(0)[0])
    # Nothing is predicted, so what is left is the velocity, sqrt(kept) noise: 11 steps x 4 draws x 7 numbers.
    assert loss.item() == pytest.approx(policy.kept.mean().item(), rel=0.3)
    other = policy.sft_loss(context, actions, torch.ones(5, 8), generators(0)[0])
    assert other.item() != loss.item()


def test_gradients_reach_exactly_the_actor(policy, context):
    noise, t = draws(5, 2)
    actor = policy.actor_parameters()
    trace = policy.explore(context, generators(*range(5)), 0.1).trace
    for score in (
        lambda: policy.denoising_loss(context, torch.zeros(5, 8, 7), t, noise).mean(),
        lambda: policy.log_prob(context, trace, torch.ones(5, 8), 0.1).logp.mean(),
    ):
        policy.zero_grad()
        score().backward()
        assert {id(p) for p in policy.parameters() if p.grad is not None} == {id(p) for p in actor}
        assert all(p.grad.abs().max() > 0 for p in actor)


def test_supervised_gradients_reach_everything(policy, spec):
    batch = policy.preprocess([observe(i, spec) for i in range(2)])
    policy.sft_loss(policy.encode(batch), torch.zeros(2, 8, 7), torch.ones(2, 8), generators(0)[0]).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_batch_is_its_rows(policy, spec, context):
    together = policy.explore(context, generators(*range(5)), 0.1)
    for i in range(5):
        alone = policy.explore(context.index(torch.tensor([i])), generators(i), 0.1)
        # An untrained head makes a chain that spreads rounding.
        torch.testing.assert_close(together.trace[i], alone.trace[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_beside_any_neighbours_and_at_any_place(policy, spec, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = []
        for place, first in ((0, 0), (4, 20), (10, 40)):
            others = [observe(first + i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 1 + i % 4]) for i in range(11)]
            others[place] = observe(100, spec, INSTRUCTIONS[1])
            seeds = [first + i for i in range(11)]
            seeds[place] = 7
            with torch.no_grad():
                context = policy.encode(policy.preprocess(others))
            trace = policy.explore(context, generators(*seeds), 0.1).trace
            seen.append((trace[place], policy.features(context)[place]))
        for other in seen[1:]:
            for a, b in zip(seen[0], other, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_room_for_more_padding_changes_nothing(policy, spec):
    roomy = dataclasses.replace(policy.architecture, max_words=33, max_objects=17, max_name_words=9)
    other = Octo(policy.name, roomy, policy.vocabulary)
    weights = policy.state_dict()
    weights["model.positions.language"] = torch.cat((weights["model.positions.language"], torch.ones(13, 128)))
    other.load_state_dict(weights)
    seen = [observe(i, spec, INSTRUCTIONS[i]) for i in range(2)]
    with torch.no_grad():
        contexts = [p.encode(p.preprocess(seen)) for p in (policy, other)]
    for name in ("readout", "pooled", "proprio"):
        torch.testing.assert_close(*(getattr(c, name) for c in contexts), atol=1e-5, rtol=0)


def test_everything_seen_matters(policy, spec):
    base = observe(0, spec)
    replace = dataclasses.replace
    others = [
        replace(base, instruction=INSTRUCTIONS[1]),
        replace(base, instruction=" ".join(reversed(base.instruction.split()))),
        replace(base, proprio=base.proprio + np.float32(0.1) * np.eye(8, dtype=np.float32)[6]),
    ]
    if spec.observation == "pixels":
        others += [replace(base, images={**base.images, name: image[::-1]}) for name, image in base.images.items()]
    else:
        for name in OBJECTS:
            moved = base.objects[name] + np.float32(0.3) * np.eye(7, dtype=np.float32)[0]
            others.append(replace(base, objects={**base.objects, name: moved}))
        swapped = {"ketchup_1": base.objects["basket_1"], "basket_1": base.objects["ketchup_1"]}
        others.append(replace(base, objects={**base.objects, **swapped}))
    with torch.no_grad():
        readout = policy.encode(policy.preprocess([base, *others])).readout
    assert ((readout[1:] - readout[0]).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf")])
def test_a_chain_without_noise_has_no_density(policy, context, noise):
    with pytest.raises(BenchError, match=r"^noise: .*must be above 0"):
        policy.explore(context, generators(*range(5)), noise)
    with pytest.raises(BenchError, match=r"^noise: "):
        policy.log_prob(context, torch.zeros(5, 11, 8, 7), torch.ones(5, 8), noise)


def test_sizes_are_what_the_summaries_say():
    for spec, millions in ((OCTO_TINY, 1.3), (OCTO_TINY_PIXELS, 1.7)):
        policy = make(spec)
        assert sum(p.numel() for p in policy.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert f"{millions} M parameters" in spec.summary
        assert spec.capabilities == policy.capabilities


@pytest.mark.parametrize("spec", [OCTO_SMALL, OCTO_BASE], ids=lambda spec: spec.name)
def test_published_sizes_do_not_start_from_random_weights(spec):
    with pytest.raises(BenchError, match=f"^base: .*{spec.name}.*octo_convert"):
        spec.create(Embodiment(7, 8), ["pick up"])


def test_subwords_are_cut_and_end_with_their_mark():
    words = Subwords(tokenizer_json(), 6)
    assert words.encode("pick up the milk") == [3, 4, 5, 6, 1]
    assert words.encode("pick up the milk pick up the milk") == [3, 4, 5, 6, 3, 1]
    assert words.encode("pick up the zebra") == [3, 4, 5, 2, 1]
