"""Octo's network against the authors' code (numbers in octo_golden.json), Pillow, and what masks promise."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlarl_bench.policies.octo import Context, Octo, Subwords, resize
from vlarl_bench.policies.octo_convert import FULL_SIZE, architecture_of, convert_parameters, torch_array, torch_key
from vlarl_bench.policies.octo_model import OctoNetwork, StandardisedConv, attention_rules, cosine_betas
from vlarl_bench.policies.presets import OCTO_TINY_PIXELS
from vlarl_bench.suite import Observation

from .conftest import INSTRUCTIONS, make
from .octo_golden import IDS, MODEL, SEEN, golden, parameters, pixels, tokenizer_json

MANIFEST = json.loads((Path(__file__).parent / "octo_manifest.json").read_text())["parameters"]


def small(variant="published", **changes):
    """The network of octo_golden.json, in torch."""
    arrays = parameters(variant == "proprio")
    shapes = {path: array.shape for path, array in arrays.items()}
    a = architecture_of({"model": {**MODEL, "use_correct_attention": variant != "first_release_mask"}}, shapes)
    a = type(a)(**{**a.__dict__, "proprio_dim": 5 if variant == "proprio" else 0, **changes})
    network = OctoNetwork(a, a.text_vocabulary).eval()
    network.load_state_dict(convert_parameters(arrays))
    return network


def inputs(network):
    """(word ids, observed groups) of octo_golden.json."""
    images = [torch.from_numpy(pixels(2, 2, s, s, 3)).permute(0, 1, 4, 2, 3) for s in network.architecture.camera_sizes]
    values = network.images(images)
    if network.architecture.proprio_dim:
        values["proprio"] = torch.from_numpy(np.sin(np.arange(20, dtype=np.float32)).reshape(2, 2, 5, 1))
    seen = torch.from_numpy(SEEN)[..., None]
    return torch.from_numpy(IDS), {name: (x, seen.expand(x.shape[:3])) for name, x in values.items()}


@pytest.mark.parametrize("variant", ["published", "first_release_mask", "proprio"])
def test_the_transformer_and_the_head_are_the_authors(variant):
    network = small(variant)
    with torch.no_grad():
        readout, tokens, _ = network(*inputs(network))
        x = torch.from_numpy(np.sin(np.arange(112) * 0.37).astype(np.float32) * np.float32(1.5)).view(2, 2, 28)
        noise = network.head(readout, x, torch.tensor([[0, 19], [7, 12]]))
    found = {
        "readout": readout,
        "observed": tokens.mean(-1),
        "observed_first": tokens[..., 0],
        "eps": noise,
    }
    for name, value in found.items():
        expected = golden(variant, name, *value.shape)
        assert expected.std() > 0.02
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5, err_msg=name)


def test_masks_of_the_two_releases_differ():
    two = [golden(variant, "readout", 2, 2, 32) for variant in ("published", "first_release_mask")]
    assert np.abs(two[0] - two[1]).max() > 1e-2


@pytest.mark.parametrize(("variant", "limit"), [("published", 5.0), ("narrow", 1.0)])
def test_a_whole_sample_is_the_authors(variant, limit, monkeypatch):
    """All 20 steps, from the same noise. With `narrow` clipping changes almost every step."""
    network = small(max_latent=limit)
    policy = Octo("octo", network.architecture, Subwords(tokenizer_json(), 6))
    policy.model = network
    with torch.no_grad():
        readout, tokens, _ = network(*inputs(network))
    context = Context(readout[:, -1], tokens[:, -1].mean(1), torch.zeros(2, 0))
    noise = torch.from_numpy(golden("published", "noise", 2, 21, 4, 7))
    rows = iter(noise)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(rows))
    sample = policy.sample(context, [torch.Generator(), torch.Generator()])
    expected = golden(variant, "sample", 2, 4, 7)
    assert np.abs(expected).max() == limit or limit == 5.0
    np.testing.assert_allclose(sample.latent, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "column", "millions"), [("octo-small-1.5", 0, 27.04), ("octo-base-1.5", 1, 92.83)])
def test_full_size_has_exactly_the_published_parameters(name, column, millions):
    shapes = {path: tuple(both[column]) for path, both in MANIFEST.items()}
    architecture = architecture_of({"model": MODEL}, shapes)
    for field, value in FULL_SIZE[name].items():
        assert getattr(architecture, field) == value
    assert (architecture.camera_sizes, architecture.window, architecture.max_words) == ((256, 128), 10, 16)
    with torch.device("meta"):
        own = OctoNetwork(architecture, architecture.text_vocabulary).state_dict()
    expected = {}
    for path, shape in shapes.items():
        expected[torch_key(path)] = torch_array(path, np.broadcast_to(np.float32(0), shape)).shape
    assert len(expected) == len(shapes)
    assert {key: tuple(tensor.shape) for key, tensor in own.items()} == expected
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    counted = sum(tensor.numel() for key, tensor in own.items() if not key.startswith("language."))
    assert counted / 1e6 == pytest.approx(millions, abs=0.005)


def test_who_sees_whom_by_hand():
    """Two words, then twice: two observation tokens and a readout."""
    expected = """
        11 000 000
        11 000 000
        11 110 000
        11 110 000
        11 111 000
        11 110 110
        11 110 110
        11 111 111"""
    rows = [[int(x) for x in line.replace(" ", "")] for line in expected.split("\n") if line]
    assert attention_rules(2, 2, 2).int().tolist() == rows


def test_nothing_sees_the_readout():
    """Another readout token leaves every other token as it was."""
    network = small()
    with torch.no_grad():
        before = network(*inputs(network))
        network.positions["action"].neg_()
        after = network(*inputs(network))
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0], after[0], atol=1e-2)


def test_the_future_and_padded_timesteps_are_not_seen():
    network = small()
    ids, observed = inputs(network)
    with torch.no_grad():
        readout, tokens, _ = network(ids, observed)
        patches, mask = observed["primary"]
        changed = patches.clone()
        changed[1, 1] += 1  # the second row's present
        changed[0, 0] += 1  # what the first row's mask calls padding
        other = network(ids, {**observed, "primary": (changed, mask)})
    torch.testing.assert_close(other[0][1, 0], readout[1, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(other[1][1, 0], tokens[1, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(other[0][0, 1], readout[0, 1], atol=1e-6, rtol=0)
    assert not torch.allclose(other[0][1, 1], readout[1, 1], atol=1e-3)


def test_checkpointed_gradients_are_the_gradients():
    """And each block is computed twice for them, but not without gradients."""
    network, found, computed = small(), [], []
    network.blocks[1].register_forward_pre_hook(lambda *_: computed.append(1))
    for checkpointed in (False, True):
        network.checkpointed = checkpointed
        network.zero_grad()
        readout, tokens, _ = network(*inputs(network))
        (readout.sum() + tokens.square().sum()).backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert len(computed) == 3
    with torch.no_grad():
        network(*inputs(network))
    assert len(computed) == 4
    assert found[0].keys() == found[1].keys()
    assert sum("blocks" in name for name in found[0]) > 2 * len(network.blocks)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_cosine_schedule_by_hand():
    betas = cosine_betas(20)
    kept = (1 - betas).cumprod(0)
    f = [np.cos((t / 20 + 0.008) / 1.008 * np.pi / 2) ** 2 for t in (0, 10, 20)]
    assert kept[9].item() == pytest.approx(f[1] / f[0])
    assert kept[0].item() == pytest.approx(1 - betas[0].item())
    assert betas[-1].item() == 0.999
    assert ((betas[1:] - betas[:-1]) > 0).all()


def test_standardised_convolution_by_hand():
    conv = StandardisedConv(1, 1, 3, 1, 0)
    kernel = torch.arange(9.0)
    with torch.no_grad():
        conv.weight.copy_(5 + 7 * kernel.view(1, 1, 3, 3))
        conv.bias.fill_(0.5)
        found = conv(torch.eye(9).view(9, 1, 3, 3)).flatten()
    deviation = np.sqrt(60 / 9)  # of 0 .. 8
    torch.testing.assert_close(found, 0.5 + (kernel - 4) / deviation, atol=1e-5, rtol=0)


def test_pixels_by_hand():
    """0, 51 and 255 are -1, -0.6 and 1, and so is black where a goal would be shown."""
    network, shown = small(), []
    for stem in network.stems.values():
        stem.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    colour = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None]
    with torch.no_grad():
        network.images([colour.expand(1, 2, 3, size, size) for size in network.architecture.camera_sizes])
    for found, size in zip(shown, (32, 16), strict=True):
        assert found.shape == (2, 6, size, size)
        torch.testing.assert_close(found, torch.tensor([-1, -0.6, 1, -1, -1, -1])[:, None, None].expand_as(found))


@pytest.mark.parametrize("form", ["published", "tiny"])
def test_agentview_is_primary_and_the_wrist_is_the_wrist(form):
    """From observations of one grey level a camera, 51 and 204, to -0.6 and 0.6 in the two stems."""
    if form == "published":
        shapes = {path: tuple(both[0]) for path, both in MANIFEST.items()}
        narrow = {"width": 16, "layers": 1, "heads": 2, "mlp": 16, "word_width": 16, "text_layers": 1, "text_mlp": 16}
        a = dataclasses.replace(architecture_of({"model": MODEL}, shapes), text_vocabulary=50, **narrow)
        policy, side, sides, goal = Octo("octo-small-1.5", a, Subwords(tokenizer_json(), 16)), 256, (256, 128), True
    else:
        policy, side, sides, goal = make(OCTO_TINY_PIXELS), 64, (64, 64), False
    shown = {}
    for view, stem in policy.model.stems.items():
        stem.register_forward_pre_hook(lambda _, inputs, view=view: shown.update({view: inputs[0]}))
    grey = {"agentview": 51, "robot0_eye_in_hand": 204}
    images = {camera: np.full((side, side, 3), level, np.uint8) for camera, level in grey.items()}
    with torch.no_grad():
        policy.encode(policy.preprocess([Observation(INSTRUCTIONS[0], np.zeros(8, np.float32), images=images)]))
    assert list(shown) == ["primary", "wrist"]
    for found, level, size in zip(shown.values(), (-0.6, 0.6), sides, strict=True):
        expected = torch.full((1, 3, size, size), level)
        black = torch.full((1, 3 * goal, size, size), -1.0)
        torch.testing.assert_close(found, torch.cat((expected, black), 1))


def test_images_are_resized_as_pillow_does():
    image = pixels(256, 256, 3)
    ours = resize(torch.from_numpy(image).permute(2, 0, 1), 128).permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.LANCZOS), np.float32)
    assert ours.shape == (128, 128, 3)
    assert np.abs(ours - pillow).max() <= 1  # Pillow rounds once after each direction
    assert np.abs(ours - pillow).mean() < 0.2
    unchanged = torch.from_numpy(image).permute(2, 0, 1)
    assert torch.equal(resize(unchanged, 256), unchanged.float())
