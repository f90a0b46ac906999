"""pi0 at its published size, as lerobot and openpi run it: PaliGemma and a 300 M action expert, 3.501 B parameters.

What differs from the tiny ones: grouped keys, PaliGemma's own tokenizer, actions and proprioception padded with zeros
to 32 numbers (so a latent has 32), 50 actions a chunk, no clipping of proprioception. An image that the robot does not
have is left out: that is what masking its tokens comes to, since nothing looks at them and they take no position.

Shapes: as in `pi0.py`; N patches an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PI0Config, PI0ForConditionalGeneration

from .base import Sample
from .inputs import Batch
from .paligemma import PaliGemmaPolicy, PaliGemmaPrompts, fill_buffers, lower_precision, paligemma_config
from .pi0 import Context, Pi0, Pi0Architecture
from .steady import steady_rows


@dataclass(frozen=True)
class PublishedPi0Architecture(Pi0Architecture):
    """`Pi0Architecture` with what only the published network has; the defaults are its sizes."""

    chunk: int = 50
    layers: int = 18
    heads: int = 8
    head_dim: int = 256
    prefix_width: int = 2048
    prefix_mlp: int = 16384
    expert_width: int = 1024
    expert_mlp: int = 4096
    euler_steps: int = 10
    max_words: int = 48
    image_size: int = 224
    patch: int = 14
    vision_layers: int = 27
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_heads: int = 16
    key_value_heads: int = 1
    vocabulary_size: int = 257152
    padded_dim: int = 32
    """Numbers that the network sees of an action and of proprioception; those beyond the robot's own are zero."""
    dtype: str = "float32"
    """`float32`, or `bfloat16` for all but `paligemma.PRECISE`."""


