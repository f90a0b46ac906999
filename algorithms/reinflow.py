"""ReinFlow: flow policies fine-tuned through learned noise (Zhang et al., 2025, arXiv 2505.22094).

Noise is added to each Euler step of the flow, as much as a small network says. The chain is then a Gaussian one whose
density is known exactly, whatever the number of steps, and PPO trains velocity and noise together. The noise network is
no part of the policy: it is left behind when the policy is stored, and evaluation decodes the flow itself.
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
class ReinFlowSettings:
    """Settings; where the authors' (Robomimic and Franka Kitchen) differ, theirs are named."""

    lr: float = 4.5e-5
    """Actor learning rate (AdamW; authors' from state); authors 3.5e-6 from pixels."""
    noise_lr: float = 3e-4
    """Learning rate of the noise network; authors the actor's, over many more gradient steps: in as few as here it
    would stay where it begins."""
    epochs: int = 4
    """Passes over an iteration's decisions; authors 5 or 10."""
    minibatch: int = 128
    """Decisions a gradient step, each with its whole chain."""
    noise_least: float = 0.08
    """Smallest standard deviation of a step (authors')."""
    noise_most: float = 0.14
    """Largest standard deviation of a step (authors' for Robomimic; 0.16 to 0.24 elsewhere)."""
    noise_width: int = 64
    """Hidden width of the noise network (authors')."""
    clip_eps: float = 0.01
    """Clip range of the ratio (authors')."""
    numbers: Literal["mean", "sum"] = "mean"
    """How the log-densities of a chain's numbers become that of the chain: the joint density is their sum, as in the
    paper; the authors' code takes the mean, and the clip range is meant for it."""
    entropy: float = 0.0
    """Weight of the mean entropy of a number, which drives the noise to its most; with 0 it falls to its least. Authors
    0.01 for Robomimic, whose robot LIBERO has, 0.03 for locomotion, 0 for shortcut models."""
    gamma: float = 0.99
    """Discount a decision (authors')."""
    gae_lambda: float = 0.95
    """Lambda of the advantage estimator (authors')."""
    target_kl: float = 0.01
    """An iteration's epochs end early beyond this divergence (authors' for Robomimic and Franka Kitchen)."""
    warmup: int = 0
    """First iterations in which only the critic learns, at most all but the run's last; authors 0 to 10."""
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
        check_learned_noise(self)


def check_learned_noise(settings: Any) -> None:
    """Raises BenchError if a setting that `ReinFlow` reads is out of range."""
    check_actor_critic(settings)
    if not 0 < settings.noise_least <= settings.noise_most < float("inf"):
        raise BenchError(
            f"algo.noise_least: {settings.noise_least}; it must be above 0, and at most algo.noise_most, which is "
            f"{settings.noise_most} and must be finite"
        )
    if settings.noise_lr <= 0:
        raise BenchError(f"algo.noise_lr: {settings.noise_lr}; it must be above 0")
    if settings.noise_width < 1:
        raise BenchError(f"algo.noise_width: {settings.noise_width}; it must be at least 1")
    if settings.entropy < 0:
        raise BenchError(f"algo.entropy: {settings.entropy}; it must be at least 0")
    if settings.target_kl <= 0:
        raise BenchError(f"algo.target_kl: {settings.target_kl}; it must be above 0")
    if not 0 < settings.clip_eps < 1:
        raise BenchError(f"algo.clip_eps: {settings.clip_eps}; it must be in (0, 1)")


class ReinFlow(Algorithm):
    """PPO on the joint density of a flow's steps under learned noise."""

    name = "reinflow"
    summary = "ReinFlow (Zhang et al.): PPO on the joint density of a flow's steps under learned noise"
    requires = frozenset({"flow", "likelihood"})
    learns_from = "rollouts"
    Settings = ReinFlowSettings
    search = MappingProxyType({"lr": (4.5e-6, 1.5e-5, 4.5e-5), "clip_eps": (0.001, 0.002, 0.01), "epochs": (2, 4, 8)})

    def __init__(self, settings: Any, policy: StochasticFlow, budget: Budget, seed: int) -> None:
        from vlarl_bench.policies.noise import LearnedNoise

        self.settings = s = settings
        shape = (policy.feature_dim, policy.chunk, policy.latent_dim)
        self.noise = LearnedNoise(*shape, s.noise_least, s.noise_most, s.noise_width, seed).to(policy.device)
        noise = {"params": list(self.noise.parameters()), "initial_lr": s.noise_lr}
        groups: list[dict[str, Any]] = [{"params": only_actor_learns(policy)}, noise]
        optimizer = torch.optim.AdamW(groups, lr=s.lr, weight_decay=0.0, fused=True)
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
        """[B, 1] log-density of the executed numbers of each chain, summed or averaged over steps and numbers."""
        assert taken.trace is not None
        found = policy.log_prob(taken.view(i), taken.trace[i], taken.mask[i], self.noise)
        logp, numbers = found.logp.sum((1, 2)), found.mask.sum((1, 2))
        if self.settings.numbers == "mean":
            logp = logp / numbers.clamp_min(1)
        return Score(logp[:, None], (numbers > 0)[:, None], found.entropy.sum((1, 2)), numbers)

    def state_dict(self) -> dict[str, Any]:
        """Noise network, optimiser, critic and generator."""
        return {**self.learner.state_dict(), "noise": self.noise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.learner.load_state_dict(state)
        self.noise.load_state_dict(state["noise"])
