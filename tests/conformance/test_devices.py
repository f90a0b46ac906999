"""What every policy and algorithm does is the same wherever the policy computes; on a device that is pretended."""

import copy
import dataclasses

import pytest
import torch

from vlarl_bench import registry
from vlarl_bench.metering import Meter, check_finite
from vlarl_bench.policies.base import LogProb, Sample
from vlarl_bench.policies.store import content_hash

from .narrow import SAME
from .pretend import DEVICE, Pretend, Pretended
from .test_algorithms import PAIRS, start

PUBLISHED = [name for name in registry.names("policy") if registry.get("policy", name).published and name not in SAME]
"""Those that are for GPUs; the tiny ones are in what algorithms do with them."""
OTHERS = ("openvla-ar-tiny", "pi0-fast-tiny")
FEW = [(a, p) for a, p in PAIRS if p.endswith("-tiny") and (p not in OTHERS or a == "pi0-fast")]
"""Each algorithm on the tiny policies that it runs on, of those of tokens one."""


@pytest.fixture
def stage(request, bench):
    return bench(request.param)


@pytest.fixture(autouse=True)
def pretend(monkeypatch, stage):
    """Once the policy and its data are there."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which torch lets no wrapped tensor be written to
    with Pretend():
        yield


def seeds():
    return [torch.Generator().manual_seed(number) for number in range(4)]


def outcomes(stage, policy):
    """What the methods of `policy` come to, by name, and the gradients of its losses."""
    context = policy.encode(policy.preprocess(stage.observations))
    shape, mask = (4, policy.chunk, policy.latent_dim), torch.ones(4, policy.chunk)
    draw = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(shape, generator=draw), torch.randn(4, 2, *shape[1:], generator=draw)
    t, found = torch.rand(4, 2, generator=draw), {"features": policy.features(context)}
    found["sample"] = policy.sample(context, seeds())
    found["likeliest"] = policy.sample(context.index(torch.tensor([2, 0])), None)
    found["again"] = policy.unnormalise(policy.normalise(found["sample"].actions))
    found["sft_loss"] = policy.sft_loss(context, found["sample"].actions, mask, torch.Generator().manual_seed(1))
    if "denoising" in policy.capabilities:
        found["draw_loss"] = policy.draw_loss(context, latent, t, noise)
    if "flow" in policy.capabilities:
        found["velocity"] = policy.velocity(context, noise, t)
    if "noise" in policy.capabilities:
        found["decode"] = policy.decode(context, policy.start(context, seeds()))
    if "likelihood" in policy.capabilities:
        found["explore"] = policy.explore(context, seeds(), 1.0)
        found["log_prob"] = policy.log_prob(context.detach(), found["explore"].trace, mask, 1.0)
    loss = found["sft_loss"] + (found["draw_loss"].mean() if "draw_loss" in found else 0)
    (loss + (found["log_prob"].logp.mean() if "log_prob" in found else 0)).backward()
    return found


def tensors(found):
    """(name, tensor) of all that was found."""
    for name, value in found.items():
        parts = [value]
        if isinstance(value, Sample | LogProb):
            parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        yield from ((name, part) for part in parts if part is not None)


@pytest.mark.parametrize("stage", PUBLISHED, indirect=True)
def test_a_policy_takes_and_gives_tensors_of_the_cpu_wherever_it_computes(stage):
    here, there = (copy.deepcopy(stage.policy).requires_grad_(True) for _ in range(2))
    there.to(DEVICE)
    assert there.device == DEVICE
    assert all(type(p.data) is Pretended or isinstance(p, Pretended) for p in there.parameters())
    assert content_hash(there) == content_hash(here)
    expected, found = dict(outcomes(stage, here)), dict(outcomes(stage, there))
    for (what, a), (_, b) in zip(tensors(expected), tensors(found), strict=True):
        assert b.device.type == "cpu" and not isinstance(b, Pretended), what
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3, msg=lambda text, what=what: f"{what}: {text}")
    for (key, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            assert isinstance(b.grad, Pretended), key
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-2, atol=1e-4)


def weights(policy):
    """Copies on the CPU of all that is not an integer."""
    found = policy.state_dict().items()
    return {key: tensor.detach().cpu().clone() for key, tensor in found if tensor.is_floating_point()}


@pytest.mark.parametrize(("name", "stage"), FEW, indirect=["stage"], ids=["-".join(pair) for pair in FEW])
def test_an_algorithm_learns_the_same_wherever_the_policy_computes(name, stage, budget):
    """Two updates, metered, a stored state in between. Attention takes other kernels there, of which torch counts other
    operations."""
    # FPO's penalty has its kink where the first step begins, at no drift: rounding decides on which side that is.
    changed = {"drift_penalty": 0.0} if name == "fpo" else {}
    ended = []
    for device in ("cpu", DEVICE):
        placed = dataclasses.replace(stage, policy=copy.deepcopy(stage.policy).to(device))
        algorithm, policy = start(name, placed, budget, **changed)
        data = placed.data(algorithm, policy)
        begun, metrics = weights(policy), []
        for number in range(2):
            if number:
                stored = copy.deepcopy(algorithm.state_dict())
                algorithm.load_state_dict(stored)
            with Meter(policy) as meter:
                metrics.append(algorithm.update(policy, data))
            metrics[-1] |= {"flops": meter.flops, "gradient_steps": meter.gradient_steps}
            check_finite(policy, meter.gradient_steps)
        ended.append((metrics, begun, weights(policy)))
    (expected, before, here), (found, _, there) = ended
    for a, b in zip(expected, found, strict=True):
        assert b.pop("flops") == pytest.approx(a.pop("flops"), rel=0.05)
        assert b == pytest.approx(a, rel=1e-2, abs=1e-4)
    learned = sum(float((here[key] - tensor).norm()) for key, tensor in before.items())
    apart = sum(float((here[key] - there[key]).norm()) for key in before)
    assert apart < 0.05 * learned
