"""The policy seam: what every vision-language-action policy offers, named by capability and never by algorithm.

Shapes: B observations, K loss draws an observation, H actions a chunk, A action dimensions.
`latent` is always the normalised action chunk, `actions` the same chunk in environment units.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..suite import Observation


@dataclass(frozen=True)
class Sample:
    """A batch of sampled chunks."""

    actions: Tensor
    """[B, H, A] in environment units."""
    latent: Tensor
    """[B, H, A] normalised: what `flow_loss` scores."""


class Policy(nn.Module):
    """A policy with weights. Evaluation and every algorithm go through these methods only."""

    capabilities: ClassVar[frozenset[str]]
    """`sft`: has `sft_loss`. `flow`: has `velocity` and `flow_loss`."""
    chunk: int
    """H, actions a chunk."""
    action_dim: int
    """A."""
    feature_dim: int
    """Width of `features`."""

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
        """The expensive part, once per observation: a context with `index(i: Tensor)`, `detach()` and `__len__`."""

    @abstractmethod
    def features(self, context: Any) -> Tensor:
        """[B, feature_dim] summary of the context for a critic."""

    @abstractmethod
    def sample(self, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Decodes one chunk an observation. Row i uses only `generators[i]`; None decodes from zero noise."""

    @abstractmethod
    def sft_loss(self, context: Any, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar supervised loss of [B, H, A] actions in environment units; mask [B, H] marks real steps."""

    @abstractmethod
    def fit_normalisation(self, actions: np.ndarray, proprio: np.ndarray) -> None:
        """Sets the latent's scale from demonstrated actions [N, A] and proprio [N, P], in the suite's units."""

    @abstractmethod
    def normalise(self, actions: Tensor) -> Tensor:
        """Environment units to latent."""

    @abstractmethod
    def unnormalise(self, latent: Tensor) -> Tensor:
        """Latent to environment units."""

    @abstractmethod
    def actor_parameters(self) -> list[nn.Parameter]:
        """What RL trains: the action expert, without the (frozen) vision-language prefix."""


class FlowPolicy(Policy):
    """A policy that decodes by integrating a velocity field, pi0's convention:
    x_t = t noise + (1 - t) latent, velocity target = noise - latent, t = 1 is noise (Black et al., 2024, eq. 1-2)."""

    @abstractmethod
    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] velocities at points x [B, K, H, A] and times t [B, K], K points against one context row."""

    def flow_loss(self, context: Any, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B, K, H, A] squared errors of the conditional flow-matching loss at stored times t [B, K] and
        noises [B, K, H, A]; latent is [B, H, A]. No reduction: the caller decides which elements count."""
        target = noise - latent[:, None]
        x = latent[:, None] + t[..., None, None] * target
        return (self.velocity(context, x, t) - target) ** 2
