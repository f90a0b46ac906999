"""Actions and proprioception in standard deviations from their mean."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .base import Policy

CLIP = 6.0  # standard deviations; keeps a proprio reading far outside the demonstrations from saturating the policy


class Standardised(Policy):
    """A policy whose latent is (action - mean) / deviation, number by number."""

    action_mean: Tensor
    action_std: Tensor
    proprio_mean: Tensor
    proprio_std: Tensor

    def build_scales(self, action_dim: int, proprio_dim: int) -> None:
        """Registers the scales as buffers: they are stored and loaded with the weights, and never trained."""
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))

    @property
    def scales(self) -> dict[str, str]:
        """What config.json says of them."""
        return {
            "actions": "(x - action_mean) / action_std",
            "proprio": f"clip((x - proprio_mean) / proprio_std, {-CLIP}, {CLIP})",
            "stored": "model.safetensors",
        }

    def fit_normalisation(self, actions: Sequence[np.ndarray], proprio: np.ndarray) -> None:
        """Sets mean and deviation from demonstrated episodes' actions, [T, A] each, and proprio [N, P]."""
        for prefix, values, floor in (("action", np.concatenate(actions), 0.1), ("proprio", proprio, 0.01)):
            if not getattr(self, f"{prefix}_mean").numel():
                continue  # a policy without proprioception
            # The floor keeps a dimension that hardly moves in the demonstrations from being blown up to unit variance.
            flat = torch.as_tensor(np.asarray(values, dtype=np.float64))
            getattr(self, f"{prefix}_mean").copy_(flat.mean(0))
            getattr(self, f"{prefix}_std").copy_(flat.std(0, unbiased=False).clamp_min(floor))

    def normalise(self, actions: Tensor) -> Tensor:
        """Environment units to latent."""
        return (actions - self.action_mean) / self.action_std

    def unnormalise(self, latent: Tensor) -> Tensor:
        """Latent to environment units."""
        return latent * self.action_std + self.action_mean

    def normalise_proprio(self, proprio: Tensor) -> Tensor:
        """[B, P] suite's units to deviations, clipped."""
        return ((proprio - self.proprio_mean) / self.proprio_std).clamp(-CLIP, CLIP)
