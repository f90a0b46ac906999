"""AR-PPO: PPO on action tokens, as VLA-RL does it (Lu et al., 2025, arXiv 2505.18719).

The policy draws its chunk token by token, or number by number; PPO's ratio is that of those draws. Advantages come from
GAE over decisions with a learned state value. VLA-RL's three additions are here: temperature while collecting, critic
warm-up, and a curriculum over tasks (its section on curriculum selection). Its process reward model is not: a reward is
success and nothing else, the same for every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.decisions import decisions
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import ActorCritic, Score, check_actor_critic, only_actor_learns

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
class ARPPOSettings:
    """Settings; where VLA-RL's value differs, it is named."""

    lr: float = 3e-4
    """Actor learning rate (Adam); VLA-RL 2e-5 with LoRA on 7.5 B parameters."""
    epochs: int = 2
    """Passes over an iteration's decisions; VLA-RL 1, of rounds with many more gradient steps a pass."""
    minibatch: int = 128
    """Decisions a gradient step."""
    clip_eps: float = 0.2
    """Clip range of the ratio (VLA-RL)."""
    ratio: Literal["token", "chunk"] = "token"
    """What a ratio belongs to: each token, as in language models, or the whole chunk, as in VLA-RL, whose chunk is one
    action of 7 tokens; over a chunk of many more tokens the product of their ratios leaves the clip range at once."""
    temperature: float = 1.3
    """Softmax temperature while collecting; VLA-RL 1.5."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 0.99
    """Discount a decision (VLA-RL)."""
    gae_lambda: float = 0.3
    """Lambda of the advantage estimator: ours; VLA-RL 0.95."""
    warmup: int = 0
    """First iterations in which only the critic learns, at most all but the run's last; VLA-RL 5 of many more."""
    curriculum: float = 0.0
    """Temperature tau of the task curriculum, P(task) ~ exp((0.5 - success) / tau); 0 takes tasks in turn."""
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
        if self.temperature <= 0:
            raise BenchError(f"algo.temperature: {self.temperature}; it must be above 0")
        for name in ("entropy", "curriculum"):
            if getattr(self, name) < 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be at least 0")
        if not 0 < self.clip_eps < 1:
            raise BenchError(f"algo.clip_eps: {self.clip_eps}; it must be in (0, 1)")


class ARPPO(Algorithm):
    """PPO on token likelihoods, with a state value, critic warm-up and a task curriculum."""

    name = "ar-ppo"
    summary = "Autoregressive PPO (VLA-RL): PPO on action tokens, GAE; critic warm-up and task curriculum on request"
    requires = frozenset({"tokens"})
    learns_from = "rollouts"
    Settings = ARPPOSettings
    search = MappingProxyType({"lr": (3e-5, 1e-4, 3e-4), "temperature": (0.8, 1.0, 1.3), "epochs": (2, 4, 8)})

    def __init__(self, settings: ARPPOSettings, policy: LikelihoodPolicy, budget: Budget, seed: int) -> None:
        self.settings = settings
        optimizer = torch.optim.Adam(only_actor_learns(policy), lr=settings.lr, fused=True)
        self.learner = ActorCritic(settings, policy, optimizer, budget, seed)
        self.success: dict[str, float] = {}

    def task_weights(self, tasks: Sequence[str]) -> np.ndarray | None:
        """VLA-RL's curriculum: the less a task succeeded when it was last tried, the more often it is asked for. One
        that was never tried counts as succeeding half of the time."""
        if not self.settings.curriculum:
            return None
        exponent = (0.5 - np.array([self.success.get(task, 0.5) for task in tasks])) / self.settings.curriculum
        weights = np.exp(exponent - exponent.max())  # the same shares, and nothing overflows
        return weights / weights.sum()

    def act(self, policy: LikelihoodPolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Draws at the collecting temperature, and keeps the tokens."""
        assert generators is not None
        return policy.explore(context, generators, self.settings.temperature)

    def update(self, policy: LikelihoodPolicy, rollout: Rollout) -> dict[str, float]:
        """The critic's regression, then clipped epochs on this round's decisions."""
        s = self.settings
        taken = decisions(policy, rollout)
        for task in {episode.job.task.key for episode in rollout.episodes}:
            outcomes = [episode.success for episode in rollout.episodes if episode.job.task.key == task]
            self.success[task] = float(np.mean(outcomes))
        advantage, metrics = self.learner.judge(taken)
        if advantage is None:
            return metrics
        return metrics | self.learner.ascend(
            taken.spread(lambda i: self.score(policy, taken, i)),
            advantage,
            s.clip_eps,
            entropy=s.entropy,
        )

    def score(self, policy: LikelihoodPolicy, taken: Decisions, i: Tensor) -> Score:
        """Log-probabilities of the executed tokens, one by one or summed over the chunk."""
        assert taken.trace is not None
        found = policy.log_prob(taken.view(i), taken.trace[i], taken.mask[i], self.settings.temperature)
        logp, mask = found.logp.flatten(1), found.mask.flatten(1)
        entropy, drawn = found.entropy.flatten(1).sum(1), mask.sum(1)
        if self.settings.ratio == "chunk":
            logp, mask = logp.sum(1, keepdim=True), mask.any(1, keepdim=True)
        return Score(logp, mask, entropy, drawn)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic, success of each task and generator."""
        return {**self.learner.state_dict(), "success": dict(self.success)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.learner.load_state_dict(state)
        self.success = dict(state["success"])
