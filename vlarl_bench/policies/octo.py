"""Octo (Octo Model Team, 2024, arXiv:2405.12213) behind the diffusion seam: the published sizes, and tiny ones.

The transformer runs once per observation; the head then removes noise step by step from its readout, with the DDPM
sampler of the authors' code: x <- (x - b_t / sqrt(1 - a_t) * predicted noise) / sqrt(1 - b_t), plus noise of variance
b_t except at step 0, then clipped. `explore` gives every step at least some deviation, the last one too, so that the
chain has a density (Ren et al., 2024, DPPO, arXiv:2409.00588, sec. 4.3); what a step drew is stored before clipping.

`decode`, which draws nothing, takes DDIM's steps instead. A steered policy samples by `decode`.

The tiny presets keep the architecture and differ in this: sizes, 10 denoising steps instead of 20, words from a table
that is trained along instead of frozen T5, padding words masked, no goal image, a window of one timestep, and
proprioception as Octo's low-dimensional tokens. In `state` mode one token an object takes the place of the images.
They clip the predicted latent inside each step, where the authors' sampler clips only what was drawn: the first step
multiplies an error of the network by 1 / sqrt(1 - 0.999) = 32, which only very long training makes small enough.

Shapes: B observations, K draws, S denoising steps, H actions a chunk, A action dimensions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..errors import BenchError
from ..suite import Embodiment, Observation
from .adapt import learning
from .base import ALL, DenoisingPolicy, LikelihoodPolicy, LogProb, NoisePolicy, Sample
from .batch_invariant import batch_invariant
from .inputs import Batch, Rows, to_batch
from .octo_model import OctoArchitecture, OctoNetwork, cosine_betas
from .standardised import Standardised
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .spec import PolicySpec

FULL_SIZE: Mapping[str, Mapping[str, int]] = {
    "octo-small-1.5": {"width": 384, "layers": 12, "heads": 6, "mlp": 1536},
    "octo-base-1.5": {"width": 768, "layers": 12, "heads": 12, "mlp": 3072},
}


class Subwords:
    """T5's own tokenizer, with the end mark, cut to the number of words that the policy takes."""

    def __init__(self, tokenizer_json: str, longest: int) -> None:
        """Takes the text of a tokenizer.json. Raises whatever `tokenizers` raises if it is not one."""
        self.json = tokenizer_json
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.enable_truncation(longest)
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(self._tokenizer.encode(text).ids)


@dataclass(frozen=True)
class Context(Rows):
    """An encoded observation."""

    readout: Tensor
    """[B, D] all that acting needs."""
    pooled: Tensor
    """[B, D] mean of what leaves the transformer at the observation's tokens."""
    proprio: Tensor
    """[B, P] normalised."""


