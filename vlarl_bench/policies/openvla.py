"""OpenVLA behind the policy seam: actions as tokens, one bin a number (Kim et al., 2024), or OFT's regression.

Where a context is cut: `encode` runs the vision towers, the projector and the `frozen_layers` lowest layers of the
language model; what decodes from a context are the layers above and the head, and those are `actor_parameters`. So an
observation is encoded once, and RL trains the upper language model from that, exactly: nothing of a context changes
while only the actor does. With `frozen_layers` 0 RL trains the whole language model (as VLA-RL does, by LoRA), and a
context is its input embeddings.

Shapes: B observations, M objects, S tokens, D width, H actions a chunk, A action dimensions, P proprio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import BenchError
from ..suite import Embodiment, Observation
from .adapt import learning
from .base import ALL, LogProb, Sample
from .batch_invariant import batch_invariant
from .inputs import Batch, Rows, object_tokens, object_width, to_batch
from .openvla_inputs import Prompts, from_bins, pixels, to_bins
from .openvla_model import L1Head, OpenVLAArchitecture, OpenVLANetwork, ProprioProjector, Tower
from .quantiles import Quantiles
from .tokens import TokenPolicy, choose, likelihood, row_by_row, uniforms
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .spec import PolicySpec


@dataclass(frozen=True)
class Context(Rows):
    """An encoded observation. Plain tensors that nothing writes to, so contexts can be shared and indexed freely."""

    hidden: Tensor
    """[B, S, D] what enters the first layer that RL may train."""
    mask: Tensor
    """[B, S] bool, true for real tokens."""
    positions: Tensor
    """[B, S] of each token; padding takes none."""
    pooled: Tensor
    """[B, 2 D] mean and maximum of `hidden` over what was seen."""
    proprio: Tensor
    """[B, P] normalised."""


class _OpenVLA(Quantiles):
    """What both heads share: all but decoding. Its weights are random until some are loaded."""

    def __init__(
        self, name: str, architecture: OpenVLAArchitecture, vocabulary: Vocabulary | Prompts, seed: int = 0
    ) -> None:
        """Random weights from `seed`; the global generator is left as it was."""
        super().__init__()
        a = architecture
        if a.decoding == "autoregressive" and (a.frozen_layers or a.head != "tokens"):
            raise BenchError("decoding: 'autoregressive' needs frozen_layers 0 and head 'tokens'")
        self.name, self.architecture, self.vocabulary = name, a, vocabulary
        self.chunk, self.action_dim, self.cameras = a.chunk, a.action_dim, a.cameras
        self.feature_dim = 2 * a.width + a.proprio_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(a)
        for parameter in self.parameters():  # and no buffer: rotary frequencies stay precise, as upstream
            parameter.data = parameter.data.to(getattr(torch, a.dtype))
        self.build_scales(a.action_dim, a.proprio_dim)
        self.eval()

    def _build(self, a: OpenVLAArchitecture) -> None:
        self.network = OpenVLANetwork(a)
        if a.observation == "state":
            self.object_in = nn.Linear(object_width(a), a.width)
            self.object_out = nn.Linear(a.width, a.width)
        if a.proprio_token:
            self.proprio_projector = ProprioProjector(a.proprio_dim, a.width)
        if a.decoding == "parallel" and a.placeholders == "learned":
            self.placeholders = nn.Parameter(torch.randn(a.numbers, a.width))
        if a.head == "l1":
            self.action_head = L1Head(a.width, a.action_dim)
        if isinstance(self.vocabulary, Vocabulary):  # trained from nothing: on a par with what the layers add
            nn.init.normal_(self.network.language_model.model.embed_tokens.weight)
            for layer in self.network.language_model.model.layers.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds besides the card: enough to rebuild the policy around its weights."""
        words: dict[str, Any]
        if isinstance(self.vocabulary, Prompts):
            words = {"tokenizer": self.vocabulary.json}
        else:
            words = {"vocabulary": list(self.vocabulary.entries)}
        return {
            "policy": self.name,
            "architecture": asdict(self.architecture),
            "normalisation": self.scales,
            **words,
        }

    @property
    def checkpointed(self) -> bool:  # type: ignore[override]
        return self.network.checkpointed

    @checkpointed.setter
    def checkpointed(self, wanted: bool) -> None:
        self.network.checkpointed = wanted

    def normalise(self, actions: Tensor) -> Tensor:
        """Environment units to latent; quantiles become -1 and 1."""
        if self.architecture.gripper == "inverted":
            actions = torch.cat((actions[..., :-1], (1 - actions[..., -1:]) / 2), -1)
        return super().normalise(actions)

    def unnormalise(self, latent: Tensor) -> Tensor:
        """Latent to environment units. An inverted gripper is shut or open, nothing between."""
        actions = super().unnormalise(latent)
        if self.architecture.gripper == "inverted":
            actions = torch.cat((actions[..., :-1], -(2 * actions[..., -1:] - 1).sign()), -1)
        return actions

    # What is seen

    def preprocess(self, observations: Sequence[Observation]) -> Batch:
        """Observations to padded tensors. Raises BenchError if one does not fit the architecture."""
        return to_batch(observations, self.architecture, self.vocabulary)

    @batch_invariant
    def encode(self, batch: Batch) -> Context:
        """Runs what RL leaves as it is, once; gradients flow unless the caller forbids them."""
        a, net = self.architecture, self.network
        proprio = self.normalise_proprio(batch.proprio)
        seen, real, steps = self._prefix(batch, proprio)
        x, s = seen, seen.shape[1]
        if a.decoding == "parallel":
            x = torch.cat((seen, self._places(len(batch), seen)), 1)
            real, steps = (F.pad(t, (0, a.numbers + 1), value=1) for t in (real, steps))
        positions = steps.cumsum(1) - 1
        x = net.run(x, real[:, None, None].expand(-1, -1, x.shape[1], -1), positions, slice(a.frozen_layers))
        hidden = F.rms_norm(x[:, :s].float(), (a.width,))
        keep = real[:, :s, None]
        mean = (hidden * keep).sum(1) / keep.sum(1)
        return Context(x, real, positions, torch.cat((mean, hidden.masked_fill(~keep, -torch.inf).amax(1)), 1), proprio)

    def _prefix(self, batch: Batch, proprio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, S, D], which are real [B, S], and how far each moves the position on [B, S]:
        begin, images or objects, proprio, prompt, separator."""
        a, net, n = self.architecture, self.network, len(batch)
        edge = batch.words.new_tensor([a.begin, a.separator]).expand(n, 2)
        spoken = batch.words != 0
        one = spoken.new_ones(n, 1)
        if a.observation == "pixels":
            visible = net.see(pixels(batch.images, a.crop_area).to(edge.device, getattr(torch, a.dtype)))
            real = spoken.new_ones(visible.shape[:2])
            steps = real
        else:
            visible, real = self._objects(batch)
            steps = F.pad(one, (0, real.shape[1] - 1))  # objects are a set: all stand at one position
        first, last = net.embed(edge).split(1, 1)
        parts, reals, moves = [first, visible], [one, real], [one, steps]
        if a.proprio_token:
            parts.append(self.proprio_projector(proprio.to(first.dtype))[:, None])
            reals.append(one)
            moves.append(one)
        parts += [net.embed(batch.words), last]
        return torch.cat(parts, 1), torch.cat((*reals, spoken, one), 1), torch.cat((*moves, spoken, one), 1)

    def _objects(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, M, D] of the objects, and which are real [B, M]."""
        return object_tokens(batch, self.network.embed, self.object_in, self.object_out)

    def _places(self, n: int, like: Tensor) -> Tensor:
        """[B, H A + 1, D]: placeholders that actions are read from, and the stop token."""
        a = self.architecture
        stop = self.network.embed(torch.full((n, 1), a.stop, device=like.device))
        if a.placeholders == "zero":
            return torch.cat((like.new_zeros(n, a.numbers, a.width), stop), 1)
        return torch.cat((self.placeholders.expand(n, -1, -1), stop), 1)

    def features(self, context: Context) -> Tensor:
        """[B, 2 D + P]: mean and maximum of the hidden states of what was seen, and normalised proprio."""
        return torch.cat((context.pooled, context.proprio), -1)

    # Decoding

    @batch_invariant
    def _read(self, context: Context) -> Tensor:
        """[B, H A, D] normed hidden states that the numbers of a chunk are read from, in one pass.

        As in training by next-token prediction, a number is read one token before its own place.
        """
        a, mask = self.architecture, context.mask
        attend = mask[:, None, None].expand(-1, -1, mask.shape[1], -1)
        x = self.network.run(context.hidden, attend, context.positions, slice(a.frozen_layers, None))
        return self.network.norm(x[:, -a.numbers - 2 : -2])

    def actor_parameters(self) -> list[nn.Parameter]:
        """The language model above `frozen_layers`, and the head: what receives a gradient from a detached context."""
        model = self.network.language_model.model
        head = self.action_head if self.architecture.head == "l1" else self.network.language_model.lm_head
        modules = (*model.layers[self.architecture.frozen_layers :], model.norm, head)
        return learning(self, (p for module in modules for p in module.parameters()))


