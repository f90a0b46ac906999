"""pi0-tiny against transformers' own forward and sampler, and against what the flow seam promises."""

import dataclasses
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from vlarl_bench.metering import Meter
from vlarl_bench.policies import pi0
from vlarl_bench.policies.noise import LearnedNoise
from vlarl_bench.policies.pi0 import Pi0
from vlarl_bench.policies.presets import PI0_TINY, PI0_TINY_PIXELS

from .conftest import INSTRUCTIONS, OBJECTS, in_float64, make, observe
from .pi0_small import image_inputs


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def points(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, 8, 7, generator=g), torch.rand(n, k, generator=g)


def transformers_velocity(policy, context, x, t):
    """One draw through `PI0ForConditionalGeneration.forward`."""
    cache = DynamicCache([(layer[:, 0], layer[:, 1]) for layer in context.cache.unbind(1)])
    mask = context.mask
    return policy.model(state=context.proprio, noise=x, timestep=t, attention_mask=mask, past_key_values=cache).logits


def test_velocity_of_k_draws_is_transformers_forward_of_each(policy, context):
    x, t = points(5, 3)
    with torch.no_grad():
        ours = policy.velocity(context, x, t)
        for k in range(3):
            theirs = transformers_velocity(policy, context, x[:, k], t[:, k])
            assert theirs.abs().max() > 0.05
            torch.testing.assert_close(ours[:, k], theirs, atol=2e-6, rtol=0)
            alone = policy.velocity(context, x[:, k : k + 1], t[:, k : k + 1])[:, 0]
            torch.testing.assert_close(ours[:, k], alone, atol=2e-6, rtol=0)


def test_the_prefix_is_that_of_transformers(policy, spec):
    """The cache, with padding words and objects, and what enters the last layer."""
    batch = policy.preprocess([observe(i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 2 + i]) for i in range(3)])
    with torch.no_grad():
        context = policy.encode(batch)
        mask, embeddings, positions = policy._tokens(batch)
        theirs = policy.model.model.vlm(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            token_type_ids=torch.zeros_like(positions),
            use_cache=True,
            output_hidden_states=True,
        )
    cache = torch.stack([torch.stack((x.keys, x.values), 1) for x in theirs.past_key_values.layers], 1)
    torch.testing.assert_close(context.cache, cache, atol=1e-6, rtol=0)
    hidden = torch.nn.functional.rms_norm(theirs.hidden_states[policy.architecture.layers - 1], (128,))
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(context.pooled[:, :128], mean, atol=1e-6, rtol=0)


def shown(policy, seen, module):
    """[images, 3, S, S] that `siglip` is given when a policy of this module looks."""
    with mock.patch.object(module, "siglip", wraps=module.siglip) as tower, torch.no_grad():
        policy.encode(policy.preprocess([seen]))
    return tower.call_args.args[1]


def test_pixels_by_hand():
    """0, 51 and 255 are -1, -0.6 and 1."""
    policy, seen = make(PI0_TINY_PIXELS), observe(0, PI0_TINY_PIXELS)
    seen.images["robot0_eye_in_hand"][:] = [0, 51, 255]
    pixels = shown(policy, seen, pi0)
    assert pixels.shape == (2, 3, 64, 64)
    torch.testing.assert_close(pixels[1], torch.tensor([-1, -0.6, 1])[:, None, None].expand(3, 64, 64))


def test_pixel_cache_changes_nothing():
    policy = make(PI0_TINY_PIXELS)
    batch = policy.preprocess([observe(i, PI0_TINY_PIXELS, INSTRUCTIONS[i % 2]) for i in range(3)])
    x, t = points(3, 1)
    with torch.no_grad():
        context = policy.encode(batch)
        whole = policy.model(state=context.proprio, noise=x[:, 0], timestep=t[:, 0], **image_inputs(policy, batch))
        torch.testing.assert_close(policy.velocity(context, x, t)[:, 0], whole.logits, atol=2e-6, rtol=0)


