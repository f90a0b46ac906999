"""Flow-Noise: pi_RL's PPO on a flow with learned noise (Chen et al., 2025, arXiv 2510.25889).

All but the likelihood is ReinFlow's: Euler steps of the flow, to which a network adds noise that it learns. What PPO
takes the ratio of is the mean over steps of each step's density; clip range and entropy bonus go with that.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from vlarl_bench.algorithms.reinflow import ReinFlow, check_learned_noise

from vlarl_bench.policy_gradient import Score

if TYPE_CHECKING:
    from torch import Tensor

    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.stochastic_flow import StochasticFlow


@dataclass(frozen=True)
class FlowNoiseSettings:
    """Settings; where the authors' (pi0) differ, theirs are named."""

    lr: float = 1e-5
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
    numbers: Literal["sum", "mean", "each"] = "each"
    """What has a ratio: a chunk, by the sum of its executed numbers' log-densities (the paper) or their mean, or each
    number (the authors' configuration of Flow-Noise: `logprob_type: token_level`)."""
    entropy: float = 0.005
    """Weight of the mean entropy of a number (authors')."""
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
        check_learned_noise(self)


class FlowNoise(ReinFlow):
    """PPO on the mean over steps of a flow's densities under learned noise."""

    name = "flow-noise"
    summary = "Flow-Noise (pi_RL): PPO on a flow with learned noise, densities averaged over its steps"
    Settings = FlowNoiseSettings
    search = MappingProxyType({"lr": (3e-6, 1e-5, 3e-5), "clip_eps": (0.1, 0.2, 0.4), "epochs": (2, 4, 8)})

    def score(self, policy: StochasticFlow, taken: Decisions, i: Tensor) -> Score:
        """[B, 1] mean over steps of the log-density of each one's executed numbers, or [B, H A] of each number."""
        assert taken.trace is not None
        found = policy.log_prob(taken.view(i), taken.trace[i], taken.mask[i], self.noise)
        logp, numbers = found.logp.sum(2), found.mask.sum(2)
        entropy = found.entropy.sum((1, 2))
        if self.settings.numbers == "each":
            return Score(found.logp.mean(1), found.mask.any(1), entropy, numbers.sum(1))
        if self.settings.numbers == "mean":
            logp = logp / numbers.clamp_min(1)
        return Score(logp.mean(1, keepdim=True), numbers.any(1, keepdim=True), entropy, numbers.sum(1))