class OpenVLA(_OpenVLA, TokenPolicy):
    """Every number of a chunk is drawn from a distribution over bins, one token after another or all at once."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"sft", "likelihood", "tokens"})

    def logits(self, context: Context, index: Tensor) -> Tensor:
        """[B, H A, bins] logits of each number; in autoregressive decoding given the bins [B, H A] before it."""
        if self.architecture.decoding == "parallel":
            return self.network.bin_logits(self._read(context))
        return self.network.bin_logits(self._follow(context, index))

    @batch_invariant
    def _follow(self, context: Context, index: Tensor) -> Tensor:
        """[B, H A, D]: as `_read`, by teacher forcing."""
        n, s = self.architecture.numbers, context.mask.shape[1]
        before = self.network.embed(self._tokens(index[:, :-1]))
        if not context.hidden.requires_grad:
            before = before.detach()  # embeddings are the context's part of the network, here as in the prompt
        x = torch.cat((context.hidden, before), 1)
        real = F.pad(context.mask, (0, n - 1), value=1)
        last = context.positions[:, -1:]
        positions = torch.cat((context.positions, last + torch.arange(1, n, device=last.device)), 1)
        x = self.network.run(x, _causal(real), positions, slice(None))
        return self.network.norm(x[:, s - 1 :])

    def _tokens(self, index: Tensor) -> Tensor:
        return self.architecture.action_end - 1 - index

    @batch_invariant
    def _decode(self, context: Context, uniform: Tensor | None, temperature: float) -> Tensor:
        """[B, H A] bins: the likeliest, or drawn by [B, H A] uniform numbers."""
        a, net = self.architecture, self.network

        if a.decoding == "parallel":
            return choose(net.bin_logits(self._read(context)), uniform, temperature)
        cache, real = DynamicCache(), context.mask
        x = net.run(context.hidden, _causal(real), context.positions, slice(None), cache)
        chosen: list[Tensor] = []
        for i in range(a.numbers):
            drawn = None if uniform is None else uniform[:, i]
            chosen.append(choose(net.bin_logits(net.norm(x[:, -1])), drawn, temperature))
            if i < a.numbers - 1:
                real = F.pad(real, (0, 1), value=1)
                token = net.embed(self._tokens(chosen[-1]))[:, None]
                x = net.run(token, real[:, None, None], context.positions[:, -1:] + i + 1, slice(None), cache)
        return torch.stack(chosen, 1)

    def decode(self, context: Context, generators: Sequence[torch.Generator] | None, temperature: float) -> Sample:
        """Each bin drawn at a temperature, or the likeliest; the trace is the bins [B, H A, 1], time-major."""
        a = self.architecture
        index = self._decode(context, uniforms(generators, a.numbers, self.device), temperature)
        latent = from_bins(index, a.bins).unflatten(1, (a.chunk, a.action_dim))
        return Sample(self.unnormalise(latent), latent, index[..., None])

    @row_by_row
    def log_prob(self, context: Context, trace: Tensor, mask: Tensor, noise: float) -> LogProb:
        """Of a trace of bins [B, H A, 1] at temperature `noise`."""
        logp, entropy = likelihood(self.logits(context, trace[..., 0]), trace[..., 0], noise)
        executed = mask.bool().repeat_interleave(self.action_dim, 1)[..., None]
        return LogProb(logp * executed, entropy * executed, executed)

    def sft_loss(
        self, context: Context, actions: Tensor, mask: Tensor, generator: torch.Generator, rows: Tensor | slice = ALL
    ) -> Tensor:
        """Cross-entropy of the bins (only among bins, not the whole vocabulary); mean over real steps."""
        index = to_bins(self.normalise(actions[rows]), self.architecture.bins).flatten(1)
        losses = F.cross_entropy(self.logits(context, index).flatten(0, 1), index.flatten(), reduction="none")
        steps = losses.view(-1, self.chunk, self.action_dim).mean(-1)
        return (steps * mask[rows]).sum() / mask.sum()


class OpenVLARegression(_OpenVLA):
    """OFT's L1 head: a chunk is one point, so there is nothing to draw and no likelihood."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"sft"})

    @torch.no_grad()
    @batch_invariant
    def sample(self, context: Context, generators: Sequence[torch.Generator] | None) -> Sample:
        """The regressed chunk, with or without generators."""
        latent = self.action_head(self._read(context)).float()
        return Sample(self.unnormalise(latent), latent)

    def sft_loss(
        self, context: Context, actions: Tensor, mask: Tensor, generator: torch.Generator, rows: Tensor | slice = ALL
    ) -> Tensor:
        """Mean absolute error of the normalised actions over real steps (Kim et al., 2025)."""
        errors = (self.action_head(self._read(context)).float() - self.normalise(actions[rows])).abs().mean(-1)
        return (errors * mask[rows]).sum() / mask.sum()


