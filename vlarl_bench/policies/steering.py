"""A small network that chooses the noise which a frozen policy decodes from (Wagenmaker et al., 2025, DSRL,
arXiv:2506.15799). The policy carries it: what is judged, stored and loaded is the steered policy.

Shapes: B observations, F features, H actions a chunk, A numbers of a latent action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BenchError

if TYPE_CHECKING:
    from .base import NoisePolicy


class Steering(nn.Module):
    """Noise w = bound tanh(u), u ~ N(mean(features), deviation(features)^2), number by number: of every action of a
    chunk or, with `repeat`, of one, which then serves the whole chunk.

    It begins with mean 0 and deviation 1 everywhere. Features are standardised by what `standardise` was shown first;
    until then it is not `ready`, and the policy that carries it decodes from N(0, I) as if it were not there.
    """

    def __init__(
        self, features: int, chunk: int, latent_dim: int, bound: float, width: int, repeat: bool, seed: int = 0
    ) -> None:
        """Weights from `seed`; the global generator is left as it was."""
        super().__init__()
        self.chunk, self.latent_dim, self.bound, self.width, self.repeat = chunk, latent_dim, bound, width, repeat
        self.own = 1 if repeat else chunk
        """Actions of a chunk, from its first, that have noise of their own."""
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.zeros(features))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.centre = nn.Linear(width, self.own * latent_dim)
            self.log_deviation = nn.Linear(width, self.own * latent_dim)
        for head in (self.centre, self.log_deviation):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @property
    def config(self) -> dict[str, Any]:
        """What `steer` needs to make another of the same shape."""
        return {"bound": self.bound, "width": self.width, **({"repeat": True} if self.repeat else {})}

    @property
    def ready(self) -> bool:
        """Whether the policy decodes from what this draws."""
        return bool(self.std.any())

    def standardise(self, features: Tensor) -> None:
        """Takes mean and deviation from features [N, F]; only the first call counts."""
        if not self.ready:
            self.mean.copy_(features.mean(0))
            self.std.copy_(features.std(0, unbiased=False).clamp_min(1e-2))

    def forward(self, features: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [B, H, A] for features [B, F] from draws of N(0, 1) [B, H, A], and the log-density [B] of noise / bound
        (Haarnoja et al., 2018, eq. 21), each number that repeats counted once. Both differentiable, and where the
        features are, whatever the device of the weights; draws of 0 give bound tanh(mean)."""
        home, features, unit = features.device, features.to(self.mean), unit.to(self.mean)
        hidden = self.layers((features - self.mean) / self.std)
        log_deviation = self.log_deviation(hidden).clamp(-20, 2)  # the authors' limits
        unit = unit[:, : self.own].flatten(1)
        u = self.centre(hidden) + log_deviation.exp() * unit
        density = -0.5 * unit**2 - log_deviation - 0.5 * math.log(2 * math.pi)
        slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), also where that rounds to 0
        noise = self.spread(self.bound * torch.tanh(u).view(-1, self.own, self.latent_dim))
        return noise.to(home), (density - slope).sum(1).to(home)

    def spread(self, noise: Tensor) -> Tensor:
        """Noise [B, H or own, A] -> [B, H, A], what repeats as its first action has it."""
        return noise[:, : self.own].repeat(1, self.chunk // self.own, 1)


def steer(policy: NoisePolicy, config: Mapping[str, Any], seed: int = 0) -> Steering:
    """Has the policy carry a fresh steering module, which from then on is its whole actor.

    Raises BenchError if it carries one already, if adapters were to learn in its place, or if `config` is none.
    """
    if policy.steering is not None:
        raise BenchError("base: a steered policy; its steering has its noise already, start from what it steers")
    if any(".lora_" in part for part, _ in policy.named_parameters()):
        raise BenchError("lora: steering leaves the policy's weights as they are, adapters too; leave it out")
    try:
        bound, width, repeat = float(config["bound"]), int(config["width"]), config.get("repeat", False)
        if not (0 < bound < math.inf and width >= 1 and isinstance(repeat, bool)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        example = "{'bound': 1.0, 'width': 128}, and may have 'repeat': True"
        raise BenchError(f"steering: {config!r:.200}; it must be like {example}") from None
    made = Steering(policy.feature_dim, policy.chunk, policy.latent_dim, bound, width, repeat, seed)
    policy.steering = made.to(policy.device)
    return policy.steering
