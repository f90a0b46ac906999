"""Octo's network (Octo Model Team, 2024, arXiv:2405.12213), version 1.5, in torch.

Token groups (words, image patches or objects, proprioception) go through a block-causal transformer; one readout token
a timestep collects what acting needs, and a small diffusion head predicts the noise in an action chunk from it.

Shapes: B observations, W timesteps of the window, T words, M objects, n tokens of a group, N tokens in all, D width,
P proprio, H actions a chunk, A action dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from .inputs import object_width

VIEWS = ("primary", "wrist")
"""Octo's names of the cameras, in the order of `OctoArchitecture.cameras`."""
EPS = 1e-6  # flax's default, in layer and group normalisation


@dataclass(frozen=True)
class OctoArchitecture:
    """Everything that decides the network's shape and how it decodes; stored in the policy folder's config.json."""

    observation: str
    """`state` or `pixels`."""
    action_dim: int
    proprio_dim: int
    """Numbers of proprioception, one token each; 0: not seen, as in the published checkpoints."""
    chunk: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    window: int = 1
    """Timesteps that have position embeddings. The policy shows one, the first, as Octo's fine-tuning recipe does."""
    max_objects: int = 10
    max_name_words: int = 6
    max_words: int = 20
    word_width: int = 128
    text_layers: int = 0
    """Layers of the frozen T5 encoder; 0: words come from a table that is trained along."""
    text_heads: int = 12
    text_mlp: int = 3072
    text_vocabulary: int = 0
    mask_padding: bool = True
    """False: padding words are seen like others, as in the published checkpoints."""
    correct_attention: bool = True
    """False: the attention mask of the first release, where every token counts as one of its neighbour's group."""
    hands: tuple[str, ...] = ()
    """See `suite.Embodiment`."""
    cameras: tuple[str, ...] = ()
    image_size: int = 0
    """Side of the images that the suite shows (pixels); 0 in `state` mode."""
    camera_sizes: tuple[int, ...] = ()
    """Side to which each camera's image is resized."""
    goal: bool = False
    """Whether the stems have three more channels, for a goal image. None is ever given, so they see black."""
    stem_widths: tuple[int, ...] = (32, 64, 96, 128)
    stem_out: int = 128
    head_width: int = 256
    head_blocks: int = 3
    time_dim: int = 32
    denoising_steps: int = 10
    predicts: str = "noise"
    """What the head gives: `noise`, as the authors' does, or `velocity` (Salimans and Ho, 2022, app. D). From predicted
    noise the first, noisiest step of a short chain has to divide the head's error by the root of almost nothing."""
    posterior: bool = True
    """True: a step draws from the posterior around the predicted latent, clipped (Ho et al., 2020, eq. 6-7), as DPPO
    does. False: the authors' sampler, which clips only what was drawn."""
    max_latent: float = 5.0
    """Latents are clipped to this many standard deviations, in each denoising step and in the loss."""


