"""FPO: reinforcement fine-tuning of flow-matching policies (Lyu et al., 2025, arXiv 2510.09976).

Not McAllister et al.'s FPO (2507.21053), which shares the idea of a ratio made from flow-matching losses.

A flow policy has no cheap likelihood. FPO replaces the log-probability ratio of PPO by the change of the conditional
flow-matching (CFM) loss on the chunk that was executed: a chunk that the new policy would denoise better has become
more likely. docs/methods/fpo.md has the readings of what the paper leaves open. Equations are numbered as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.config import added
from vlarl_bench.decisions import decisions
from vlarl_bench.distributed import descend, own, spread
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.policy_gradient import (
    anneal,
    check_first_ratio,
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
    from vlarl_bench.policies.base import DenoisingPolicy, Sample
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")

LEARNERS = ("optimizer", "critic", "target", "critic_optimizer")


@dataclass(frozen=True)
class FPOSettings:
    """The paper gives no values; these are ours, found as docs/experiments.md tells."""

    latent: Literal["action", "noise"] = added("action", before="action")
    """What x is: `action`, the normalised chunk, and the policy's own flow learns; `noise`, what the frozen policy
    decodes from, and a small flow over that learns (`vlarl_bench/noise_flow.py`)."""
    lr: float = 3e-5
    """Actor learning rate (Adam) of the first iteration."""
    anneal_lr: bool = True
    """Whether the learning rate falls linearly towards 0 over the budget's iterations, as the other methods' does."""
    epochs: int = 8
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
    """Scale in the exponent of the ratio; 1 for `difference`, half of `clip_eps` clips 5% where dl is standardised."""
    std_floor: float = 0.1
    """Smallest deviation that dl is divided by: on the first pass dl is 0 for all. Below it nothing is standardised."""
    drift_penalty: float = 1.0
    """Weight of relu(-mean dl), ours, against a rise of all losses, which `standardised` cannot see. Without it
    training destroyed the policy on two of three sets of tasks, and gained most on the third (docs/methods/fpo.md)."""
    ratio_gradient: Literal["through", "weight"] = "through"
    """`through` differentiates rho as PPO does; `weight` stops the gradient at rho and weighs the CFM loss by it."""
    chunk_credit: bool = added(True, before=True)
    """Whether a draw of the executed chunk has one dl and one rho (the paper), or one of each action (ablation)."""
    gamma: float = 0.99
    """Discount a decision (one executed chunk)."""
    gae_lambda: float = 0.95
    """Lambda of the advantage estimator; the paper names none."""
    advantage_centre: Literal["task", "batch"] = "task"
    """What the mean advantage is taken over: each task, or the batch, where a hard task is nothing but bad examples."""
    advantage_over: Literal["round", "minibatch"] = added("round", before="round")
    """What advantages are standardised over: a round's decisions, or each minibatch's anew (the paper)."""
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


def chunk_loss(actor: Any, context: Any, x: Tensor, mask: Tensor, t: Tensor, noise: Tensor, whole: bool) -> Tensor:
    """[B, K] CFM losses at stored draws: squared error averaged over the executed steps (mask [B, H]) and the action's
    own numbers; where they are not of the `whole` chunk, [B, K, H] those of each step. A sum, or a mean that counts
    steps that were never executed, scales the ratio away from 1."""
    error = actor.draw_loss(context, x, t, noise)[..., : actor.action_dim]
    if not whole:
        return error.mean(3)
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
    """Scalar loss (eq. 4) and ratio [N], from new and stored losses and advantages, [N] each: one advantage serves all
    that a decision has losses of."""
    difference = old - new
    ratio = cfm_ratio(difference, settings)
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

    def __init__(self, settings: FPOSettings, policy: Any, budget: Budget, seed: int) -> None:
        """Raises BenchError if the policy lacks what the settings need: noise to decode from, or a velocity."""
        from vlarl_bench.critics import QEnsemble
        from vlarl_bench.noise_flow import NoiseFlow

        if settings.latent == "noise" and "noise" not in policy.capabilities:
            raise BenchError("algo.latent: 'noise'; the policy does not decode from noise that it is given")
        self.noise = NoiseFlow(policy, seed) if settings.latent == "noise" else None
        for name, fits in (("explore_steps", settings.explore_steps == 1), ("ratio", settings.ratio != "none")):
            if not fits and "flow" not in (self.noise or policy).capabilities:
                raise BenchError(f"algo.{name}: {getattr(settings, name)!r}; only flow policies have a velocity")
        self.settings, self.iterations, self.updates = settings, budget.iterations, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(only_actor_learns(policy), lr=settings.lr, fused=True)
        shape = (settings.critics, policy.feature_dim + 1, policy.chunk * policy.latent_dim, settings.critic_width)
        self.critic, self.target = (QEnsemble(*shape, self.generator) for _ in range(2))
        self.target.load_state_dict(self.critic.state_dict())
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_lr, fused=True)
        self.replay: list[dict[str, Tensor]] = []

    def act(self, policy: Any, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Samples a latent and refines it K - 1 times (eq. 7): x <- x + eta v, in pi0's sign x <- x - eta v."""
        from vlarl_bench.policies.base import Sample

        s, actor = self.settings, self.noise or policy
        x = self.noise.sample(context, generators) if self.noise else policy.sample(context, generators).latent
        t = torch.full((len(x), 1), s.explore_time)
        for _ in range(s.explore_steps - 1):
            x = x - s.explore_size * actor.velocity(context, x[:, None], t)[:, 0]
        return self.noise.decode(context, x) if self.noise else Sample(actions=policy.unnormalise(x), latent=x)

    def update(self, policy: DenoisingPolicy, rollout: Rollout) -> dict[str, float]:
        """Critic steps on the replay window, then clipped actor epochs on this rollout."""
        from vlarl_bench.critics import explained_variance

        s, actor = self.settings, self.noise or policy
        if s.anneal_lr:
            anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        taken = self.noise.judged(decisions(policy, rollout)) if self.noise else decisions(policy, rollout)
        data = self._data(actor, taken)
        with torch.no_grad():  # before these episodes are learned from: else it said how well they are remembered
            foreseen = self.critic(data["features"], data["latent"]).mean(0)
        metrics = explained_variance(data["returns"], foreseen) if self.replay else {}
        self.replay = [*self.replay, data][-s.window :]
        metrics |= self._fit_critic()
        advantage = self._advantages(data)
        metrics |= {"advantage_std": float(advantage.std(correction=0))}
        if s.ratio == "none":
            return metrics | self._ascend_critic(actor, taken)
        return metrics | self._ascend_surrogate(actor, taken, advantage)

    def _data(self, actor: Any, taken: Decisions) -> dict[str, Tensor]:
        """What the critics need of each decision; `fresh` latents are the present policy's own."""
        seen = torch.arange(int(taken.row[-1]) + 2)
        seeds = torch.randint(2**62, (len(seen),), generator=self.generator)[own(len(seen))].tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        fresh = spread(lambda _: actor.sample_round(taken.context, generators), seen)
        value, following, next_value = fresh[taken.row], fresh[taken.row + 1], fresh[taken.row + 1]
        if self.settings.value_chunk == "stored":
            value = taken.latent
            next_value = torch.where(taken.ended[:, None, None], following, taken.latent.roll(-1, 0))
        return {
            "features": taken.features,
            "latent": taken.latent,
            "reward": taken.reward,
            "ended": taken.ended,
            "terminated": taken.reward > 0 if self.settings.bootstrap_time_limit else taken.ended,
            "returns": taken.returns(self.settings.gamma),
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
            goal = replay["returns"][i]
            if s.critic_target == "td":
                with torch.no_grad():
                    following = self.target(replay["next_features"][i], replay["next_chunk"][i]).amin(0)
                    goal = replay["reward"][i] + s.gamma * following * ~replay["terminated"][i]
            loss = ((self.critic(replay["features"][i], replay["latent"][i]) - goal) ** 2).mean()
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()
            if s.critic_target == "td":
                self.target.follow(self.critic, s.polyak)
        return {"critic_loss": loss.item()}

    def _advantages(self, data: dict[str, Tensor]) -> Tensor:
        """[n] GAE with V(s) = min_i Q_i(s, x)."""
        with torch.no_grad():
            values = self.critic(data["features"], data["value_chunk"]).amin(0)
            next_values = self.critic(data["next_features"], data["next_value_chunk"]).amin(0)
        reward, terminated, ended = (data[key].numpy() for key in ("reward", "terminated", "ended"))
        s = self.settings
        found = gae(reward, values.numpy(), next_values.numpy(), terminated, ended, s.gamma, s.gae_lambda)
        return torch.from_numpy(found.astype(np.float32))

    def _ascend_surrogate(self, actor: Any, taken: Decisions, advantage: Tensor) -> dict[str, float]:
        """Eq. 4 over stored (tau, eps): the same draws score the old and the new policy, in every epoch."""
        s = self.settings
        x, mask, n = taken.latent, taken.mask, len(taken)
        group = taken.task if s.advantage_centre == "task" else 0 * taken.task
        advantage = standardise(advantage, group) if s.advantage_over == "round" else advantage
        t = draw_times(actor, (n, s.draws), s.tau_min, self.generator)
        noise = torch.randn(n, s.draws, *x.shape[1:], generator=self.generator)
        # What has a ratio of its own: each draw of a chunk, or of each of its actions that was executed.
        judged = (torch.ones_like(t) if s.chunk_credit else mask[:, None].expand(-1, s.draws, -1)).bool()
        losses = taken.spread(lambda i: chunk_loss(actor, taken.view(i), x[i], mask[i], t[i], noise[i], s.chunk_credit))
        with torch.no_grad():
            old = torch.cat([losses(i) for i in torch.arange(n).split(s.minibatch)])
        seen: dict[str, list[float]] = {"clip_fraction": [], "ratio_off_one": [], "cfm_drift": []}
        for i in minibatches(n, s.minibatch, s.epochs, self.generator):
            gain = advantage[i] if s.advantage_over == "round" else standardise(advantage[i], group[i])
            new, before, row = losses(i)[judged[i]], old[i][judged[i]], judged[i].nonzero()[:, 0]
            loss, ratio = actor_loss(new, before, gain[row], s)
            off = (ratio.detach() - 1).abs()
            if not seen["cfm_drift"]:
                check_first_ratio(off)
            descend(self.optimizer, loss, 1.0)
            seen["clip_fraction"].append(float((off > s.clip_eps).float().mean()))
            seen["ratio_off_one"].append(float(off.mean()))
            seen["cfm_drift"].append(float((new.detach() - before).mean()))
        seen["cfm_drift"] = seen["cfm_drift"][-math.ceil(n / s.minibatch) :]  # how far the last epoch was
        return {"cfm_loss": float(old[judged].mean())} | {k: float(np.mean(values)) for k, values in seen.items()}

    def _ascend_critic(self, actor: Any, taken: Decisions) -> dict[str, float]:
        """The ablation without the CFM ratio: the latent itself climbs min Q, through ten Euler steps of the flow."""
        values, s = [], self.settings
        for i in minibatches(len(taken), s.minibatch, s.epochs, self.generator):
            noise = torch.randn(taken.latent[i].shape, generator=self.generator)[:, None]

            def fresh_value(mine: Tensor, i: Tensor = i, x: Tensor = noise) -> Tensor:
                view, x = taken.view(i[mine]), x[mine]
                for t in torch.linspace(1, 0.1, 10):
                    x = x - 0.1 * actor.velocity(view, x, t.expand(len(x), 1))
                return self.critic(taken.features[i[mine]], x[:, 0]).amin(0)

            value = spread(fresh_value, taken.row[i]).mean()
            descend(self.optimizer, -value, 1.0)
            values.append(value.item())
        return {"chunk_value": float(np.mean(values))}

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, critics, replay window and generator."""
        state = {name: getattr(self, name).state_dict() for name in LEARNERS}
        return {**state, "generator": self.generator.get_state(), "replay": list(self.replay), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        for name in LEARNERS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.replay, self.updates = list(state["replay"]), state["updates"]