class PublishedPi0(PaliGemmaPolicy, Pi0):
    """pi0 at its published size behind the flow seam. Its weights are random until some are loaded."""

    architecture: PublishedPi0Architecture
    capabilities = frozenset({"sft", "denoising", "flow", "likelihood", "chain", "noise"})

    def _build(self, name: str, architecture: Any, vocabulary: Any) -> None:
        self.name, self.architecture, self.vocabulary = name, architecture, vocabulary
        a = self.architecture
        self.chunk, self.action_dim, self.cameras = a.chunk, a.action_dim, a.cameras
        self.euler_steps = a.euler_steps
        self.feature_dim = 2 * a.prefix_width + a.padded_dim
        self.model = PI0ForConditionalGeneration(_transformers_config(a))
        lower_precision(self.model, a.dtype)
        self.model.embed_action_time.sinusoid_embeds.sinusoid_freq = _frequencies(self.model.config)
        self.build_scales(a.action_dim, a.proprio_dim)

    @classmethod
    def restore(cls, config: Mapping[str, Any]) -> PublishedPi0:
        """The policy that `config` describes, its weights still to be loaded."""
        prompts: Any = PaliGemmaPrompts(config["tokenizer"])
        return cls(config["policy"], PublishedPi0Architecture(**config["architecture"]), prompts)

    def fill_buffers(self) -> None:
        """Computes what is not stored, where the policy was built on the meta device."""
        model = self.model.model
        fill_buffers(model.vlm, model.dit)
        self.model.embed_action_time.sinusoid_embeds.sinusoid_freq = _frequencies(self.model.config)

    @property
    def latent_dim(self) -> int:
        return self.architecture.padded_dim

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds besides the card: enough to rebuild the policy around its weights."""
        vocabulary = self.vocabulary
        assert isinstance(vocabulary, PaliGemmaPrompts)
        return {
            "policy": self.name,
            "architecture": asdict(self.architecture),
            "normalisation": {**self.scales, "proprio": "(x - proprio_mean) / proprio_std"},
            "tokenizer": vocabulary.json,
        }

    def normalise(self, actions: Tensor) -> Tensor:
        """Environment units to latent: padded with zeros."""
        return F.pad(super().normalise(actions), (0, self.latent_dim - self.action_dim))

    def unnormalise(self, latent: Tensor) -> Tensor:
        """Latent to environment units: the robot's own numbers."""
        return super().unnormalise(latent[..., : self.action_dim])

    def normalise_proprio(self, proprio: Tensor) -> Tensor:
        """[B, P] suite's units to [B, 32] deviations, padded with zeros."""
        own = (proprio - self.proprio_mean) / self.proprio_std
        return F.pad(own, (0, self.architecture.padded_dim - own.shape[-1]))

    # What is seen

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mask [B, S], embeddings [B, S, D] and positions [B, S] of the prefix: images, then the prompt."""
        visible = self._see(self.model.model.vlm, batch.images)
        words = self.model.model.vlm.get_input_embeddings()(batch.words)
        spoken = batch.words != 0
        mask = torch.cat((spoken.new_ones(visible.shape[:2]), spoken), 1)
        return mask, torch.cat((visible.to(words.dtype), words), 1), mask.cumsum(-1) - 1

    # Layers one by one: transformers' own checkpointing would give up the cache that pi0 lives on.

    @steady_rows
    def encode(self, batch: Batch) -> Context:
        """Runs the vision-language prefix once; gradients flow unless the caller forbids them."""
        model = self.model.model.vlm.language_model
        mask, embeddings, positions = self._tokens(batch)
        attend = mask[:, None, None].expand(-1, -1, mask.shape[1], -1)
        rotary = model.rotary_emb(embeddings, positions)
        x = last = embeddings
        cache = []
        for layer in model.layers:
            last = x
            x, keys, values = self._maybe_again(_layer, layer, x, attend, rotary)
            cache.append(torch.stack((keys, values), 1))
        # The last layer's own output feeds nothing that training reaches, so features come from what enters it.
        hidden, real = F.rms_norm(last.float(), last.shape[-1:]), mask[..., None]
        mean = (hidden * real).sum(1) / real.sum(1)
        top = hidden.masked_fill(~real, -torch.inf).amax(1)
        return Context(torch.stack(cache, 1), mask, self.normalise_proprio(batch.proprio), torch.cat((mean, top), -1))

    @steady_rows
    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, 32] velocities at x [B, K, H, 32], t [B, K]; a chunk sees the prefix, the state and itself."""
        (b, k, h, _), s, embed = x.shape, context.mask.shape[1], self.model.embed_action_time
        time = embed.sinusoid_embeds(t.flatten()).to(x).view(b, k, 1, -1).expand(-1, -1, h, -1)
        chunks = torch.cat((embed.action_in_proj(x), time), -1)
        chunks = embed.action_time_mlp_out(F.silu(embed.action_time_mlp_in(chunks)))
        tokens = torch.cat((embed.state_proj(context.proprio)[:, None], chunks.flatten(1, 2)), 1)
        q = tokens.shape[1]
        draw = torch.arange(q - 1, device=x.device) // h
        mask = torch.zeros(b, 1, q, s + q, dtype=torch.bool, device=x.device)
        mask[..., :s] = context.mask[:, None, None]
        mask[..., s] = True
        mask[..., 1:, s + 1 :] = draw[:, None] == draw
        step = torch.cat((draw.new_zeros(1), torch.arange(h, device=x.device).repeat(k) + 1))
        hidden = self._run_expert(context, tokens, mask, context.mask.sum(1, keepdim=True) + step)
        return self.model.action_out_proj(hidden[:, 1:]).view(x.shape)

    def _run_expert(self, context: Context, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, Q, E] float32 of the action expert's tokens; mask [B, 1, Q, S + Q] says what each sees."""
        model = self.model.model.dit
        x = tokens.to(context.cache.dtype)
        rotary = model.rotary_emb(x, positions)
        for layer, kept in zip(model.layers, context.cache.unbind(1), strict=True):
            x = self._maybe_again(_layer, layer, x, mask, rotary, kept[:, 0], kept[:, 1])[0]
        normed: Tensor = model.norm(x)
        return normed.float()

    @torch.no_grad()
    def decode(self, context: Context, noise: Tensor) -> Sample:
        """Integrates from t = 1 (noise) to 0 in `euler_steps` Euler steps."""
        steps, x = self.architecture.euler_steps, noise
        for step in range(steps):
            t = torch.full((len(x), 1), 1 - step / steps, device=self.device)
            x = x - self.velocity(context, x[:, None], t)[:, 0] / steps
        return Sample(self.unnormalise(x), x)


class _Cache:
    """One layer's keys and values [B, heads, S, head_dim], as transformers' attention asks for them."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, _layer: int) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        self.keys, self.values = keys, values
        return keys, values


def _layer(
    layer: nn.Module,
    x: Tensor,
    attend: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A Gemma layer's output, and the keys and values that it looked at: those given, then its own."""
    cache = _Cache(keys, values)
    return layer(x, attention_mask=attend, position_embeddings=rotary, past_key_values=cache), cache.keys, cache.values


restore = PublishedPi0.restore


def _frequencies(config: Any) -> Tensor:
    """Of the time embedding, float64 as lerobot's: angles reach 1,600, where float32 is off by 1e-4."""
    half = config.dit_config.hidden_size // 2
    share = torch.linspace(0, 1, half, dtype=torch.float64)
    return 2 * math.pi / (config.min_period * (config.max_period / config.min_period) ** share)


def _transformers_config(a: PublishedPi0Architecture) -> PI0Config:
    vlm = paligemma_config(a, a.prefix_width, a.prefix_mlp, a.vocabulary_size)
    return PI0Config(
        vlm_config=vlm,
        dit_config={**vlm["text_config"], "hidden_size": a.expert_width, "intermediate_size": a.expert_mlp},
        chunk_size=a.chunk,
        max_state_dim=a.padded_dim,
        max_action_dim=a.padded_dim,
        num_inference_steps=a.euler_steps,
        loss_reduction="none",
    )
