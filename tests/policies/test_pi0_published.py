"""The published pi0 against lerobot's keys, and against numbers that lerobot's code gave."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies import paligemma
from vlarl_bench.policies.inputs import Batch
from vlarl_bench.policies.paligemma import PaliGemmaPrompts, resize_with_pad
from vlarl_bench.policies.pi0_checkpoint import load_published, published_key
from vlarl_bench.policies.pi0_published import PublishedPi0, PublishedPi0Architecture
from vlarl_bench.suite import Observation

from .conftest import characters, in_float64, spelled
from .openvla_tiny import weight
from .pi0_small import CAMERAS, SIZES, STATS, publish, small, tokenizer
from .test_pi0 import learned, scores_what_it_drew, shown
from .test_pi0_checkpoint import restate

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "pi0_manifest.json").read_text())
GOLDEN = json.loads((HERE / "pi0_golden.json").read_text())
PROMPTS = ([2, 11, 12, 13, 14, 108], [2, 21, 22, 108])


def full_size(dtype):
    with torch.device("meta"):
        architecture = PublishedPi0Architecture("pixels", 7, 8, cameras=CAMERAS, dtype=dtype)
        return PublishedPi0("pi0-base", architecture, PaliGemmaPrompts(tokenizer()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_size_has_the_published_keys_shapes_and_dtypes(dtype):
    expected = {}
    for key, entry in MANIFEST["tensors"].items():
        for i in range(entry.get("copies", 1)):
            expected[key.replace("*", str(i))] = (entry["shape"], dtype if entry.get("half") else "float32")
    found = {published_key(k): v for k, v in full_size(dtype).model.state_dict().items()}
    assert {k: (list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in found.items()} == expected
    assert len(found) == 777  # as lerobot's log for pi0_base says
    assert sum(v.numel() for v in found.values()) == MANIFEST["parameters"] == 3_501_372_176


def wave(name, *shape):
    """[shape] between -1 and 1."""
    return ((weight(f"{name}.data", (math.prod(shape),)) - 1) / 0.3).view(shape)


def batch():
    """The golden inputs: two cameras of three, prompts of unlike length, normalised proprioception."""
    words = torch.tensor([ids + [0] * (16 - len(ids)) for ids in PROMPTS])
    images = ((wave("images", 2, 2, 3, 28, 28) + 1) * 127.5).round().to(torch.uint8)
    none = torch.zeros(2, 0, 15), torch.zeros(2, 0, 6, dtype=torch.long)
    return Batch(wave("state", 2, 8), words, *none, images)


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, torch.tensor(expected), atol=tolerance, rtol=tolerance)


def test_it_agrees_with_the_authors_code(monkeypatch):
    policy = small()
    actions = torch.nn.functional.pad(wave("actions", 2, 6, 7), (0, 25))
    noise, t = 1.5 * wave("noise", 2, 6, 32), torch.tensor([[0.7], [0.2]])
    with torch.no_grad():
        context = policy.encode(batch())
        loss = policy.draw_loss(context, actions, t, noise[:, None])[:, 0]
        close(loss[:, ::5].flatten(1)[:, ::3], GOLDEN["loss"])
        drawn = iter(noise)
        monkeypatch.setattr(torch, "randn", lambda *_, **__: next(drawn))
        sample = policy.sample(context, [torch.Generator(), torch.Generator()])
    close(sample.latent[:, ::5].flatten(1), GOLDEN["sample"])
    assert sample.actions.shape == (2, 6, 7)


def test_draws_of_one_observation_are_as_if_each_were_alone():
    policy = small()
    with torch.no_grad():
        context = policy.encode(batch())
        x, t = wave("x", 2, 3, 6, 32), wave("t", 2, 3).abs()
        together = policy.velocity(context, x, t)
        for k in range(3):
            alone = policy.velocity(context, x[:, k : k + 1], t[:, k : k + 1])
            torch.testing.assert_close(together[:, k : k + 1], alone)


@pytest.mark.parametrize("noise", [0.5, "learned"])
def test_a_decision_has_the_log_probability_that_it_was_drawn_with(noise, float64):
    """Of the robot's own seven numbers of an action: what pads them to 32 is drawn too, and not scored."""
    policy = small().double()
    with torch.no_grad():
        context = policy.encode(in_float64(batch())).index(torch.tensor([0, 1, 0, 1, 1]))
    scores_what_it_drew(policy, context, learned(policy) if noise == "learned" else noise)


