"""GRPO: episodes judged against their siblings from the same initial state, without a critic.

Several episodes start from one snapshot; an episode's advantage is its outcome against the group's, the same for every
decision in it. Settings and the choice of groups are SimpleVLA-RL's (Li et al., 2025, arXiv 2509.09674). Two more
methods are this one with other options: RIPT's leave-one-out baseline (Tan et al., 2025, arXiv 2505.17016; Ahmadian et
al., 2024), and on flow policies, whose Euler steps draw, Flow-GRPO (Liu et al., 2025, arXiv 2505.05470).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.config import added
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import (
    Score,
    anneal,
    ascend,
    group_advantages,
    mixed,
    only_actor_learns,
    weigh_episodes,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.base import LikelihoodPolicy, Sample
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class GRPOSettings:
    """Settings; where SimpleVLA-RL's or Flow-GRPO's value differs, it is named."""

    lr: float = 3e-5
    """Actor learning rate (Adam); SimpleVLA-RL 5e-6 on 7.5 B parameters, Flow-GRPO 1e-4 with LoRA."""
    epochs: int = 4
    """Passes over an iteration's decisions; SimpleVLA-RL 1."""
    minibatch: int = 128
    """Decisions a gradient step."""
    group_size: int = 8
    """Episodes from each initial state (SimpleVLA-RL)."""
    weigh: Literal["decision", "episode"] = added("decision", before="decision")
    """What weighs the same in a gradient step: each decision, or each episode, however long it took (SimpleVLA-RL)."""
    baseline: Literal["grpo", "rloo"] = "grpo"
    """What an outcome is compared with: `grpo`, the group's mean, over the group's deviation; `rloo`, the mean of the
    others (RIPT)."""
    accuracy_low: float = 0.1
    """Groups with a smaller share of successes are left out (SimpleVLA-RL) ..."""
    accuracy_high: float = 0.9
    """... and so are those with a larger one. Groups without spread always are."""
    clip_eps: float = 0.2
    """Lower clip range of a token's ratio (SimpleVLA-RL)."""
    clip_high: float = 0.28
    """Upper clip range of a token's ratio (SimpleVLA-RL)."""
    clip_chain: float = 0.01
    """Clip range of a denoising step's ratio, which is that of its mean density a number; Flow-GRPO 1e-4 over images'
    many more numbers."""
    temperature: float = 1.0
    """Softmax temperature of token policies while collecting; SimpleVLA-RL 1.6."""
    sde_level: float = 0.5
    """Noise level of the SDE that flow policies draw from while collecting; Flow-GRPO 0.7."""
    noise: float = 0.1
    """Least standard deviation of a step of diffusion policies while collecting (DPPO)."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        for name in ("lr", "temperature", "sde_level", "noise", "clip_high"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        for name in ("epochs", "minibatch"):
            if getattr(self, name) < 1:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be at least 1")
        for name in ("clip_eps", "clip_chain"):
            if not 0 < getattr(self, name) < 1:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be in (0, 1)")
        if self.group_size < 2:
            raise BenchError(f"algo.group_size: {self.group_size}; it must be at least 2")
        if not 0 <= self.accuracy_low <= self.accuracy_high <= 1:
            raise BenchError(
                f"algo.accuracy_low: {self.accuracy_low}; it must be at least 0 and at most algo.accuracy_high, "
                f"{self.accuracy_high}, which must be at most 1"
            )


class GRPO(Algorithm):
    """Clipped epochs on group-relative advantages; no critic, no KL term."""

    name = "grpo"
    summary = "Group-relative PO (SimpleVLA-RL; options RLOO and Flow-GRPO): siblings from one state, no critic"
    requires = frozenset({"likelihood"})
    learns_from = "rollouts"
    Settings = GRPOSettings
    search = MappingProxyType({"lr": (1e-5, 3e-5, 1e-4), "sde_level": (0.3, 0.5, 0.7), "epochs": (2, 4, 8)})

    def __init__(self, settings: GRPOSettings, policy: LikelihoodPolicy, budget: Budget, seed: int) -> None:
        self.settings, self.group = settings, settings.group_size
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(only_actor_learns(policy), lr=settings.lr, fused=True)
        self.iterations, self.updates = budget.iterations, 0
        self.tokens = "tokens" in policy.capabilities
        if self.tokens:
            self.noise = settings.temperature
        else:
            self.noise = settings.sde_level if "flow" in policy.capabilities else settings.noise

    def act(self, policy: LikelihoodPolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Draws with the collecting noise, and keeps what was drawn."""
        assert generators is not None
        return policy.explore(context, generators, self.noise)

    def update(self, policy: LikelihoodPolicy, rollout: Rollout) -> dict[str, float]:
        """Clipped epochs over the decisions of the groups that have spread; none, and nothing is done."""
        s = self.settings
        anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        taken = decisions(policy, rollout)
        outcome, start = taken.reward[taken.ended], taken.start[taken.ended]
        used = mixed(outcome, start, s.accuracy_low, s.accuracy_high)
        metrics = {"groups_used": len(start[used].unique()) / len(start.unique())}
        if not used.any():
            return metrics
        rows = used[taken.episode].nonzero()[:, 0]
        advantage = group_advantages(outcome, start, s.baseline)[taken.episode][rows]
        if s.weigh == "episode":
            advantage = weigh_episodes(advantage, taken.episode[rows])
        metrics |= {"advantage_std": advantage.std(correction=0).item()}
        score = taken.spread(lambda i: self.score(policy, taken, i))
        return metrics | ascend(
            lambda i: score(rows[i]),
            advantage,
            s.clip_eps if self.tokens else s.clip_chain,
            self.optimizer,
            self.generator,
            s.epochs,
            s.minibatch,
            clip_high=s.clip_high if self.tokens else None,
        )

    def score(self, policy: LikelihoodPolicy, taken: Decisions, i: Tensor) -> Score:
        """Log-probabilities of executed tokens, one by one, or of denoising steps, each the mean over its numbers."""
        assert taken.trace is not None
        found = policy.log_prob(taken.view(i), taken.trace[i], taken.mask[i], self.noise)
        entropy, drawn = found.entropy.sum((1, 2)), found.mask.sum((1, 2))
        if self.tokens:
            return Score(found.logp.flatten(1), found.mask.flatten(1), entropy, drawn)
        return Score(found.logp.sum(2) / found.mask.sum(2).clamp_min(1), found.mask.any(2), entropy, drawn)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator and how many updates there were."""
        state = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        return {**state, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]
