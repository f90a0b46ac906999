"""The forward of transformers' SigLIP vision tower, without what it decides anew at each call; see `gemma.py`.

Shapes: B images, P patches, D width, N heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def siglip(tower: Any, pixels: Tensor) -> Tensor:
    """[B, P, D] of pixels [B, 3, size, size] between -1 and 1."""
    x = tower.embeddings(pixels)
    for layer in tower.encoder.layers:
        x = x + _attention(layer.self_attn, layer.layer_norm1(x))
        mlp = layer.mlp
        x = x + mlp.fc2(mlp.activation_fn(mlp.fc1(layer.layer_norm2(x))))
    seen: Tensor = tower.post_layernorm(x)
    return seen


def _attention(attention: Any, x: Tensor) -> Tensor:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    out = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    attended: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
    return attended
