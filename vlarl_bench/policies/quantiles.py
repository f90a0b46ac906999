"""Actions and proprioception between their quantiles: 1 % becomes -1, and 99 % becomes 1."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .base import Policy

NARROWEST = {"action": 0.05, "proprio": 0.01}
"""Least half-width between the quantiles, so that a number that hardly moves in demonstrations is not blown up."""


class Quantiles(Policy):
    """A policy whose latent is an action's place between its quantiles, for the numbers that are scaled at all."""

    action_low: Tensor
    action_high: Tensor
    action_scaled: Tensor
    """[A] bool; false where the latent is the action itself, such as a published gripper's."""
    proprio_low: Tensor
    proprio_high: Tensor

    def build_scales(self, action_dim: int, proprio_dim: int) -> None:
        """Registers the scales as buffers: they are stored and loaded with the weights, and never trained."""
        for kind, size in (("action", action_dim), ("proprio", proprio_dim)):
            self.register_buffer(f"{kind}_low", -torch.ones(size))
            self.register_buffer(f"{kind}_high", torch.ones(size))
        self.register_buffer("action_scaled", torch.ones(action_dim, dtype=torch.bool))

    @property
    def scales(self) -> dict[str, str]:
        """What config.json says of them."""
        return {
            "actions": "2 (x - action_low) / (action_high - action_low) - 1 where action_scaled",
            "proprio": "clip(2 (x - proprio_low) / (proprio_high - proprio_low) - 1, -1, 1)",
            "stored": "model.safetensors",
        }

    def fit_normalisation(self, actions: Sequence[np.ndarray], proprio: np.ndarray) -> None:
        """Sets the quantiles from demonstrated episodes' actions, [T, A] each, and proprio [N, P]."""
        for kind, values in (("action", np.concatenate(actions)), ("proprio", proprio)):
            low, high = np.quantile(np.asarray(values, dtype=np.float64), (0.01, 0.99), axis=0)
            half = np.maximum((high - low) / 2, NARROWEST[kind])
            getattr(self, f"{kind}_low").copy_(torch.from_numpy((low + high) / 2 - half))
            getattr(self, f"{kind}_high").copy_(torch.from_numpy((low + high) / 2 + half))

    def normalise(self, actions: Tensor) -> Tensor:
        """Environment units to latent."""
        scaled = 2 * (actions - self.action_low) / (self.action_high - self.action_low) - 1
        return torch.where(self.action_scaled, scaled, actions)

    def unnormalise(self, latent: Tensor) -> Tensor:
        """Latent to environment units."""
        scaled = 0.5 * (latent + 1) * (self.action_high - self.action_low) + self.action_low
        return torch.where(self.action_scaled, scaled, latent)

    def normalise_proprio(self, proprio: Tensor) -> Tensor:
        """[B, P] suite's units to the place between the quantiles, clipped."""
        return (2 * (proprio - self.proprio_low) / (self.proprio_high - self.proprio_low) - 1).clamp(-1, 1)
