"""OpenVLA from a folder as its authors publish it, by path: `openvla-7b` and its LIBERO fine-tunes, and OFT's.

Nothing in a folder says how its network decodes: OFT has OpenVLA's tensors, and what differs is Python. So the policy's
name does, `openvla-7b` or `openvla-oft-7b`.

Read are config.json, the safetensors (one file, or shards with their index), tokenizer.json and the statistics of the
training data; the folder's Python files never run, and pickles are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BenchError
from ..files import read_json_object
from .openvla import OpenVLA, OpenVLARegression, assemble
from .openvla_inputs import EMPTY_TOKEN, Prompts
from .openvla_model import OpenVLAArchitecture, Tower
from .shards import keys_in, keys_without, pick_statistics, read_tensors, refuse_pickles, shards

PUBLISHED: Mapping[str, Any] = {
    "observation": "pixels",
    "action_dim": 7,
    "proprio_dim": 8,
    "vocabulary_size": 32064,  # Llama's 32000, and room that was added for padding
    "action_end": 32000,
    "begin": 1,
    "separator": EMPTY_TOKEN,
    "stop": 2,
    "placeholders": "zero",
    "layers": 32,
    "frozen_layers": 0,
    "width": 4096,
    "heads": 32,
    "mlp": 11008,
    "max_words": 64,
    "image_size": 224,
    "patch": 14,
    "dino": Tower(1024, 24, 16, 4096),
    "siglip": Tower(1152, 27, 16, 4304),
    "whole_towers": True,
    "crop_area": 0.9,
    "gripper": "inverted",
    "dtype": "bfloat16",
}
"""Architecture of every published checkpoint, with LIBERO's robot and conventions."""
ONE_IMAGE: Mapping[str, Any] = {
    "decoding": "autoregressive",
    "chunk": 1,
    "proprio_token": False,
    "cameras": ("agentview",),
}
OFT: Mapping[str, Any] = {
    "decoding": "parallel",
    "head": "l1",
    "chunk": 8,
    "cameras": ("agentview", "robot0_eye_in_hand"),
}
OFT_TOKENS: Mapping[str, Any] = {**OFT, "head": "tokens", "cameras": ("agentview",)}
"""OFT as SimpleVLA-RL has it, with nothing beside the network."""


def load_published(
    folder: Path | str,
    name: str = "openvla-7b",
    unnorm_key: str | None = None,
    dtype: str | None = None,
    **sizes: Any,
) -> OpenVLA | OpenVLARegression:
    """The policy in a published folder. That of `openvla-oft-7b` regresses if an `action_head` lies beside the network,
    else it draws tokens; it looks at one camera where nothing lies there, for how many it was trained on is in no file.

    `unnorm_key` names the training data whose scales to use (`libero_object` finds `libero_object_no_noops` too); None
    takes the only one there is. `dtype` is `float32` or `bfloat16`; None is bfloat16, in which the authors load every
    part whatever its file holds: OFT's training keeps the projector of proprioception in float32. `sizes` are what a
    checkpoint of another size has in place of `PUBLISHED`.

    Raises BenchError naming every tensor that is missing, surplus or of another shape, or the file that is unreadable.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise BenchError(f"dtype: {dtype!r}; it must be 'float32' or 'bfloat16'")
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    if config.get("model_type") != "openvla":
        raise BenchError(f"config.json: model_type {config.get('model_type')!r} in {folder}; it must be 'openvla'")
    statistics = folder / "dataset_statistics.json"
    stats = pick_statistics(
        read_json_object(statistics) if statistics.exists() else config.get("norm_stats"), unnorm_key
    )
    heads = {part: _beside(folder, part) for part in ("action_head", "proprio_projector")}
    shape = {
        **PUBLISHED,
        **_form(name, heads, folder),
        "proprio_token": heads["proprio_projector"] is not None,
        **sizes,
    }
    if dtype is not None:
        shape["dtype"] = dtype
    try:
        tokenizer = (folder / "tokenizer.json").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"tokenizer.json: cannot read it in {folder}: {error}") from None
    with torch.device("meta"):  # the checkpoint's tensors take the parameters' place, so nothing is held twice
        policy = assemble(name, OpenVLAArchitecture(**shape), Prompts(tokenizer))
    parameters = dict(policy.named_parameters())
    tensors = _scales(stats, policy)
    for part, files in (("network", shards(folder)), *heads.items()):
        if files:
            expected = {k.removeprefix(f"{part}."): p for k, p in parameters.items() if k.startswith(f"{part}.")}
            stored = keys_without("module.", keys_in(files))  # DDP's prefix
            found = read_tensors(files, stored, expected)
            tensors |= {f"{part}.{key}": tensor for key, tensor in found.items()}
    policy.load_state_dict(tensors, strict=True, assign=True)
    llama = policy.network.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(llama.config)  # its frequencies are computed, not stored
    return policy


def _form(name: str, heads: Mapping[str, Sequence[Path] | None], folder: Path) -> Mapping[str, Any]:
    """How the network decodes, and what it looks at. Raises BenchError for OFT's folder by OpenVLA's name."""
    beside = [file.name for files in heads.values() for file in files or ()]
    if name == "openvla-7b":
        if beside:
            raise BenchError(f"policy: {folder} has {', '.join(beside)}, so it is OFT's; take 'openvla-oft-7b'")
        return ONE_IMAGE
    if not beside:
        return OFT_TOKENS
    return OFT if heads["action_head"] else {**OFT, "head": "tokens"}


def _scales(stats: Mapping[str, Any], policy: OpenVLA | OpenVLARegression) -> dict[str, Tensor]:
    """The policy's buffers: quantiles of actions, and of proprio where it is seen."""
    a = policy.architecture
    scales = {"proprio_low": -torch.ones(a.proprio_dim), "proprio_high": torch.ones(a.proprio_dim)}
    try:
        for kind in ("action", "proprio") if a.proprio_token else ("action",):
            for side, quantile in (("low", "q01"), ("high", "q99")):
                scales[f"{kind}_{side}"] = torch.tensor(stats[kind][quantile], dtype=torch.float32)
        mask = stats["action"].get("mask", [True] * a.action_dim)
        scales["action_scaled"] = torch.tensor(mask, dtype=torch.bool)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BenchError(f"norm_stats: {error!r}; needs action (and proprio) with q01, q99 and mask") from None
    for key, tensor in scales.items():
        right = a.proprio_dim if key.startswith("proprio") else a.action_dim
        if tensor.shape != (right,):
            raise BenchError(f"norm_stats: {key} has shape {list(tensor.shape)}; this robot needs [{right}]")
    return scales


def _beside(folder: Path, part: str) -> list[Path] | None:
    """The file of a part that OFT stores on its own, such as `action_head--150000_checkpoint.safetensors`."""
    found = sorted(folder.glob(f"{part}*.safetensors"))
    if len(found) > 1:
        raise BenchError(f"policy: {folder} has several files {part}*.safetensors; keep one")
    if not found:
        for pickle in sorted(folder.glob(f"{part}*.pt")):
            refuse_pickles([pickle], f"{pickle.stem}.safetensors")
    return found or None
