"""The blocks of transformers' Gemma, without what makes its own forward slow at small sizes: masks, caches, recorded
outputs and kernels are chosen anew at each call there. Weights stay where transformers has them, and layers are called
as modules, so that adapters (LoRA) work. Operations and their order are the same, and so are results, except in
`repeated`, which only agrees up to rounding.

Shapes: B observations, Q tokens, S tokens before them, N heads, G of them with keys, E width of a head, D of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotation(model: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, 1, Q, E] cosines and signed sines of rotary embeddings at positions [B, Q]."""
    angles = positions[..., None].float() * model.rotary_emb.inv_freq
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, Q, S + Q] bool, true where a token may look, to what is added to attention's logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


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


MOST_COPIED = 2**20
"""Numbers of a weight beyond which laying it out anew takes longer than the calls that it saves."""


def repeated(layer: Any, rotated: tuple[Tensor, Tensor], mask: Tensor, before: Tensor) -> Callable[[Tensor], Tensor]:
    """What `block` makes of tokens, up to rounding: ready for many calls, without gradients."""
    if readable(layer) and layer.mlp.gate_proj.weight.numel() <= MOST_COPIED:
        return _Repeated(layer, rotated, mask, before)
    return lambda x: block(layer, x, rotated, mask, before)[0]


def readable(layer: Any) -> bool:
    """Whether a layer's weights say all that its projections do: float32, and no adapter around them."""
    projections = [
        module for module in (*layer.self_attn.children(), *layer.mlp.children()) if list(module.parameters())
    ]
    return all(type(m) is nn.Linear and m.bias is None and m.weight.dtype == torch.float32 for m in projections)


class _Repeated:
    """Weights that multiply the same input lie side by side. Keys and values of the tokens before are laid out once,
    and each call writes its own behind them."""

    def __init__(self, layer: Any, rotated: tuple[Tensor, Tensor], mask: Tensor, before: Tensor) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.mask, self.scale, self.head_dim, self.act = mask, attention.scaling, attention.head_dim, mlp.act_fn
        self.cos, self.sin = (part.transpose(1, 2) for part in rotated)
        self.qkv = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        self.gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        self.out, self.down = attention.o_proj.weight.T, mlp.down_proj.weight.T
        self.first, self.second = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        b, _, self.with_keys, s, _ = before.shape
        seen = before.new_empty(b, mask.shape[3], 2 * self.with_keys, self.head_dim)
        seen[:, :s] = before.flatten(1, 2).transpose(1, 2)
        self.own = seen[:, s:]
        self.keys, self.values = seen.transpose(1, 2).chunk(2, 1)

    def __call__(self, x: Tensor) -> Tensor:
        g, flat = self.with_keys, x.flatten(0, 1)
        # N queries, G keys, G values
        heads = F.linear(self.first(flat), self.qkv).view(*x.shape[:2], -1, self.head_dim)
        turned = heads[:, :, :-g]
        rolled = turned.roll(self.head_dim // 2, -1)
        turned.mul_(self.cos).addcmul_(rolled, self.sin)
        self.own.copy_(heads[:, :, -2 * g :])
        query = heads[:, :, : -2 * g].transpose(1, 2)
        grouped = query.shape[1] != g
        out = F.scaled_dot_product_attention(
            query, self.keys, self.values, self.mask, scale=self.scale, enable_gqa=grouped
        )
        flat = torch.addmm(flat, out.transpose(1, 2).reshape(len(flat), -1), self.out)
        gate, up = F.linear(self.second(flat), self.gate_up).chunk(2, -1)
        return torch.addmm(flat, self.act(gate).mul_(up), self.down).view(x.shape)


class _Norm:
    """`norm` in four operations, where on a CPU `F.rms_norm` is seven: ready for many calls."""

    def __init__(self, layer: Any) -> None:
        width = layer.weight.numel()
        self.weight = (1 + layer.weight) * width**0.5
        self.shortest = torch.full((), (width * layer.eps) ** 0.5, device=layer.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # the root mean square times sqrt(D)
        return x / torch.hypot(length, self.shortest) * self.weight
