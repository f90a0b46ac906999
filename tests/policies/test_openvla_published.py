"""OpenVLA's network against the published checkpoint's keys and against numbers that the authors' code gave."""

import json
import math
from pathlib import Path

import pytest
import torch

from vlarl_bench.policies import openvla
from vlarl_bench.policies.inputs import Batch
from vlarl_bench.policies.openvla import assemble
from vlarl_bench.policies.openvla_checkpoint import OFT as PUBLISHED_OFT
from vlarl_bench.policies.openvla_checkpoint import ONE_IMAGE, PUBLISHED
from vlarl_bench.policies.openvla_inputs import Prompts
from vlarl_bench.policies.openvla_model import OpenVLAArchitecture

from .openvla_tiny import AUTOREGRESSIVE, OFT, inputs, small, tokenizer

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "openvla_7b_manifest.json").read_text())
GOLDEN = json.loads((HERE / "openvla_golden.json").read_text())
PROMPTS = ([512, 29901, 1724, 3158, 881, 278], [512, 29901, 4337, 304])  # without <s> before and 29871 after


def full_size(shape):
    with torch.device("meta"):
        return assemble("openvla-7b", OpenVLAArchitecture(**{**PUBLISHED, **shape}), Prompts(tokenizer()))


def test_full_size_has_the_published_keys_shapes_and_dtypes():
    expected = {}
    for key, entry in MANIFEST["tensors"].items():
        for i in range(entry.get("copies", 1)):
            expected[key.replace("*", str(i))] = (entry["shape"], MANIFEST["dtype"])
    found = full_size(ONE_IMAGE).network.state_dict()
    assert {k: (list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in found.items()} == expected
    assert sum(v.numel() for v in found.values()) == MANIFEST["parameters"] == 7_541_237_184


def test_shapes_give_the_adapter_size_that_fine_tuning_logs_print():
    """Rank 32 on every linear layer, the patch convolutions and the output layer: 110,828,288 in public logs."""
    adapters = 0
    for key, tensor in full_size(ONE_IMAGE).network.state_dict().items():
        if key.endswith("weight") and tensor.ndim >= 2 and "embed_tokens" not in key:
            adapters += 32 * (tensor.shape[0] + math.prod(tensor.shape[1:]))
    assert adapters == MANIFEST["lora_rank_32_parameters"]


def test_full_size_oft_has_the_published_heads_tensors():
    """Keys and shapes of L1RegressionActionHead and ProprioProjector (github.com/moojink/openvla-oft, commit 213c5ff,
    prismatic/models/action_heads.py and projectors.py) at the sizes that vla-scripts/finetune.py makes them. It saves
    the head in bfloat16; the projector is float32 there, and bfloat16 here, as the authors' evaluation loads it."""
    policy = full_size(PUBLISHED_OFT)
    blocks = [f"model.mlp_resnet_blocks.{i}.ffn" for i in (0, 1)]
    layers = {"model.fc1": (4096, 28672), "model.fc2": (7, 4096)} | {f"{block}.1": (4096, 4096) for block in blocks}
    norms = {"model.layer_norm1": 28672, "model.layer_norm2": 4096} | {f"{block}.0": 4096 for block in blocks}
    head = {f"{k}.weight": shape for k, shape in layers.items()} | {f"{k}.bias": v[:1] for k, v in layers.items()}
    head |= {f"{k}.{part}": (width,) for k, width in norms.items() for part in ("weight", "bias")}
    projector = {"fc1.weight": (4096, 8), "fc1.bias": (4096,), "fc2.weight": (4096, 4096), "fc2.bias": (4096,)}
    for part, expected in ((policy.action_head, head), (policy.proprio_projector, projector)):
        assert {k: tuple(v.shape) for k, v in part.state_dict().items()} == expected
        assert {v.dtype for v in part.state_dict().values()} == {torch.bfloat16}


def encode(policy, images, monkeypatch, proprio=None, pad=0):
    """Contexts of the golden prompts; images [2, C, 6, 28, 28] are already normalised."""
    longest = policy.architecture.max_words
    words = torch.tensor([ids + [0] * (longest - len(ids)) for ids in PROMPTS])
    none = torch.zeros(2, 0, 15), torch.zeros(2, 0, 6, dtype=torch.long)
    blank = torch.zeros(*images.shape[:2], 3, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(openvla, "pixels", lambda *_: images)
    with torch.no_grad():
        return policy.encode(Batch(torch.zeros(2, 8) if proprio is None else proprio, words, *none, blank))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.tensor(expected), atol=tolerance, rtol=tolerance)


def scale_as_golden(policy):
    policy.action_low.copy_(torch.tensor([-0.5, -0.6, -0.7, -0.1, -0.2, -0.3, 0.0]))
    policy.action_high.copy_(torch.tensor([0.5, 0.7, 0.9, 0.1, 0.15, 0.3, 1.0]))
    policy.action_scaled[6] = False


def test_openvla_agrees_with_the_authors_code(monkeypatch):
    golden = GOLDEN["openvla"]
    policy = small(**AUTOREGRESSIVE)
    scale_as_golden(policy)
    images = inputs("pixels", 2, 6, 28, 28)
    with torch.no_grad():
        features = policy.network.vision_backbone(images)
        close(features[1, 2], golden["vision_row_1_patch_2"])
        close(policy.network.projector(features)[0, 3], golden["projected_row_0_patch_3"])
        context = encode(policy, images[:, None], monkeypatch)
        tokens = torch.tensor(
            [[31744, 31900, 31999, 31800, 31750, 31880, 31990], [31999, 31998, 31744, 31745, 31850, 31851, 31852]]
        )
        close(policy.logits(context, 31999 - tokens).flip(-1)[..., ::15], golden["logits"])
    sample = policy.sample(context, None)
    assert (31999 - sample.trace[..., 0]).tolist() == golden["greedy_tokens"]
    close(sample.actions[:, 0], golden["greedy_actions"], 1e-6)


@pytest.mark.parametrize("head", ["tokens", "l1"])
def test_oft_agrees_with_the_authors_code(head, monkeypatch):
    golden = GOLDEN["oft"]
    policy = small(**OFT, head=head)
    scale_as_golden(policy)
    images = inputs("two_images", 2, 2, 6, 28, 28)
    context = encode(policy, images, monkeypatch, inputs("proprio", 2, 8))
    with torch.no_grad():
        close(policy._read(context)[:, ::9], golden["hidden"], 2e-5)
        actions = policy.sample(context, None).actions
        if head == "l1":
            close(actions, golden["l1_actions"])
        else:
            close(policy.logits(context, None).flip(-1)[:, ::9, ::15], golden["logits"])
            close(actions, golden["token_actions"], 1e-6)
