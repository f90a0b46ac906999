"""The policy seam: what every vision-language-action policy offers, named by capability and never by algorithm.

Shapes: B observations, K loss draws an observation, H actions a chunk, A action dimensions, S decisions inside the
decoder (tokens, or denoising steps), D numbers drawn at each.
`latent` is always the normalised action chunk, `actions` the same chunk in environment units. Where a network pads its
actions, a latent has `latent_dim` numbers an action in place of A.

Outside a policy every tensor is on the CPU, whatever the device of its weights: the methods of `SEAM` take such and
give such. Only a context stays where `encode` made it; of those of a whole round, rows are taken there as they are
asked for. So no algorithm knows of devices, unless it hands the policy a network: that must be on `Policy.device`.
"""

import dataclasses
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BenchError
from ..suite import Observation
from .batch_invariant import batch_invariant, large
from .inputs import Rows
from .steering import Steering

ALL = slice(None)
"""Every row."""
AT_ONCE = 16
"""Observations that a large policy encodes together."""


@dataclass(frozen=True)
class Sample:
    """A batch of sampled chunks."""

    actions: Tensor
    """[B, H, A] in environment units."""
    latent: Tensor
    """[B, H, A] normalised: what `draw_loss` scores."""
    trace: Tensor | None = None
    """[B, ...] everything that was drawn on the way, which is what `log_prob` scores; None where nothing scores it."""
    invalid: Tensor | None = None
    """[B] bool: what was drawn spells no chunk, and `latent` is what the policy makes of it all the same; None where
    whatever is drawn is a chunk."""


@dataclass(frozen=True)
class LogProb:
    """How likely a trace was, number by number. What a method sums or averages is the method's business."""

    logp: Tensor
    """[B, S, D] log-probability (density) of each number; 0 where `mask` is false."""
    entropy: Tensor
    """[B, S, D] entropy of what it was drawn from."""
    mask: Tensor
    """[B, S, D] bool: false for padding, and for numbers that only decide actions that were never executed."""


SEAM = frozenset(
    ("preprocess", "encode", "features", "sample", "start", "decode", "explore", "log_prob", "ode_log_prob")
    + ("sft_loss", "draw_loss", "velocity", "normalise", "unnormalise")
)
"""Methods through which tensors go into a policy and come out."""
CPU = torch.device("cpu")


def _from_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `SEAM` as others call it: with tensors of the CPU, and for such. Called by another one of them it is
    what it was."""

    @functools.wraps(method)
    def call(self: "Policy", *args: Any, **kwargs: Any) -> Any:
        device = self.device
        if device == CPU or self._inside:
            return method(self, *args, **kwargs)
        self._inside = True
        try:
            found = method(
                self,
                *(_on(device, value) for value in args),
                **{name: _on(device, value) for name, value in kwargs.items()},
            )
        finally:
            self._inside = False
        return found if method.__name__ == "encode" else _on(CPU, found)

    return call


def _on(device: torch.device, value: Any) -> Any:
    """A tensor, or rows or decisions made of some, on another device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Sample | LogProb | Rows):
        return type(value)(*(_on(device, getattr(value, field.name)) for field in dataclasses.fields(value)))
    return value


def _starts(policy: "Policy", n: int) -> Iterator[slice]:
    """n rows in the parts that a policy works on at a time; one part, be it empty, where it is not large."""
    size = AT_ONCE if large(policy) else max(n, 1)
    return (slice(start, start + size) for start in range(0, max(n, 1), size))


