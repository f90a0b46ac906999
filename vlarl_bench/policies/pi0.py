"""pi0 (Black et al., 2024, arXiv:2410.24164): transformers' `PI0ForConditionalGeneration`, at sizes that a CPU trains.

A vision-language prefix is encoded once per observation into a key-value cache; an action expert then predicts flow
velocities against that cache. In `pixels` mode the prefix is pi0's own (SigLIP patches, then instruction words); in
`state` mode one token an object takes the place of the images.

Shapes: B observations, K draws, H actions a chunk, A action dimensions, P proprio, M objects, W words a name, T words
an instruction, C cameras, S prefix tokens, L layers, D prefix width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PI0Config, PI0ForConditionalGeneration

from ..suite import Embodiment, Observation
from .adapt import learning
from .base import ALL, NoisePolicy, Sample
from .batch_invariant import batch_invariant
from .gemma import additive, block, keys_and_values, norm, repeated, rotation
from .inputs import Batch, Rows, object_tokens, object_width, to_batch
from .siglip import siglip
from .standardised import Standardised
from .stochastic_flow import StochasticFlow
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .spec import PolicySpec


@dataclass(frozen=True)
class Pi0Architecture:
    """Everything that decides the network's shape and how it decodes; stored in the policy folder's config.json."""

    observation: str
    """`state` or `pixels`."""
    action_dim: int
    proprio_dim: int
    chunk: int = 8
    layers: int = 3
    heads: int = 4
    head_dim: int = 32
    prefix_width: int = 128
    prefix_mlp: int = 256
    expert_width: int = 96
    expert_mlp: int = 192
    euler_steps: int = 5
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
    def image_tokens(self) -> int:
        """Prefix tokens of all cameras."""
        return len(self.cameras) * (self.image_size // self.patch) ** 2 if self.cameras else 0


@dataclass(frozen=True)
class Context(Rows):
    """An encoded observation. Plain tensors that nothing writes to, so contexts can be shared and indexed freely."""

    cache: Tensor
    """[B, L, 2, heads, S, head_dim] keys (rotated) and values of the prefix."""
    mask: Tensor
    """[B, S] bool, true for real tokens."""
    proprio: Tensor
    """[B, P] normalised."""
    pooled: Tensor
    """[B, 2 D] mean and maximum of the prefix's hidden states."""


@dataclass(frozen=True)
class Frame:
    """What the action expert needs of a context, laid out for a number of points."""

    layers: tuple[Tensor, ...]
    """[B, 2, heads, S, head_dim] of each layer, keys and values of the prefix."""
    mask: Tensor
    """[B, 1, Q, S + Q], added to attention's logits."""
    rotated: tuple[Tensor, Tensor]
    """What `gemma.rotation` gives for the tokens."""
    state: Tensor
    """[B, 1, width] the state token."""


