"""Freezing by name, and adapters: what learns, and what is left when they are merged."""

import sys

import pytest
import torch
from torch import nn

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.adapt import READ_DIRECTLY, add_lora, freeze, merge_lora
from vlarl_bench.policies.presets import (
    OCTO_TINY,
    OPENVLA_AR_TINY,
    OPENVLA_TINY,
    OPENVLA_TINY_PIXELS,
    PI0_FAST_TINY,
    PI0_TINY,
    PI0_TINY_PIXELS,
)
from vlarl_bench.policies.store import content_hash, save_policy

from .conftest import make, observe, told_in_one_line
from .openvla_tiny import AUTOREGRESSIVE, small


def score(policy, spec=OPENVLA_TINY):
    """Log-probability of one fixed chunk for two observations."""
    context = policy.encode(policy.preprocess([observe(i, spec) for i in range(2)]))
    trace = torch.arange(2 * 56).view(2, 56, 1)
    return policy.log_prob(context, trace, torch.ones(2, 8), 1.0).logp


def learners(policy):
    """Names of what a gradient reaches."""
    score(policy, OPENVLA_TINY_PIXELS if policy.architecture.cameras else OPENVLA_TINY).mean().backward()
    return {name for name, p in policy.named_parameters() if p.grad is not None}


def test_a_frozen_part_gets_no_gradient_and_leaves_the_actor():
    policy = make(OPENVLA_TINY_PIXELS)
    layer = "network.language_model.model.layers.3"
    freeze(policy, ["network.vision_backbone", layer, "placeholders"])
    parts = ("network.vision_backbone.", layer + ".", "placeholders")
    expected = {name for name, _ in policy.named_parameters() if not name.startswith(parts)}
    assert learners(policy) == expected
    frozen = {id(p) for name, p in policy.named_parameters() if name.startswith(layer)}
    whole = {id(p) for p in make(OPENVLA_TINY_PIXELS).actor_parameters()}
    policy.requires_grad_(True)  # as an algorithm does before it asks for the actor
    assert not frozen & {id(p) for p in policy.actor_parameters()}
    assert len(policy.actor_parameters()) == len(whole) - len(frozen)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("vision", "there are network, object_in, object_out, placeholders, proprio_projector"),
        ("network.vision", "there are network.language_model"),
        ("network.language_model.model.layers.7", r"there are .*layers\.0, .*layers\.1, .*layers\.2, .*layers\.3$"),
    ],
)
def test_a_part_that_is_none(name, there):
    with pytest.raises(BenchError, match=there):
        freeze(make(OPENVLA_TINY), [name])


def test_adapters_start_as_nothing_and_are_all_that_learns():
    policy, state = make(OPENVLA_TINY), torch.get_rng_state()
    with torch.no_grad():
        before = score(policy)
        add_lora(policy, rank=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(score(policy), before)
    names = learners(policy)
    # Two layers that RL trains, seven linear ones in each, an A and a B for each of those.
    assert len(names) == 2 * 7 * 2
    assert all(".lora_" in name and (".layers.2." in name or ".layers.3." in name) for name in names)
    assert {id(p) for name, p in policy.named_parameters() if name in names} == {
        id(p) for p in policy.actor_parameters()
    }


def test_merged_adapters_leave_the_same_policy_with_its_own_keys(tmp_path):
    policy, plain = make(OPENVLA_TINY), make(OPENVLA_TINY)
    add_lora(policy, rank=4, alpha=8, targets=("q_proj", "down_proj"), seed=3)
    score(policy).mean().backward()
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter -= parameter.grad.sign() * 0.02
        adapted = score(policy)
        assert (adapted - score(plain)).abs().max() > 0.01
        merge_lora(policy)
        torch.testing.assert_close(score(policy), adapted, atol=1e-5, rtol=0)
    changed = {k for k, v in policy.state_dict().items() if not torch.equal(v, plain.state_dict()[k])}
    layers = [f"network.language_model.model.layers.{i}" for i in (2, 3)]
    assert changed == {f"{x}.{y}.weight" for x in layers for y in ("self_attn.q_proj", "mlp.down_proj")}
    save_policy(tmp_path / "merged", policy, {})
    assert content_hash(OPENVLA_TINY.load(tmp_path / "merged")) == content_hash(policy)


def test_pi0_s_adapters_count_in_what_it_samples():
    """Sampling lays weights out anew, which must not lose what stands beside them."""
    policy, found = make(PI0_TINY), []
    batch = policy.preprocess([observe(i) for i in range(2)])

    def sample():
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        with torch.no_grad():
            found.append(policy.sample(policy.encode(batch), generators).latent)

    sample()
    add_lora(policy, rank=4)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    sample()
    merge_lora(policy)
    sample()
    base, adapted, merged = found
    assert (adapted - base).abs().max() > 0.01
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_a_hash_is_the_merged_policy_s(form):
    policy = small(**AUTOREGRESSIVE, dtype=form)
    base = content_hash(policy)
    add_lora(policy, rank=4)
    adapters = [p for name, p in policy.named_parameters() if ".lora_" in name]
    assert adapters and {p.dtype for p in adapters} == {torch.float32}
    assert content_hash(policy) == base
    with torch.no_grad():
        for parameter in adapters:
            parameter += 0.05
    adapted = content_hash(policy)
    merge_lora(policy)
    assert content_hash(policy) == adapted != base
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, form)}


