"""What every registered policy must do, whoever wrote it."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.policies import base
from vlarl_bench.policies.adapt import add_lora, freeze, merge_lora, within
from vlarl_bench.policies.store import content_hash, save_policy
from vlarl_bench.suite import Embodiment

from .conftest import create
from .narrow import SAME

POLICIES = registry.names("policy")
METHODS = {
    "sft": ("sft_loss",),
    "denoising": ("draw_loss",),
    "flow": ("velocity",),
    "likelihood": ("explore", "log_prob"),
    "noise": ("decode",),
}


@pytest.fixture(scope="module", params=[name for name in POLICIES if name not in SAME])
def stage(request, bench):
    return bench(request.param)


@pytest.fixture(scope="module")
def policy(stage):
    return stage.policy


@pytest.fixture(scope="module")
def context(stage, policy):
    """Four observations, encoded."""
    with torch.no_grad():
        return policy.encode(policy.preprocess(stage.observations))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def needs(policy, capability):
    if capability not in policy.capabilities:
        pytest.skip(f"{policy.config['policy']} has no {capability}")


@pytest.mark.parametrize("name", POLICIES)
def test_naming_it_imports_nothing_heavy(name, imported):
    assert imported("policy")[name] == []


def test_description(stage, policy):
    assert "\n" not in stage.spec.summary.strip() != ""
    assert policy.config["policy"] == stage.spec.name
    assert policy.capabilities == stage.spec.capabilities
    for capability in policy.capabilities:
        for method in METHODS.get(capability, ()):
            assert callable(getattr(policy, method))


@pytest.mark.parametrize("name", [name for name in POLICIES if registry.get("policy", name).published])
def test_a_published_policy_says_what_it_starts_from(name, tmp_path):
    spec = registry.get("policy", name)
    assert spec.prior_folder("libero") is None
    with pytest.raises(
        BenchError, match=rf"^base: 'scratch'; {re.escape(name)} starts from .*{re.escape(spec.source)}"
    ):
        spec.create(Embodiment(7, 8), ["pick up"])
    with pytest.raises(BenchError, match=re.escape(str(tmp_path))):
        spec.load(tmp_path)


def test_same_seed_same_weights(stage):
    made = [create(stage.spec, stage.suite.embodiment(stage.protocol), ["pick up"], seed) for seed in (1, 1, 2)]
    hashes = [content_hash(policy) for policy in made]
    assert hashes[0] == hashes[1] != hashes[2]


def test_shapes(stage, policy, context):
    batch = policy.preprocess(stage.observations)
    assert len(batch) == len(batch.index(torch.tensor([1, 0, 2, 3]))) == len(context) == 4
    assert len(context.index(torch.tensor([2]))) == len(context.detach().index(torch.tensor([0]))) == 1
    assert policy.features(context).shape == (4, policy.feature_dim)
    assert policy.features(context).isfinite().all()
    sample = policy.sample(context, seeds(0, 1, 2, 3))
    assert sample.latent.shape == (4, policy.chunk, policy.latent_dim)
    assert sample.actions.shape == (4, policy.chunk, policy.action_dim)
    assert policy.action_dim == stage.suite.action_dim
    assert sample.actions.isfinite().all()


def test_actions_are_the_latent_in_environment_units(policy, context):
    sample = policy.sample(context, seeds(0, 1, 2, 3))
    torch.testing.assert_close(policy.unnormalise(sample.latent), sample.actions)
    torch.testing.assert_close(policy.unnormalise(policy.normalise(sample.actions)), sample.actions)


def test_sample_is_a_function_of_its_arguments(policy, context):
    before, weights = torch.get_rng_state(), content_hash(policy)
    first = policy.sample(context, seeds(0, 1, 2, 3))
    again = policy.sample(context, seeds(0, 1, 2, 3))
    assert torch.equal(first.latent, again.latent)
    assert torch.equal(policy.sample(context, None).latent, policy.sample(context, None).latent)
    assert not torch.equal(first.latent, policy.sample(context, seeds(4, 5, 6, 7)).latent)
    assert torch.equal(torch.get_rng_state(), before), "uses torch's global generator"
    assert content_hash(policy) == weights
    assert not first.latent.requires_grad


def test_rows_are_independent(policy, context):
    """Same batch size, other neighbours: bitwise. Another batch size: to rounding."""
    whole = policy.sample(context, seeds(0, 1, 2, 3)).latent
    others = policy.sample(context.index(torch.tensor([0, 3, 1, 3])), seeds(0, 7, 8, 9)).latent
    assert torch.equal(whole[0], others[0])
    for row in range(4):
        alone = policy.sample(context.index(torch.tensor([row])), seeds(row)).latent
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_rows_are_encoded_independently(stage, policy):
    seen = stage.observations
    with torch.no_grad():
        whole = policy.features(policy.encode(policy.preprocess(seen)))
        others = policy.features(policy.encode(policy.preprocess([seen[0], seen[3], seen[1], seen[3]])))
        alone = [policy.features(policy.encode(policy.preprocess([one]))) for one in seen]
    assert torch.equal(whole[0], others[0])
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_large_policy_encodes_a_round_in_parts(stage, policy, context, monkeypatch):
    monkeypatch.setattr(base, "large", lambda policy: True)
    monkeypatch.setattr(base, "AT_ONCE", 3)
    looked = []
    own = policy.preprocess
    monkeypatch.setattr(policy, "preprocess", lambda seen: looked.append(len(seen)) or own(seen))
    found, features = policy.encode_round(stage.observations)
    assert looked == [3, 1]
    assert len(found) == 4
    torch.testing.assert_close(features, policy.features(context), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        policy.sample_round(found, seeds(0, 1, 2, 3)),
        policy.sample(context, seeds(0, 1, 2, 3)).latent,
        rtol=1e-4,
        atol=1e-5,
    )


def test_room_for_longer_instructions_changes_nothing(stage, policy, context):
    """What pads an instruction is not seen, in a chunk or in its likelihood."""
    if "max_words" not in policy.config.get("architecture", {}):
        pytest.skip("it has no such room")
    roomier = copy.deepcopy(policy.config)
    roomier["architecture"]["max_words"] += 5
    wide = stage.spec.restore(roomier)
    if {k: v.shape for k, v in wide.state_dict().items()} != {k: v.shape for k, v in policy.state_dict().items()}:
        pytest.skip("it has a weight for each place of an instruction")
    wide.load_state_dict(policy.state_dict())
    with torch.no_grad():
        seen = wide.encode(wide.preprocess(stage.observations))
        torch.testing.assert_close(wide.features(seen), policy.features(context), rtol=1e-4, atol=1e-5)
        chunks = [p.sample(c, None).latent for p, c in ((wide, seen), (policy, context))]
        torch.testing.assert_close(*chunks, rtol=1e-3, atol=1e-4)
        if "likelihood" in policy.capabilities:
            trace = policy.explore(context, seeds(0, 1, 2, 3), 1.0).trace
            scores = [
                p.log_prob(c, trace, torch.ones(4, policy.chunk), 1.0) for p, c in ((wide, seen), (policy, context))
            ]
            torch.testing.assert_close(*(score.logp for score in scores), rtol=1e-4, atol=1e-4)


def test_everything_that_is_shown_matters(stage, policy):
    """The instruction and each camera or object reach what is drawn. Not every policy looks at proprioception."""
    seen, replace = stage.observations[0], dataclasses.replace
    others = {"instruction": replace(seen, instruction=stage.suite.tasks[1].instruction)}
    for camera in policy.cameras:
        others[camera] = replace(seen, images={**seen.images, camera: 255 - seen.images[camera]})
    if not policy.cameras:
        moved = np.float32([0.3, 0, 0, 0, 0, 0, 0])
        others |= {n: replace(seen, objects={**seen.objects, n: pose + moved}) for n, pose in seen.objects.items()}
    with torch.no_grad():
        for name, other in others.items():
            context = policy.encode(policy.preprocess([seen] * 8 + [other] * 8))
            latent = policy.sample(context, seeds(*range(8), *range(8))).latent
            assert not torch.allclose(latent[:8], latent[8:], atol=1e-6), name


def test_nothing_writes_to_a_context(policy, context):
    """So contexts can be shared by draws, minibatches and epochs."""
    before = {field.name: getattr(context, field.name).clone() for field in dataclasses.fields(context)}
    latent, ones = policy.sample(context, seeds(0, 1, 2, 3)).latent, torch.ones(4, policy.chunk)
    noise = torch.randn(4, 2, policy.chunk, policy.latent_dim, generator=torch.Generator().manual_seed(0))
    policy.features(context)
    if "sft" in policy.capabilities:
        policy.sft_loss(context, policy.unnormalise(latent), ones, *seeds(0)).backward()
    if "denoising" in policy.capabilities:
        policy.draw_loss(context, latent, torch.full((4, 2), 0.5), noise).mean().backward()
    if "noise" in policy.capabilities:
        policy.decode(context, noise[:, 0])
    if "likelihood" in policy.capabilities:
        trace = policy.explore(context, seeds(0, 1, 2, 3), 1.0).trace
        kept = trace.clone()
        policy.log_prob(context, trace, ones, 1.0).logp.mean().backward()
        assert torch.equal(trace, kept)
    policy.zero_grad()
    assert all(torch.equal(getattr(context, name), value) for name, value in before.items())


def test_stored_and_loaded_it_is_the_same(stage, policy, context, tmp_path):
    save_policy(tmp_path / "policy", policy, {"made_by": "a test"})
    loaded = stage.spec.load(tmp_path / "policy")
    assert content_hash(loaded) == content_hash(policy)
    with torch.no_grad():
        again = loaded.encode(loaded.preprocess(stage.observations))
    expected, found = policy.sample(context, seeds(0, 1, 2, 3)), loaded.sample(again, seeds(0, 1, 2, 3))
    assert torch.equal(expected.actions, found.actions)


def test_configurations_of_something_else(stage, policy):
    """One line, whichever part is missing or is not what it should be."""
    whole = policy.config
    for key in whole.keys() - {"normalisation"}:
        with pytest.raises(BenchError, match=rf"^config\.json: .* does not describe {re.escape(stage.spec.name)}$"):
            stage.spec.restore({name: value for name, value in whole.items() if name != key})
        if key != "policy":  # a name, which `load` compares
            with pytest.raises(BenchError):
                stage.spec.restore(whole | {key: 7})
    with pytest.raises(BenchError, match="does not describe"):
        stage.spec.restore(whole | {"architecture": whole["architecture"] | {"unheard_of": 3}})


def test_actor_parameters_are_the_policys_own(policy):
    own = {id(parameter) for parameter in policy.parameters()}
    actor = [id(parameter) for parameter in policy.actor_parameters()]
    assert actor
    assert len(set(actor)) == len(actor)
    assert set(actor) <= own


def imitate(stage, policy, budget):
    """One supervised update of some steps; names of the parameters that it changed."""
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    sft = registry.get("algorithm", "sft")
    sft(sft.Settings(), policy, dataclasses.replace(budget, iterations=1), seed=0).update(policy, stage.demonstrations)
    return {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}


def test_a_frozen_part_stays_as_it_is_to_the_bit(stage, policy, budget):
    """The module of its first, of its middle and of its last weight, in turn: encoder, language model, head."""
    needs(policy, "sft")
    names = [name for name, _ in policy.named_parameters()]
    for name in {names[0], names[len(names) // 2], names[-1]}:
        part = name.rpartition(".")[0] or name
        frozen = copy.deepcopy(policy).requires_grad_(True)
        freeze(frozen, [part])
        changed = imitate(stage, frozen, budget)
        assert changed and not any(within(one, part) for one in changed), part


def test_adapters_begin_as_nothing_are_all_that_learns_and_can_be_merged(stage, policy, context, budget):
    needs(policy, "sft")
    adapted = copy.deepcopy(policy).requires_grad_(True)
    add_lora(adapted, rank=2)

    def drawn():
        with torch.no_grad():
            return adapted.sample(adapted.encode(adapted.preprocess(stage.observations)), seeds(0, 1, 2, 3)).latent

    plain = policy.sample(context, seeds(0, 1, 2, 3)).latent
    torch.testing.assert_close(drawn(), plain, rtol=1e-3, atol=1e-3)
    changed = imitate(stage, adapted, budget)
    assert changed and all(".lora_" in name for name in changed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in changed:
                parameter += 0.1
    moved = drawn()
    assert (moved - plain).abs().max() > 0.01
    merge_lora(adapted)
    assert adapted.state_dict().keys() == policy.state_dict().keys()
    torch.testing.assert_close(drawn(), moved, rtol=1e-3, atol=1e-3)


def test_sft_loss_learns_from_real_steps_only(stage, policy):
    needs(policy, "sft")
    policy = copy.deepcopy(policy).requires_grad_(True)
    context = policy.encode(policy.preprocess(stage.observations))
    actions = policy.sample(context, seeds(0, 1, 2, 3)).actions
    mask = torch.ones(4, policy.chunk)
    mask[:, policy.chunk // 2 :] = 0
    loss = policy.sft_loss(context, actions, mask, *seeds(0))
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    for parameter in policy.actor_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    with torch.no_grad():
        assert policy.sft_loss(context, actions, mask, *seeds(0)) == pytest.approx(float(loss), rel=1e-5)
        changed = actions + (mask == 0)[..., None]
        assert policy.sft_loss(context, changed, torch.ones_like(mask), *seeds(0)) != pytest.approx(float(loss))


def test_sft_loss_of_some_rows_is_what_they_add_to_that_of_all(stage, policy, context):
    """So that processes can share a batch, each with its rows of the context alone."""
    needs(policy, "sft")
    actions, mask = policy.sample(context, seeds(0, 1, 2, 3)).actions, torch.ones(4, policy.chunk)
    mask[1, policy.chunk // 2 :] = 0
    with torch.no_grad():
        whole = policy.sft_loss(context, actions, mask, *seeds(0))
        parts = [
            policy.sft_loss(context.index(rows), actions, mask, *seeds(0), rows)
            for rows in (torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2]))
        ]
    assert all(part > 0 for part in parts)
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_velocity_is_differentiable_and_takes_k_draws(policy, context):
    needs(policy, "flow")
    policy = copy.deepcopy(policy).requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, policy.chunk, policy.latent_dim, generator=draw)
    t = torch.rand(4, 3, generator=draw)
    velocity = policy.velocity(context, x, t)
    assert velocity.shape == x.shape
    for k in range(3):
        alone = policy.velocity(context, x[:, k : k + 1], t[:, k : k + 1])
        torch.testing.assert_close(velocity[:, k : k + 1], alone, rtol=1e-4, atol=1e-5)
    velocity.square().mean().backward()
    actor = {id(parameter) for parameter in policy.actor_parameters()}
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in actor), name


def test_a_flows_draw_loss_is_the_squared_error_of_the_velocity(policy, context):
    needs(policy, "flow")
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(4, policy.chunk, policy.latent_dim, generator=draw)
    noise = torch.randn(4, 2, policy.chunk, policy.latent_dim, generator=draw)
    with torch.no_grad():
        # At t = 1 the point is pure noise, at t = 0 the chunk itself.
        for t, x in ((1.0, noise), (0.0, latent[:, None].expand_as(noise))):
            times = torch.full((4, 2), t)
            expected = (policy.velocity(context, x, times) - (noise - latent[:, None])) ** 2
            torch.testing.assert_close(policy.draw_loss(context, latent, times, noise), expected, rtol=1e-4, atol=1e-5)


def test_draw_loss_takes_k_draws_at_times_from_0_to_1(policy, context):
    needs(policy, "denoising")
    policy = copy.deepcopy(policy).requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(4, policy.chunk, policy.latent_dim, generator=draw)
    noise = torch.randn(4, 3, policy.chunk, policy.latent_dim, generator=draw)
    t = torch.tensor([0.0, 0.7, 1.0]).expand(4, 3)
    loss = policy.draw_loss(context, latent, t, noise)
    assert loss.shape == noise.shape
    assert loss.isfinite().all() and (loss >= 0).all()
    for k in range(3):
        alone = policy.draw_loss(context, latent, t[:, k : k + 1], noise[:, k : k + 1])
        torch.testing.assert_close(loss[:, k : k + 1], alone, rtol=1e-3, atol=1e-3)
    loss[:, 1].mean().backward()
    actor = {id(parameter) for parameter in policy.actor_parameters()}
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in actor), name


def test_decode_is_a_function_of_its_noise(policy, context):
    needs(policy, "noise")
    before = torch.get_rng_state()
    noise = torch.randn(4, policy.chunk, policy.latent_dim, generator=torch.Generator().manual_seed(0))
    first = policy.decode(context, noise)
    assert first.latent.shape == noise.shape
    assert torch.equal(first.latent, policy.decode(context, noise).latent)
    assert torch.equal(torch.get_rng_state(), before), "uses torch's global generator"
    torch.testing.assert_close(policy.unnormalise(first.latent), first.actions)
    others = policy.decode(context, torch.cat((noise[:1], -noise[1:])))
    assert torch.equal(first.latent[0], others.latent[0])
    assert not torch.equal(first.latent[1:], others.latent[1:])
    assert not first.latent.requires_grad


def test_explore_is_a_function_of_its_arguments(policy, context):
    needs(policy, "likelihood")
    before = torch.get_rng_state()
    first, again = (policy.explore(context, seeds(0, 1, 2, 3), 1.0) for _ in range(2))
    assert torch.equal(first.trace, again.trace)
    assert torch.equal(first.latent, again.latent)
    assert not torch.equal(first.trace, policy.explore(context, seeds(4, 5, 6, 7), 1.0).trace)
    assert torch.equal(torch.get_rng_state(), before), "uses torch's global generator"
    assert len(first.trace) == 4
    assert first.latent.shape == (4, policy.chunk, policy.latent_dim)
    torch.testing.assert_close(policy.unnormalise(first.latent), first.actions)
    others = policy.explore(context.index(torch.tensor([0, 3, 1, 3])), seeds(0, 7, 8, 9), 1.0)
    assert torch.equal(first.trace[0], others.trace[0])


def test_log_prob_scores_what_was_executed_row_by_row(policy, context):
    needs(policy, "likelihood")
    trace = policy.explore(context, seeds(0, 1, 2, 3), 1.0).trace
    mask = torch.ones(4, policy.chunk)
    mask[1, 1:] = 0
    mask[3] = 0
    with torch.no_grad():
        whole = policy.log_prob(context, trace, torch.ones_like(mask), 1.0)
        scored = policy.log_prob(context, trace, mask, 1.0)
        alone = policy.log_prob(context.index(torch.tensor([2])), trace[2:3], mask[2:3], 1.0)
    assert scored.logp.shape == scored.entropy.shape == scored.mask.shape
    assert scored.logp.isfinite().all()
    assert scored.mask.dtype == torch.bool
    assert (scored.logp[~scored.mask] == 0).all()
    # What only decided actions that were not executed does not count; the rest is as if all had been.
    counted, of = scored.mask.sum((1, 2)), whole.mask.sum((1, 2))
    assert counted[0] == of[0] > 0 and counted[2] == of[2] > 0
    assert 0 < counted[1] <= of[1]
    assert counted[3] == 0
    assert (scored.mask <= whole.mask).all()
    torch.testing.assert_close(scored.logp, whole.logp * scored.mask)
    torch.testing.assert_close(scored.logp[2:3], alone.logp, rtol=1e-4, atol=1e-4)


def test_log_prob_reaches_exactly_the_actor(policy, context):
    needs(policy, "likelihood")
    policy = copy.deepcopy(policy).requires_grad_(True)
    trace = policy.explore(context, seeds(0, 1, 2, 3), 1.0).trace
    scored = policy.log_prob(context.detach(), trace, torch.ones(4, policy.chunk), 1.0)
    assert scored.logp.requires_grad
    scored.logp.mean().backward()
    actor = {id(parameter) for parameter in policy.actor_parameters()}
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in actor), name