def test_pixel_sample_is_transformers_sample_actions():
    policy = make(PI0_TINY_PIXELS)
    batch = policy.preprocess([observe(i, PI0_TINY_PIXELS) for i in range(2)])
    with torch.no_grad():
        context = policy.encode(batch)
    noise = torch.stack([torch.randn(8, 7, generator=g) for g in generators(1, 2)])
    theirs = policy.model.sample_actions(
        context.proprio, noise=noise, num_steps=policy.architecture.euler_steps, **image_inputs(policy, batch)
    )
    torch.testing.assert_close(policy.sample(context, generators(1, 2)).latent, theirs, atol=5e-6, rtol=0)


def test_sample_integrates_from_noise_down_to_actions(policy, context):
    """With a constant velocity b every Euler path ends at noise - b."""
    with torch.no_grad():
        policy.model.action_out_proj.weight.zero_()
        policy.model.action_out_proj.bias.copy_(torch.arange(7.0))
    noise = torch.stack([torch.randn(8, 7, generator=g) for g in generators(*range(5))])
    sample = policy.sample(context, generators(*range(5)))
    torch.testing.assert_close(sample.latent, noise - torch.arange(7.0))
    torch.testing.assert_close(sample.actions, policy.unnormalise(sample.latent))
    torch.testing.assert_close(policy.sample(context, None).latent, -torch.arange(7.0).expand(5, 8, 7))


def test_decoding_costs_as_much_as_its_steps(policy, context):
    """`decode` runs under inference_mode, `velocity` here does not: FLOPs must be counted alike."""
    x, t = points(5, 1)
    with torch.no_grad(), Meter(policy) as steps:
        for _ in range(policy.euler_steps):
            policy.velocity(context, x, t)
    with Meter(policy) as decoding:
        policy.decode(context, x[:, 0])
    assert 0.9 < decoding.flops / steps.flops <= 1  # what all steps share is made once


