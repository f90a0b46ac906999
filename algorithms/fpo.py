"""FPO: reinforcement fine-tuning of flow-matching policies (Lyu et al., 2025, arXiv 2510.09976).

Not McAllister et al.'s FPO (2507.21053), which shares the idea of a ratio made from flow-matching losses.

A flow policy has no cheap likelihood. FPO replaces the log-probability ratio of PPO by the change of the conditional
flow-matching (CFM) loss on the chunk that was executed: a chunk that the new policy would denoise better has become
more likely. The paper leaves several points open; each reading is a setting, and docs/methods/fpo.md says which one
works here and why. Equations are numbered as in the paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.decisions import decisions
from vlarl_bench.distributed import descend, own, spread
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import (
    anneal,
    clipped_surrogate,
    draw_times,
    gae,
    minibatches,
    only_actor_learns,
    standardise,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.base import DenoisingPolicy, FlowPolicy, Sample
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")

LEARNERS = ("optimizer", "critic", "target", "critic_optimizer")


@dataclass(frozen=True)
class FPOSettings:
    """The paper gives no values; these are ours, found as docs/experiments.md tells."""

    lr: float = 1e-5
    """Actor learning rate (Adam) of the first iteration."""
    anneal_lr: bool = True
    """Whether the learning rate falls linearly towards 0 over the budget's iterations, as the other methods' does."""
    epochs: int = 4
    """Passes over an iteration's decisions."""
    minibatch: int = 128
    """Decisions a gradient step; each counts with all its draws."""
    draws: int = 4
    """Stored (tau, eps) pairs a decision."""
    tau_min: float = 0.2
    """Smallest tau drawn (1 = noise) of flow policies (`draw_times` says why); the paper draws from all of [0, 1]."""
    clip_eps: float = 0.02
    """Clip range e of eq. 4; 0 turns clipping off (ablation)."""
    ratio: Literal["difference", "scaled", "standardised", "none"] = "difference"
    """rho from the loss change dl (eq. 2-3): `difference` exp(beta dl); `scaled` exp(beta dl / std);
    `standardised` exp(beta (dl - mean) / std), the paper's eq. 3; `none` ascends min Q through the sampler instead
    (the paper's ablation without the CFM ratio)."""
    beta: float = 1.0
    """Scale in the exponent of the ratio; 1 for `difference`, about 0.1 for the standardised readings."""
    std_floor: float = 0.1
    """Smallest standard deviation that dl is divided by; on the first pass dl is 0 for every sample."""
    drift_penalty: float = 1.0
    """Weight of relu(-mean dl), which holds the mean loss: noise raises it and `standardised` cannot see it."""
    ratio_gradient: Literal["through", "weight"] = "through"
    """`through` differentiates rho as PPO does; `weight` stops the gradient at rho and weighs the CFM loss by it."""
    gamma: float = 0.99
    """Discount a decision (one executed chunk)."""
    gae_lambda: float = 0.3
    """Lambda of the advantage estimator, of all methods with a critic; the paper names none."""
    advantage_centre: Literal["task", "batch"] = "task"
    """What the mean advantage is taken over: each task, or the batch, where a hard task is nothing but bad examples."""
    critics: int = 2
    """Members of the Q-ensemble (eq. 5-6); 1 is the paper's single-critic ablation."""
    critic_lr: float = 1e-3
    """Critic learning rate (Adam)."""
    critic_steps: int = 300
    """Critic gradient steps an iteration."""
    critic_batch: int = 256
    """Decisions a critic gradient step."""
    critic_width: int = 256
    """Hidden width of each critic."""
    critic_target: Literal["td", "return"] = "return"
    """`td`: bootstrapped min over target critics (eq. 5); `return`: the episode's discounted return."""
    polyak: float = 0.05
    """Step of the target critics towards the critics after each gradient step (`td` only)."""
    window: int = 4
    """Iterations kept in the replay window."""
    value_chunk: Literal["fresh", "stored"] = "fresh"
    """Chunk at which V(s) = min Q(s, x) is read; `stored` makes the baseline depend on the action it judges."""
    explore_steps: int = 1
    """K of eq. 7, multi-step latent exploration; 1 executes the sampled chunk itself."""
    explore_size: float = 0.1
    """eta of eq. 7."""
    explore_time: float = 0.5
    """Flow time (1 = noise) at which eq. 7 asks for the velocity."""
    bootstrap_time_limit: bool = False
    """Whether running out of time is a cut-off to bootstrap from; False counts it as a failure, as success rates do."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        counts = ("epochs", "minibatch", "draws", "critics", "critic_batch", "critic_width", "window", "explore_steps")
        for names, fits, right in (
            (("lr", "beta", "std_floor", "critic_lr", "explore_size"), lambda x: x > 0, "above 0"),
            (counts, lambda x: x >= 1, "at least 1"),
            (("critic_steps", "drift_penalty"), lambda x: x >= 0, "at least 0"),
            (("gamma", "gae_lambda", "polyak", "explore_time"), lambda x: 0 < x <= 1, "in (0, 1]"),
            (("tau_min",), lambda x: 0 <= x < 1, "in [0, 1)"),
            (("clip_eps",), lambda x: 0 <= x < 1, "in [0, 1), 0 turns clipping off"),
        ):
            for name in names:
                if not fits(getattr(self, name)):
                    raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be {right}")
        if self.bootstrap_time_limit and self.critic_target == "return":
            raise BenchError("algo.bootstrap_time_limit: True; it must go with algo.critic_target 'td'")


def chunk_loss(policy: DenoisingPolicy, context: Any, latent: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """[B, K] CFM losses: squared error averaged over the executed steps (mask [B, H]) and the action's own numbers.

    A sum, or a mean that counts steps that were never executed, scales the ratio away from 1."""
    error = policy.draw_loss(context, latent, t, noise)[..., : policy.action_dim]
    return (error * mask[:, None, :, None]).sum((2, 3)) / (mask.sum(1, keepdim=True) * error.shape[-1])


def cfm_ratio(difference: Tensor, settings: FPOSettings) -> Tensor:
    """rho of eq. 3 from dl = old loss - new loss, any shape; statistics are over all elements and not differentiated.

    The exponent is clamped to [-3, 3] so that one wild draw cannot overflow."""
    exponent = difference
    if settings.ratio != "difference":
        centre = difference.mean().detach() if settings.ratio == "standardised" else 0.0
        exponent = (difference - centre) / difference.std(unbiased=False).detach().clamp_min(settings.std_floor)
    return torch.exp((settings.beta * exponent).clamp(-3.0, 3.0))


def actor_loss(new: Tensor, old: Tensor, advantage: Tensor, settings: FPOSettings) -> tuple[Tensor, Tensor]:
    """Scalar loss (eq. 4) from [B, K] new and stored losses and [B] advantages, and the [B, K] ratio.

    One advantage serves all draws of a decision: the credit of the whole executed chunk.
    """
    difference = old - new
    ratio = cfm_ratio(difference, settings)
    advantage = advantage[:, None]
    if settings.ratio_gradient == "weight":
        low, high = (1 - settings.clip_eps, 1 + settings.clip_eps) if settings.clip_eps else (0.0, torch.inf)
        loss = (ratio.detach().clamp(low, high) * advantage * new).mean()
    elif settings.clip_eps:
        loss = -clipped_surrogate(ratio, advantage, settings.clip_eps).mean()
    else:
        loss = -(ratio * advantage).mean()
    if settings.drift_penalty:
        loss = loss + settings.drift_penalty * torch.relu(-difference.mean())
    return loss, ratio


class FPO(Algorithm):
    """Flow policy optimisation with CFM ratios, whole-chunk credit, latent exploration and a Q-ensemble."""

    name = "fpo"
    summary = "Flow policy optimisation (Lyu et al.): PPO on CFM-loss ratios, Q-ensemble, latent exploration"
    requires = frozenset({"denoising"})
    learns_from = "rollouts"
    Settings = FPOSettings
    search = MappingProxyType({"lr": (3e-6, 1e-5, 3e-5), "clip_eps": (0.01, 0.02, 0.05), "epochs": (2, 4, 8)})

    def __init__(self, settings: FPOSettings, policy: DenoisingPolicy, budget: Budget, seed: int) -> None:
        """Raises BenchError if the settings need a velocity and the policy has none."""
        from vlarl_bench.critics import QEnsemble

        for name, fits in (("explore_steps", settings.explore_steps == 1), ("ratio", settings.ratio != "none")):
            if not fits and "flow" not in policy.capabilities:
                raise BenchError(f"algo.{name}: {getattr(settings, name)!r}; only flow policies have a velocity")
        self.settings, self.iterations, self.updates = settings, budget.iterations, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.actor = only_actor_learns(policy)
        self.optimizer = torch.optim.Adam(self.actor, lr=settings.lr, fused=True)
        shape = (settings.critics, policy.feature_dim + 1, policy.chunk * policy.latent_dim, settings.critic_width)
        self.critic, self.target = (QEnsemble(*shape, self.generator) for _ in range(2))
        self.target.load_state_dict(self.critic.state_dict())
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_lr, fused=True)
        self.replay: list[dict[str, Tensor]] = []

    def act(self, policy: DenoisingPolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Samples a chunk and refines it K - 1 times (eq. 7): x <- x + eta v, in pi0's sign x <- x - eta v."""
        sample = policy.sample(context, generators)
        if self.settings.explore_steps == 1:
            return sample
        x, flow = sample.latent, cast("FlowPolicy", policy)
        t = torch.full((len(x), 1), self.settings.explore_time)
        for _ in range(self.settings.explore_steps - 1):
            x = x - self.settings.explore_size * flow.velocity(context, x[:, None], t)[:, 0]
        return dataclasses.replace(sample, actions=policy.unnormalise(x), latent=x)

    def update(self, policy: DenoisingPolicy, rollout: Rollout) -> dict[str, float]:
        """Critic steps on the replay window, then clipped actor epochs on this rollout."""
        s = self.settings
        if s.anneal_lr:
            anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        data = self._data(policy, taken := decisions(policy, rollout))
        # Judged before these episodes are learned from, or it would say how well they are remembered.
        metrics = self._foresight(data) if self.replay else {}
        self.replay = [*self.replay, data][-s.window :]
        metrics |= self._fit_critic()
        advantage = self._advantages(data)
        metrics |= {"advantage_std": float(advantage.std(correction=0))}
        advantage = standardise(advantage, taken.task if s.advantage_centre == "task" else 0 * taken.task)
        if s.ratio == "none":
            return metrics | self._ascend_critic(cast("FlowPolicy", policy), taken)
        return metrics | self._ascend_surrogate(policy, taken, advantage)

    def _data(self, policy: DenoisingPolicy, taken: Decisions) -> dict[str, Tensor]:
        """What the critics need of each decision; `fresh` chunks are the present policy's own."""
        s = self.settings
        seen = torch.arange(int(taken.row[-1]) + 2)
        seeds = torch.randint(2**62, (len(seen),), generator=self.generator)[own(len(seen))].tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            fresh = spread(lambda _: policy.sample_round(taken.context, generators), seen)
        value, following = fresh[taken.row], fresh[taken.row + 1]
        next_value = following
        if s.value_chunk == "stored":
            value = taken.latent
            next_value = torch.where(taken.ended[:, None, None], following, taken.latent.roll(-1, 0))
        return {
            "features": taken.features,
            "latent": taken.latent,
            "reward": taken.reward,
            "ended": taken.ended,
            "terminated": taken.reward > 0 if s.bootstrap_time_limit else taken.ended,
            "returns": taken.returns(s.gamma),
            "value_chunk": value,
            "next_features": taken.next_features,
            "next_chunk": following,
            "next_value_chunk": next_value,
        }

    def _fit_critic(self) -> dict[str, float]:
        """Eq. 5-6: regression to the bootstrapped minimum of the target ensemble, or to returns."""
        s = self.settings
        replay = {key: torch.cat([data[key] for data in self.replay]) for key in self.replay[0]}
        for critic in (self.critic, self.target):
            critic.standardise(replay["features"])
        loss = torch.zeros(())
        for _ in range(s.critic_steps):
            i = torch.randint(len(replay["reward"]), (s.critic_batch,), generator=self.generator)
            if s.critic_target == "td":
                with torch.no_grad():
                    following = self.target(replay["next_features"][i], replay["next_chunk"][i]).amin(0)
                    goal = replay["reward"][i] + s.gamma * following * ~replay["terminated"][i]
            else:
                goal = replay["returns"][i]
            loss = ((self.critic(replay["features"][i], replay["latent"][i]) - goal) ** 2).mean()
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()
            if s.critic_target == "td":
                self.target.follow(self.critic, s.polyak)
        return {"critic_loss": loss.item()}

    def _foresight(self, data: dict[str, Tensor]) -> dict[str, float]:
        """How well the critics, all together, foresaw the round's returns."""
        from vlarl_bench.critics import explained_variance

        with torch.no_grad():
            return explained_variance(data["returns"], self.critic(data["features"], data["latent"]).mean(0))

    def _advantages(self, data: dict[str, Tensor]) -> Tensor:
        """[n] GAE with V(s) = min_i Q_i(s, x)."""
        with torch.no_grad():
            values = self.critic(data["features"], data["value_chunk"]).amin(0)
            next_values = self.critic(data["next_features"], data["next_value_chunk"]).amin(0)
        reward, terminated, ended = (data[key].numpy() for key in ("reward", "terminated", "ended"))
        s = self.settings
        found = gae(reward, values.numpy(), next_values.numpy(), terminated, ended, s.gamma, s.gae_lambda)
        return torch.from_numpy(found.astype(np.float32))

    def _ascend_surrogate(self, policy: DenoisingPolicy, taken: Decisions, advantage: Tensor) -> dict[str, float]:
        """Eq. 4 over stored (tau, eps): the same draws score the old and the new policy, in every epoch."""
        s = self.settings
        latent, mask, n = taken.latent, taken.mask, len(taken)
        t = draw_times(policy, (n, s.draws), s.tau_min, self.generator)
        noise = torch.randn(n, s.draws, *latent.shape[1:], generator=self.generator)

        losses = taken.spread(lambda i: chunk_loss(policy, taken.view(i), latent[i], mask[i], t[i], noise[i]))
        with torch.no_grad():
            old = torch.cat([losses(i) for i in torch.arange(n).split(s.minibatch)])
        seen: dict[str, list[float]] = {"clip_fraction": [], "ratio_off_one": [], "cfm_drift": []}
        for i in minibatches(n, s.minibatch, s.epochs, self.generator):
            new = losses(i)
            loss, ratio = actor_loss(new, old[i], advantage[i], s)
            off = (ratio.detach() - 1).abs()
            if not seen["cfm_drift"] and not float(off.max()) <= 1e-3:  # also when it is not a number
                raise BenchError(
                    f"ratio: off 1 by {float(off.max()):.2g} before the first update; the same policy must have the "
                    "same losses at the same draws"
                )
            descend(self.optimizer, loss, 1.0)
            seen["clip_fraction"].append(float((off > s.clip_eps).float().mean()))
            seen["ratio_off_one"].append(float(off.mean()))
            seen["cfm_drift"].append(float((new.detach() - old[i]).mean()))
        seen["cfm_drift"] = seen["cfm_drift"][-math.ceil(n / s.minibatch) :]  # how far the last epoch was
        return {"cfm_loss": float(old.mean())} | {name: float(np.mean(values)) for name, values in seen.items()}

    def _ascend_critic(self, policy: FlowPolicy, taken: Decisions) -> dict[str, float]:
        """The ablation without the CFM ratio: the chunk itself climbs min Q, through ten Euler steps of the flow."""
        values, s = [], self.settings
        for i in minibatches(len(taken), s.minibatch, s.epochs, self.generator):
            value = self._fresh_values(policy, taken, i).mean()
            descend(self.optimizer, -value, 1.0)
            values.append(value.item())
        return {"chunk_value": float(np.mean(values))}

    def _fresh_values(self, policy: FlowPolicy, taken: Decisions, i: Tensor) -> Tensor:
        """[B] values of fresh chunks for the decisions i [B], differentiable."""
        noise = torch.randn(taken.latent[i].shape, generator=self.generator)[:, None]

        def value(mine: Tensor) -> Tensor:
            view, x = taken.view(i[mine]), noise[mine]
            for step in range(10):
                x = x - 0.1 * policy.velocity(view, x, torch.full((len(x), 1), 1 - 0.1 * step))
            return self.critic(taken.features[i[mine]], x[:, 0]).amin(0)

        return spread(value, taken.row[i])

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, critics, replay window and generator."""
        return {
            **{name: getattr(self, name).state_dict() for name in LEARNERS},
            "generator": self.generator.get_state(),
            "replay": list(self.replay),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        for name in LEARNERS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.replay, self.updates = list(state["replay"]), state["updates"]
