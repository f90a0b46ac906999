"""The blocks of transformers' Gemma, without what makes its own forward slow at small sizes: masks, caches, recorded
outputs and kernels are chosen anew at each call there. Weights stay where transformers has them, and layers are called
as modules, so that adapters (LoRA) work. Operations and their order are the same, so results are too.

Shapes: B observations, Q tokens, S tokens before them, N heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation(model: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, Q, E] cosines and signed sines of rotary embeddings at positions [B, Q]."""
    angles = positions[..., None].float() * model.rotary_emb.inv_freq
    dtype = model.norm.weight.dtype
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def additive(mask: Tensor) -> Tensor:
    """[B, 1, Q, S + Q] bool, true where a token may look, to what is added to attention's logits."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def keys_and_values(layer: Any, seen: Tensor, rotated: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values [B, N, Q, E] that a layer makes of its normalised input."""
    attention = layer.self_attn
    return rotate(split(attention.k_proj(seen), attention), *rotated), split(attention.v_proj(seen), attention)


def block(
    layer: Any, x: Tensor, rotated: tuple[Tensor, Tensor], mask: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output [B, Q, D], and its keys and values [B, N, Q, E]. `before` [B, 2, N, S, E]: those of S tokens
    that it also looks at."""
    attention, mlp = layer.self_attn, layer.mlp
    seen = norm(layer.input_layernorm, x)
    query = rotate(split(attention.q_proj(seen), attention), *rotated)
    key, value = keys_and_values(layer, seen, rotated)
    keys, values = key, value
    if before is not None:
        keys, values = torch.cat((before[:, 0], key), 2), torch.cat((before[:, 1], value), 2)
    grouped = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(query, keys, values, mask, scale=attention.scaling, enable_gqa=grouped)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    seen = norm(layer.post_attention_layernorm, x)
    return x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(seen)) * mlp.up_proj(seen)), key, value


def split(x: Tensor, attention: Any) -> Tensor:
    """[B, Q, N E] to [B, N, Q, E]."""
    return x.view(*x.shape[:-1], -1, attention.head_dim).transpose(1, 2)


def norm(layer: Any, x: Tensor) -> Tensor:
    """RMS norm with Gemma's weights, which are distances from 1."""
    return F.rms_norm(x.float(), x.shape[-1:], 1 + layer.weight.float(), layer.eps).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, N, Q, E]; `sin` has the signs."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