def test_where_there_is_no_transformer_every_layer_of_the_actor_is_adapted():
    policy = make(OCTO_TINY)
    whole = {name for name, p in policy.named_parameters() if any(p is q for q in policy.actor_parameters())}
    linear = {name.removesuffix(".weight") for name in whole if name.endswith(".weight") and "norm" not in name}
    add_lora(policy, rank=2)
    assert {name.rpartition(".lora_")[0] for name, p in policy.named_parameters() if ".lora_" in name} == linear


def test_freezing_takes_parts_from_every_family_s_actor():
    for spec, part in ((PI0_TINY, "model.model.dit.layers.1"), (OCTO_TINY, "model.head.blocks.0")):
        policy, whole = make(spec), {id(p) for p in make(spec).actor_parameters()}
        freeze(policy, [part])
        frozen = [p for name, p in policy.named_parameters() if name.startswith(f"{part}.")]
        kept = {id(p) for p in policy.actor_parameters()}
        assert frozen and len(kept) == len(whole) - len(frozen)
        assert not kept & {id(p) for p in frozen}


def test_adapters_by_hand():
    """W x + alpha / rank B A x."""
    policy = make(OPENVLA_TINY)
    add_lora(policy, rank=2, alpha=6, targets=("o_proj",))
    layer = policy.network.language_model.model.layers[2].self_attn.o_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(0)))
        x = torch.ones(128)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * b @ (a @ x))


@pytest.mark.parametrize("spec", [OPENVLA_TINY, OPENVLA_AR_TINY, PI0_FAST_TINY], ids=lambda spec: spec.name)
def test_a_layer_whose_weight_is_read_is_refused(spec):
    policy = make(spec)
    for targets in (("lm_head",), ("q_proj", "lm_head")):
        told_in_one_line(
            lambda targets=targets: add_lora(policy, targets=targets),
            "lora: targets ['lm_head']; rows of its weight are read and the layer is never called",
            "can be adapted is down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        )
    assert not any(".lora_" in name for name, _ in policy.named_parameters())


@pytest.mark.parametrize(
    "spec",
    [OPENVLA_TINY, OPENVLA_TINY_PIXELS, OPENVLA_AR_TINY, PI0_FAST_TINY, PI0_TINY, PI0_TINY_PIXELS, OCTO_TINY],
    ids=lambda spec: spec.name,
)
def test_every_other_layer_of_the_actor_is_called(spec):
    """So no adapter is left that does nothing: a gradient reaches each."""
    policy = make(spec)
    actor = {id(p) for p in policy.actor_parameters()}
    linear = {
        n.rpartition(".")[2] for n, m in policy.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in actor
    }
    add_lora(policy, rank=2, targets=sorted(linear - READ_DIRECTLY))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    context = policy.encode(policy.preprocess([observe(i, spec) for i in range(2)]))
    actions = torch.linspace(-0.5, 0.5, 2 * policy.chunk * 7).view(2, policy.chunk, 7)
    policy.sft_loss(context, actions, torch.ones(2, policy.chunk), torch.Generator().manual_seed(0)).backward()
    adapters = {name: p for name, p in policy.named_parameters() if ".lora_" in name}
    assert adapters
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []


def test_what_cannot_be_adapted(monkeypatch):
    policy = make(OPENVLA_TINY)
    with pytest.raises(BenchError, match=r"targets \['wq'\]; the actor's linear layers are down_proj, gate_proj"):
        add_lora(policy, targets=("wq",))
    with pytest.raises(BenchError, match="lora: rank 0"):
        add_lora(policy, rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BenchError, match=r"pip install .*'\.\[lora\]'"):
        add_lora(policy)
