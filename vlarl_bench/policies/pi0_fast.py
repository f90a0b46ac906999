"""pi0-FAST (Pertsch et al., 2025): PaliGemma, transformers' own, that writes an action chunk as FAST tokens.

The prefix (images or objects, instruction, proprioception) sees itself in both directions; action tokens see it and
those before them, until one that ends the chunk. In `state` mode one token an object takes the place of the images.
The published model (`pi0_fast_published.py`) reads proprioception as text in its prompt; here it is one projected
token, the prefix's last. And tiny is told with each action token how many coefficients have been said up to it, by an
embedding of its own: the published model has to count, which so small a network hardly learns, and most of what it then
says is no chunk. For the same reason its softmax is over those tokens alone after which a chunk can still come about
(`grammar`).

Where a context is cut: `encode` runs the vision tower and the `frozen_layers` lowest layers over the prefix; RL trains
the layers above and the head. Action tokens pass through the lower layers too, on the keys and values that the context
keeps, and leave them as they are: nothing below the cut receives a gradient from a detached context, and what the
actor receives is exact.

Shapes: B observations, M objects, S prefix tokens, T action tokens, D width, H actions a chunk, A action dimensions,
P proprio, V FAST tokens. Action tokens are counted from 0, which ends a chunk; FAST's own ids follow from 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.cache_utils import DynamicCache

from ..errors import BenchError
from ..suite import Embodiment, Observation, windows
from .adapt import learning
from .base import ALL, LogProb, Sample
from .batch_invariant import batch_invariant
from .fast_tokens import FastTokenizer
from .inputs import Batch, Rows, object_tokens, object_width, to_batch
from .quantiles import Quantiles
from .siglip import siglip
from .tokens import TokenPolicy, choose, likelihood, row_by_row, uniforms
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .spec import PolicySpec

END = 0
"""The action token that ends a chunk, and fills the rest of a trace."""
IMPOSSIBLE = -1e4
"""Logit of what cannot be drawn; finite, so that entropies are."""


@dataclass(frozen=True)
class Pi0FastArchitecture:
    """Everything that decides the network's shape and how it decodes; stored in the policy folder's config.json."""

    observation: str
    """`state` or `pixels`."""
    action_dim: int
    proprio_dim: int
    """The first three proprio entries are the end-effector position (m)."""
    words: int
    """Size of the vocabulary of texts; in the language model's, action tokens follow it."""
    chunk: int = 8
    grammar: bool = True
    """Whether tokens are drawn only among those that can still lead to a chunk; the published model says anything."""
    action_tokens: int = 512
    """FAST tokens that there is room for."""
    scale: float = 10.0
    """Steps a unit that the transformed chunk is rounded to; 10 is the authors'."""
    layers: int = 3
    frozen_layers: int = 1
    """Lowest layers of the language model, which RL leaves as they are."""
    heads: int = 4
    head_dim: int = 32
    width: int = 128
    mlp: int = 256
    max_objects: int = 10
    max_name_words: int = 6
    max_words: int = 20
    hands: tuple[str, ...] = ()
    """See `suite.Embodiment`."""
    cameras: tuple[str, ...] = ()
    image_size: int = 0
    patch: int = 16
    vision_layers: int = 3

    @property
    def max_tokens(self) -> int:
        """Action tokens a chunk, at most: one a coefficient, and the end. So every chunk can be said."""
        return self.chunk * self.action_dim + 1


@dataclass(frozen=True)
class Context(Rows):
    """An encoded observation. Plain tensors that nothing writes to, so contexts can be shared and indexed freely."""

    hidden: Tensor
    """[B, S, D] what enters the first layer that RL trains."""
    lower: Tensor
    """[B, frozen_layers, 2, heads, S, head_dim] keys (rotated) and values of the prefix in the layers below."""
    mask: Tensor
    """[B, S] bool, true for real tokens; the last always is."""
    positions: Tensor
    """[B, S] of each token; padding takes none."""
    pooled: Tensor
    """[B, 2 D] mean and maximum of `hidden`."""
    proprio: Tensor
    """[B, P] normalised."""


