"""TPO: trajectory-wise preference optimisation, as GRAPE does it (Zhang et al., 2024, arXiv 2411.19309).

Direct preference optimisation on whole episodes: of two that share task and initial state, the one that succeeded is to
become likelier than the one that failed, relative to the policy that played them, by the mean log-ratio of its
decisions. Token policies name that of a decision.
Flow and diffusion policies don't: there minus half of the squared denoising error at stored draws stands in for it, as
in Diffusion-DPO (Wallace et al., 2024, eq. 14). That is a surrogate, and metrics call it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlarl_bench.algorithm import Algorithm, uncounted
from vlarl_bench.config import added
from vlarl_bench.decisions import decisions
from vlarl_bench.distributed import descend
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import anneal, draw_times, mixed, only_actor_learns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.base import DenoisingPolicy, LikelihoodPolicy, Sample
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class TPOSettings:
    """Settings; where GRAPE's value differs, it is named."""

    lr: float = 2.7e-5
    """Actor learning rate (Adam); GRAPE 2e-5 with LoRA on 7.5 B parameters."""
    epochs: int = 4
    """Passes over an iteration's groups; a gradient step takes all pairs of one group."""
    beta: float = 0.3
    """How much a nat of an episode's log-ratio counts; GRAPE 0.1. Small values let the policy go far from the
    reference."""
    reference: Literal["round", "base"] = added("round", before="base")
    """What log-ratios are taken to: the policy as the round began, which played its episodes (GRAPE's iterations), or
    the base policy, from which pairs of later rounds begin with margins that nothing of them explains."""
    counted: Literal["success", "episode"] = added("success", before="episode")
    """What of an episode its mean is over: as many decisions as its group's longest success took (GRAPE compares
    stretches of equal length), or all, of which failures have more, most of them long after they failed."""
    group_size: int = 4
    """Episodes from each initial state; each success is paired with each failure."""
    temperature: float = 1.0
    """Softmax temperature of token policies while collecting, and in the likelihood."""
    draws: int = 4
    """Stored (t, noise) pairs a decision, for the surrogate of flow and diffusion policies."""
    tau_min: float = 0.2
    """Smallest t drawn (1 = noise) of flow policies (`draw_times` says why)."""
    deviation: float = 0.1
    """Standard deviation of the Gaussian under which the surrogate reads a denoising error. With `beta` 0.3 it makes
    beta / deviation^2 = 30; Diffusion-DPO has some 90 in these units. At deviation 1 no pair is ever told apart, and
    nothing holds the policy to the reference."""
    grad_norm: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        for name in ("lr", "beta", "temperature", "deviation", "grad_norm"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        for name in ("epochs", "draws"):
            if getattr(self, name) < 1:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.tau_min < 1:
            raise BenchError(f"algo.tau_min: {self.tau_min}; it must be in [0, 1)")
        if self.group_size < 2:
            raise BenchError(f"algo.group_size: {self.group_size}; it must be at least 2, or there are no pairs")


def preference_loss(won: Tensor, lost: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Scalar loss from log-ratios to the reference of S successes [S] and F failures [F]: the mean over all pairs of
    -log sigmoid(beta (won - lost)). Also the margins [S, F], beta (won - lost)."""
    margin = beta * (won[:, None] - lost[None])
    return -torch.nn.functional.logsigmoid(margin).mean(), margin


class TPO(Algorithm):
    """Preferences between episodes from one initial state, relative to the policy as the round, or the run, began."""

    name = "tpo"
    summary = "Trajectory-wise preference optimisation (GRAPE): DPO on episodes that share task and initial state"
    requires = frozenset({"likelihood"})
    learns_from = "rollouts"
    Settings = TPOSettings
    search = MappingProxyType({"lr": (9e-6, 2.7e-5, 8e-5), "beta": (0.1, 0.3, 1.0), "epochs": (2, 4, 8)})

    def __init__(self, settings: TPOSettings, policy: Any, budget: Budget, seed: int) -> None:
        self.settings, self.group = settings, settings.group_size
        self.tokens = "tokens" in policy.capabilities
        if not self.tokens and "denoising" not in policy.capabilities:
            raise BenchError(f"policy: {policy.config['policy']!r} has neither tokens nor a denoising loss")
        self.generator = torch.Generator().manual_seed(seed)
        self.actor = only_actor_learns(policy)
        self.reference = [parameter.detach().clone() for parameter in self.actor]
        self.optimizer = torch.optim.Adam(self.actor, lr=settings.lr, fused=True)
        self.iterations, self.updates = budget.iterations, 0

    def act(self, policy: LikelihoodPolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Draws tokens at the collecting temperature and keeps them; the policy's own sampling where there are none."""
        if not self.tokens:
            return policy.sample(context, generators)
        assert generators is not None
        return policy.explore(context, generators, self.settings.temperature)

    def update(self, policy: Any, rollout: Rollout) -> dict[str, float]:
        """Gradient steps on the pairs of each group that has any; none, and nothing is done."""
        s = self.settings
        anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        taken = decisions(policy, rollout)
        outcome, start = taken.reward[taken.ended], taken.start[taken.ended]
        groups = start[mixed(outcome, start)].unique()
        metrics = {"groups_used": len(groups) / len(start.unique())}
        if not len(groups):
            return metrics
        if s.reference == "round":
            self.reference = [parameter.detach().clone() for parameter in self.actor]
        score = taken.spread(self._likelihood(policy, taken) if self.tokens else self._surrogate(policy, taken))
        counts = self._counts(taken, outcome, start)
        rows = {int(group): ((taken.start == group) & counts).nonzero()[:, 0] for group in groups}
        # Failures last until time is up: with sums, making everything unlikely would tell them from successes.
        length = taken.episode[counts].bincount(minlength=len(outcome)).clamp_min(1)
        if not self.tokens:
            with torch.no_grad(), uncounted():  # also of groups without pairs, which no gradient step sees
                errors = -2 * s.deviation**2 * torch.cat([score(i) for i in torch.arange(len(taken)).split(128)])
                metrics["cfm_loss"] = float((errors / (taken.mask.sum(1) * policy.action_dim)).mean())
        with self._at_reference(), torch.no_grad():
            reference = {group: score(i) for group, i in rows.items()}
        seen: dict[str, list[float]] = {"loss": [], "preferred": [], "won": [], "lost": []}
        for _ in range(s.epochs):
            for group in groups[torch.randperm(len(groups), generator=self.generator)].tolist():
                i = rows[group]
                ratio = torch.zeros(len(outcome)).index_add(0, taken.episode[i], score(i) - reference[group]) / length
                won, lost = (ratio[(start == group) & (outcome == value)] for value in (1, 0))
                loss, margin = preference_loss(won, lost, s.beta)
                descend(self.optimizer, loss, s.grad_norm)
                seen["loss"].append(loss.item())
                seen["preferred"].append((margin > 0).float().mean().item())
                seen["won"].append(won.mean().item())
                seen["lost"].append(lost.mean().item())
        mean = {name: float(np.mean(values)) for name, values in seen.items()}
        kind = "tpo" if self.tokens else "tpo_surrogate"
        return metrics | {
            f"{kind}_loss": mean["loss"],
            "preference_accuracy": mean["preferred"],
            f"{kind}_log_ratio_won": mean["won"],
            f"{kind}_log_ratio_lost": mean["lost"],
        }

    def _counts(self, taken: Decisions, outcome: Tensor, start: Tensor) -> Tensor:
        """[N] bool: whether a decision is among those that its episode is judged by; `outcome` and `start` are [E]. Of
        groups without a success, which have no pairs, none is where `counted` is `success`."""
        if self.settings.counted == "episode":
            return torch.ones(len(taken), dtype=torch.bool)
        length = taken.episode.bincount()
        longest = torch.zeros_like(start).scatter_reduce(0, start, length * (outcome > 0), "amax")
        place = torch.arange(len(taken)) - (length.cumsum(0) - length)[taken.episode]
        return place < longest[taken.start]

    def _likelihood(self, policy: LikelihoodPolicy, taken: Decisions) -> Callable[[Tensor], Tensor]:
        """[B] log-probability of the executed chunks of the decisions i [B]: the sum over their tokens."""
        trace = taken.trace
        assert trace is not None

        def score(i: Tensor) -> Tensor:
            found = policy.log_prob(taken.view(i), trace[i], taken.mask[i], self.settings.temperature)
            return found.logp.flatten(1).sum(1)

        return score

    def _surrogate(self, policy: DenoisingPolicy, taken: Decisions) -> Callable[[Tensor], Tensor]:
        """[B] minus half of the squared denoising error of the executed chunks i [B], over the variance, summed over
        their numbers and averaged over draws that stay the same: up to a constant the log-density of what the network
        is asked to predict under a Gaussian."""
        n, k, variance = len(taken), self.settings.draws, self.settings.deviation**2
        t = draw_times(policy, (n, k), self.settings.tau_min, self.generator)
        noise = torch.randn(n, k, *taken.latent.shape[1:], generator=self.generator)

        def score(i: Tensor) -> Tensor:
            error = policy.draw_loss(taken.view(i), taken.latent[i], t[i], noise[i])[..., : policy.action_dim]
            return -0.5 / variance * (error * taken.mask[i][:, None, :, None]).sum((2, 3)).mean(1)

        return score

    @contextmanager
    def _at_reference(self) -> Iterator[None]:
        """Lends the actor the reference's weights."""
        now = [parameter.detach().clone() for parameter in self.actor]
        try:
            self._put(self.reference)
            yield
        finally:
            self._put(now)

    def _put(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self.actor, weights, strict=True):
                parameter.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """Reference, optimiser, generator and how many updates there were."""
        return {
            "reference": [weight.clone() for weight in self.reference],
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.reference = [weight.clone() for weight in state["reference"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]
