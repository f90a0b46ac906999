"""What policy-gradient methods share: advantages over decisions, and PPO's clipped surrogate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .lazy import lazy_import

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_import("torch")


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """Generalised advantage estimates (Schulman et al., 2016, eq. 16) of [n] consecutive decisions.

    `terminated` decisions have no future worth bootstrapping; `ended` ones (terminated, or cut off by a time limit)
    are the last of their episode, so nothing flows back over them. A cut-off decision therefore bootstraps from
    `next_values`, the value of what was seen after it.
    """
    delta = rewards + gamma * next_values * ~terminated - values
    advantages = np.zeros_like(delta)
    following = 0.0
    for i in reversed(range(len(delta))):
        following = delta[i] + (0.0 if ended[i] else gamma * lam * following)
        advantages[i] = following
    return advantages


def clipped_surrogate(ratio: torch.Tensor, advantage: torch.Tensor, eps: float) -> torch.Tensor:
    """Element-wise PPO objective to maximise (Schulman et al., 2017, eq. 7); shapes broadcast, nothing is reduced."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
