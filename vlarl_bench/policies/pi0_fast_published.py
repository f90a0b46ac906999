"""pi0-FAST at its published size, as lerobot runs it: PaliGemma, 2.9 B parameters and an output layer of its own.

What differs from the tiny one: PaliGemma's own tokenizer, and proprioception as text. A prompt is

    <bos>Task: pick up the milk, State: 12 255 128 ...;\\n

where each number is the bin of 256, between its quantiles, that a number of proprioception lies in. Prompt and images
see each other in both directions. From there on tokens see only what was said before:

    <bos>Action: f1 f2 ... |

The beginning is always the same, so it is given (`opening`) and not drawn; what is drawn are FAST tokens and the end,
with a softmax over these alone, not over PaliGemma's whole vocabulary. FAST token f is PaliGemma's `last` - f. Nothing
keeps the network from spelling what is no chunk: such samples are told (`Sample.invalid`).

Embedding and output layer are two matrices, as in lerobot's class: RL may change one and leave contexts as they are.
An image that the robot does not have is left out, which is what masking it comes to, as for pi0.

Shapes: as in `pi0_fast.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.cache_utils import DynamicCache

from ..errors import BenchError
from ..suite import Observation
from .fast_tokens import FastTokenizer
from .inputs import Batch
from .paligemma import PaliGemmaPolicy, PaliGemmaPrompts, fill_buffers, lower_precision, paligemma_config
from .pi0_fast import Pi0Fast, Pi0FastArchitecture

BINS = np.linspace(-1, 1, 257)[:-1]
"""Where each of the 256 bins of a state begins; below the first it is bin -1."""


@dataclass(frozen=True)
class PublishedPi0FastArchitecture(Pi0FastArchitecture):
    """`Pi0FastArchitecture` with what only the published network has; the defaults are its sizes."""

    words: int = 257152
    chunk: int = 50
    grammar: bool = False
    action_tokens: int = 2048
    layers: int = 18
    frozen_layers: int = 0
    heads: int = 8
    head_dim: int = 256
    width: int = 2048
    mlp: int = 16384
    max_words: int = 200
    image_size: int = 224
    patch: int = 14
    vision_layers: int = 27
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_heads: int = 16
    key_value_heads: int = 1
    skip_tokens: int = 128
    """PaliGemma's last tokens, which stand for no FAST token."""
    longest: int = 252
    """Action tokens a chunk, at most, the end among them."""
    dtype: str = "float32"
    """`float32`, or `bfloat16` for all but `paligemma.PRECISE`."""

    @property
    def max_tokens(self) -> int:
        """Action tokens a chunk, at most: so a chunk that takes more than `longest` cannot be said."""
        return min(super().max_tokens, self.longest)