class StandardisedConv(nn.Conv2d):
    """Convolution whose kernels have mean 0 and deviation 1 (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        kernel = kernel / (kernel.std((1, 2, 3), correction=0, keepdim=True) + 1e-5)
        return self._conv_forward(x, kernel, self.bias)


class SmallStem(nn.Module):
    """Four strided convolutions, then patches of 16 x 16 pixels (Xiao et al., 2021)."""

    def __init__(self, channels: int, widths: Sequence[int], out: int) -> None:
        super().__init__()
        ins = (channels, *widths[:-1])
        self.convs = nn.ModuleList(StandardisedConv(i, o, 3, 2, 1) for i, o in zip(ins, widths, strict=True))
        self.norms = nn.ModuleList(nn.GroupNorm(32, width, EPS) for width in widths)
        self.embedding = nn.Conv2d(widths[-1], out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, S, S] in [-1, 1] to [B, (S / 16)^2, out], row by row."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.embedding(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D]; mask [B, 1, N, N] bool, true where row may look at column."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ResidualBlock(nn.Module):
    """Block of the diffusion head's residual network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width, EPS),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class DiffusionHead(nn.Module):
    """Predicts the noise in a chunk, from a readout, the noisy chunk and the denoising step."""

    def __init__(self, a: OctoArchitecture) -> None:
        super().__init__()
        numbers = a.chunk * a.action_dim
        self.frequencies = nn.Parameter(0.2 * torch.randn(a.time_dim // 2, 1))
        self.time_in, self.time_out = nn.Linear(a.time_dim, 2 * a.time_dim), nn.Linear(2 * a.time_dim, a.time_dim)
        self.input = nn.Linear(a.time_dim + a.width + numbers, a.head_width)
        self.blocks = nn.ModuleList(ResidualBlock(a.head_width) for _ in range(a.head_blocks))
        self.output = nn.Linear(a.head_width, numbers)

    def forward(self, readout: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """readout [..., D], x [..., H * A] and steps t [...] (integers from 0) to noise [..., H * A]."""
        angle = 2 * torch.pi * t[..., None].to(x) @ self.frequencies.T
        time = torch.cat((angle.cos(), angle.sin()), -1)
        time = self.time_out(F.silu(self.time_in(time)))
        y = self.input(torch.cat((time, readout, x), -1))
        for block in self.blocks:
            y = block(y)
        return self.output(F.silu(y))


class OctoNetwork(nn.Module):
    """Tokenisers, transformer and head. Its weights are random until some are loaded."""

    def __init__(self, a: OctoArchitecture, vocabulary: int) -> None:
        super().__init__()
        self.architecture = a
        self.checkpointed = False
        """Whether gradients recompute each block instead of keeping what it computed."""
        self.language = _text_encoder(a, vocabulary)
        ins, self.groups = {"language": a.word_width}, {}
        for view, size in zip(VIEWS, a.camera_sizes, strict=False):
            ins[view], self.groups[view] = a.stem_out, (size // 16) ** 2
        if a.observation == "state":
            self.groups["objects"] = 1  # a set: its tokens share one position
        if a.proprio_dim:
            ins["proprio"], self.groups["proprio"] = 1, a.proprio_dim
        channels = 6 if a.goal else 3
        self.stems = nn.ModuleDict({v: SmallStem(channels, a.stem_widths, a.stem_out) for v in VIEWS[: len(a.cameras)]})
        self.projections = nn.ModuleDict({name: nn.Linear(i, a.width) for name, i in ins.items()})
        self.positions = nn.ParameterDict({"language": nn.Parameter(torch.empty(a.max_words, a.width))})
        for name, tokens in {**self.groups, "action": 1}.items():
            self.positions[name] = nn.Parameter(torch.empty(a.window, tokens, a.width))
        if a.observation == "state":
            self.object_in, self.object_out = nn.Linear(object_width(a), a.width), nn.Linear(a.width, a.width)
        self.blocks = nn.ModuleList(Block(a.width, a.heads, a.mlp) for _ in range(a.layers))
        self.norm = nn.LayerNorm(a.width, EPS)
        self.head = DiffusionHead(a)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for position in self.positions.values():
            nn.init.normal_(position, std=0.02)

    def words(self, ids: Tensor) -> Tensor:
        """[B, T, word_width] of ids [B, T]; nothing trains the text encoder."""
        if not self.architecture.text_layers:
            return self.language(ids)
        with torch.no_grad():
            return self.language(input_ids=ids, attention_mask=ids != 0).last_hidden_state

    def images(self, pixels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Group -> [B, W, n, stem_out] of each camera's [B, W, 3, S, S], 0 to 255."""
        found = {}
        for (view, stem), image in zip(self.stems.items(), pixels, strict=True):
            x = image.flatten(0, 1).float() / 127.5 - 1
            if self.architecture.goal:
                x = torch.cat((x, torch.full_like(x, -1)), 1)
            found[view] = stem(x).unflatten(0, image.shape[:2])
        return found

    def objects(self, features: Tensor, names: Tensor) -> Tensor:
        """[B, M, D] of features [B, M, 15] and name ids [B, M, words].

        An object shares its words with the instruction: that is what lets language point at it.
        """
        named = names != 0
        words = self.projections["language"](self.words(names.flatten(1)).unflatten(1, names.shape[1:]))
        label = (words * named[..., None]).sum(2) / named.sum(2, keepdim=True).clamp_min(1)
        return self.object_out(F.silu(self.object_in(features))) + label

    def forward(self, ids: Tensor, observed: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the transformer on word ids [B, T] and groups of (inputs [B, W, n, width], mask [B, W, n] bool).

        Returns what leaves it: readouts [B, W, D], observation tokens [B, W, n, D] and their mask [B, W, n].
        """
        a = self.architecture
        spoken = ids != 0 if a.mask_padding else torch.ones_like(ids, dtype=torch.bool)
        language = self.projections["language"](self.words(ids)) + self.positions["language"]
        first = next(iter(observed.values()))[0]
        b, w = first.shape[:2]
        project = {name: self.projections[name] if name in self.projections else nn.Identity() for name in observed}
        tokens = [project[name](x) + self.positions[name][:w] for name, (x, _) in observed.items()]
        masks = [mask for _, mask in observed.values()]
        # The task's tokens stand before everything, and again in each timestep, where they see the images.
        tokens.append(language[:, None].expand(-1, w, -1, -1))
        masks.append(spoken[:, None].expand(-1, w, -1))
        seen = torch.cat(masks, 2)
        tokens.append(self.positions["action"][:w].expand(b, -1, -1, -1))
        steps = torch.cat(tokens, 2)
        real = torch.cat((seen, torch.ones_like(seen[..., :1])), 2)
        x = torch.cat((language, steps.flatten(1, 2)), 1)
        rules = attention_rules(ids.shape[1], seen.shape[2], w, a.correct_attention).to(x.device)
        mask = (rules & torch.cat((spoken, real.flatten(1)), 1)[:, None])[:, None]
        again = self.checkpointed and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
        x = self.norm(x)[:, ids.shape[1] :].unflatten(1, (w, -1))
        return x[:, :, -1], x[:, :, :-1], seen


@functools.cache
def attention_rules(words: int, observed: int, window: int, correct: bool = True) -> Tensor:
    """[N, N] bool: which token (row) may look at which (column), padding aside.

    Tokens are the task's words, then for each timestep its observation tokens and one readout. Words see words.
    Observations see words and the observations of their own and earlier timesteps. A readout sees these too, and
    earlier readouts; nothing else sees a readout.
    """
    task, observation, readout = range(3)
    step = [observation] * observed + [readout]
    if not correct:
        step = [*step[:1], *step[:-1]]
    kind = torch.tensor([task] * words + step * window)
    time = torch.tensor([-1] * words + [t for t in range(window) for _ in step])
    row, column = kind[:, None], kind
    sees = (column == task) | ((column == observation) & (row != task)) | ((column == readout) & (row == readout))
    return sees & (time <= time[:, None])


def cosine_betas(steps: int) -> Tensor:
    """[steps] variances of the noising steps: the cosine schedule of Nichol & Dhariwal (2021), s = 0.008.

    Octo adds s to t / steps before it divides by 1 + s, as the paper does.
    """
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(0, 0.999)


def _text_encoder(a: OctoArchitecture, vocabulary: int) -> nn.Module:
    if not a.text_layers:
        return nn.Embedding(vocabulary, a.word_width)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=a.word_width,
        d_kv=a.word_width // a.text_heads,
        d_ff=a.text_mlp,
        num_layers=a.text_layers,
        num_heads=a.text_heads,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5Stack(config)
