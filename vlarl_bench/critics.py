"""Critics that algorithms share."""

from typing import Any

import torch
from torch import Tensor, nn


def explained_variance(returns: Tensor, predicted: Tensor) -> dict[str, float]:
    """`explained_variance`: how much of the spread of returns [N] is predicted [N]; 1 is all, 0 no more than a constant
    does. Empty where they have no spread."""
    if returns.min() == returns.max():
        return {}
    return {"explained_variance": float(1 - (returns - predicted).var() / returns.var())}


class QEnsemble(nn.Module):
    """M independent two-layer networks Q_i(s, x) over state features and action chunks.

    Features are standardised by what `standardise` was shown first: what tells two states apart is often a small part
    of their features. The last layer starts at zero: an untrained critic says 0 everywhere instead of noise.
    """

    def __init__(
        self, members: int, features: int, chunk: int, width: int, generator: torch.Generator, norm: bool = False
    ) -> None:
        """With `norm` each hidden layer is normalised (Ba et al., 2016), so that a critic that learns from its own
        values cannot run away where it has no data (Ball et al., 2023, sec. 4.2)."""
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.zeros(features))
        inputs = features + chunk
        self.members = nn.ModuleList()
        for _ in range(members):
            hidden = [
                (nn.Linear(n, width), *([nn.LayerNorm(width)] if norm else []), nn.SiLU()) for n in (inputs, width)
            ]
            net = nn.Sequential(*(layer for layers in hidden for layer in layers))
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

    @torch.no_grad()
    def follow(self, other: "QEnsemble", step: float) -> None:
        """Moves every weight by `step` of the way to the other's: what slow targets do."""
        for slow, fast in zip(self.parameters(), other.parameters(), strict=True):
            slow.lerp_(fast, step)

    def forward(self, features: Tensor, chunks: Tensor) -> Tensor:
        """[M, B] values of features [B, F] and chunks [B, ...]."""
        inputs = torch.cat([(features - self.mean) / self.std, chunks.flatten(1)], dim=1)
        return torch.stack([member(inputs)[:, 0] for member in self.members])


class ValueCritic:
    """V(s), fitted to the discounted returns of the last few rounds; running out of time counts as a failure."""

    def __init__(
        self, features: int, width: int, lr: float, steps: int, batch: int, window: int, generator: torch.Generator
    ) -> None:
        """`features` wide input; each `fit` takes `steps` gradient steps (Adam at `lr`) on `batch` decisions out of
        the last `window` rounds."""
        self.steps, self.batch, self.window, self.generator = steps, batch, window, generator
        self.net = QEnsemble(1, features, 0, width, generator)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, fused=True)
        self.replay: list[tuple[Tensor, Tensor]] = []

    def __call__(self, features: Tensor) -> Tensor:
        """[N] values of features [N, F]."""
        with torch.no_grad():
            return self.net(features, features[:, :0])[0]

    def fit(self, features: Tensor, returns: Tensor) -> dict[str, float]:
        """Learns a round's features [N, F] and returns [N]; says first how well it foresaw them, if they vary."""
        metrics = explained_variance(returns, self(features)) if self.replay else {}
        self.replay = [*self.replay, (features, returns)][-self.window :]
        seen, goal = (torch.cat(parts) for parts in zip(*self.replay, strict=True))
        self.net.standardise(seen)
        loss = torch.zeros(())
        for _ in range(self.steps):
            i = torch.randint(len(goal), (self.batch,), generator=self.generator)
            loss = ((self.net(seen[i], seen[i, :0])[0] - goal[i]) ** 2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return metrics | {"critic_loss": loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """Network, optimiser and the rounds it learns from."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "features": [features for features, _ in self.replay],
            "returns": [returns for _, returns in self.replay],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay = list(zip(state["features"], state["returns"], strict=True))
