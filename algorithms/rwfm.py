"""RWFM: reward-weighted flow matching (Pfrommer et al., 2025, arXiv 2507.15073), and success-filtered regression.

The cheapest way to learn from one's own episodes: imitate them again, the successful ones more. The loss is the
kind that flow and diffusion policies were trained with, weighed by exp(alpha R), or by R alone, which imitates
successes and nothing else. There is no critic, no ratio and no trust region. What samples do not show cannot be
learned, so chunks are bent while collecting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlarl_bench.algorithm import Algorithm, uncounted
from vlarl_bench.config import added
from vlarl_bench.distributed import descend, spread
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import anneal, draw_times, only_actor_learns
from vlarl_bench.suite import Observation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.policies.base import DenoisingPolicy, Sample
    from vlarl_bench.rollout import Episode, Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class RWFMSettings:
    """Settings; none is the authors', whose task and rewards are of another kind."""

    lr: float = 9e-4
    """Actor learning rate (Adam)."""
    gradient_steps: int = 120
    """Gradient steps an iteration."""
    minibatch: int = 128
    """Decisions a gradient step."""
    draws: int = 4
    """(t, noise) pairs a decision and gradient step."""
    tau_min: float = 0.2
    """Smallest t drawn (1 = noise) of flow policies (`draw_times` says why)."""
    weight: Literal["filtered", "exponential"] = "exponential"
    """`exponential`: exp(alpha R), R being success, 0 or 1; `filtered`: R, so failures do not count at all."""
    alpha: float = 5.0
    """A success counts exp(alpha) times as much as a failure (`exponential` only); the authors try 0 to 40."""
    window: int = 4
    """Iterations whose episodes are imitated."""
    explore_size: float = 0.1
    """Largest height of the bumps that are added to a chunk while collecting, in the latent's units; 0 adds none."""
    ema: float = added(0.0, before=0.0)
    """Decay, a gradient step, of the average of the weights with which the policy acts (authors'); 0: the last ones."""
    grad_norm: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        for name in ("lr", "grad_norm"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        for name in ("gradient_steps", "minibatch", "draws", "window"):
            if getattr(self, name) < 1:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.tau_min < 1:
            raise BenchError(f"algo.tau_min: {self.tau_min}; it must be in [0, 1)")
        if not 0 <= self.ema < 1:
            raise BenchError(f"algo.ema: {self.ema}; it must be in [0, 1)")
        if self.explore_size < 0:
            raise BenchError(f"algo.explore_size: {self.explore_size}; it must be at least 0")
        if not 0 <= self.alpha <= 20:
            raise BenchError(f"algo.alpha: {self.alpha}; it must be in [0, 20], where failures count nothing any more")


def bump(generator: torch.Generator, steps: int, numbers: int, size: float) -> Tensor:
    """[steps, numbers] a Gaussian bump along the chunk for each number of an action: its centre anywhere in the chunk,
    its deviation 1/16 to 1/4 of the chunk, its height from -size to size. Smooth, so that a robot follows it, where
    white noise would average out."""
    centre, width, height = torch.rand(3, numbers, generator=generator)
    along = (torch.arange(steps) + 0.5)[:, None] / steps
    return size * (2 * height - 1) * torch.exp(-0.5 * ((along - centre) / (1 / 16 + 3 / 16 * width)) ** 2)


def stored(episode: Episode) -> dict[str, Any]:
    """What imitating an episode of n decisions takes: text, and tensors of n rows."""
    seen = episode.observations[: len(episode.latents)]
    latent = np.stack(episode.latents)
    mask = np.arange(latent.shape[1]) < np.array(episode.executed)[:, None]
    return {
        "instruction": seen[0].instruction,
        "proprio": torch.from_numpy(np.stack([x.proprio for x in seen])),
        "objects": {name: torch.from_numpy(np.stack([x.objects[name] for x in seen])) for name in seen[0].objects},
        "images": {name: torch.from_numpy(np.stack([x.images[name] for x in seen])) for name in seen[0].images},
        "latent": torch.from_numpy(latent),
        "mask": torch.from_numpy(mask.astype(np.float32)),
        "outcome": torch.full((len(latent),), float(episode.success)),
    }


def observations(episode: dict[str, Any]) -> list[Observation]:
    """Those that `stored` took apart."""
    return [
        Observation(
            episode["instruction"],
            episode["proprio"][i].numpy(),
            {name: poses[i].numpy() for name, poses in episode["objects"].items()},
            {name: images[i].numpy() for name, images in episode["images"].items()},
        )
        for i in range(len(episode["latent"]))
    ]


class RWFM(Algorithm):
    """Imitation of one's own episodes, weighed by their success."""

    name = "rwfm"
    summary = "Reward-weighted flow matching (Pfrommer et al.), or success-filtered regression: imitate what worked"
    requires = frozenset({"denoising"})
    learns_from = "rollouts"
    Settings = RWFMSettings
    search = MappingProxyType({"lr": (1e-4, 3e-4, 9e-4), "alpha": (1.0, 5.0, 10.0), "gradient_steps": (30, 60, 120)})

    def __init__(self, settings: RWFMSettings, policy: DenoisingPolicy, budget: Budget, seed: int) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        self.actor = only_actor_learns(policy)
        self.optimizer = torch.optim.Adam(self.actor, lr=settings.lr, fused=True)
        self.iterations, self.updates = budget.iterations, 0
        self.replay: list[list[dict[str, Any]]] = []
        self.learned: list[Tensor] | None = None  # weights that steps move, where the policy acts with their average

    def act(self, policy: DenoisingPolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """The policy's own samples, each bent by a bump."""
        from vlarl_bench.policies.base import Sample

        sample, size = policy.sample(context, generators), self.settings.explore_size
        if not size:
            return sample
        assert generators is not None
        latent = sample.latent.clone()
        bumps = [bump(g, policy.chunk, policy.action_dim, size) for g in generators]
        latent[..., : policy.action_dim] += torch.stack(bumps).to(latent)
        return Sample(actions=policy.unnormalise(latent), latent=latent)

    def update(self, policy: DenoisingPolicy, rollout: Rollout) -> dict[str, float]:
        """Weighted regression on the window; without weight on anything in it, nothing is done."""
        s = self.settings
        anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        episodes = [stored(episode) for episode in rollout.episodes]
        metrics = {"cfm_loss": self._fresh_loss(policy, episodes)}
        if s.weight == "filtered":
            episodes = [episode for episode in episodes if episode["outcome"].any()]
        self.replay = [*self.replay, episodes][-s.window :]
        window = [episode for episodes in self.replay for episode in episodes]
        metrics["episodes_imitated"] = float(len(window))
        if not window:
            return metrics
        batch, latent, mask, outcome = gather(policy, window)
        weight = outcome if s.weight == "filtered" else torch.exp(s.alpha * (outcome - outcome.max()))
        weight = weight / weight.mean()
        losses: list[float] = []
        average = self._put(self.learned) if s.ema else []
        for _ in range(s.gradient_steps):
            i = torch.randint(len(weight), (s.minibatch,), generator=self.generator)
            loss = (weight[i] * self._losses(policy, batch, latent, mask, i)).mean()
            descend(self.optimizer, loss, s.grad_norm)
            losses.append(loss.item())
            for mean, p in zip(average, self.actor, strict=False):
                mean.lerp_(p.detach(), 1 - s.ema)
        if s.ema:
            self.learned = self._put(average)
        effective = float(weight.sum() ** 2 / (weight**2).sum() / len(weight))
        return metrics | {"weighted_loss": float(np.mean(losses)), "effective_share": effective}

    def _put(self, weights: list[Tensor] | None) -> list[Tensor]:
        """The actor's weights so far; from now on it has these, if any."""
        before = [p.detach().clone() for p in self.actor]
        with torch.no_grad():
            for p, value in zip(self.actor, weights or before, strict=True):
                p.copy_(value)
        return before

    def _losses(self, policy: DenoisingPolicy, batch: Any, latent: Tensor, mask: Tensor, i: Tensor) -> Tensor:
        """[B] denoising losses of the rows i [B] at fresh draws: the mean over draws, executed steps and action
        dimensions."""
        shape = (len(i), self.settings.draws)
        t = draw_times(policy, shape, self.settings.tau_min, self.generator)
        noise = torch.randn(*shape, *latent.shape[1:], generator=self.generator)

        def losses(mine: Tensor) -> Tensor:
            rows = i[mine]
            with torch.no_grad():
                context = policy.encode(batch.index(rows))
            error = policy.draw_loss(context, latent[rows], t[mine], noise[mine])[..., : policy.action_dim].mean((1, 3))
            return (error * mask[rows]).sum(1) / mask[rows].sum(1)

        return spread(losses, torch.arange(len(i)))

    def _fresh_loss(self, policy: DenoisingPolicy, episodes: Sequence[dict[str, Any]]) -> float:
        """Mean loss on the round's own chunks, before anything is learned from them."""
        batch, latent, mask, _ = gather(policy, episodes)
        with torch.no_grad(), uncounted():
            parts = torch.arange(len(latent)).split(self.settings.minibatch)
            return float(torch.cat([self._losses(policy, batch, latent, mask, i) for i in parts]).mean())

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, the window's episodes, how many updates there were, and what the average is of."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
            "replay": [list(episodes) for episodes in self.replay],
            "learned": self.learned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]
        self.replay = [list(episodes) for episodes in state["replay"]]
        self.learned = state.get("learned")  # runs of before `ema` have none


def gather(policy: DenoisingPolicy, episodes: Sequence[dict[str, Any]]) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(batch, latents [N, H, A], masks [N, H], outcomes [N]) of the decisions of stored episodes."""
    batch = policy.preprocess([seen for episode in episodes for seen in observations(episode)])
    latent, mask, outcome = (torch.cat([e[key] for e in episodes]) for key in ("latent", "mask", "outcome"))
    return batch, latent, mask, outcome
