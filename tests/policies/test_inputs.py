"""What tiny policies see: names, poses, words and pictures, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.inputs import object_features
from vlarl_bench.policies.presets import PI0_TINY_PIXELS
from vlarl_bench.policies.vocabulary import Vocabulary

from .conftest import INSTRUCTIONS, OBJECTS, make, observe


def decode(policy, *observations):
    with torch.no_grad():
        return policy.sample(policy.encode(policy.preprocess(observations)), None).latent


def test_everything_seen_matters(policy, spec):
    """The instruction, its word order, each camera or object, and proprioception all reach the actions."""
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
        for i in (0, 3):
            for name in OBJECTS:
                moved = base.objects[name] + np.float32(0.3) * np.eye(7, dtype=np.float32)[i]
                others.append(replace(base, objects={**base.objects, name: moved}))
        swapped = {"ketchup_1": base.objects["basket_1"], "basket_1": base.objects["ketchup_1"]}
        others.append(replace(base, objects={**base.objects, **swapped}))
        others.append(replace(base, objects={n: p for n, p in base.objects.items() if n != "ketchup_1"}))
    actions = decode(policy, base, *others)
    assert ((actions[1:] - actions[0]).abs().amax((1, 2)) > 1e-4).all()


def test_the_order_and_the_sign_of_what_is_seen_do_not_matter():
    policy, base = make(), observe(0)
    shuffled = dataclasses.replace(base, objects=dict(reversed(base.objects.items())))
    negated = {name: np.r_[pose[:3], -pose[3:]].astype(np.float32) for name, pose in base.objects.items()}
    same = decode(policy, base, shuffled, dataclasses.replace(base, objects=negated))
    assert torch.equal(same[0], same[1])
    torch.testing.assert_close(same[0], same[2], atol=1e-5, rtol=0)


def test_object_features_by_hand():
    half = np.sqrt(0.5)
    pose = np.array([[[0.3, 0.0, 0.6, 0.0, 0.0, half, half]]], np.float32)  # a quarter turn about z
    features = object_features(pose, np.array([[[0.15, 0.04, 0.6]]], np.float32))[0, 0]
    expected = [1, 0, 2, 1, -0.04 / 0.15, 0, np.tanh(3.75), np.tanh(-1), 0, 0, 1, 0, -1, 0, 0]
    np.testing.assert_allclose(features, expected, atol=1e-6)
    both = object_features(pose, np.array([[[0.15, 0.04, 0.6], [0.3, 0.04, 0.6]]], np.float32))[0, 0]
    second = [0, -0.04 / 0.15, 0, 0, np.tanh(-1), 0]
    np.testing.assert_allclose(both, [*expected[:9], *second, *expected[9:]], atol=1e-6)


def test_proprio_far_outside_is_clipped():
    policy, base = make(), observe(0)
    far, further = (dataclasses.replace(base, proprio=np.full(8, x, np.float32)) for x in (50, 51))
    with torch.no_grad():
        context = policy.encode(policy.preprocess([far, further]))
    assert torch.equal(context.proprio, torch.full((2, 8), 6.0))


def test_words():
    vocabulary = Vocabulary.of(["Pick up the alphabet_soup_1", "the basket"])
    assert vocabulary.entries == ("<pad>", "<unk>", "1", "alphabet", "basket", "pick", "soup", "the", "up")
    assert vocabulary.encode("pick the WRENCH, basket-2") == [5, 7, 1, 4, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proprio": np.zeros(9, np.float32)}, "proprio: shape (9,)"),
        ({"instruction": "go " * 21}, "instruction: 'go go"),
        ({"instruction": ""}, "instruction: ''"),
        ({"objects": {}}, "objects: 0"),
        ({"objects": {f"milk_{i}": np.zeros(7, np.float32) for i in range(11)}}, "objects: 11"),
    ],
)
def test_observations_that_do_not_fit(change, message):
    with pytest.raises(BenchError) as error:
        make().preprocess([dataclasses.replace(observe(0), **change)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("image", [None, np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_images_that_do_not_fit(image):
    seen = observe(0, PI0_TINY_PIXELS)
    images = {name: picture for name, picture in seen.images.items() if name != "agentview"}
    if image is not None:
        images["agentview"] = image
    found = r"missing \(there are robot0_eye_in_hand\)" if image is None else r"\(\d\d, \d\d, 3\) [a-z0-9]+"
    with pytest.raises(BenchError, match=rf"^images\['agentview'\]: {found}, but this .*takes \(64, 64, 3\) uint8$"):
        make(PI0_TINY_PIXELS).preprocess([dataclasses.replace(seen, images=images)])
    if image is None:
        with pytest.raises(BenchError, match=r"missing \(there are none\)"):
            make(PI0_TINY_PIXELS).preprocess([dataclasses.replace(seen, images={})])
