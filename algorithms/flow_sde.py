"""Flow-SDE: pi_RL's PPO on a flow made stochastic (Chen et al., 2025, arXiv 2510.25889).

The Euler steps of the flow become those of the stochastic differential equation that has the same marginals, so noise
comes without being learned. In the hybrid form only one step of a chain, drawn at random, is stochastic and scored, and
all others follow the flow itself: PPO then sees one Gaussian decision a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.config import added
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import ActorCritic, Score, check_actor_critic, only_actor_learns, weigh_episodes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.base import Sample
    from vlarl_bench.policies.stochastic_flow import StochasticFlow
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class FlowSDESettings:
    """Settings; where the authors' (pi0 on LIBERO) differ, theirs are named."""

    lr: float = 2.1e-5
    """Actor learning rate (Adam); authors 5e-6 on 300 M parameters, which does not fall."""
    epochs: int = 4
    """Passes over an iteration's decisions (authors')."""
    minibatch: int = 128
    """Decisions a gradient step."""
    noise: float = 0.8
    """Level a of the SDE; authors 0.5, and 0.8 in the best line of their ablation."""
    hybrid: bool = True
    """Whether one random step of a chain draws and the others follow the flow (authors'), or all of them draw."""
    clip_eps: float = 0.2
    """Clip range of the ratio (authors')."""
    numbers: Literal["sum", "mean"] = "sum"
    """How the log-densities of a step's executed numbers become that of the step (authors': their sum)."""
    weigh: Literal["decision", "episode"] = added("episode", before="decision")
    """What weighs the same in a gradient step: each decision, or each episode, however long it took (authors')."""
    gamma: float = 0.99
    """Discount a decision (authors')."""
    gae_lambda: float = 0.95
    """Lambda of the advantage estimator (authors')."""
    target_kl: float = 1.0
    """An iteration's epochs end early beyond this divergence; the authors have no such end."""
    warmup: int = 0
    """First iterations in which only the critic learns, at most all but the run's last (authors')."""
    critic_lr: float = 1e-3
    """Critic learning rate (Adam); authors 1e-4."""
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
        for name in ("noise", "target_kl"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        if not 0 < self.clip_eps < 1:
            raise BenchError(f"algo.clip_eps: {self.clip_eps}; it must be in (0, 1)")


class FlowSDE(Algorithm):
    """PPO on the steps of a flow's stochastic differential equation."""

    name = "flow-sde"
    summary = "Flow-SDE (pi_RL): PPO on a flow made stochastic, one random step a chunk or all of them"
    requires = frozenset({"flow", "likelihood"})
    learns_from = "rollouts"
    Settings = FlowSDESettings
    search = MappingProxyType({"lr": (7e-6, 2.1e-5, 6.3e-5), "noise": (0.5, 0.8, 1.0), "epochs": (2, 4, 8)})

    def __init__(self, settings: FlowSDESettings, policy: StochasticFlow, budget: Budget, seed: int) -> None:
        self.settings = settings
        optimizer = torch.optim.Adam(only_actor_learns(policy), lr=settings.lr, fused=True)
        self.learner = ActorCritic(settings, policy, optimizer, budget, seed)

    def act(self, policy: StochasticFlow, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Draws one random step of each chain, or all, and keeps the chain. Below it, one more row of the trace says
        which step drew (-1: all)."""
        assert generators is not None
        count = policy.euler_steps
        drawn = [int(torch.randint(count, (), generator=g)) if self.settings.hybrid else -1 for g in generators]
        step = torch.tensor(drawn)
        sample = policy.explore(context, generators, self.levels(step, count))
        assert sample.trace is not None
        label = torch.zeros_like(sample.trace[:, :1]) + step.to(sample.trace)[:, None, None, None]
        return dataclasses.replace(sample, trace=torch.cat((sample.trace, label), 1))

    def levels(self, step: Tensor, count: int) -> Tensor:
        """[B, S] noise level of each of `count` steps, where `step` [B] draws, or all for -1."""
        draws = (torch.arange(count) == step[:, None]) | (step[:, None] < 0)
        return self.settings.noise * draws

    def update(self, policy: StochasticFlow, rollout: Rollout) -> dict[str, float]:
        """The critic's regression, then clipped epochs over the steps that drew."""
        s = self.settings
        taken = decisions(policy, rollout)
        advantage, metrics = self.learner.judge(taken)
        if advantage is None:
            return metrics
        if s.weigh == "episode":
            advantage = weigh_episodes(advantage, taken.episode)
        return metrics | self.learner.ascend(
            taken.spread(lambda i: self.score(policy, taken, i)),
            advantage,
            s.clip_eps,
            target_kl=s.target_kl,
        )

    def score(self, policy: StochasticFlow, taken: Decisions, i: Tensor) -> Score:
        """[B, 1] mean over the steps that drew of the log-density of each one's executed numbers."""
        assert taken.trace is not None
        chain, step = taken.trace[i, :-1], taken.trace[i, -1, 0, 0].long()
        found = policy.log_prob(taken.view(i), chain, taken.mask[i], self.levels(step, policy.euler_steps))
        logp, numbers = found.logp.sum(2), found.mask.sum(2)
        if self.settings.numbers == "mean":
            logp = logp / numbers.clamp_min(1)
        drew = (numbers > 0).sum(1, keepdim=True)
        entropy = found.entropy.sum((1, 2))
        return Score(logp.sum(1, keepdim=True) / drew.clamp_min(1), drew > 0, entropy, numbers.sum(1))

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic and generator."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.learner.load_state_dict(state)
