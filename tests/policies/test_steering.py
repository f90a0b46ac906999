"""Steered policies: what is stored is what was judged, and decoding listens to its noise."""

import dataclasses
import math

import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.adapt import add_lora
from vlarl_bench.policies.octo import Octo
from vlarl_bench.policies.presets import OCTO_TINY, PI0_TINY
from vlarl_bench.policies.steering import steer
from vlarl_bench.policies.store import content_hash, read_policy, save_policy

from .conftest import make, observe


def seeds():
    return [torch.Generator().manual_seed(i) for i in range(3)]


def encoded(policy, spec):
    with torch.no_grad():
        return policy.encode(policy.preprocess([observe(i, spec) for i in range(3)]))


def steered(spec, repeat=False):
    """A policy whose steering has some weights."""
    policy = make(spec)
    steering = steer(policy, {"bound": 0.8, "width": 16, "repeat": repeat})
    steering.standardise(policy.features(encoded(policy, spec)))
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("spec", [PI0_TINY, OCTO_TINY], ids=lambda spec: spec.name)
def test_stored_and_loaded_it_is_steered(spec, repeat, tmp_path):
    policy = steered(spec, repeat)
    context = encoded(policy, spec)
    save_policy(tmp_path / "policy", policy, {"made_by": "a test"})
    assert read_policy(tmp_path / "policy")[0]["steering"] == {"bound": 0.8, "width": 16} | (
        {"repeat": True} if repeat else {}  # as it was before there was a choice, so that hashes stay
    )
    loaded = spec.load(tmp_path / "policy")
    assert content_hash(loaded) == content_hash(policy) != content_hash(make(spec))
    for generators in (seeds, lambda: None):
        expected, found = policy.sample(context, generators()), loaded.sample(context, generators())
        assert torch.equal(expected.latent, found.latent)
        assert torch.equal(expected.latent, policy.decode(context, policy.start(context, generators())).latent)
    whole = policy.sample(context, seeds()).latent
    others = policy.sample(context.index(torch.tensor([0, 2, 2])), seeds()).latent
    assert torch.equal(whole[0], others[0])
    actor = {id(parameter) for parameter in policy.actor_parameters()}
    assert actor == {id(parameter) for parameter in policy.steering.parameters()}


@pytest.mark.parametrize("spec", [PI0_TINY, OCTO_TINY], ids=lambda spec: spec.name)
def test_until_it_is_ready_it_is_the_base(spec, tmp_path):
    policy, base = make(spec), make(spec)
    context = encoded(policy, spec)
    steer(policy, {"bound": 1.0, "width": 8, "repeat": False})
    assert content_hash(policy) == content_hash(base)
    assert torch.equal(policy.sample(context, seeds()).latent, base.sample(context, seeds()).latent)
    save_policy(tmp_path / "policy", policy, {})
    assert "steering" not in read_policy(tmp_path / "policy")[0]
    assert spec.load(tmp_path / "policy").steering is None


def test_what_cannot_be_steered():
    fine = {"bound": 1.0, "width": 8, "repeat": False}
    for wrong in ({"bound": 0.0}, {"bound": math.inf}, {"width": "x"}, {"repeat": 1}, {"repeat": None}):
        with pytest.raises(BenchError, match=r"^steering: .*bound"):
            steer(make(), {**fine, **wrong})
    for bad in ({}, {"bound": 1.0}):
        with pytest.raises(BenchError, match=r"^steering: .*bound"):
            steer(make(), bad)
    policy = steered(PI0_TINY)
    with pytest.raises(BenchError, match=r"^base: a steered policy"):
        steer(policy, {"bound": 1.0, "width": 8, "repeat": False})
    with pytest.raises(BenchError, match=r"^lora: .*steered"):
        add_lora(policy)
    adapted = make()
    add_lora(adapted, 2)
    with pytest.raises(BenchError, match=r"^lora: .*adapters too"):
        steer(adapted, fine)


def test_flow_decodes_the_noise_that_it_would_have_drawn():
    policy = make(PI0_TINY)
    context = encoded(policy, PI0_TINY)
    noise = torch.stack([torch.randn(policy.chunk, policy.action_dim, generator=g) for g in seeds()])
    assert torch.equal(policy.decode(context, noise).latent, policy.sample(context, seeds()).latent)


def test_diffusion_decodes_noise_to_the_distribution_itself():
    """Latents of N(m, s^2): the noise that is to be expected in x is known, and the ODE takes w to m + s w."""
    tiny = make(OCTO_TINY)
    policy = Octo("octo-tiny", dataclasses.replace(tiny.architecture, denoising_steps=500), tiny.vocabulary)
    m, s = 0.7, 0.4

    def predict(context, x, t):
        kept = policy.kept[t][..., None, None]
        return (1 - kept).sqrt() * (x - kept.sqrt() * m) / (kept * s**2 + 1 - kept)

    policy.predict = predict
    context = encoded(policy, OCTO_TINY)
    noise = torch.randn(3, policy.chunk, policy.action_dim, generator=torch.Generator().manual_seed(0))
    found = policy.decode(context, noise)
    torch.testing.assert_close(found.latent, m + s * noise, atol=0.02, rtol=0)
    torch.testing.assert_close(found.actions, policy.unnormalise(found.latent))