def test_sample_follows_transformers_forward(policy, context):
    x = torch.zeros(5, 8, 7)
    with torch.no_grad():
        for t in (1.0, 0.8, 0.6, 0.4, 0.2):
            x = x - 0.2 * transformers_velocity(policy, context, x, torch.full((5,), t))
    torch.testing.assert_close(policy.sample(context, None).latent, x, atol=5e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_beside_any_neighbours_and_at_any_place(policy, spec, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        n, chosen = 11, observe(100, spec, INSTRUCTIONS[1])
        seen = []
        for place, first in ((0, 0), (4, 20), (10, 40)):
            others = [observe(first + i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 1 + i % 4]) for i in range(n)]
            others[place] = chosen
            seeds = [first + i for i in range(n)]
            seeds[place] = 7
            with torch.no_grad():
                context = policy.encode(policy.preprocess(others))
                x, t = points(n, 2, first)
                x[place], t[place] = points(1, 2, 99)[0][0], points(1, 2, 99)[1][0]
                velocity = policy.velocity(context, x, t)[place]
            features = policy.features(context)[place]
            seen.append((policy.sample(context, generators(*seeds)).latent[place], features, velocity))
        for other in seen[1:]:
            for a, b in zip(seen[0], other, strict=True):
                assert torch.equal(a, b)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_batch_is_its_rows(policy, spec, context):
    together = policy.sample(context, generators(*range(5))).latent
    for i in range(5):
        alone = policy.sample(context.index(torch.tensor([i])), generators(i)).latent[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)
    seen = [observe(i, spec) for i in range(3)]
    with torch.no_grad():
        all_features = policy.features(policy.encode(policy.preprocess(seen)))
        for i in range(3):
            alone = policy.features(policy.encode(policy.preprocess(seen[i : i + 1])))[0]
            torch.testing.assert_close(all_features[i], alone, atol=1e-5, rtol=0)
    assert all_features.shape == (3, policy.feature_dim)


def test_padding_is_never_read(policy, context):
    x, t = points(5, 2)
    dirty = torch.where(context.mask[:, None, None, None, :, None], context.cache, torch.full((), 1e4))
    assert not torch.equal(dirty, context.cache)
    with torch.no_grad():
        clean = policy.velocity(context, x, t)
        assert torch.equal(clean, policy.velocity(dataclasses.replace(context, cache=dirty), x, t))


def test_room_for_more_padding_changes_nothing(policy, spec):
    roomy = dataclasses.replace(policy.architecture, max_words=33, max_objects=17, max_name_words=9)
    other = Pi0(policy.name, roomy, policy.vocabulary)
    other.load_state_dict(policy.state_dict())
    seen = [observe(i, spec, INSTRUCTIONS[i]) for i in range(2)]
    with torch.no_grad():
        contexts = [p.encode(p.preprocess(seen)) for p in (policy, other)]
        assert contexts[0].mask.shape[1] < contexts[1].mask.shape[1]
        torch.testing.assert_close(policy.features(contexts[0]), other.features(contexts[1]), atol=1e-5, rtol=0)
    a, b = (p.sample(c, None).latent for p, c in zip((policy, other), contexts, strict=True))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("noise", [0.5, "learned"])
def test_sampled_log_probability_is_the_teacher_forced_one(policy, context, noise):
    """All steps scored in one pass, against each step's own draw."""
    if noise == "learned":
        noise = learned(policy)
    seen = []
    policy.velocity, single = lambda c, x, t: seen.append(x.shape[1]) or single(c, x, t), policy.velocity
    trace = policy.explore(context, generators(*range(5)), noise).trace
    with torch.no_grad():
        scored = policy.log_prob(context, trace, torch.ones(5, 8), noise)
    assert seen == [1] * 5 + [5]
    drawn = []
    for g in generators(*range(5)):
        torch.randn(8, 7, generator=g)
        drawn.append(torch.randn(5, 8, 7, generator=g))
    std = (scored.entropy - 0.5 * np.log(2 * np.pi * np.e)).exp()
    expected = -0.5 * torch.stack(drawn).flatten(2) ** 2 - std.log() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(scored.logp.mean((1, 2)), expected.mean((1, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.logp, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", [0.5, "learned"])
def test_a_decision_has_the_log_probability_that_it_was_drawn_with(spec, noise, float64):
    policy = make(spec)
    with torch.no_grad():
        context = policy.encode(in_float64(policy.preprocess([observe(i, spec) for i in range(5)])))
    scores_what_it_drew(policy, context, learned(policy) if noise == "learned" else noise)


def scores_what_it_drew(policy, context, noise):
    """`log_prob` of five chunks is, to 1e-5 in all, the density of the numbers that `explore` drew, by hand."""
    n, steps, own = 5, policy.euler_steps, slice(policy.action_dim)
    trace = policy.explore(context, generators(*range(n)), noise).trace
    draw = []
    for g in generators(*range(n)):
        torch.randn(policy.chunk, policy.latent_dim, generator=g)
        draw.append(torch.randn(steps, policy.chunk, policy.latent_dim, generator=g))
    t = torch.tensor([1 - step / steps for step in range(steps)])
    if isinstance(noise, LearnedNoise):
        std = noise(policy.features(context), trace[:, :-1], t.expand(n, -1))[..., own]
    else:  # sigma sqrt(d), sigma^2 = a^2 t / (1 - t), and at t = 1 d in place of 1 - t
        std = noise * (t / (1 - t).clamp_min(1 / steps) / steps).sqrt()[:, None, None]
    expected = -0.5 * torch.stack(draw)[..., own] ** 2 - std.log() - 0.5 * np.log(2 * np.pi)
    mask = torch.ones(n, policy.chunk)
    mask[1, 3:] = 0
    with torch.no_grad():
        scored = policy.log_prob(context, trace, mask, noise)
    assert scored.logp.dtype == torch.float64
    expected = (expected * mask[:, None, :, None]).flatten(2)
    torch.testing.assert_close(scored.logp.sum((1, 2)), expected.sum((1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.logp, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def learned(policy, seed=0):
    noise = LearnedNoise(policy.feature_dim, policy.chunk, policy.latent_dim, 0.08, 0.16, seed=seed)
    torch.nn.init.normal_(noise.layers[-1].weight, std=0.2, generator=generators(seed)[0])
    return noise


def test_without_noise_exploring_is_sampling(policy, context):
    sampled = policy.sample(context, generators(*range(5))).latent
    still = policy.explore(context, generators(*range(5)), torch.zeros(5, 5)).latent
    torch.testing.assert_close(still, sampled, rtol=0, atol=1e-6)
    distances = [policy.explore(context, generators(*range(5)), a).latent - sampled for a in (1e-1, 1e-3, 1e-5)]
    sizes = [distance.abs().max() for distance in distances]
    assert sizes[0] > 10 * sizes[1] > 100 * sizes[2]
    assert sizes[2] < 1e-4


@pytest.mark.parametrize("threads", [1, 2])
def test_an_explored_row_has_the_same_bits_beside_any_neighbours(policy, spec, threads):
    before, noise = torch.get_num_threads(), learned(policy)
    torch.set_num_threads(threads)
    try:
        for how in (0.5, noise):
            traces = []
            for place, first in ((0, 0), (4, 20), (10, 40)):
                others = [observe(first + i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 1 + i % 4]) for i in range(11)]
                others[place] = observe(100, spec, INSTRUCTIONS[1])
                seeds = [first + i for i in range(11)]
                seeds[place] = 7
                with torch.no_grad():
                    context = policy.encode(policy.preprocess(others))
                traces.append(policy.explore(context, generators(*seeds), how).trace[place])
            assert torch.equal(traces[0], traces[1])
            assert torch.equal(traces[0], traces[2])
    finally:
        torch.set_num_threads(before)


def test_likelihoods_of_a_batch_are_those_of_its_rows_and_padding_is_never_read(policy, context):
    mask = torch.ones(5, 8)
    mask[2, 3:] = 0
    dirty = torch.where(context.mask[:, None, None, None, :, None], context.cache, torch.full((), 1e4))
    for noise in (0.5, learned(policy)):
        trace = policy.explore(context, generators(*range(5)), noise).trace
        with torch.no_grad():
            together = policy.log_prob(context, trace, mask, noise)
            padded = policy.log_prob(dataclasses.replace(context, cache=dirty), trace, mask, noise)
            assert torch.equal(padded.logp, together.logp)
            for i in range(5):
                row = context.index(torch.tensor([i]))
                alone = policy.explore(row, generators(i), noise).trace
                torch.testing.assert_close(alone[0], trace[i], atol=1e-5, rtol=0)
                scored = policy.log_prob(row, trace[i : i + 1], mask[i : i + 1], noise)
                torch.testing.assert_close(scored.logp[0], together.logp[i], atol=5e-5, rtol=1e-5)
        assert together.mask[2].sum() == 5 * 3 * 7


def test_learned_noise_learns_beside_the_actor(policy, context):
    noise = learned(policy)
    trace = policy.explore(context, generators(*range(5)), noise).trace
    policy.log_prob(context, trace, torch.ones(5, 8), noise).logp.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in noise.parameters())
    assert {id(p) for p in policy.parameters() if p.grad is not None} == {id(p) for p in policy.actor_parameters()}


def test_exact_density_of_a_batch_is_that_of_its_rows(policy, context):
    latent = policy.sample(context, generators(*range(5))).latent
    some = context.index(torch.tensor([1, 3]))
    together = policy.ode_log_prob(some, latent[[1, 3]], 2)
    alone = policy.ode_log_prob(some.index(torch.tensor([1])), latent[3:4], 2)
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=0)
    assert not together.requires_grad


def test_draw_loss_by_hand(policy, context):
    """x_t = t noise + (1 - t) latent, and the target is noise - latent."""
    g = torch.Generator().manual_seed(3)
    latent, noise = torch.randn(5, 8, 7, generator=g), torch.randn(5, 2, 8, 7, generator=g)
    t = torch.tensor([[0.25, 1.0]]).expand(5, 2)
    with torch.no_grad():
        loss = policy.draw_loss(context, latent, t, noise)
        quarter = transformers_velocity(policy, context, 0.25 * noise[:, 0] + 0.75 * latent, t[:, 0])
        torch.testing.assert_close(loss[:, 0], (quarter - noise[:, 0] + latent) ** 2, atol=1e-4, rtol=1e-4)
        pure = transformers_velocity(policy, context, noise[:, 1], t[:, 1])
        torch.testing.assert_close(loss[:, 1], (pure - noise[:, 1] + latent) ** 2, atol=1e-4, rtol=1e-4)


def test_gradients_reach_exactly_the_actor(policy, context):
    latent, (noise, t) = torch.zeros(5, 8, 7), points(5, 2)
    policy.draw_loss(context, latent, t, noise).mean().backward()
    actor = policy.actor_parameters()
    assert {id(p) for p in policy.parameters() if p.grad is not None} == {id(p) for p in actor}
    assert len({id(p) for p in actor}) == len(actor)
    assert all(p.grad.abs().max() > 0 for p in actor)


def test_supervised_gradients_reach_what_the_policy_sees_with(policy, spec):
    batch = policy.preprocess([observe(i, spec) for i in range(2)])
    loss = policy.sft_loss(policy.encode(batch), torch.zeros(2, 8, 7), torch.ones(2, 8), generators(0)[0])
    loss.backward()
    vlm = policy.model.model.vlm
    seeing = vlm.vision_tower if spec.observation == "pixels" else policy.object_in
    for module in (seeing, vlm.get_input_embeddings(), vlm.language_model.layers[0].mlp):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_sft_loss_counts_only_real_steps(policy, context):
    with torch.no_grad():
        policy.model.action_out_proj.weight.zero_()
        policy.model.action_out_proj.bias.zero_()
    actions, mask = torch.zeros(5, 8, 7), torch.zeros(5, 8)
    mask[0, :3] = mask[1, :8] = 1
    loss = policy.sft_loss(context, actions, mask, generators(0)[0])
    actions[0, 3:], actions[2:] = 9.0, 9.0
    assert policy.sft_loss(context, actions, mask, generators(0)[0]) == loss
    actions[0, 2] = 9.0
    assert policy.sft_loss(context, actions, mask, generators(0)[0]) > loss
    # A velocity of zero leaves E|noise - latent|^2 = 1 + latent^2 a dimension; 11 steps x 4 draws x 7 dimensions.
    actions = policy.unnormalise(torch.full((5, 8, 7), 2.0))
    assert policy.sft_loss(context, actions, mask, generators(0)[0]).item() == pytest.approx(5, rel=0.3)


def test_index_takes_rows_of_everything(policy, context):
    some = context.index(torch.tensor([3, 1]))
    assert len(some) == 2
    assert torch.equal(some.cache, context.cache[[3, 1]])
    x, t = points(5, 1)
    with torch.no_grad():
        expected = policy.velocity(context, x, t)[[3, 1]]
        torch.testing.assert_close(policy.velocity(some, x[[3, 1]], t[[3, 1]]), expected, atol=2e-6, rtol=0)


def test_normalisation_round_trip():
    policy = make()
    actions = torch.randn(4, 8, 7)
    torch.testing.assert_close(policy.unnormalise(policy.normalise(actions)), actions, atol=1e-5, rtol=1e-5)
    demonstrated = np.random.default_rng(1).normal([0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 1, 1, 0], (4000, 7))
    policy.fit_normalisation([demonstrated], np.zeros((10, 8)))
    latent = policy.normalise(torch.from_numpy(demonstrated).float())
    torch.testing.assert_close(latent.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.std(0)[:6], torch.ones(6), atol=1e-2, rtol=0)
    assert policy.action_std[6] == pytest.approx(0.1)  # a dimension that never moved is not blown up


def test_seeds():
    state = torch.get_rng_state()
    a, b, c = make(seed=0), make(seed=0), make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.model.action_out_proj.weight, c.model.action_out_proj.weight)


def test_presets_import_nothing_heavy_and_say_what_policies_can():
    code = "import sys, vlarl_bench.policies.presets; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    for spec in (PI0_TINY, PI0_TINY_PIXELS):
        policy = make(spec)
        assert spec.capabilities == policy.capabilities
        assert 0.5e6 < sum(p.numel() for p in policy.parameters()) < 2.5e6