class Octo(Standardised, DenoisingPolicy, LikelihoodPolicy, NoisePolicy):
    """Octo behind the seam. Its weights are random until some are loaded.

    It decodes by removing noise step by step (Ho et al., 2020, eq. 4, 11 and 14). Steps count down from
    `denoising_steps` - 1 to 0; at step t a chunk is x_t = sqrt(a_t) latent + sqrt(1 - a_t) noise, with a_t the share of
    the signal's variance that the schedule has left. S = `denoising_steps`, D = H * A, and a trace is [B, S + 1, H, A]:
    the noise that decoding starts from, then what each step drew.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"sft", "likelihood", "chain", "denoising", "noise"})
    sft_draws: ClassVar[int] = 4
    """Draws of (t, noise) an observation in `sft_loss`: the transformer runs once, so more draws are cheap."""

    def __init__(
        self, name: str, architecture: OctoArchitecture, vocabulary: Vocabulary | Subwords, seed: int = 0
    ) -> None:
        """Random weights from `seed`; the global generator is left as it was."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(name, architecture, vocabulary)
        self.eval()

    def _build(self, name: str, a: OctoArchitecture, vocabulary: Vocabulary | Subwords) -> None:
        self.name, self.architecture, self.vocabulary = name, a, vocabulary
        self.chunk, self.action_dim, self.cameras = a.chunk, a.action_dim, a.cameras
        self.denoising_steps = a.denoising_steps
        self.feature_dim = 2 * a.width + a.proprio_dim
        self.model = OctoNetwork(a, a.text_vocabulary if isinstance(vocabulary, Subwords) else len(vocabulary))
        self.build_scales(a.action_dim, a.proprio_dim)
        betas = cosine_betas(a.denoising_steps)
        kept = (1 - betas).cumprod(0)
        before = torch.cat((torch.ones_like(kept[:1]), kept[:-1]))
        own = betas * (1 - before) / (1 - kept) if a.posterior else betas * (before < 1)
        self.betas: Tensor
        self.kept: Tensor
        self.before: Tensor
        self.own: Tensor
        """[S] deviation of a step's draw in `sample`: 0 at step 0."""
        for name, schedule in (("betas", betas), ("kept", kept), ("before", before), ("own", own.sqrt())):
            self.register_buffer(name, schedule.float(), persistent=False)  # not stored: it follows from the steps

    @classmethod
    def restore(cls, config: Mapping[str, Any]) -> Octo:
        """The policy that `config` describes, its weights still to be loaded."""
        architecture = OctoArchitecture(**config["architecture"])
        vocabulary: Vocabulary | Subwords
        if architecture.text_layers:
            vocabulary = Subwords(config["tokenizer"], architecture.max_words)
        else:
            vocabulary = Vocabulary(config["vocabulary"])
        return cls(config["policy"], architecture, vocabulary)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds besides the card: enough to rebuild the policy around its weights."""
        words: dict[str, Any]
        if isinstance(self.vocabulary, Subwords):
            words = {"tokenizer": self.vocabulary.json}
        else:
            words = {"vocabulary": list(self.vocabulary.entries)}
        return {"policy": self.name, "architecture": asdict(self.architecture), "normalisation": self.scales, **words}

    @property
    def checkpointed(self) -> bool:  # type: ignore[override]
        return self.model.checkpointed

    @checkpointed.setter
    def checkpointed(self, wanted: bool) -> None:
        self.model.checkpointed = wanted

    # Transformer

    def preprocess(self, observations: Sequence[Observation]) -> Batch:
        """Observations to padded tensors. Raises BenchError if one does not fit the architecture."""
        return to_batch(observations, self.architecture, self.vocabulary)

    @batch_invariant
    def encode(self, batch: Batch) -> Context:
        """Runs the transformer once; gradients flow unless the caller forbids them."""
        a, observed = self.architecture, {}
        pixels = [resize(batch.images[:, i : i + 1], size) for i, size in enumerate(a.camera_sizes)]
        for view, patches in self.model.images(pixels).items():
            observed[view] = (patches, torch.ones(patches.shape[:3], dtype=torch.bool, device=self.device))
        if a.observation == "state":
            objects = self.model.objects(batch.objects, batch.names)
            observed["objects"] = (objects[:, None], (batch.names != 0).any(-1)[:, None])
        proprio = self.normalise_proprio(batch.proprio)
        if a.proprio_dim:
            numbers = proprio[:, None, :, None]
            observed["proprio"] = (numbers, torch.ones(numbers.shape[:3], dtype=torch.bool, device=self.device))
        readouts, tokens, seen = self.model(batch.words, observed)
        real = seen[:, -1, :, None]
        return Context(readouts[:, -1], (tokens[:, -1] * real).sum(1) / real.sum(1), proprio)

    def features(self, context: Context) -> Tensor:
        """[B, 2 D + P]: readout, mean of the observation's tokens, and normalised proprio."""
        return torch.cat((context.readout, context.pooled, context.proprio), -1)

    # Denoising

    def predict(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] predicted noise in x [B, K, H, A] at steps t [B, K]."""
        readout = context.readout[:, None].expand(-1, x.shape[1], -1)
        head: Tensor = self.model.head(readout, x.flatten(2), t).view(x.shape)
        if self.architecture.predicts == "noise":
            return head
        kept = self.kept[t][..., None, None]
        return kept.sqrt() * head + (1 - kept).sqrt() * x  # velocity is sqrt(kept) noise - sqrt(1 - kept) latent

    def means(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] what steps t [B, K] make of x [B, K, H, A], before their noise."""
        beta, kept, before = (schedule[t][..., None, None] for schedule in (self.betas, self.kept, self.before))
        noise, limit = self.predict(context, x, t), self.architecture.max_latent
        if not self.architecture.posterior:
            return (x - beta / (1 - kept).sqrt() * noise) / (1 - beta).sqrt()
        latent = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-limit, limit)
        return (before.sqrt() * beta * latent + (1 - beta).sqrt() * (1 - before) * x) / (1 - kept)

    def deviations(self, least: float) -> Tensor:
        """[S] standard deviation of each step's draw, in the order of decoding: `least` is for those that draw less."""
        return self.own.clamp_min(least).flip(0)

    @torch.no_grad()
    @batch_invariant
    def _denoise(self, context: Context, generators: Sequence[torch.Generator] | None, least: float) -> Sample:
        shape = (self.denoising_steps + 1, self.chunk, self.action_dim)
        if generators is None:
            noise = torch.zeros(len(context), *shape, device=self.device)
        else:
            noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
            noise = noise.to(self.device)
        x, trace, limit = noise[:, 0], [noise[:, 0]], self.architecture.max_latent
        for i, deviation in enumerate(self.deviations(least)):
            t = torch.full((len(context), 1), self.denoising_steps - 1 - i, device=self.device)
            drawn = self.means(context, x[:, None], t)[:, 0] + deviation * noise[:, i + 1]
            trace.append(drawn)
            x = drawn.clamp(-limit, limit)
        return Sample(self.unnormalise(x), x, torch.stack(trace, 1))

    def sample(self, context: Context, generators: Sequence[torch.Generator] | None) -> Sample:
        """DDPM, and with None all noise is zero; or, steered, `decode`. A function of its arguments alone.

        At a given batch size a row does not depend, to the bit, on its neighbours or on its place.
        """
        if self.steered:
            return super().sample(context, generators)
        sample = self._denoise(context, generators, 0.0)
        return Sample(sample.actions, sample.latent)

    @torch.no_grad()
    @batch_invariant
    def decode(self, context: Context, noise: Tensor) -> Sample:
        """DDIM (Song et al., 2021, arXiv:2010.02502, eq. 12 with sigma = 0) over the same steps.

        With DDPM's steps, their draws left out, the chain would hardly listen to the noise it starts from; DDIM takes
        N(0, I) to the policy's own distribution.
        """
        x, limit = noise, self.architecture.max_latent
        for step in range(self.denoising_steps - 1, -1, -1):
            kept, before = self.kept[step], self.before[step]
            t = torch.full((len(context), 1), step, device=self.device)
            latent = (x - (1 - kept).sqrt() * self.predict(context, x[:, None], t)[:, 0]) / kept.sqrt()
            latent = latent.clamp(-limit, limit)
            direction = (x - kept.sqrt() * latent) / (1 - kept).sqrt()  # the noise that the clipped latent leaves
            x = before.sqrt() * latent + (1 - before).sqrt() * direction
        return Sample(self.unnormalise(x), x)

    def explore(self, context: Context, generators: Sequence[torch.Generator], noise: float) -> Sample:
        """`sample`, but no step draws with a deviation below `noise` (of the latent, so in standard deviations)."""
        _check_noise(noise)
        return self._denoise(context, generators, noise)

    def log_prob(self, context: Context, trace: Tensor, mask: Tensor, noise: float) -> LogProb:
        """[B, S, H A] log-densities of what each step drew, given what the step before it drew.

        As in DPPO, all steps of an action that was not executed are masked, also those that decide others with it.
        """
        _check_noise(noise)
        limit = self.architecture.max_latent
        # Each step starts from what the one before drew, clipped; the first one from noise, which is not.
        x = torch.cat((trace[:, :1], trace[:, 1:-1].clamp(-limit, limit)), 1)
        t = torch.arange(self.denoising_steps - 1, -1, -1, device=trace.device).expand(len(trace), -1)
        deviation = self.deviations(noise)[:, None]
        error = (trace[:, 1:] - self.means(context, x, t)).flatten(2) / deviation
        executed = mask.bool().repeat_interleave(self.action_dim, 1)[:, None].expand_as(error)
        logp = -0.5 * error**2 - deviation.log() - 0.5 * math.log(2 * math.pi)
        entropy = (deviation.log() + 0.5 * math.log(2 * math.pi * math.e)).expand_as(error)
        zero = torch.zeros_like(error)
        return LogProb(torch.where(executed, logp, zero), torch.where(executed, entropy, zero), executed)

    def denoising_loss(self, context: Context, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B, K, H, A] squared errors of the predicted noise at steps t [B, K] (integers) and noises [B, K, H, A]; the
        latent [B, H, A] is clipped first, as in the authors' code."""
        clean = latent.clamp(-self.architecture.max_latent, self.architecture.max_latent)[:, None]
        kept = self.kept[t][..., None, None]
        return (self.predict(context, kept.sqrt() * clean + (1 - kept).sqrt() * noise, t) - noise) ** 2

    def draw_loss(self, context: Context, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B, K, H, A] errors of what the head predicts, at step floor(t `denoising_steps`)."""
        step = (t * self.denoising_steps).long().clamp_max(self.denoising_steps - 1)
        return self._head_loss(context, latent, step, noise)

    def _head_loss(self, context: Context, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B, K, H, A] `denoising_loss`, of the velocity where the head predicts that."""
        errors = self.denoising_loss(context, latent, t, noise)
        return errors / self.kept[t][..., None, None] if self.architecture.predicts == "velocity" else errors

    def sft_loss(
        self, context: Context, actions: Tensor, mask: Tensor, generator: torch.Generator, rows: Tensor | slice = ALL
    ) -> Tensor:
        """Mean over real steps of the error of what the head predicts, at uniform steps (Ho et al., 2020, eq. 14).

        For noise the authors' loss is this times A.
        """
        latent = self.normalise(actions)
        shape = (len(latent), self.sft_draws)
        t = torch.randint(self.denoising_steps, shape, generator=generator, device=generator.device).to(latent.device)
        noise = torch.randn(*shape, *latent.shape[1:], generator=generator, device=generator.device).to(latent)
        errors = self._head_loss(context, latent[rows], t[rows], noise[rows]).mean((1, 3))
        return (errors * mask[rows]).sum() / mask.sum()

    def actor_parameters(self) -> list[nn.Parameter]:
        """The diffusion head: exactly what receives a gradient from a detached context."""
        return learning(self, self.model.head.parameters())


