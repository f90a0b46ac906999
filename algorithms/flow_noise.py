"""Flow-Noise: pi_RL's PPO on a flow with learned noise (Chen et al., 2025, arXiv 2510.25889).

The chain is ReinFlow's: Euler steps of the flow, to which a network adds noise that it learns. What differs is PPO's
likelihood, the mean over steps of each step's joint density, with the clip range and entropy bonus that go with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

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
    from vlarl_bench.policies.base import Sample
    from vlarl_bench.policies.stochastic_flow import StochasticFlow
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class FlowNoiseSettings:
    """Settings; where the authors' (pi0) differ, theirs are named."""

    lr: float = 2e-5
    """Actor learning rate (Adam); authors 5e-6 on 300 M parameters, which does not fall."""
    noise_lr: float = 3e-4
    """Learning rate of the noise network; authors the actor's, over many more gradient steps: in as few as here it
    would stay where it begins."""
    epochs: int = 4
    """Passes over an iteration's decisions (authors')."""
    minibatch: int = 128
    """Decisions a gradient step, each with its whole chain."""
    noise_least: float = 0.08
    """Smallest standard deviation of a step (authors')."""
    noise_most: float = 0.16
    """Largest standard deviation of a step (authors')."""
    noise_width: int = 64
    """Hidden width of the noise network; authors 128 and 64, on the action expert's last hidden state."""
    clip_eps: float = 0.2
    """Clip range of the ratio (authors')."""
    numbers: Literal["sum", "mean"] = "sum"
    """How the log-densities of a step's executed numbers become that of the step (authors': their sum)."""
    entropy: float = 0.005
    """Weight of the mean entropy of a number (authors')."""
    gamma: float = 0.99
    """Discount a decision (authors')."""
    gae_lambda: float = 0.3
    """Lambda of the advantage estimator: ours, of all methods with a critic; authors 0.95."""
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
        if not 0 < self.noise_least <= self.noise_most < float("inf"):
            raise BenchError(
                f"algo.noise_least: {self.noise_least}; it must be above 0, and at most algo.noise_most, which is "
                f"{self.noise_most} and must be finite"
            )
        if self.noise_lr <= 0:
            raise BenchError(f"algo.noise_lr: {self.noise_lr}; it must be above 0")
        if self.noise_width < 1:
            raise BenchError(f"algo.noise_width: {self.noise_width}; it must be at least 1")
        if self.entropy < 0:
            raise BenchError(f"algo.entropy: {self.entropy}; it must be at least 0")
        if self.target_kl <= 0:
            raise BenchError(f"algo.target_kl: {self.target_kl}; it must be above 0")
        if not 0 < self.clip_eps < 1:
            raise BenchError(f"algo.clip_eps: {self.clip_eps}; it must be in (0, 1)")


class FlowNoise(Algorithm):
    """PPO on the mean over steps of a flow's densities under learned noise."""

    name = "flow-noise"
    summary = "Flow-Noise (pi_RL): PPO on a flow with learned noise, joint density averaged over its steps"
    requires = frozenset({"flow", "likelihood"})
    learns_from = "rollouts"
    Settings = FlowNoiseSettings
    search = MappingProxyType({"lr": (7e-6, 2e-5, 6e-5), "clip_eps": (0.1, 0.2, 0.3), "epochs": (2, 4, 8)})

    def __init__(self, settings: FlowNoiseSettings, policy: StochasticFlow, budget: Budget, seed: int) -> None:
        from vlarl_bench.policies.noise import LearnedNoise

        self.settings = s = settings
        shape = (policy.feature_dim, policy.chunk, policy.latent_dim)
        self.noise = LearnedNoise(*shape, s.noise_least, s.noise_most, s.noise_width, seed)
        noise = {"params": list(self.noise.parameters()), "initial_lr": s.noise_lr}
        groups: list[dict[str, Any]] = [{"params": only_actor_learns(policy)}, noise]
        optimizer = torch.optim.Adam(groups, lr=s.lr, fused=True)
        self.learner = ActorCritic(s, policy, optimizer, budget, seed)

    def act(self, policy: StochasticFlow, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Draws at every Euler step, as much as the noise network says, and keeps the chain."""
        assert generators is not None
        return policy.explore(context, generators, self.noise)

    def update(self, policy: StochasticFlow, rollout: Rollout) -> dict[str, float]:
        """The critic's regression, then clipped epochs over this round's chains."""
        s = self.settings
        taken = decisions(policy, rollout)
        advantage, metrics = self.learner.judge(taken)
        if advantage is None:
            return metrics
        return metrics | self.learner.ascend(
            taken.spread(lambda i: self.score(policy, taken, i)),
            advantage,
            s.clip_eps,
            entropy=s.entropy,
            target_kl=s.target_kl,
        )

    def score(self, policy: StochasticFlow, taken: Decisions, i: Tensor) -> Score:
        """[B, 1] mean over steps of the log-density of each one's executed numbers."""
        assert taken.trace is not None
        found = policy.log_prob(taken.view(i), taken.trace[i], taken.mask[i], self.noise)
        logp, numbers = found.logp.sum(2), found.mask.sum(2)
        if self.settings.numbers == "mean":
            logp = logp / numbers.clamp_min(1)
        entropy = found.entropy.sum((1, 2))
        return Score(logp.mean(1, keepdim=True), numbers.any(1, keepdim=True), entropy, numbers.sum(1))

    def state_dict(self) -> dict[str, Any]:
        """Noise network, optimiser, critic and generator."""
        return {**self.learner.state_dict(), "noise": self.noise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.learner.load_state_dict(state)
        self.noise.load_state_dict(state["noise"])
