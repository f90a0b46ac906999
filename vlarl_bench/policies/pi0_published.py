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
from torch import Tensor
from transformers import PI0Config, PI0ForConditionalGeneration

from .inputs import Batch
from .paligemma import PaliGemmaPolicy, PaliGemmaPrompts, fill_buffers, lower_precision, paligemma_config
from .pi0 import Pi0, Pi0Architecture


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
