"""Small OpenVLA networks with weights from a formula, so that no test needs a checkpoint."""

import zlib

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from vlarl_bench.policies.openvla import assemble
from vlarl_bench.policies.openvla_inputs import Prompts
from vlarl_bench.policies.openvla_model import OpenVLAArchitecture, Tower

SMALL = {
    "observation": "pixels",
    "action_dim": 7,
    "proprio_dim": 8,
    "vocabulary_size": 32064,
    "action_end": 32000,
    "begin": 1,
    "separator": 29871,
    "stop": 2,
    "placeholders": "zero",
    "layers": 3,
    "frozen_layers": 0,
    "width": 32,
    "heads": 4,
    "mlp": 48,
    "max_words": 16,
    "image_size": 28,
    "patch": 14,
    "dino": Tower(16, 3, 2, 64),
    "siglip": Tower(24, 4, 2, 40),
    "whole_towers": True,
}
"""The published network's form, with the widths that the golden numbers were made at."""
AUTOREGRESSIVE = {"decoding": "autoregressive", "chunk": 1, "proprio_token": False, "cameras": ("agentview",)}
OFT = {"decoding": "parallel", "cameras": ("agentview", "robot0_eye_in_hand")}


def tokenizer(extra=()):
    """The text of a tokenizer.json that knows the prompt's words."""
    words = [
        "In",
        ":",
        "What",
        "action",
        "should",
        "the",
        "robot",
        "take",
        "to",
        "?",
        "Out",
        "up",
        "pick",
        "milk",
        "move",
    ]
    ids = {"<unk>": 0} | {word: 100 + i for i, word in enumerate([*words, *extra])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made.to_str()


def weight(key, shape):
    """[shape] float32 that depends on the key alone: a wave, at about the scale of a trained network."""
    wave = np.sin(np.arange(np.prod(shape)) * 0.7 + zlib.crc32(key.encode()) % 1000)
    if len(shape) < 2:
        wave = 0.1 * wave if key.endswith("bias") else 1 + 0.3 * wave
    elif key.endswith(("embed_tokens.weight", "pos_embed", "cls_token", "reg_token")):
        wave = 0.8 * wave
    else:
        wave = 1.4 * wave / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(wave.reshape(shape).astype(np.float32))


def inputs(name, *shape):
    """[shape] float32 between -0.3 and 0.3."""
    return (weight(f"{name}.data", (int(np.prod(shape)),)) - 1).view(shape)


def fill(module):
    """Gives every parameter the weights of its key."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(weight(key, tuple(parameter.shape)))
    return module


def small(**changes):
    """A small policy of the published form, in evaluation; each part filled under its published keys."""
    architecture = OpenVLAArchitecture(**{**SMALL, **changes})
    name = "openvla-7b" if architecture.decoding == "autoregressive" else "openvla-oft-7b"
    policy = assemble(name, architecture, Prompts(tokenizer()))
    fill(policy.network)
    with torch.no_grad():  # so that the likeliest of all tokens is an action token
        head = policy.network.language_model.lm_head.weight
        head[:31744] *= 0.1
        head[32000:] *= 0.1
    for part in ("action_head", "proprio_projector"):
        if hasattr(policy, part):
            fill(getattr(policy, part))
    return policy