class Pi0Fast(Quantiles, TokenPolicy):
    """Scaled-down pi0-FAST. Its weights are random until some are loaded, its tokenizer plain until it is fitted."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"sft", "likelihood", "tokens", "fast"})
    opening: int = 0
    """Tokens at the prefix's end that no token before them sees, as if they had been said."""
    spelled: Tensor
    """[V + 1] coefficients that each action token spells."""

    def __init__(
        self,
        name: str,
        architecture: Pi0FastArchitecture,
        vocabulary: Vocabulary,
        fast: FastTokenizer | None = None,
        seed: int = 0,
    ) -> None:
        """Random weights from `seed`; the global generator is left as it was."""
        super().__init__()
        a = architecture
        self.name, self.architecture, self.vocabulary = name, a, vocabulary
        self._use(fast or FastTokenizer.plain(a.chunk, a.scale))
        self.chunk, self.action_dim, self.cameras = a.chunk, a.action_dim, a.cameras
        self.feature_dim = 2 * a.width + a.proprio_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(a)
        self.build_scales(a.action_dim, a.proprio_dim)
        self.eval()

    def _use(self, fast: FastTokenizer) -> None:
        room = self.architecture.action_tokens
        if len(fast) > room:
            raise BenchError(f"action_tokens: {room}, but the FAST tokenizer has {len(fast)}")
        self.fast = fast
        self.register_buffer("spelled", torch.tensor([0, *fast.lengths]), persistent=False)  # the end spells nothing

    def _build(self, a: Pi0FastArchitecture) -> None:
        self.network = PaliGemmaForConditionalGeneration(_transformers_config(a))
        if a.observation == "state":
            # No image ever reaches a state policy: without its tower no dead weight is stored, hashed or optimised.
            self.network.model.vision_tower = nn.Identity()
            self.network.model.multi_modal_projector = nn.Identity()
            self.object_in = nn.Linear(object_width(a), a.width)
            self.object_out = nn.Linear(a.width, a.width)
        self.proprio_in = nn.Linear(a.proprio_dim, a.width)
        self.places = nn.Embedding(a.chunk * a.action_dim + 1, a.width)
        # Gemma scales embeddings by sqrt(width): this makes them unit variance, on a par with the object tokens.
        nn.init.normal_(self.network.model.language_model.embed_tokens.weight, std=a.width**-0.5)

    @classmethod
    def restore(cls, config: Mapping[str, Any]) -> Pi0Fast:
        """The policy that `config` describes, its weights still to be loaded."""
        architecture, fast = Pi0FastArchitecture(**config["architecture"]), FastTokenizer.restore(config["fast"])
        return cls(config["policy"], architecture, Vocabulary(config["vocabulary"]), fast)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds besides the card: enough to rebuild the policy around its weights."""
        return {
            "policy": self.name,
            "architecture": asdict(self.architecture),
            "normalisation": self.scales,
            "vocabulary": list(self.vocabulary.entries),
            "fast": self.fast.config,
        }

    def fit_normalisation(self, actions: Sequence[np.ndarray], proprio: np.ndarray) -> None:
        """Quantiles, and the FAST tokenizer from every chunk of the normalised episodes."""
        super().fit_normalisation(actions, proprio)
        scaled = (self.normalise(torch.as_tensor(episode)).float().numpy() for episode in actions)
        chunks = np.concatenate([windows(episode, self.chunk)[0] for episode in scaled])
        self._use(FastTokenizer.fit(chunks, self.architecture.scale, self.architecture.action_tokens))
        self.to(self.device)  # what it spells by is new

    # Prefix

    def preprocess(self, observations: Sequence[Observation]) -> Batch:
        """Observations to padded tensors. Raises BenchError if one does not fit the architecture."""
        return to_batch(observations, self.architecture, self.vocabulary)

    @batch_invariant
    def encode(self, batch: Batch) -> Context:
        """Runs what RL leaves as it is, once; gradients flow unless the caller forbids them."""
        a, cache = self.architecture, DynamicCache()
        proprio = self.normalise_proprio(batch.proprio)
        x, real, positions = self._prefix(batch, proprio)
        x = self._run(x, self._mask(real), positions, slice(a.frozen_layers), cache)
        layers: list[Any] = cache.layers
        lower = x.new_zeros(len(batch), 0, 2, a.heads, x.shape[1], a.head_dim)
        if layers:
            lower = torch.stack([torch.stack((layer.keys, layer.values), 1) for layer in layers], 1)
        hidden = F.rms_norm(x.float(), (a.width,))
        keep = real[..., None]
        mean = (hidden * keep).sum(1) / keep.sum(1)
        top = hidden.masked_fill(~keep, -torch.inf).amax(1)
        return Context(x, lower, real, positions, torch.cat((mean, top), 1), proprio)

    def _prefix(self, batch: Batch, proprio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, S, D] of images or objects, words and proprio; which are real [B, S]; positions [B, S]."""
        spoken = batch.words != 0
        if self.architecture.observation == "pixels":
            seen, real = self._images(batch)
            steps = real
        else:
            seen, real = self._objects(batch)
            steps = F.pad(real[:, :1], (0, real.shape[1] - 1))  # objects are a set: all stand at one position
        one = spoken.new_ones(len(batch), 1)
        x = torch.cat((seen, self._embed(batch.words), self.proprio_in(proprio)[:, None]), 1)
        return x, torch.cat((real, spoken, one), 1), torch.cat((steps, spoken, one), 1).cumsum(1) - 1

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, N, D] of the patches of all cameras, and which are real [B, N]: all."""
        model = self.network.model
        patches = siglip(model.vision_tower, batch.images.flatten(0, 1).float() / 127.5 - 1)
        seen = model.multi_modal_projector(patches).view(len(batch), -1, self.architecture.width)
        return seen, torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device)

    def _objects(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, M, D] of the objects, and which are real [B, M]."""
        return object_tokens(batch, self._embed, self.object_in, self.object_out)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.network.model.language_model.embed_tokens(tokens)

    def _run(
        self, x: Tensor, mask: Tensor, positions: Tensor, layers: slice, cache: DynamicCache | None = None
    ) -> Tensor:
        """Some layers on hidden states [B, n, D] at positions [B, n]; mask [B, 1, n, all keys] is true where a token
        may look."""
        model = self.network.model.language_model
        rotary = model.rotary_emb(x, positions)
        for layer in model.layers[layers]:
            x = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        return x

    def features(self, context: Context) -> Tensor:
        """[B, 2 D + P]: mean and maximum of the prefix's hidden states, and normalised proprio."""
        return torch.cat((context.pooled, context.proprio), -1)

    # Action tokens

    @batch_invariant
    def logits(self, context: Context, index: Tensor) -> Tensor:
        """[B, T, V + 1] logits of each action token, given the ones [B, T] before it."""
        a, s, t = self.architecture, context.mask.shape[1], index.shape[1] - 1
        real = F.pad(context.mask, (0, t), value=1)
        steps = torch.arange(1, t + 1, device=index.device)
        positions = torch.cat((context.positions, context.positions[:, -1:] + steps), 1)
        mask = self._mask(real, t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and context.hidden.requires_grad):
            x = self._speak(index[:, :-1], self.spelled[index[:, :-1]].cumsum(1))
            x = self._run(x, mask[:, :, s:], positions[:, s:], slice(a.frozen_layers), self._cache(context))
        x = self._run(torch.cat((context.hidden, x), 1), mask, positions, slice(a.frozen_layers, None))
        spelled = self.spelled[index]
        return self._possible(self._read(x[:, s - 1 :]), spelled.cumsum(1) - spelled)

    def _mask(self, real: Tensor, said: int = 0) -> Tensor:
        """[B, 1, n, n] which token may look at which, where the last `said` of the n are action tokens: all at what is
        real [B, n] of the prefix, and from its opening on at nothing that comes later."""
        first = real.shape[1] - self.opening - said
        order = real.new_ones(real.shape[1], real.shape[1]).tril()
        order[:first, :first] = True
        return real[:, None, None] & order

    def _possible(self, logits: Tensor, said: Tensor) -> Tensor:
        """Logits [..., V + 1] after `said` [...] coefficients, with what the grammar forbids out of reach: a token that
        spells more than the chunk has left, and the end before nothing is left."""
        if not self.architecture.grammar:
            return logits
        left = (self.chunk * self.action_dim - said).clamp_min(0)[..., None]
        possible = self.spelled <= left
        possible[..., END] = left[..., 0] == 0
        return logits.masked_fill(~possible, IMPOSSIBLE)

    def _speak(self, index: Tensor, said: Tensor) -> Tensor:
        """Embeddings [B, n, D] of action tokens [B, n] that bring the number of coefficients to `said` [B, n]."""
        places = self.places(said.clamp_max(self.places.num_embeddings - 1))
        return self._embed(self.architecture.words + index) + places

    def _read(self, x: Tensor) -> Tensor:
        """[..., V + 1] logits of what leaves the last layer [..., D], among action tokens alone."""
        return F.linear(self.network.model.language_model.norm(x), self._head()).float()

    def _head(self) -> Tensor:
        """[V + 1, D] rows of the output layer that stand for action tokens."""
        first = self.architecture.words
        return self.network.lm_head.weight[first : first + 1 + len(self.fast)]

    def _cache(self, context: Context) -> DynamicCache:
        """A fresh cache over the context's tensors; transformers appends to the cache, never to the tensors."""
        cache = DynamicCache()
        for i, layer in enumerate(context.lower.unbind(1)):
            cache.update(layer[:, 0], layer[:, 1], i)
        return cache

    @batch_invariant
    def _decode(self, context: Context, uniform: Tensor | None, temperature: float) -> Tensor:
        """[B, max_tokens] action tokens: the likeliest, or drawn by uniform numbers of that shape."""
        a, cache, real = self.architecture, self._cache(context), context.mask
        x = self._run(context.hidden, self._mask(real), context.positions, slice(a.frozen_layers, None), cache)
        index = torch.full((len(context), a.max_tokens), END, device=real.device)
        said = torch.zeros(len(context), 1, dtype=torch.long, device=real.device)
        ended = torch.zeros(len(context), dtype=torch.bool, device=real.device)
        for i in range(a.max_tokens):
            logits = self._possible(self._read(x[:, -1]), said[:, 0])
            token = choose(logits, None if uniform is None else uniform[:, i], temperature)
            index[:, i] = token.masked_fill(ended, END)
            ended = ended | (token == END)
            if ended.all():
                break
            real = F.pad(real, (0, 1), value=1)
            said = said + self.spelled[index[:, i : i + 1]]
            token = self._speak(index[:, i : i + 1], said)
            x = self._run(token, real[:, None, None], context.positions[:, -1:] + i + 1, slice(None), cache)
        return index

    def decode(self, context: Context, generators: Sequence[torch.Generator] | None, temperature: float) -> Sample:
        """Tokens drawn at a temperature, or the likeliest; the trace is the tokens [B, max_tokens, 1], the end too."""
        a = self.architecture
        index = self._decode(context, uniforms(generators, a.max_tokens, self.device), temperature)
        tokens = [[i - 1 for i in itertools.takewhile(lambda i: i != END, row)] for row in index.tolist()]
        chunks, valid = self.fast.decode(tokens, a.chunk, a.action_dim)
        latent = torch.from_numpy(chunks).float().to(self.device)
        return Sample(self.unnormalise(latent), latent, index[..., None], torch.from_numpy(~valid))

    @row_by_row
    def log_prob(self, context: Context, trace: Tensor, mask: Tensor, noise: float) -> LogProb:
        """Of a trace of action tokens [B, max_tokens, 1] at temperature `noise`.

        The end counts as a decision, what follows it does not. A token stands for frequencies, so all tokens decide
        every action: they count unless no action of the chunk was executed.
        """
        index = trace[..., 0]
        before = (index == END).cumsum(1) - (index == END).long()
        counted = (before == 0) & mask.bool().any(1, keepdim=True)
        longest = int((before == 0).sum(1).max())
        index = index[:, :longest]
        logp, entropy = likelihood(self.logits(context, index), index, noise)
        rest = (0, 0, 0, trace.shape[1] - longest)
        kept = counted[..., None]
        return LogProb(F.pad(logp, rest) * kept, F.pad(entropy, rest) * kept, kept)

    def sft_loss(
        self, context: Context, actions: Tensor, mask: Tensor, generator: torch.Generator, rows: Tensor | slice = ALL
    ) -> Tensor:
        """Cross-entropy of the chunks' tokens (only among action tokens): a chunk's mean over its tokens, the end
        among them, and the mean over chunks, as the authors' code has it.

        In a step that is not real the last real action before it is held (or the first, where none is before), and a
        chunk without a real step does not count.
        """
        steps = torch.arange(self.chunk, device=mask.device)
        everything, actions, real = mask.bool().any(1).sum(), actions[rows], mask[rows].bool()
        last = torch.where(real, steps, -1).cummax(1).values
        held = torch.where(last < 0, real.int().argmax(1, keepdim=True), last)
        latent = self.normalise(actions.gather(1, held[..., None].expand_as(actions)))
        tokens = self.fast.encode(latent.detach().cpu().numpy())
        index = torch.full((len(tokens), 1 + max(map(len, tokens))), END)
        for row, ids in zip(index, tokens, strict=True):
            row[: len(ids)] = torch.tensor(ids) + 1
        index = index.to(self.device)
        said = torch.arange(index.shape[1], device=index.device) <= (index != END).sum(1, keepdim=True)
        losses = F.cross_entropy(self.logits(context, index).transpose(1, 2), index, reduction="none")
        chunks, counted = (losses * said).sum(1) / said.sum(1), real.any(1)
        return (chunks * counted).sum() / everything

    def actor_parameters(self) -> list[nn.Parameter]:
        """The language model above `frozen_layers`, and the head: what receives a gradient from a detached context."""
        model = self.network.model.language_model
        modules = (*model.layers[self.architecture.frozen_layers :], model.norm, self.network.lm_head)
        return learning(self, (p for module in modules for p in module.parameters()))


