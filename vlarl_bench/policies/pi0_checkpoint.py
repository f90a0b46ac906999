"""pi0 from a folder as lerobot publishes it, by path: `lerobot/pi0_base` and what was fine-tuned from it.

Read are config.json, the safetensors (one file, or shards with their index), the scales of the training data and
PaliGemma's tokenizer.json, which is gated and so is in no pi0 folder: put it there, or pass its path. Scales are those
of policy_preprocessor.json and policy_postprocessor.json with their safetensors (lerobot), or of
`assets/NAME/norm_stats.json` (openpi), where `unnorm_key` is the NAME.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import BenchError
from ..files import read_json_object
from .paligemma import PaliGemmaPrompts
from .pi0_published import PublishedPi0, PublishedPi0Architecture
from .shards import keys_in, keys_without, pick_statistics, read_tensors, shards

EXPERT = "paligemma_with_expert."
NAMES = (
    ("model.vlm.language_model.embed_tokens.", EXPERT + "paligemma.lm_head."),
    ("model.vlm.vision_tower.", EXPERT + "paligemma.model.vision_tower.vision_model."),
    ("model.vlm.", EXPERT + "paligemma.model."),
    ("model.dit.embed_tokens.", EXPERT + "gemma_expert.lm_head."),
    ("model.dit.", EXPERT + "gemma_expert.model."),
    ("embed_action_time.", ""),
)
"""How parameters of transformers' class begin, and how lerobot's and openpi's begin."""
TIED = EXPERT + "paligemma.model.language_model.embed_tokens.weight"
"""The embeddings' other name. Where both are stored this one counts: nothing reads the output layer."""
CAMERAS = {
    "base_0_rgb": "agentview",
    "image": "agentview",
    "left_wrist_0_rgb": "robot0_eye_in_hand",
    "image2": "robot0_eye_in_hand",
    "wrist_image": "robot0_eye_in_hand",
}
"""LIBERO's camera for each image of published checkpoints, by what follows `observation.images.`."""
ABSENT = ("right_wrist_0_rgb", r"empty_camera_\d+")
"""Images that LIBERO's robot does not have: they stay masked."""
MODES = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}
"""lerobot's ways to scale, by the statistics that each takes; those of the last two become -1 and 1."""


