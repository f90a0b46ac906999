"""What the published pi0 and pi0-FAST share: PaliGemma at its published size, its prompts and its images.

Shapes: B observations, C cameras, N patches an image, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import BenchError
from ..suite import Observation
from .base import Policy
from .siglip import siglip
from .vocabulary import parse_tokenizer

PRECISE = ("vision_tower.", "multi_modal_projector.", "layernorm.", ".norm.", "embed_action_time.", "action_out_proj.")
"""What stays float32 where the rest is bfloat16, as in lerobot: images, norms and the projections of actions."""


class PaliGemmaPrompts:
    """Instructions as pi0 was taught them: PaliGemma's beginning, the text, a line feed."""

    def __init__(self, tokenizer: str) -> None:
        """Takes the text of PaliGemma's `tokenizer.json`. Raises BenchError if it is none."""
        self.json = tokenizer
        self._tokenizer = parse_tokenizer(tokenizer)
        self._begin = self._id("<bos>")
        self._encoded: dict[str, list[int]] = {}

    def _id(self, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise BenchError(f"tokenizer.json: has no token {token!r}; it must be PaliGemma's")
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt for an instruction."""
        if text not in self._encoded:
            line = text if text.endswith("\n") else f"{text}\n"
            self._encoded[text] = [self._begin, *self._tokenizer.encode(line, add_special_tokens=False).ids]
        return list(self._encoded[text])


class PaliGemmaPolicy(Policy):
    """A policy around PaliGemma at its published size."""

    architecture: Any

    def preprocess(self, observations: Sequence[Observation]) -> Any:
        """Observations to padded tensors; images of any size are resized. Raises BenchError if one does not fit."""
        size, cameras = self.architecture.image_size, self.architecture.cameras
        fitting = []
        for seen in observations:
            absent = [camera for camera in cameras if camera not in seen.images]
            if absent:
                there = ", ".join(sorted(seen.images)) or "none"
                raise BenchError(f"images: {', '.join(absent)} missing; this policy looks at it, and there are {there}")
            images = {camera: resize_with_pad(seen.images[camera], size) for camera in cameras}
            fitting.append(dataclasses.replace(seen, images=images))
        return super().preprocess(fitting)  # type: ignore[safe-super]

    def _see(self, paligemma: Any, images: Tensor) -> Tensor:
        """[B, C N, D] of images [B, C, 3, size, size] in grey levels, image after image."""
        pixels = images.float() / 127.5 - 1
        x = paligemma.multi_modal_projector(siglip(paligemma.vision_tower, pixels.flatten(0, 1), self._maybe_again))
        return x.unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def _maybe_again(self, function: Any, *inputs: Any) -> Any:
        """`function(*inputs)`, computed again for its gradient instead of kept, if the policy is `checkpointed`."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] uint8 to [size, size, 3]: bilinear, in proportion, with black borders, as lerobot and openpi do.

    Rounded to whole grey levels; lerobot keeps the fractions.
    """
    if image.shape == (size, size, 3) or image.ndim != 3:  # `to_batch` refuses what is no image
        return image
    scale = max(image.shape[:2]) / size
    height, width = (int(side / scale) for side in image.shape[:2])
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    small = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False).round().clamp(0, 255)
    top, left = (size - height) // 2, (size - width) // 2
    padded = F.pad(small, (left, size - width - left, top, size - height - top))
    return padded[0].permute(1, 2, 0).to(torch.uint8).numpy()


def lower_precision(network: nn.Module, dtype: str) -> None:
    """Turns all but `PRECISE` into `dtype`."""
    for key, parameter in network.named_parameters():
        if not any(part in key for part in PRECISE):
            parameter.data = parameter.data.to(getattr(torch, dtype))


def fill_buffers(paligemma: Any, *gemmas: Any) -> None:
    """Computes what is not stored of PaliGemma, and of further language models, where they were built on the meta
    device."""
    for gemma in (paligemma.language_model, *gemmas):
        gemma.rotary_emb = type(gemma.rotary_emb)(gemma.config)
        gemma.embed_tokens.embed_scale = torch.tensor(gemma.embed_tokens.scalar_embed_scale)
    images = paligemma.vision_tower.embeddings
    images.position_ids = torch.arange(images.num_positions).expand(1, -1)


def paligemma_config(a: Any, width: int, mlp: int, vocabulary: int) -> dict[str, Any]:
    """transformers' configuration at an architecture's sizes, and its language model's."""
    return {
        "model_type": "paligemma",
        "text_config": {
            "model_type": "gemma",
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.key_value_heads,
            "head_dim": a.head_dim,
            "vocab_size": vocabulary,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": a.vision_width,
            "intermediate_size": a.vision_mlp,
            "num_hidden_layers": a.vision_layers,
            "num_attention_heads": a.vision_heads,
            "image_size": a.image_size,
            "patch_size": a.patch,
            "vision_use_head": False,
        },
        "projection_dim": width,
        "image_token_id": vocabulary,
    }