def resize(images: Tensor, size: int) -> Tensor:
    """[..., S, S] uint8 to [..., size, size] float, 0 to 255 and whole, by Lanczos with three lobes, antialiased.

    That is what Octo's data were resized with (tf.image.resize, "lanczos3"), and what Pillow's LANCZOS does.
    """
    if images.shape[-1] == size:
        return images.float()
    along = _lanczos(images.shape[-1], size).to(images.device)
    return (along @ images.float() @ along.T).round().clamp(0, 255)


def _lanczos(inputs: int, outputs: int) -> Tensor:
    """[outputs, inputs] weights of each input pixel in each output pixel."""
    scale = max(inputs / outputs, 1.0)
    centre = (torch.arange(outputs, dtype=torch.float64) + 0.5) * inputs / outputs
    offset = (torch.arange(inputs, dtype=torch.float64) + 0.5 - centre[:, None]) / scale
    weight = torch.where(offset.abs() < 3, torch.sinc(offset) * torch.sinc(offset / 3), 0.0)
    return (weight / weight.sum(1, keepdim=True)).float()


def _check_noise(noise: float) -> None:
    if not 0 < noise < math.inf:
        raise BenchError(f"noise: {noise}; the least deviation of a denoising step must be above 0, for example 0.1")


def create(spec: PolicySpec, embodiment: Embodiment, vocabulary: Sequence[str], seed: int) -> Octo:
    """A tiny preset with random weights; `vocabulary` are texts."""
    # Noise must pass through the head to be told apart, so it is a third wider than the chunk has numbers, or more: 320
    # for ALOHA's 280 were too few (docs/experiments.md). Where that is wider than usual, fewer blocks keep its size.
    head_width = max(128, 64 * round(embodiment.chunk * embodiment.action_dim / 48))
    architecture = OctoArchitecture(
        observation=spec.observation,
        action_dim=embodiment.action_dim,
        proprio_dim=embodiment.proprio_dim,
        chunk=embodiment.chunk,
        hands=embodiment.hands,
        cameras=embodiment.cameras,
        image_size=spec.image_size,
        camera_sizes=(spec.image_size,) * len(embodiment.cameras),
        predicts="velocity",
        head_width=head_width,
        head_blocks=max(1, round(3 * (128 / head_width) ** 2)),
    )
    return Octo(spec.name, architecture, Vocabulary.of(vocabulary), seed)


restore = Octo.restore