class Policy(nn.Module, ABC):
    """A policy with weights. Evaluation and every algorithm go through these methods only."""

    capabilities: ClassVar[frozenset[str]]
    """`sft`: has `sft_loss`. `denoising`: has `draw_loss`. `flow`: has `velocity` besides. `likelihood`: has `explore`
    and `log_prob`, and either `tokens`: what it draws are tokens, or `chain`: they are the steps of a denoising chain.
    `flow` with `likelihood`: a `StochasticFlow`. `fast`: its tokens are FAST's. `noise`: has `decode`, and may be
    steered."""
    chunk: int
    """H, actions a chunk."""
    action_dim: int
    """A."""
    feature_dim: int
    """Width of `features`."""
    cameras: tuple[str, ...] = ()
    """Those it looks at."""
    frozen: tuple[str, ...] = ()
    """Parts, by dotted name, that nothing trains (`adapt.freeze`)."""
    checkpointed: bool = False
    """Whether gradients recompute each layer's activations instead of keeping them; small policies need not."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in SEAM & vars(cls).keys():
            setattr(cls, name, _from_cpu(vars(cls)[name]))

    def __init__(self) -> None:
        super().__init__()
        self._inside = False
        self.steering: Steering | None = None
        """Chooses the noise that decoding starts from, where some does (`steering.steer`): then it is the actor."""

    @property
    def device(self) -> torch.device:
        """Where the weights are; `to` moves them."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    @property
    def steered(self) -> bool:
        """Whether a steering module chooses the noise that it decodes from."""
        return self.steering is not None and self.steering.ready

    def check_trainable(self) -> None:
        """Raises BenchError if it came with its noise steered: what is steered is not to change under it."""
        if self.steered:
            raise BenchError("base: a steered policy, whose weights stay as they are; start from what it steers")

    @property
    def latent_dim(self) -> int:
        """Numbers that an action has in the latent: A, or more where the network pads it."""
        return self.action_dim

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What config.json of a policy folder holds: enough to rebuild the policy around its weights. JSON-able; has
        at least its registered name, `policy`."""

    @abstractmethod
    def preprocess(self, observations: Sequence[Observation]) -> Any:
        """Observations to a batch of tensors; the batch has `index(i: Tensor)` and `__len__`."""

    @abstractmethod
    def encode(self, batch: Any) -> Any:
        """The expensive part, once per observation: a context with `index(i: Tensor)`, `detach()`, `cat(parts)` and
        `__len__` (`inputs.Rows`)."""

    @torch.no_grad()
    def encode_round(self, observations: Sequence[Observation]) -> tuple[Any, Tensor]:
        """Context of all observations of a round, and their features [B, feature_dim].

        A `large` policy looks at `AT_ONCE` of them at a time: what it works on while it looks takes many times the
        memory of what it keeps. What it keeps goes to the CPU's memory: of a round it is more than a GPU has."""
        parts, features = [], []
        for start in _starts(self, len(observations)):
            context = self.encode(self.preprocess(observations[start]))
            features.append(self.features(context))
            parts.append(_on(CPU, context))
        return (parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)), torch.cat(features)

    @torch.no_grad()
    def sample_round(self, context: Any, generators: Sequence[torch.Generator]) -> Tensor:
        """[B, H, A] latents that `sample` draws for all rows of a round's context, in parts like `encode_round`."""
        whole, starts = torch.arange(len(context)), list(_starts(self, len(context)))
        if len(starts) == 1:
            return self.sample(context, generators).latent
        return torch.cat([self.sample(context.index(whole[rows]), generators[rows]).latent for rows in starts])

    @abstractmethod
    def features(self, context: Any) -> Tensor:
        """[B, feature_dim] summary of the context for a critic."""

    @abstractmethod
    def sample(self, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Decodes one chunk an observation. Row i uses only `generators[i]`; None decodes from zero noise."""

    @abstractmethod
    def sft_loss(
        self, context: Any, actions: Tensor, mask: Tensor, generator: torch.Generator, rows: Tensor | slice = ALL
    ) -> Tensor:
        """Scalar supervised loss of [B, H, A] actions in environment units; mask [B, H] marks real steps. The context
        has those `rows` of the B alone, and the loss is what they add to that of all B."""

    @abstractmethod
    def fit_normalisation(self, actions: Sequence[np.ndarray], proprio: np.ndarray) -> None:
        """Sets the latent's scale, and tokens if it has any, from demonstrated episodes' actions, [T, A] each, and
        proprio [N, P], in the suite's units."""

    @abstractmethod
    def normalise(self, actions: Tensor) -> Tensor:
        """Environment units to latent."""

    @abstractmethod
    def unnormalise(self, latent: Tensor) -> Tensor:
        """Latent to environment units."""

    @abstractmethod
    def actor_parameters(self) -> list[nn.Parameter]:
        """What RL trains: the action expert, without the (frozen) vision-language prefix."""


class NoisePolicy(Policy):
    """A policy that can decode without drawing: the noise that it starts from alone decides the chunk."""

    @abstractmethod
    def decode(self, context: Any, noise: Tensor) -> Sample:
        """The chunks that noise [B, H, A] becomes. Nothing is drawn, and gradients are not kept."""

    @torch.no_grad()
    @batch_invariant
    def start(self, context: Any, generators: Sequence[torch.Generator] | None) -> Tensor:
        """[B, H, A] noise that `sample` decodes from: N(0, I), or what the steering module makes of that. None is zero,
        or the steering module's mean."""
        shape, device = (self.chunk, self.latent_dim), self.device
        if generators is None:
            noise = torch.zeros(len(context), *shape, device=device)
        else:
            noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(device)
        if self.steering is None or not self.steering.ready:
            return noise
        return self.steering(self.features(context), noise)[0]

    def sample(self, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Decodes from `start`; a function of its arguments alone.

        At a given batch size a row does not depend, to the bit, on its neighbours or on its place.
        """
        return self.decode(context, self.start(context, generators))


class DenoisingPolicy(Policy):
    """A policy that learns to take noise off a chunk, by flow matching or by diffusion."""

    @abstractmethod
    def draw_loss(self, context: Any, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B, K, H, A] squared errors of what the network is trained to predict, at stored draws: times t [B, K] in
        [0, 1], where 1 is all noise, and noises [B, K, H, A]; latent is [B, H, A]. No reduction: the caller decides
        which elements count."""


class FlowPolicy(DenoisingPolicy):
    """A policy that decodes by integrating a velocity field, pi0's convention:
    x_t = t noise + (1 - t) latent, velocity target = noise - latent, t = 1 is noise (Black et al., 2024, eq. 1-2)."""

    @abstractmethod
    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] velocities at points x [B, K, H, A] and times t [B, K], K points against one context row."""

    def draw_loss(self, context: Any, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Squared errors of the velocity: the conditional flow-matching loss, unreduced."""
        target = noise - latent[:, None]
        x = latent[:, None] + t[..., None, None] * target
        return (self.velocity(context, x, t) - target) ** 2


class LikelihoodPolicy(Policy):
    """A policy whose decoder draws from distributions that it can name: action tokens one after another, or the steps
    of a denoising chain or of a flow made stochastic."""

    @abstractmethod
    def explore(self, context: Any, generators: Sequence[torch.Generator], noise: float) -> Sample:
        """`sample` with a `trace`. `noise` says how random it is: a softmax temperature for tokens, the least standard
        deviation of a step for diffusion, the level of the SDE for flows (which take more: `stochastic_flow.Noise`).
        Row i uses only `generators[i]`."""

    @abstractmethod
    def log_prob(self, context: Any, trace: Tensor, mask: Tensor, noise: float) -> LogProb:
        """Differentiable likelihood of a trace that `explore` drew at the same `noise`; mask [B, H] marks the actions
        that were executed."""
