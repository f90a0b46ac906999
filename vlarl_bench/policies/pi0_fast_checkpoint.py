"""pi0-FAST from a folder as lerobot publishes it, by path: `lerobot/pi0fast-base` and what was fine-tuned from it.

Read are what `pi0_checkpoint.py` reads, and the FAST tokenizer that the folder names (`action_tokenizer_name`): its
processor_config.json and tokenizer.json are to lie in the folder's `action_tokenizer`, where lerobot's newer releases
put them. The tokenizer's own Python file never runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BenchError
from ..files import read_json_object
from .fast_tokens import FastTokenizer
from .pi0_checkpoint import (
    CAMERAS,
    EXPERT,
    TIED,
    published_key,
    read_scales,
    shared_architecture,
    tokenizer_json,
    whole_number,
)
from .pi0_fast_published import FastPrompts, PublishedPi0Fast, PublishedPi0FastArchitecture
from .shards import keys_in, keys_without, read_tensors, shards

NAMES = (
    ("network.model.vision_tower.", EXPERT + "paligemma.model.vision_tower.vision_model."),
    ("network.", EXPERT + "paligemma."),
)
"""How parameters of the policy begin, and how lerobot's begin."""
HEAD = EXPERT + "paligemma.lm_head.weight"


def load_published(
    folder: Path | str,
    name: str = "pi0-fast-base",
    unnorm_key: str | None = None,
    tokenizer: Path | str | None = None,
    fast: Path | str | None = None,
    dtype: str | None = None,
    cameras: Mapping[str, str] = CAMERAS,
    **sizes: Any,
) -> PublishedPi0Fast:
    """The policy in a published folder.

    `tokenizer` and `fast` are where PaliGemma's and FAST's lie if not in the folder. `dtype` is `float32` or
    `bfloat16`; None takes the folder's. `cameras` says which camera gives which image. `sizes` are what a checkpoint of
    another size has in place of `PublishedPi0FastArchitecture`'s.

    Raises BenchError naming every tensor that is missing, surplus or of another shape, or the file that is unreadable.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    actions = _fast(folder / "action_tokenizer" if fast is None else Path(fast), config)
    shape = {
        **shared_architecture(config, folder, cameras, dtype, "pi0_fast", {}),
        "action_tokens": len(actions),
        "max_words": whole_number(config, "tokenizer_max_length", 200),
        "skip_tokens": whole_number(config, "fast_skip_tokens", 128),
        **sizes,
    }
    prompts: Any = FastPrompts(tokenizer_json(folder if tokenizer is None else Path(tokenizer)), shape["skip_tokens"])
    room = whole_number(config, "max_action_tokens", 256) - len(prompts.opening)
    if room < 2:
        raise BenchError(f"config.json: max_action_tokens in {folder}; it must be above {len(prompts.opening) + 1}")
    with torch.device("meta"):  # the checkpoint's tensors take the parameters' place, so nothing is held twice
        architecture = PublishedPi0FastArchitecture(**({"longest": room} | shape))
        policy = PublishedPi0Fast(name, architecture, prompts, actions)
    scales = _scales(folder, config, policy, unnorm_key)
    parameters = {published_key(key, NAMES): key for key, _ in policy.named_parameters()}
    expected: dict[str, Tensor] = {key: policy.get_parameter(own) for key, own in parameters.items()}
    files = shards(folder)
    stored = keys_without("model.", keys_in(files))
    if HEAD in stored and TIED not in stored:  # a base checkpoint has both in one
        del expected[TIED]
    tensors = read_tensors(files, stored, expected)
    if TIED not in tensors:
        tensors[TIED] = tensors[HEAD].clone()
    own = {parameters[key]: tensor for key, tensor in tensors.items()}
    policy.load_state_dict(own | scales, strict=True, assign=True)
    policy.fill_buffers()
    return policy


def _fast(place: Path, config: Mapping[str, Any]) -> FastTokenizer:
    if not place.is_dir():
        named = config.get("action_tokenizer_name", "lerobot/fast-action-tokenizer")
        raise BenchError(f"action_tokenizer: there is no folder {place}; put the FAST tokenizer {named!r} there")
    return FastTokenizer.load(place)


def _scales(
    folder: Path, config: Mapping[str, Any], policy: PublishedPi0Fast, unnorm_key: str | None
) -> dict[str, Tensor]:
    """The policy's buffers. Mean and deviation are turned into the quantiles that do the same."""
    modes = config.get("normalization_mapping") or {"STATE": "QUANTILES", "ACTION": "QUANTILES"}
    scales = {"action_scaled": torch.ones(policy.action_dim, dtype=torch.bool)}
    for kind, (mode, first, second, least) in read_scales(folder, modes, policy.architecture, unnorm_key).items():
        spread = second + least
        low, high = (first - spread, first + spread) if mode == "MEAN_STD" else (first, second)
        # A number that never moved: what it was is -1, as in lerobot, and nothing is divided by zero.
        above = torch.maximum(low + least, torch.nextafter(low, torch.full_like(low, torch.inf)))
        scales[f"{kind}_low"], scales[f"{kind}_high"] = low.clone(), torch.maximum(high, above)
    return scales