def create(spec: PolicySpec, embodiment: Embodiment, vocabulary: Sequence[str], seed: int) -> Pi0Fast:
    """Random weights, at the sizes of `spec`; `vocabulary` are texts."""
    words = Vocabulary.of(vocabulary)
    architecture = Pi0FastArchitecture(
        observation=spec.observation,
        action_dim=embodiment.action_dim,
        proprio_dim=embodiment.proprio_dim,
        words=len(words),
        chunk=embodiment.chunk,
        hands=embodiment.hands,
        cameras=embodiment.cameras,
        image_size=spec.image_size,
    )
    return Pi0Fast(spec.name, architecture, words, seed=seed)


restore = Pi0Fast.restore


def _transformers_config(a: Pi0FastArchitecture) -> PaliGemmaConfig:
    pixels = a.observation == "pixels"
    size = a.words + 1 + a.action_tokens
    return PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "vocab_size": size,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": a.width,
            "intermediate_size": a.mlp,
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.heads,
            "head_dim": a.head_dim,
            "initializer_range": 0.05,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": a.width if pixels else 4,
            "intermediate_size": a.mlp if pixels else 4,
            "num_hidden_layers": a.vision_layers if pixels else 1,
            "num_attention_heads": a.heads,
            "image_size": a.image_size or 8,
            "patch_size": a.patch,
            "vision_use_head": False,
        },
        projection_dim=a.width,
        image_token_index=size,
        tie_word_embeddings=False,
    )
