"""How much noise a flow policy's steps get where that is learned (Zhang et al., 2025, ReinFlow, arXiv:2505.22094).

The network is no part of the policy: it belongs to the algorithm, which trains it beside the actor, keeps it in its
state, and leaves it behind when the policy is stored.

Shapes: B observations, K points, H actions a chunk, A action dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import BenchError

COSINES = 8


class LearnedNoise(nn.Module):
    """Standard deviation of each number that a step draws, from what is seen, where the chunk is, and when.

    Bounded as in ReinFlow: log sigma lies between log `least` and log `most` by a tanh. It starts in the middle, which
    is sqrt(least most), the same everywhere. `least` = `most` makes a constant, as diffusion methods have it.
    """

    def __init__(
        self, feature_dim: int, chunk: int, action_dim: int, least: float, most: float, width: int = 64, seed: int = 0
    ) -> None:
        """Weights from `seed`; the global generator is left as it was. Raises BenchError for bounds that are none."""
        if not 0 < least <= most < math.inf:
            raise BenchError(
                f"noise: least {least}, most {most}; deviations must be 0 < least <= most, like 0.08, 0.16"
            )
        super().__init__()
        self.least, self.most = least, most
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(width, chunk * action_dim)
            self.layers = nn.Sequential(
                nn.Linear(feature_dim + COSINES + chunk * action_dim, width),
                nn.Tanh(),
                nn.Linear(width, width),
                nn.Tanh(),
                last,
            )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] deviations for features [B, F] at points x [B, K, H, A] and times t [B, K]."""
        seen = features[:, None].expand(-1, x.shape[1], -1)
        waves = torch.cos(math.pi * t[..., None] * torch.arange(1, COSINES + 1, device=t.device))
        height: Tensor = self.layers(torch.cat((seen, waves, x.flatten(2)), -1))
        return bounded(height, self.least, self.most).view(x.shape)


def bounded(height: Tensor, least: float, most: float) -> Tensor:
    """Any number to a deviation between the two, by a tanh of its logarithm."""
    low, high = math.log(least), math.log(most)
    return (low + (high - low) * (torch.tanh(height) + 1) / 2).exp()
