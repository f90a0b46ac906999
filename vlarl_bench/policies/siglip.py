"""The forward of transformers' SigLIP vision tower, without what it decides anew at each call (see `gemma.py`) and
without a convolution.

Shapes: B images, P patches, D width, N heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .patches import embed_patches


def siglip(tower: Any, pixels: Tensor, run: Callable[..., Any] | None = None) -> Tensor:
    """[B, P, D] of pixels [B, 3, size, size] between -1 and 1. `run(function, *inputs)` calls a layer its own way."""
    x = embed_patches(tower.embeddings.patch_embedding, pixels) + tower.embeddings.position_embedding.weight
    for layer in tower.encoder.layers:
        x = run(_block, layer, x) if run else _block(layer, x)
    seen: Tensor = tower.post_layernorm(x)
    return seen


def _block(layer: Any, x: Tensor) -> Tensor:
    x = x + _attention(layer.self_attn, layer.layer_norm1(x))
    mlp = layer.mlp
    return x + mlp.fc2(mlp.activation_fn(mlp.fc1(layer.layer_norm2(x))))


def _attention(attention: Any, x: Tensor) -> Tensor:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    out = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    attended: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
    return attended
