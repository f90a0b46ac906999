"""Bins, images and prompts, each by hand."""

import json

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.openvla_inputs import EMPTY_TOKEN, Prompts, crop_middle, from_bins, pixels, to_bins
from vlarl_bench.suite import Observation

from .conftest import characters, spelled
from .openvla_tiny import OFT, small


def test_bins_are_numpys_digitize():
    """The published convention: token = vocabulary end - digitize(a), value = centre of bin, clipped to the last."""
    values = np.concatenate([np.random.default_rng(0).uniform(-1.2, 1.2, 5000), np.linspace(-1, 1, 256), [-1, 0, 1]])
    edges = np.linspace(-1, 1, 256)
    digit = np.digitize(np.clip(values, -1, 1), edges)
    index = to_bins(torch.from_numpy(values), 256)
    assert (31999 - index.numpy() == 32000 - digit).all()
    assert index.min() == 0
    assert index.max() == 255
    centres = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(from_bins(index, 256), centres[np.clip(digit - 1, 0, 254)], atol=1e-7)


def test_bins_by_hand():
    """Three edges -1, 0, 1 make two intervals with centres -0.5 and 0.5; the edge 1 is a bin of its own."""
    values = torch.tensor([[-2.0, -1, -0.1], [0.0, 0.99, 1]])
    assert to_bins(values, 3).tolist() == [[0, 0, 0], [1, 1, 2]]
    assert from_bins(torch.tensor([0, 1, 2]), 3).tolist() == [-0.5, 0.5, 0.5]


def test_pixels_by_hand():
    """White, then black: (1 - mean) / std and -mean / std of ImageNet; 1 and -1 for SigLIP."""
    images = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    images[0, 0] = 255
    found = pixels(images, 1.0)
    assert found.shape == (1, 2, 6, 4, 4)
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225, 1, 1, 1]
    black = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225, -1, -1, -1]
    np.testing.assert_allclose(found[0, :, :, 2, 1], [white, black], atol=1e-6)


def test_middle_of_an_image_by_hand():
    """A ramp of 10 grey levels a pixel keeps its middle and loses a factor sqrt(0.9) of its slope."""
    ramp = (torch.arange(21) * 10).to(torch.uint8).expand(3, 21, 21)
    found = crop_middle(ramp[None, None], 0.9)[0, 0]
    expected = 100 + np.sqrt(0.9) * (np.arange(21) - 10) * 10
    assert found[0, 5].tolist() == np.floor(expected / 255 * 255.5).tolist()
    assert torch.equal(found, found[:1, :1].expand(3, 21, 21))
    upright = crop_middle(ramp.transpose(1, 2)[None, None], 0.9)[0, 0]
    assert torch.equal(upright.transpose(1, 2), found)
    assert torch.equal(crop_middle(ramp[None, None], 1.0)[0, 0], ramp)


def test_the_policy_looks_at_the_middle_of_each_camera():
    """Ramps of 8 grey levels a pixel, 0 to 216: the middle 0.9 of them begins at 5 and ends at 210."""
    policy, shown = small(**OFT, crop_area=0.9), []
    policy.network.vision_backbone.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    ramp = np.repeat(np.arange(0, 224, 8, dtype=np.uint8)[None, :, None], 28, 0).repeat(3, -1)
    images = {"agentview": ramp, "robot0_eye_in_hand": ramp.transpose(1, 0, 2)}
    with torch.no_grad():
        policy.encode(policy.preprocess([Observation("pick up the milk", np.zeros(8, np.float32), images=images)]))
    expected = np.floor((108 + np.sqrt(0.9) * (np.arange(28) - 13.5) * 8) / 255 * 255.5)
    assert (expected[0], expected[-1]) == (5, 210)
    across = torch.from_numpy(expected).to(torch.uint8).expand(3, 28, 28)
    (seen,) = shown
    assert torch.equal(seen, pixels(torch.stack((across, across.transpose(1, 2)))[None], 1.0)[0])


def test_prompt():
    found = spelled(Prompts(characters()).encode("Pick up the MILK"))
    assert found == "In: What action should the robot take to pick up the milk?\nOut:"
    with pytest.raises(BenchError, match=r"tokenizer\.json: not a tokenizer"):
        Prompts("{}")


def test_the_empty_token_at_the_end_is_the_architectures():
    """Llama's tokenizer may end a prompt with it, and `separator` stands there anyhow."""
    ends = json.loads(characters())
    ends["model"]["vocab"]["Out:"] = EMPTY_TOKEN
    ends["pre_tokenizer"]["pattern"] = {"Regex": r"Out:|[\s\S]"}
    assert spelled(Prompts(json.dumps(ends)).encode("move")).endswith("take to move?\n")
