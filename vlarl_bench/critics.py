"""Critics that algorithms share."""

import torch
from torch import Tensor, nn


class QEnsemble(nn.Module):
    """M independent two-layer networks Q_i(s, x) over state features and action chunks.

    Features are standardised by what `standardise` was shown first: what tells two states apart is often a small part
    of their features. The last layer starts at zero: an untrained critic says 0 everywhere instead of noise.
    """

    def __init__(self, members: int, features: int, chunk: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.zeros(features))
        inputs = features + chunk
        self.members = nn.ModuleList()
        for _ in range(members):
            net = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            for layer in net:
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
                    nn.init.zeros_(layer.bias)
            head = nn.Linear(width, 1)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.members.append(nn.Sequential(net, head))

    def standardise(self, features: Tensor) -> None:
        """Takes mean and deviation from features [N, F]; only the first call counts, so that values keep meaning."""
        if not self.std.any():
            self.mean.copy_(features.mean(0))
            self.std.copy_(features.std(0, unbiased=False).clamp_min(1e-2))

    def forward(self, features: Tensor, chunks: Tensor) -> Tensor:
        """[M, B] values of features [B, F] and chunks [B, ...]."""
        inputs = torch.cat([(features - self.mean) / self.std, chunks.flatten(1)], dim=1)
        return torch.stack([member(inputs)[:, 0] for member in self.members])