def load_published(
    folder: Path | str,
    name: str = "pi0-base",
    unnorm_key: str | None = None,
    tokenizer: Path | str | None = None,
    dtype: str | None = None,
    cameras: Mapping[str, str] = CAMERAS,
    **sizes: Any,
) -> PublishedPi0:
    """The policy in a published folder.

    `dtype` is `float32` or `bfloat16`; None takes the folder's. `cameras` says which camera gives which image. `sizes`
    are what a checkpoint of another size has in place of `PublishedPi0Architecture`'s.

    Raises BenchError naming every tensor that is missing, surplus or of another shape, or the file that is unreadable.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    shape = _architecture(config, folder, cameras, dtype) | sizes
    prompts: Any = PaliGemmaPrompts(tokenizer_json(folder if tokenizer is None else Path(tokenizer)))
    with torch.device("meta"):  # the checkpoint's tensors take the parameters' place, so nothing is held twice
        policy = PublishedPi0(name, PublishedPi0Architecture(**shape), prompts)
    scales = _scales(folder, config, policy, unnorm_key)
    files = shards(folder)
    stored = keys_without("model.", keys_in(files))
    if TIED in stored:  # in the embedding's place, or beside it
        stored[published_key("model.vlm.language_model.embed_tokens.weight")] = stored.pop(TIED)
    own = {published_key(key): key for key, _ in policy.model.named_parameters()}
    parameters = dict(policy.model.named_parameters())
    expected: dict[str, Tensor] = {published: parameters[key] for published, key in own.items()}
    found = read_tensors(files, stored, expected)
    tensors = {f"model.{own[published]}": tensor for published, tensor in found.items()}
    policy.load_state_dict(tensors | scales, strict=True, assign=True)
    policy.fill_buffers()
    return policy


def published_key(key: str, names: Sequence[tuple[str, str]] = NAMES) -> str:
    """The name in lerobot's files, without its `model.`, of a parameter of transformers' class."""
    for begins, published in names:
        if key.startswith(begins):
            return published + key.removeprefix(begins)
    return key


def _architecture(
    config: Mapping[str, Any], folder: Path, cameras: Mapping[str, str], dtype: str | None
) -> dict[str, Any]:
    """What config.json decides. Raises BenchError naming what this network cannot be."""
    shape = shared_architecture(config, folder, cameras, dtype, "pi0", {"action_expert_variant": "gemma_300m"})
    width = whole_number(config, "max_action_dim", 32)
    if whole_number(config, "max_state_dim", 32) != width:
        raise BenchError(f"config.json: max_state_dim and max_action_dim must agree in {folder}")
    return {
        **shape,
        "padded_dim": width,
        "max_words": whole_number(config, "tokenizer_max_length", 48),
        "euler_steps": whole_number(config, "num_inference_steps", 10),
    }


def shared_architecture(
    config: Mapping[str, Any],
    folder: Path,
    cameras: Mapping[str, str],
    dtype: str | None,
    kind: str,
    wanted: Mapping[str, Any],
) -> dict[str, Any]:
    """What config.json decides of pi0 and pi0-FAST alike; `kind` is its type, and it may say nothing but what is
    `wanted`. Raises BenchError naming what the network cannot be."""
    right = {"paligemma_variant": "gemma_2b", "use_relative_actions": False, **wanted}
    for field, value in ({"type": kind} | right).items():
        found = config.get(field, right.get(field))
        if found != value:
            raise BenchError(f"config.json: {field} {found!r} in {folder}; it must be {value!r}")
    try:
        inputs, outputs = config["input_features"], config["output_features"]
        images = [key.removeprefix("observation.images.") for key in inputs if inputs[key]["type"] == "VISUAL"]
        (action,) = map(int, outputs["action"]["shape"])
        (state,) = map(int, inputs["observation.state"]["shape"])
        size, other = map(int, config.get("image_resolution", (224, 224)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BenchError(f"config.json: {error!r} in {folder} does not describe a {kind} checkpoint") from None
    if size != other:
        raise BenchError(f"config.json: both sides of an image must agree in {folder}")
    # A base checkpoint's features are the padding's own; what the robot has is LIBERO's.
    dims = {
        "action_dim": 7 if action == whole_number(config, "max_action_dim", 32) else action,
        "proprio_dim": 8 if state == whole_number(config, "max_state_dim", 32) else state,
    }
    unknown = [i for i in images if i not in cameras and not any(re.fullmatch(pattern, i) for pattern in ABSENT)]
    if unknown or not any(i in cameras for i in images):
        raise BenchError(
            f"cameras: no camera is known for {', '.join(unknown) or 'any image'}; {folder} has "
            f"{', '.join(images) or 'none'}; known are {', '.join(sorted(cameras))}"
        )
    dtype = dtype or config.get("dtype", "float32")
    if dtype not in ("float32", "bfloat16"):
        raise BenchError(f"dtype: {dtype!r}; it must be 'float32' or 'bfloat16'")
    return {
        "observation": "pixels",
        "cameras": tuple(cameras[i] for i in images if i in cameras),
        "dtype": dtype,
        "chunk": whole_number(config, "chunk_size", 50),
        "image_size": size,
        **dims,
    }


def whole_number(config: Mapping[str, Any], field: str, default: int) -> int:
    """What config.json says, or `default`. Raises BenchError if that is none above 0."""
    found = config.get(field, default)
    if type(found) is not int or found < 1:
        raise BenchError(f"config.json: {field} {found!r}; it must be a whole number above 0")
    return found


def tokenizer_json(place: Path) -> str:
    """The text of PaliGemma's tokenizer.json, given its path, or a folder that has it, or has it in `tokenizer` as
    lerobot's newer releases write it."""
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.exists() and (place / "tokenizer" / "tokenizer.json").exists():
        file = place / "tokenizer" / "tokenizer.json"
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"tokenizer.json: cannot read {file}: {error}; put PaliGemma's there") from None


