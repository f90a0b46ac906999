"""Between the world and OpenVLA's numbers: images, prompts, and actions as bins.

Shapes: B observations, C cameras, H actions a chunk, A action dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .vocabulary import parse_tokenizer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of each colour, as DINOv2 was trained with; SigLIP's are 0.5."""
EMPTY_TOKEN = 29871  # Llama's lone space, which training put before the actions; it is the architecture's `separator`


def crop_middle(images: Tensor, area: float) -> Tensor:
    """[..., 3, size, size] uint8: the middle `area` of each image, enlarged to the whole size.

    Bilinear between the corners' pixel centres, then cut down to whole grey levels, as `tf.image.crop_and_resize` and
    `convert_image_dtype` (which multiplies by 255.5 and truncates) do for the published checkpoints.
    """
    side = area**0.5
    line = torch.linspace(-side, side, images.shape[-1], device=images.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    flat = images.flatten(0, -4).float() / 255
    cropped = F.grid_sample(flat, grid.expand(len(flat), -1, -1, -1), align_corners=True)
    return (cropped.clamp(0, 1) * 255.5).floor().clamp_max(255).to(torch.uint8).view(images.shape)


def pixels(images: Tensor, crop_area: float) -> Tensor:
    """[B, C, 6, size, size] float32 of uint8 images [B, C, 3, size, size]: as DINOv2, then as SigLIP wants them."""
    if crop_area < 1:
        images = crop_middle(images, crop_area)
    scaled = images.float() / 255
    mean, std = (scaled.new_tensor(values)[:, None, None] for values in IMAGENET)
    return torch.cat(((scaled - mean) / std, (scaled - 0.5) / 0.5), 2)


def to_bins(latent: Tensor, bins: int) -> Tensor:
    """[...] int64 bins of normalised numbers: `digitize` over `linspace(-1, 1, bins)`, counted from 0."""
    edges = _edges(bins).to(latent.device)
    return (torch.bucketize(latent.double().clamp(-1, 1).contiguous(), edges, right=True) - 1).clamp(0, bins - 1)


def from_bins(index: Tensor, bins: int) -> Tensor:
    """[...] float32 bin centres. The last two bins share one: n edges have n - 1 intervals, and 1 itself is an edge."""
    edges = _edges(bins).to(index.device)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[index.clamp(0, bins - 2)].float()


def _edges(bins: int) -> Tensor:
    """[bins] float64. NumPy's, to the last bit: a number that lies on an edge then falls in the published bin."""
    return torch.from_numpy(np.linspace(-1, 1, bins))


class Prompts:
    """The published checkpoints' prompt, in their own tokenizer's ids."""

    def __init__(self, tokenizer: str) -> None:
        """Takes the text of a `tokenizer.json`. Raises BenchError if it is none."""
        self.json = tokenizer
        self._tokenizer = parse_tokenizer(tokenizer)
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt for an instruction, between the tokens that begin it and end it."""
        if text not in self._encoded:
            prompt = f"In: What action should the robot take to {text.lower()}?\nOut:"
            ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
            self._encoded[text] = ids[:-1] if ids[-1:] == [EMPTY_TOKEN] else ids
        return list(self._encoded[text])
