"""The small Octo whose outputs `octo_golden.json` holds: weights and inputs by formula, so that none are stored."""

import json
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOLDEN = json.loads((Path(__file__).parent / "octo_golden.json").read_text())
IDS = np.array([[7, 3, 44, 1, 0, 0], [9, 12, 5, 31, 6, 1]])
SEEN = np.array([[False, True], [True, True]])
"""[B, W] false: a timestep before the episode began."""
MODEL = {
    "observation_tokenizers": {"primary": {}, "wrist": {}},
    "task_tokenizers": {"language": {}},
    "heads": {
        "action": {
            "name": "DiffusionActionHead",
            "kwargs": {"use_map": False, "action_horizon": 4, "action_dim": 7, "diffusion_steps": 20},
        }
    },
    "readouts": {"action": 1},
    "repeat_task_tokens": True,
    "use_correct_attention": True,
}
"""What a checkpoint's config.json says in `model`, as far as it matters here."""


def parameters(proprio=False):
    """Path -> array, as the authors' code has them."""
    shapes = {path: shape for path, shape in GOLDEN["shapes"].items() if proprio or "proprio" not in path}
    made = {path: _parameter(path, shape) for path, shape in shapes.items()}
    # silu(h) - silu(-h) = h: so the head predicts x and something more, and denoising does not just run into the clip.
    head, eye = "heads_action/diffusion_model/reverse_network/", np.eye(28, dtype=np.float32)
    made[head + "Dense_0/kernel"] *= np.float32(0.3)
    made[head + "Dense_0/kernel"][-28:] += np.concatenate((eye, -eye), 1)
    made[head + "Dense_1/kernel"] *= np.float32(0.3)
    made[head + "Dense_1/kernel"] += np.concatenate((eye, -eye), 0)
    return made


def _parameter(path, shape):
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    wave = np.sin(zlib.crc32(path.encode()) % 1000 + 1.7 * i + 0.003 * i * i)
    leaf = path.rsplit("/", 1)[-1]
    if leaf in ("scale", "weight"):
        wave = 1 + 0.2 * wave
    elif leaf == "bias" or "time_preprocess" in path:
        wave = 0.2 * wave
    elif leaf == "kernel":
        ins = shape[:3] if len(shape) == 4 else shape[:2] if "out/" in path else shape[:1]
        wave = 1.4 * wave / np.sqrt(np.prod(ins))
    else:
        wave = 0.7 * wave
    return wave.reshape(shape).astype(np.float32)


def pixels(*shape):
    """uint8 images [..., S, S, 3]."""
    i = np.arange(int(np.prod(shape)))
    return ((i * i * 7 + i * 31) % 251).astype(np.uint8).reshape(shape)


def golden(variant, name, *shape):
    return np.array(GOLDEN[variant][name], np.float32).reshape(shape)


def tokenizer_json(extra=()):
    """A tokenizer like T5's: 0 is padding, 1 ends a text; 50 words, and `extra`."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "pick": 3, "up": 4, "the": 5, "milk": 6, "soup": 7}
    words |= {f"word{i}": i for i in range(8, 50)} | {word: 50 + i for i, word in enumerate(extra)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str()
