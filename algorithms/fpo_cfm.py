"""FPO-CFM: flow policy optimisation (McAllister et al., 2025, arXiv 2507.21053) and FPO++ (2026, arXiv 2602.02481).

Not Lyu et al.'s FPO (2510.09976, `fpo`). A flow policy has no cheap likelihood, but its conditional flow-matching (CFM)
loss bounds one. So the log-ratio of PPO is the fall of that loss on the executed chunk, at (tau, eps) pairs that are
drawn once a round and kept for all its epochs. FPO averages the loss over the pairs and makes one ratio; FPO++ makes
one of each pair, and offers other trust regions. Diffusion policies have a loss of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.config import added
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import (
    ActorCritic,
    Score,
    check_actor_critic,
    clipped_surrogate,
    draw_times,
    only_actor_learns,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.base import DenoisingPolicy
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class FPOCFMSettings:
    """Settings; where the authors' differ, theirs are named: FPO's, and FPO++'s for manipulation."""

    lr: float = 1e-5
    """Actor learning rate (Adam); FPO 3e-4, FPO++ 1e-5."""
    epochs: int = 4
    """Passes over an iteration's decisions; FPO 16, FPO++ 10."""
    minibatch: int = 128
    """Decisions a gradient step; each counts with all its draws."""
    draws: int = 8
    """Stored (tau, eps) pairs a decision, N_mc (FPO, and FPO++ for manipulation)."""
    tau_min: float = 0.2
    """Smallest tau drawn (1 = noise) of flow policies; diffusion's decoder looks everywhere, and so is drawn for. FPO
    draws from the times at which its decoder of 10 steps looks, so never below 0.1; decoders here may have 5 steps."""
    ratio: Literal["sample", "mean"] = "sample"
    """One ratio a draw (FPO++), or one of the mean loss over draws (FPO)."""
    numbers: Literal["mean", "steps"] = "mean"
    """How the errors of a chunk's executed numbers become its loss. FPO takes the mean, of one action's; FPO++ that of
    each of a chunk's steps, and the sum over them (`steps`)."""
    huber: float = added(0.0, before=0.0)
    """An error of a number counts squared up to this size, and in proportion beyond (2 huber |e| - huber^2), so that no
    outlier carries the loss; 0: squared whatever its size (FPO). FPO++ 0.1 to 1 by task."""
    objective: Literal["clip", "spo", "aspo"] = "clip"
    """Trust region: PPO's clip; SPO, a quadratic penalty; ASPO, the clip where the advantage is above 0, SPO elsewhere.
    FPO++ found ASPO to hurt when fine-tuning manipulation."""
    clip_eps: float = 0.01
    """Clip range, and SPO's; FPO 0.05, FPO++ 0.01 to 0.03 by task, of its sum over steps."""
    log_ratio_limit: float = 3.0
    """Log-ratios beyond it count as it (FPO), with gradients as if they did not (FPO++)."""
    gamma: float = 0.99
    """Discount a decision; FPO 0.995 a step, FPO++ 0.99."""
    gae_lambda: float = 0.3
    """Lambda of the advantage estimator: ours; FPO 0.95, FPO++ 0.99."""
    target_kl: float = 1.0
    """An iteration's epochs end early beyond this divergence; FPO has no such end."""
    warmup: int = 0
    """First iterations in which only the critic learns (FPO++), at most all but the run's last."""
    critic_lr: float = 1e-3
    """Critic learning rate (Adam)."""
    critic_steps: int = 300
    """Critic gradient steps an iteration."""
    critic_batch: int = 256
    """Decisions a critic gradient step."""
    critic_width: int = 256
    """Hidden width of the critic."""
    window: int = 4
    """Iterations that the critic learns from."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        check_actor_critic(self)
        for name in ("log_ratio_limit", "target_kl"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        if self.draws < 1:
            raise BenchError(f"algo.draws: {self.draws}; it must be at least 1")
        if not 0 <= self.tau_min < 1:
            raise BenchError(f"algo.tau_min: {self.tau_min}; it must be in [0, 1)")
        if not 0 <= self.huber < float("inf"):
            raise BenchError(f"algo.huber: {self.huber}; it must be at least 0, where errors count squared, and finite")
        if not 0 < self.clip_eps < 1:
            raise BenchError(f"algo.clip_eps: {self.clip_eps}; it must be in (0, 1)")


def chunk_loss(error: Tensor, mask: Tensor, numbers: str, huber: float = 0.0) -> Tensor:
    """[B, K] losses of squared errors [B, K, H, A]: of each executed step (mask [B, H]) the mean over its numbers, and
    of those the mean or (`numbers` is `steps`) the sum."""
    if huber:
        error = torch.where(error <= huber**2, error, 2 * huber * error.clamp_min(huber**2).sqrt() - huber**2)
    total = (error.mean(3) * mask[:, None]).sum(2)
    return total if numbers == "steps" else total / mask.sum(1, keepdim=True)


def surrogate(ratio: Tensor, advantage: Tensor, objective: str, eps: float) -> Tensor:
    """Element-wise objective to maximise (SPO: Xie et al., 2024, arXiv 2401.16025); shapes broadcast.

    Each element takes one branch and is reduced by the caller: a mean taken before would leak gradients between them.
    """
    clip = clipped_surrogate(ratio, advantage, eps)
    if objective == "clip":
        return clip
    spo = ratio * advantage - advantage.abs() / (2 * eps) * (ratio - 1) ** 2
    return spo if objective == "spo" else torch.where(advantage >= 0, clip, spo)


class FPOCFM(Algorithm):
    """PPO on ratios made from the CFM loss at stored draws."""

    name = "fpo-cfm"
    summary = "FPO and FPO++ (McAllister et al.): PPO on CFM-loss ratios at stored draws, GAE, clip, SPO or ASPO"
    requires = frozenset({"denoising"})
    learns_from = "rollouts"
    Settings = FPOCFMSettings
    search = MappingProxyType({"lr": (3e-6, 1e-5, 3e-5), "clip_eps": (0.005, 0.01, 0.05), "epochs": (2, 4, 8)})

    def __init__(self, settings: FPOCFMSettings, policy: DenoisingPolicy, budget: Budget, seed: int) -> None:
        self.settings = settings
        optimizer = torch.optim.Adam(only_actor_learns(policy), lr=settings.lr, fused=True)
        self.learner = ActorCritic(settings, policy, optimizer, budget, seed)

    def update(self, policy: DenoisingPolicy, rollout: Rollout) -> dict[str, float]:
        """The critic's regression, then epochs in which the same draws score the old policy and the new one."""
        s, generator = self.settings, self.learner.generator
        taken = decisions(policy, rollout)
        advantage, metrics = self.learner.judge(taken)
        if advantage is None:
            return metrics
        n = len(taken)
        tau = draw_times(policy, (n, s.draws), s.tau_min, generator)
        eps = torch.randn(n, s.draws, *taken.latent.shape[1:], generator=generator)
        score = taken.spread(lambda i: self.score(policy, taken, i, tau, eps))
        with torch.no_grad():
            old = torch.cat([score(i).logp for i in torch.arange(n).split(s.minibatch)])
        moved = self.learner.ascend(
            score,
            advantage,
            s.clip_eps,
            target_kl=s.target_kl,
            objective=lambda ratio, gain: surrogate(ratio, gain, s.objective, s.clip_eps),
            log_ratio_limit=s.log_ratio_limit,
            old=old,
        )
        del moved["entropy"]  # a loss has none
        return metrics | moved | {"cfm_loss": -old.mean().item()}

    def score(self, policy: DenoisingPolicy, taken: Decisions, i: Tensor, tau: Tensor, eps: Tensor) -> Score:
        """What stands for log-probabilities at stored tau [N, K] and eps [N, K, H, A]: minus the losses [B, K], or
        minus their mean [B, 1]. Numbers that only pad a latent do not count."""
        error = policy.draw_loss(taken.view(i), taken.latent[i], tau[i], eps[i])[..., : policy.action_dim]
        loss = chunk_loss(error, taken.mask[i], self.settings.numbers, self.settings.huber)
        loss = loss if self.settings.ratio == "sample" else loss.mean(1, keepdim=True)
        nothing = torch.zeros(len(loss))
        return Score(-loss, torch.ones_like(loss, dtype=torch.bool), nothing, nothing)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic and generator."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.learner.load_state_dict(state)