class FastPrompts(PaliGemmaPrompts):
    """Prompts, and PaliGemma's tokens that stand for action tokens."""

    def __init__(self, tokenizer: str, skip_tokens: int) -> None:
        """Takes the text of PaliGemma's `tokenizer.json`. Raises BenchError if it is none."""
        super().__init__(tokenizer)
        self.opening = self.encode("Action: ")
        self.end = self._id("|")
        self.last = self._tokenizer.get_vocab_size(with_added_tokens=False) - 1 - skip_tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text, after the beginning. Not remembered: with the state in it, hardly any comes twice."""
        return [self._begin, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def action_ids(self, count: int, known: int) -> list[int]:
        """PaliGemma's ids of the end and of `count` FAST tokens. Raises BenchError if they are not among the `known`
        that the network has."""
        if self.last >= known or self.last < count:
            raise BenchError(
                f"tokenizer.json: FAST's {count} tokens would be {self.last} down to {self.last - count + 1} of "
                f"PaliGemma's, and the network knows {known}"
            )
        return [self.end, *range(self.last, self.last - count, -1)]


class PublishedPi0Fast(PaliGemmaPolicy, Pi0Fast):
    """pi0-FAST at its published size behind the likelihood seam. Its weights are random until some are loaded."""

    architecture: PublishedPi0FastArchitecture
    vocabulary: Any
    """`FastPrompts`."""
    ids: Tensor
    """[V + 1] PaliGemma's id of each action token."""

    def _use(self, fast: FastTokenizer) -> None:
        super()._use(fast)
        ids = self.vocabulary.action_ids(len(fast), self.architecture.words)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.opening = len(self.vocabulary.opening)

    def _build(self, a: Any) -> None:
        config = paligemma_config(a, a.width, a.mlp, a.words)
        config["text_config"]["tie_word_embeddings"] = False
        self.network = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**config, tie_word_embeddings=False))
        lower_precision(self.network, a.dtype)

    @classmethod
    def restore(cls, config: Mapping[str, Any]) -> PublishedPi0Fast:
        """The policy that `config` describes, its weights still to be loaded."""
        architecture = PublishedPi0FastArchitecture(**config["architecture"])
        prompts: Any = FastPrompts(config["tokenizer"], architecture.skip_tokens)
        return cls(config["policy"], architecture, prompts, FastTokenizer.restore(config["fast"]))

    def fill_buffers(self) -> None:
        """Computes what is not stored, where the policy was built on the meta device."""
        self._use(self.fast)
        fill_buffers(self.network.model)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds besides the card: enough to rebuild the policy around its weights."""
        return {
            "policy": self.name,
            "architecture": asdict(self.architecture),
            "normalisation": self.scales,
            "tokenizer": self.vocabulary.json,
            "fast": self.fast.config,
        }

    # What is seen

    def preprocess(self, observations: Sequence[Observation]) -> Batch:
        """Observations to padded tensors; images of any size are resized. Raises BenchError if one does not fit."""
        prompted = [dataclasses.replace(seen, instruction=self.prompt(seen)) for seen in observations]
        batch: Batch = super().preprocess(prompted)
        return batch

    def prompt(self, seen: Observation) -> str:
        """The text that the network reads. Raises BenchError for proprioception of another robot."""
        a = self.architecture
        if seen.proprio.shape != (a.proprio_dim,):
            raise BenchError(f"proprio: shape {seen.proprio.shape}, but this policy takes ({a.proprio_dim},)")
        low, high = (scale.cpu().numpy() for scale in (self.proprio_low, self.proprio_high))
        state = 2 * (seen.proprio - low) / (high - low) - 1  # not clipped: there is a bin -1
        task = seen.instruction.strip().replace("_", " ").replace("\n", " ")
        return f"Task: {task}, State: {' '.join(map(str, np.digitize(state, BINS) - 1))};\n"

    def _prefix(self, batch: Batch, proprio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, S, D] of images, prompt and opening; which are real [B, S]; positions [B, S]."""
        opening = torch.tensor(self.vocabulary.opening, device=batch.words.device).expand(len(batch), -1)
        tokens = torch.cat((batch.words, opening), 1)
        words = self._embed(tokens)
        visible = self._see(self.network.model, batch.images).to(words.dtype)
        real = torch.cat((tokens.new_ones(visible.shape[:2], dtype=torch.bool), tokens != 0), 1)
        return torch.cat((visible, words), 1), real, real.cumsum(1) - 1

    def _run(
        self, x: Tensor, mask: Tensor, positions: Tensor, layers: slice, cache: DynamicCache | None = None
    ) -> Tensor:
        run = super()._run
        if cache is not None:
            return run(x, mask, positions, layers, cache)
        for i in range(self.architecture.layers)[layers]:
            x = self._maybe_again(run, x, mask, positions, slice(i, i + 1))
        return x

    # Action tokens

    def _speak(self, index: Tensor, said: Tensor) -> Tensor:
        return self._embed(self.ids[index])

    def _head(self) -> Tensor:
        return self.network.lm_head.weight[self.ids]


restore = PublishedPi0Fast.restore
