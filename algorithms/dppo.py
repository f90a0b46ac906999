"""DPPO: diffusion policy policy optimisation (Ren et al., 2024, arXiv 2409.00588).

A diffusion policy's chunk is the end of a denoising chain, and each step of the chain is a Gaussian whose density is
known. DPPO runs PPO on that two-layer Markov decision process (sec. 4): GAE over the environment's decisions, an
advantage discounted again along the chain, and a clip range that widens along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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
class DPPOSettings:
    """Settings; where the authors' (Robomimic square, state) differ, theirs are named."""

    lr: float = 1e-5
    """Actor learning rate (AdamW); authors 1e-4, with which a step here leaves the clip range."""
    epochs: int = 8
    """Passes over an iteration's decisions; authors 10."""
    minibatch: int = 128
    """Decisions a gradient step, each with its whole chain; authors 10,000 denoising steps."""
    steps: int = 10
    """Last steps of the chain that are fine-tuned (authors' K' = 10 of 20); a shorter chain is fine-tuned whole."""
    noise: float = 0.1
    """Least standard deviation of a step, while collecting and in the likelihood (authors' sigma_min). A flow's Euler
    step has none of its own, so there it is that of every step."""
    clip_eps: float = 0.03
    """Clip range at the last, cleanest step; authors 0.01."""
    clip_base: float = 0.001
    """Clip range at the first step that is fine-tuned."""
    clip_rate: float = 3.0
    """How fast the clip range rises along the chain (authors' 3); 0 lets it rise evenly."""
    gamma: float = 0.99
    """Discount a decision; authors 0.999 a step of 4 actions."""
    gae_lambda: float = 0.3
    """Lambda of the advantage estimator: ours; authors 0.95."""
    gamma_denoising: float = 0.99
    """Discount a denoising step: earlier, noisier steps get less of the credit."""
    logp_low: float = -5.0
    """Log-densities of a number are clamped from below ..."""
    logp_high: float = 2.0
    """... and from above, before their mean over numbers is taken."""
    target_kl: float = 1.0
    """An iteration's epochs end early beyond this divergence."""
    warmup: int = 0
    """First iterations in which only the critic learns, at most all but the run's last; authors 2."""
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
        for name in ("noise", "target_kl"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        if self.steps < 1:
            raise BenchError(f"algo.steps: {self.steps}; it must be at least 1")
        if self.clip_rate < 0:
            raise BenchError(f"algo.clip_rate: {self.clip_rate}; it must be at least 0")
        if not 0 < self.gamma_denoising <= 1:
            raise BenchError(f"algo.gamma_denoising: {self.gamma_denoising}; it must be in (0, 1]")
        if not 0 < self.clip_base <= self.clip_eps < 1:
            raise BenchError(
                f"algo.clip_base: {self.clip_base}; it must be above 0 and at most algo.clip_eps, {self.clip_eps}, "
                "which must be below 1"
            )
        if self.logp_low >= self.logp_high:
            raise BenchError(f"algo.logp_low: {self.logp_low}; it must be below algo.logp_high, {self.logp_high}")


def clip_schedule(steps: int, base: float, eps: float, rate: float) -> Tensor:
    """[steps] clip range of each fine-tuned step, the noisiest first: from `base` to `eps`, exponentially.

    The authors' formula divides by exp(rate) - 1 and by the number of steps less one: both may be 0.
    """
    along = torch.linspace(0, 1, steps) if steps > 1 else torch.ones(1)
    if rate > 0:
        along = torch.expm1(rate * along) / torch.expm1(torch.tensor(rate))
    return base + (eps - base) * along


class DPPO(Algorithm):
    """PPO on the steps of a denoising chain."""

    name = "dppo"
    summary = "Diffusion PPO (Ren et al.): PPO on the steps of the denoising chain, two-level discount"
    requires = frozenset({"chain"})
    learns_from = "rollouts"
    Settings = DPPOSettings
    search = MappingProxyType({"lr": (3e-6, 1e-5, 3e-5), "clip_eps": (0.01, 0.03, 0.1), "epochs": (2, 4, 8)})

    def __init__(self, settings: DPPOSettings, policy: LikelihoodPolicy, budget: Budget, seed: int) -> None:
        from vlarl_bench.policies.noise import LearnedNoise

        self.settings = settings
        self.noise: Any = settings.noise
        if "flow" in policy.capabilities:
            shape = (policy.feature_dim, policy.chunk, policy.latent_dim)
            self.noise = LearnedNoise(*shape, least=settings.noise, most=settings.noise).to(policy.device)
        optimizer = torch.optim.AdamW(only_actor_learns(policy), lr=settings.lr, weight_decay=0.0, fused=True)
        self.learner = ActorCritic(settings, policy, optimizer, budget, seed)

    def act(self, policy: LikelihoodPolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Denoises with at least `noise` at every step, and keeps the chain."""
        assert generators is not None
        return policy.explore(context, generators, self.noise)

    def update(self, policy: LikelihoodPolicy, rollout: Rollout) -> dict[str, float]:
        """The critic's regression, then clipped epochs over the last steps of this round's chains."""
        s = self.settings
        taken = decisions(policy, rollout)
        advantage, metrics = self.learner.judge(taken)
        if advantage is None:
            return metrics
        assert taken.trace is not None
        steps = min(s.steps, taken.trace.shape[1] - 1)
        discount = s.gamma_denoising ** torch.arange(steps - 1, -1, -1)
        return metrics | self.learner.ascend(
            taken.spread(lambda i: self.score(policy, taken, i, steps)),
            advantage[:, None] * discount,
            clip_schedule(steps, s.clip_base, s.clip_eps, s.clip_rate),
            target_kl=s.target_kl,
        )

    def score(self, policy: LikelihoodPolicy, taken: Decisions, i: Tensor, steps: int) -> Score:
        """[B, steps] mean log-density over the executed numbers of each of the chain's last `steps` steps.

        A mean, as the authors take it: a ratio of sums over a chunk's many numbers would leave any clip range at once.
        """
        s = self.settings
        assert taken.trace is not None
        found = policy.log_prob(taken.view(i), taken.trace[i], taken.mask[i], self.noise)
        logp, entropy, mask = (x[:, -steps:] for x in (found.logp, found.entropy, found.mask))
        numbers = mask.sum(2).clamp_min(1)
        mean = (logp.clamp(s.logp_low, s.logp_high) * mask).sum(2) / numbers
        return Score(mean, mask.any(2), (entropy * mask).sum((1, 2)), mask.sum((1, 2)))

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic and generator."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.learner.load_state_dict(state)