class Pi0(Standardised, StochasticFlow, NoisePolicy):
    """Scaled-down pi0 behind the flow and likelihood seams. Its weights are random until some are loaded."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"sft", "denoising", "flow", "likelihood", "chain", "noise"})
    sft_draws: ClassVar[int] = 4
    """Draws of (t, noise) an observation in `sft_loss`: the prefix is encoded once, so more draws are cheap."""

    def __init__(self, name: str, architecture: Pi0Architecture, vocabulary: Vocabulary, seed: int = 0) -> None:
        """Random weights from `seed`; the global generator is left as it was."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(name, architecture, vocabulary)
        self.eval()

    def _build(self, name: str, architecture: Pi0Architecture, vocabulary: Vocabulary) -> None:
        self.name, self.architecture, self.vocabulary = name, architecture, vocabulary
        a = architecture
        self.chunk, self.action_dim, self.cameras = a.chunk, a.action_dim, a.cameras
        self.euler_steps = a.euler_steps
        self.feature_dim = 2 * a.prefix_width + a.proprio_dim
        self.model = PI0ForConditionalGeneration(_transformers_config(a, len(vocabulary)))
        if a.observation == "state":
            # No image ever reaches a state policy: without its tower no dead weight is stored, hashed or optimised.
            self.model.model.vlm.vision_tower = nn.Identity()
            self.model.model.vlm.multi_modal_projector = nn.Identity()
            self.object_in = nn.Linear(object_width(a), a.prefix_width)
            self.object_out = nn.Linear(a.prefix_width, a.prefix_width)
        for embedding in (self.model.model.vlm.get_input_embeddings(), self.model.model.dit.get_input_embeddings()):
            # Gemma scales embeddings by sqrt(width): this makes them unit variance, on a par with the object tokens.
            nn.init.normal_(embedding.weight, std=embedding.weight.shape[1] ** -0.5)
        self.build_scales(a.action_dim, a.proprio_dim)

    @classmethod
    def restore(cls, config: Mapping[str, Any]) -> Pi0:
        """The policy that `config` describes, its weights still to be loaded."""
        return cls(config["policy"], Pi0Architecture(**config["architecture"]), Vocabulary(config["vocabulary"]))

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds besides the card: enough to rebuild the policy around its weights."""
        return {
            "policy": self.name,
            "architecture": asdict(self.architecture),
            "normalisation": self.scales,
            "vocabulary": list(self.vocabulary.entries),
        }

    # Prefix

    def preprocess(self, observations: Sequence[Observation]) -> Batch:
        """Observations to padded tensors. Raises BenchError if one does not fit the architecture."""
        return to_batch(observations, self.architecture, self.vocabulary)

    @batch_invariant
    def encode(self, batch: Batch) -> Context:
        """Runs the vision-language prefix once; gradients flow unless the caller forbids them."""
        if torch.is_grad_enabled():
            return self._encode(batch)
        with torch.inference_mode():  # less overhead than without gradients alone; the caller gets a copy from outside
            found = self._encode(batch)
        return found.clone()

    def _encode(self, batch: Batch) -> Context:
        language = self.model.model.vlm.language_model
        mask, embeddings, positions = self._tokens(batch)
        rotated = rotation(language, positions, embeddings.dtype)
        seen = additive(mask[:, None, None].expand(-1, 1, mask.shape[1], -1), embeddings.dtype)  # in both directions
        hidden, kept = embeddings, []
        for layer in language.layers[:-1]:
            hidden, key, value = self._maybe_again(block, layer, hidden, rotated, seen)
            kept.append(torch.stack((key, value), 1))
        # Of the last layer only keys and values are ever read, so features come from what enters it.
        last = language.layers[-1]
        kept.append(torch.stack(keys_and_values(last, norm(last.input_layernorm, hidden), rotated), 1))
        cache, hidden = torch.stack(kept, 1), F.rms_norm(hidden.float(), hidden.shape[-1:])
        real = mask[..., None]
        mean = (hidden * real).sum(1) / real.sum(1)
        top = hidden.masked_fill(~real, -torch.inf).amax(1)
        return Context(cache, mask, self.normalise_proprio(batch.proprio), torch.cat((mean, top), -1))

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mask [B, S], embeddings [B, S, D] and positions [B, S] of the prefix."""
        a, vlm = self.architecture, self.model.model.vlm
        embed, spoken = vlm.get_input_embeddings(), batch.words != 0
        if a.observation == "pixels":
            seen = torch.ones(len(batch), a.image_tokens, dtype=torch.bool, device=self.device)
            mask = torch.cat((seen, spoken), 1)
            patches = siglip(vlm.vision_tower, batch.images.flatten(0, 1).float() / 127.5 - 1)
            visible = vlm.multi_modal_projector(patches).view(len(batch), a.image_tokens, a.prefix_width)
            return mask, torch.cat((visible, embed(batch.words)), 1), mask.cumsum(-1) - 1
        objects, real = object_tokens(batch, embed, self.object_in, self.object_out)
        # Objects are a set, so all stand at position 0; words follow in their order.
        positions = torch.cat((torch.zeros_like(batch.names[..., 0]), spoken.cumsum(-1)), 1)
        return torch.cat((real, spoken), 1), torch.cat((objects, embed(batch.words)), 1), positions

    def features(self, context: Context) -> Tensor:
        """[B, 2 D + P]: mean and maximum of the prefix's hidden states, and normalised proprio."""
        return torch.cat((context.pooled, context.proprio), -1)

    # Action expert

    @batch_invariant
    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] velocities at x [B, K, H, A], t [B, K].

        Equal to K calls of `PI0ForConditionalGeneration.forward`, in one pass: the state token and the prefix, which
        see no action, are shared by the K chunks, and a chunk sees no other.
        """
        return self._velocity(self._frame(context, x.shape[1]), x, t)

    def _frame(self, context: Context, k: int) -> Frame:
        """What the velocities at any K points have in common."""
        a, s, b = self.architecture, context.mask.shape[1], len(context)
        q = 1 + k * a.chunk
        draw = torch.arange(q - 1, device=self.device) // a.chunk
        mask = torch.zeros(b, 1, q, s + q, dtype=torch.bool, device=self.device)
        mask[..., :s] = context.mask[:, None, None]
        mask[..., s] = True
        mask[..., 1:, s + 1 :] = draw[:, None] == draw
        step = torch.cat((draw.new_zeros(1), torch.arange(a.chunk, device=self.device).repeat(k) + 1))
        rotated = rotation(self.model.model.dit, context.mask.sum(1, keepdim=True) + step, context.cache.dtype)
        state = self.model.embed_action_time.state_proj(context.proprio)[:, None]
        return Frame(context.cache.unbind(1), additive(mask, context.cache.dtype), rotated, state)

    def _velocity(self, frame: Frame, x: Tensor, t: Tensor) -> Tensor:
        waves = self.model.embed_action_time.sinusoid_embeds(t.flatten()).to(x).view(*t.shape, -1)
        tokens = self._noisy_tokens(frame, x, waves)
        for layer, before in zip(self.model.model.dit.layers, frame.layers, strict=True):
            tokens, _, _ = self._maybe_again(block, layer, tokens, frame.rotated, frame.mask, before)
        return self._read(tokens, x)

    def _noisy_tokens(self, frame: Frame, x: Tensor, waves: Tensor) -> Tensor:
        """[B, 1 + K H, width] what enters the expert at x [B, K, H, A]; `waves` [B, K, width] embed times."""
        embed = self.model.embed_action_time
        chunks = torch.cat((embed.action_in_proj(x), waves[:, :, None].expand(-1, -1, x.shape[2], -1)), -1)
        chunks = embed.action_time_mlp_out(F.silu(embed.action_time_mlp_in(chunks)))
        return torch.cat((frame.state, chunks.flatten(1, 2)), 1).to(frame.mask.dtype)

    def _maybe_again(self, function: Any, *inputs: Any) -> Any:
        """`function(*inputs)`; published sizes may compute it again for its gradient."""
        return function(*inputs)

    def _read(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Velocities, shaped as x, of what leaves the expert."""
        velocity: Tensor = self.model.action_out_proj(norm(self.model.model.dit.norm, tokens)[:, 1:].float())
        return velocity.view(x.shape)

    @torch.no_grad()
    @batch_invariant
    def decode(self, context: Context, noise: Tensor) -> Sample:
        """Integrates from t = 1 (noise) to 0 in `euler_steps` Euler steps."""
        with torch.inference_mode():  # what it makes can never learn, so the caller gets a copy from outside
            x = self._integrate(self._frame(context, 1), noise[:, None])
        latent = x[:, 0].clone()
        return Sample(self.unnormalise(latent), latent)

    def _integrate(self, frame: Frame, x: Tensor) -> Tensor:
        """[B, 1, H, A] where the Euler steps end that begin at x; what all steps share is made once."""
        pairs = zip(self.model.model.dit.layers, frame.layers, strict=True)
        layers = [repeated(layer, frame.rotated, frame.mask, before) for layer, before in pairs]
        times = torch.tensor([1 - step / self.euler_steps for step in range(self.euler_steps)], device=self.device)
        for waves in self.model.embed_action_time.sinusoid_embeds(times).to(x):
            tokens = self._noisy_tokens(frame, x, waves.expand(len(x), 1, -1))
            for layer in layers:
                tokens = layer(tokens)
            x = x.sub(self._read(tokens, x), alpha=1 / self.euler_steps)
        return x

    def sft_loss(
        self, context: Context, actions: Tensor, mask: Tensor, generator: torch.Generator, rows: Tensor | slice = ALL
    ) -> Tensor:
        """Conditional flow matching with pi0's own times, t ~ 0.001 + 0.999 Beta(1.5, 1); mean over real steps."""
        latent = self.normalise(actions)
        shape = (len(latent), self.sft_draws)
        uniform = torch.rand(shape, generator=generator, device=generator.device).to(latent)
        noise = torch.randn(*shape, *latent.shape[1:], generator=generator, device=generator.device).to(latent)
        t = 0.001 + 0.999 * uniform ** (1 / 1.5)  # the inverse of Beta(1.5, 1)'s distribution function, t^1.5
        errors = self.draw_loss(context, latent[rows], t[rows], noise[rows]).mean((1, 3))
        return (errors * mask[rows]).sum() / mask.sum()

    def actor_parameters(self) -> list[nn.Parameter]:
        """The action expert and its projections: exactly what receives a gradient from a detached context."""
        modules = (self.model.model.dit.layers, self.model.model.dit.norm, self.model.embed_action_time)
        return learning(self, (p for module in (*modules, self.model.action_out_proj) for p in module.parameters()))