def test_checkpointed_gradients_are_the_gradients():
    """And layers of all three networks are computed twice for them."""
    policy, found, computed = small(), [], []
    vlm = policy.model.model.vlm
    parts = [layers[1].mlp for layers in (vlm.language_model.layers, policy.model.model.dit.layers)]
    hooked = [vlm.vision_tower.encoder.layers[1].mlp.fc1, *(mlp.down_proj for mlp in parts)]
    for layer in hooked:
        layer.register_forward_pre_hook(lambda layer, _: computed.append(layer))
    for checkpointed in (False, True):
        policy.checkpointed = checkpointed
        policy.zero_grad()
        actions = wave("a", 2, 6, 7)
        policy.sft_loss(policy.encode(batch()), actions, torch.ones(2, 6), torch.Generator().manual_seed(0)).backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert [computed.count(layer) for layer in hooked] == [3, 3, 3]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    assert any("vision_tower" in name for name in found[0])
    silent = {name for name, _ in policy.named_parameters()} - found[0].keys()
    last = "model.model.vlm.language_model."
    assert all(n.startswith((f"{last}layers.2.", f"{last}norm.", "model.model.dit.embed_tokens.")) for n in silent)


def test_half_precision_is_close():
    exact, half = small(), small(dtype="bfloat16")
    with torch.no_grad():
        a, b = (p.velocity(p.encode(batch()), wave("x", 2, 1, 6, 32), torch.full((2, 1), 0.5)) for p in (exact, half))
        assert half.features(half.encode(batch())).dtype == b.dtype == torch.float32
    assert 0 < (a - b).abs().mean() < 0.1 * a.abs().mean()


def test_scales_by_hand():
    policy = small()
    policy.action_mean.fill_(1)
    policy.action_std.fill_(4)
    policy.proprio_mean.fill_(2)
    policy.proprio_std.fill_(0.5)
    latent = policy.normalise(torch.full((1, 1, 7), 3.0))
    assert latent.tolist() == [[[0.5] * 7 + [0.0] * 25]]
    assert policy.unnormalise(latent + 1).tolist() == [[[7.0] * 7]]
    assert policy.normalise_proprio(torch.full((1, 8), 7.0)).tolist() == [[10.0] * 8 + [0.0] * 24]  # not clipped


def test_the_gripper_stays_the_robot_s(tmp_path):
    """In lerobot's LIBERO data -1 opens and 1 closes, as LIBERO's robot does. With mean -0.25 and deviation 0.5 open is
    -1.5 and closed 2.5, and back it is what it was: not inverted, and what lies between is not rounded."""
    publish(tmp_path / "published")
    mean, std = STATS["action.mean"].clone(), STATS["action.std"].clone()
    mean[6], std[6] = -0.25, 0.5
    restate(tmp_path / "published", {**STATS, "action.mean": mean, "action.std": std})
    policy = load_published(tmp_path / "published", **SIZES)
    latent = torch.zeros(3, 32)
    latent[:, 6] = torch.tensor([-1.5, 2.5, 1.0])
    actions = mean.repeat(3, 1)
    actions[:, 6] = torch.tensor([-1.0, 1.0, 0.25])
    torch.testing.assert_close(policy.normalise(actions), latent)
    torch.testing.assert_close(policy.unnormalise(latent), actions)


def test_pixels_by_hand():
    """0, 51 and 255 are -1, -0.6 and 1, and a border is -1."""
    policy, wide = small(), np.full((20, 40, 3), [0, 51, 255], np.uint8)
    seen = Observation("pick", np.zeros(8, np.float32), images=dict.fromkeys(CAMERAS, wide))
    pixels = shown(policy, seen, paligemma)
    assert pixels.shape == (2, 3, 28, 28)
    torch.testing.assert_close(pixels[1, :, 7:21], torch.tensor([-1, -0.6, 1])[:, None, None].expand(3, 14, 28))
    assert (pixels[:, :, :7] == -1).all()


def test_images_keep_their_proportion():
    wide = np.full((20, 40, 3), 200, np.uint8)
    made = resize_with_pad(wide, 28)
    assert made.shape == (28, 28, 3)
    assert (made[7:21] == 200).all() and not made[:7].any() and not made[21:].any()
    ramp = np.repeat(np.array([[0, 100]], np.uint8), 2, 0)[..., None].repeat(3, -1)
    # Twice as large: pixel centres lie at 1/4 and 3/4 between the old ones, and the edge repeats.
    assert resize_with_pad(ramp, 4)[0, :, 0].tolist() == [0, 25, 75, 100]


def test_prompts():
    begin, *said = PaliGemmaPrompts(characters()).encode("Pick up the MILK_1")
    assert (begin, spelled(said)) == (2, "Pick up the MILK_1\n")
    prompts = PaliGemmaPrompts(tokenizer())
    assert prompts.encode("pick up the milk") == prompts.encode("pick up the milk\n") == [2, 10, 11, 12, 13, 108]
    with pytest.raises(BenchError, match="not a tokenizer"):
        PaliGemmaPrompts("{}")
    with pytest.raises(BenchError, match="has no token '<bos>'"):
        PaliGemmaPrompts(tokenizer().replace("<bos>", "<s>"))


def test_a_camera_that_is_not_there():
    seen = Observation("pick", np.zeros(8, np.float32), images={"agentview": np.zeros((28, 28, 3), np.uint8)})
    with pytest.raises(BenchError, match=r"robot0_eye_in_hand missing.*there are agentview"):
        small().preprocess([seen])