def _scales(folder: Path, config: Mapping[str, Any], policy: PublishedPi0, unnorm_key: str | None) -> dict[str, Tensor]:
    """The policy's buffers. What becomes -1 and 1 is turned into the mean and deviation that do the same."""
    modes = config.get("normalization_mapping") or {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    scales = {}
    for kind, (mode, first, second, least) in read_scales(folder, modes, policy.architecture, unnorm_key).items():
        mean, std = (first, second) if mode == "MEAN_STD" else ((first + second) / 2, (second - first) / 2)
        scales[f"{kind}_mean"], scales[f"{kind}_std"] = mean.clone(), std + least
    return scales


def read_scales(
    folder: Path, modes: Mapping[str, Any], a: Any, unnorm_key: str | None
) -> dict[str, tuple[str, Tensor, Tensor, float]]:
    """For `action` and `proprio`: one of `MODES`, its two statistics, and what is added to deviations. Raises
    BenchError naming the mode or the statistic that is none."""
    if not isinstance(modes, dict):
        raise BenchError(
            f"normalization_mapping: {modes!r} in {folder}; it must be an object that has a mode for STATE and ACTION"
        )
    stats, least = _statistics(folder, unnorm_key)
    scales = {}
    for kind, feature, group, size in (
        ("action", "action", "ACTION", a.action_dim),
        ("proprio", "observation.state", "STATE", a.proprio_dim),
    ):
        mode = modes.get(group)
        if not isinstance(mode, str) or mode not in MODES:
            raise BenchError(f"normalization_mapping: {group} {mode!r} in {folder}; known are {', '.join(MODES)}")
        try:
            first, second = (torch.as_tensor(stats[feature][key], dtype=torch.float32) for key in MODES[mode])
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(
                f"statistics: {error!r} of {feature} in {folder}; needs {' and '.join(MODES[mode])}"
            ) from None
        for statistic in (first, second):  # openpi's are padded
            if statistic.ndim != 1 or len(statistic) < size:
                raise BenchError(
                    f"statistics: {feature} has shape {list(statistic.shape)} in {folder}; this robot needs [{size}]"
                )
        first, second = first[:size], second[:size]
        scales[kind] = mode, first, second, least
    return scales


def _statistics(folder: Path, unnorm_key: str | None) -> tuple[Mapping[str, Any], float]:
    """Statistics by feature, and what is added to deviations so that none is 0."""
    found = {
        str(file.parent.relative_to(folder / "assets")): file
        for file in sorted(folder.glob("assets/**/norm_stats.json"))
    }
    stats: dict[str, Any] = {}
    for pipeline, step in (
        ("policy_preprocessor", "normalizer_processor"),
        ("policy_postprocessor", "unnormalizer_processor"),
    ):
        stats |= _of_pipeline(folder, pipeline, step)
    if stats and unnorm_key is None:
        return stats, 1e-8
    if not found:
        if unnorm_key is not None:
            raise BenchError(f"unnorm_key: {unnorm_key!r}; {folder} has only its own, leave it out")
        raise BenchError(
            f"statistics: {folder} has none: neither a state_file of policy_preprocessor.json and "
            "policy_postprocessor.json nor assets/NAME/norm_stats.json"
        )
    chosen = read_json_object(pick_statistics(found, unnorm_key))  # type: ignore[arg-type]
    both = chosen.get("norm_stats", chosen)
    if not isinstance(both, dict) or not {"state", "actions"} <= both.keys():
        raise BenchError(f"statistics: norm_stats.json in {folder} needs 'state' and 'actions'")
    return {"observation.state": both["state"], "action": both["actions"]}, 1e-6


def _of_pipeline(folder: Path, pipeline: str, step: str) -> dict[str, Any]:
    """Statistics by feature from one of lerobot's processors; none where it has no such step, or no state."""
    file = folder / f"{pipeline}.json"
    if not file.exists():
        return {}
    steps = read_json_object(file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(entry, dict) for entry in steps):
        raise BenchError(f"statistics: {file} has no list of steps")
    state = next((entry.get("state_file") for entry in steps if entry.get("registry_name") == step), None)
    if state is None:
        return {}
    if not isinstance(state, str) or Path(state).name != state:
        raise BenchError(f"statistics: {file} names {state!r}, which is no file beside it")
    keys_in([folder / state])  # one line if it cannot be read
    stats: dict[str, Any] = {}
    for key, tensor in load_file(folder / state).items():
        feature, _, statistic = key.rpartition(".")
        stats.setdefault(feature, {})[statistic] = tensor
    return stats