def create(spec: PolicySpec, embodiment: Embodiment, vocabulary: Sequence[str], seed: int) -> Pi0:
    """Random weights, at the sizes of `spec`; `vocabulary` are texts."""
    architecture = Pi0Architecture(
        observation=spec.observation,
        action_dim=embodiment.action_dim,
        proprio_dim=embodiment.proprio_dim,
        chunk=embodiment.chunk,
        hands=embodiment.hands,
        cameras=embodiment.cameras,
        image_size=spec.image_size,
    )
    return Pi0(spec.name, architecture, Vocabulary.of(vocabulary), seed)


restore = Pi0.restore


def _transformers_config(a: Pi0Architecture, vocabulary: int) -> PI0Config:
    attention = {"num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.heads}
    gemma = {"model_type": "gemma", "head_dim": a.head_dim, "vocab_size": vocabulary, "pad_token_id": 0, **attention}
    ids = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.05}
    pixels = a.observation == "pixels"
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": a.prefix_width if pixels else 4,
        "intermediate_size": a.prefix_mlp if pixels else 4,
        "num_hidden_layers": a.vision_layers if pixels else 1,
        "num_attention_heads": a.heads,
        "image_size": a.image_size or 8,
        "patch_size": a.patch,
        "vision_use_head": False,
    }
    return PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": {**gemma, **ids, "hidden_size": a.prefix_width, "intermediate_size": a.prefix_mlp},
            "vision_config": vision,
            "projection_dim": a.prefix_width,
            "image_token_id": vocabulary,
        },
        dit_config={**gemma, **ids, "hidden_size": a.expert_width, "intermediate_size": a.expert_mlp},
        chunk_size=a.chunk,
        max_state_dim=a.proprio_dim,
        max_action_dim=a.action_dim,
        num_inference_steps=a.euler_steps,
        loss_reduction="none",
    )