def _causal(real: Tensor) -> Tensor:
    """[B, 1, S, S] mask: a token sees the real ones [B, S] up to itself."""
    return real[:, None, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()


def assemble(
    name: str, architecture: OpenVLAArchitecture, vocabulary: Vocabulary | Prompts, seed: int = 0
) -> OpenVLA | OpenVLARegression:
    """The policy class that fits the architecture's head."""
    return (OpenVLARegression if architecture.head == "l1" else OpenVLA)(name, architecture, vocabulary, seed)


def create(
    spec: PolicySpec, embodiment: Embodiment, vocabulary: Sequence[str], seed: int, **form: Any
) -> OpenVLA | OpenVLARegression:
    """Random weights, at the sizes of `spec`; `vocabulary` are texts, `form` more of `OpenVLAArchitecture`.

    Token ids: the words, then begin, separator and stop, then the bins, highest first.
    """
    words = Vocabulary.of(vocabulary)
    n = len(words)
    architecture = OpenVLAArchitecture(
        observation=spec.observation,
        action_dim=embodiment.action_dim,
        proprio_dim=embodiment.proprio_dim,
        chunk=embodiment.chunk,
        vocabulary_size=n + 3 + OpenVLAArchitecture.bins,
        action_end=n + 3 + OpenVLAArchitecture.bins,
        begin=n,
        separator=n + 1,
        stop=n + 2,
        hands=embodiment.hands,
        cameras=embodiment.cameras,
        image_size=spec.image_size,
        **form,
    )
    return assemble(spec.name, architecture, words, seed)


def restore(config: Mapping[str, Any]) -> OpenVLA | OpenVLARegression:
    """The policy that `config` describes, its weights still to be loaded."""
    towers = {tower: Tower(**config["architecture"][tower]) for tower in ("dino", "siglip")}
    words = Prompts(config["tokenizer"]) if "tokenizer" in config else Vocabulary(config["vocabulary"])
    return assemble(config["policy"], OpenVLAArchitecture(**{**config["architecture"], **towers}), words)
