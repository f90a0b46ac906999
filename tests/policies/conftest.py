import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.presets import PI0_TINY, PI0_TINY_PIXELS
from vlarl_bench.suite import Embodiment, Observation

OBJECTS = ("alphabet_soup_1", "cream_cheese_1", "ketchup_1", "basket_1")
INSTRUCTIONS = tuple(f"pick up the {name} and place it in the basket" for name in ("alphabet soup", "cream cheese"))


CAMERAS = ("agentview", "robot0_eye_in_hand")


def embodiment(spec):
    """A robot like LIBERO's."""
    return Embodiment(7, 8, CAMERAS if spec.observation == "pixels" else ())


def observe(seed, spec=PI0_TINY, instruction=INSTRUCTIONS[0], objects=OBJECTS):
    """A made-up observation of the kind that `spec` takes."""
    draw = np.random.default_rng(seed)
    proprio = draw.normal(scale=0.2, size=8).astype(np.float32)
    size = spec.image_size
    if spec.observation == "pixels":
        images = {camera: draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in CAMERAS}
        return Observation(instruction, proprio, images=images)
    poses = {}
    for name in objects:
        quaternion = draw.normal(size=4)
        poses[name] = np.r_[draw.normal(scale=0.2, size=3), quaternion / np.linalg.norm(quaternion)].astype(np.float32)
    return Observation(instruction, proprio, poses)


def make(spec=PI0_TINY, seed=0):
    """Random weights, but fitted scales that are not the identity."""
    policy = spec.create(embodiment(spec), [*INSTRUCTIONS, *OBJECTS], seed=seed)
    draw = np.random.default_rng(0)
    policy.fit_normalisation([draw.normal(0.2, 0.5, (500, 7))], draw.normal(0.1, 0.3, (500, 8)))
    return policy


def told_in_one_line(load, *needles):
    """`load()` is refused, in one line that has all of `needles`."""
    with pytest.raises(BenchError) as error:
        load()
    assert "\n" not in str(error.value)
    for needle in needles:
        assert needle in str(error.value)


class Planted:
    """What makes the file `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def plant(folder):
    """Puts Python and a pickle into a published folder that must never run; what they make if they do."""
    marker = folder.parent / "it ran"
    for name in ("__init__.py", "configuration_pi0.py", "modeling_pi0.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
    torch.save(Planted(marker), folder / "pytorch_model.bin")
    return marker


def nothing_planted_runs(folder, load):
    """`load(folder)` of a folder with safetensors works, without them it is refused, and neither runs anything."""
    marker = plant(folder)
    load(folder)
    (folder / "model.safetensors").unlink()
    told_in_one_line(
        lambda: load(folder), "pytorch_model.bin is a pickle, never read", "weights_only=True), 'model.safetensors')"
    )
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "it would have run"


def characters():
    """The text of a tokenizer.json that loses nothing: ids are the code points of a text's characters."""
    ids = {"<pad>": 0, "<unk>": 1, "<bos>": 2} | {chr(i): i for i in (10, *range(32, 127))}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return made.to_str()


def spelled(ids):
    """The text that ids of `characters` stand for."""
    return "".join(map(chr, ids))


@pytest.fixture
def float64(monkeypatch):
    """What is made is float64, also where a policy asks for float32: what differs then differs not by rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_float64(batch):
    """A batch with its numbers in float64; images and ids stay what they are."""
    numbers = {name: value.double() for name, value in vars(batch).items() if value.is_floating_point()}
    return dataclasses.replace(batch, **numbers)


@pytest.fixture(params=[PI0_TINY, PI0_TINY_PIXELS], ids=lambda spec: spec.name)
def spec(request):
    return request.param


@pytest.fixture
def policy(spec):
    return make(spec)


@pytest.fixture
def context(policy, spec):
    """Five observations, two instructions and (in state mode) two numbers of objects."""
    seen = [observe(i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 3 + i % 2]) for i in range(5)]
    return policy.encode(policy.preprocess(seen)).detach()
