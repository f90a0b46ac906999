"""DSRL: steering a frozen policy through its noise (Wagenmaker et al., 2025, arXiv 2506.15799).

A flow or diffusion policy that draws nothing while it decodes is a function from noise to chunks. DSRL leaves it as it
is and learns which noise to give it, by soft actor-critic (SAC; Haarnoja et al., 2018, arXiv 1812.05905) whose action
is that noise. The actor is a small network that the policy carries from then on (`policies/steering.py`).
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
from vlarl_bench.policy_gradient import anneal, only_actor_learns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlarl_bench.config import Budget
    from vlarl_bench.decisions import Decisions
    from vlarl_bench.policies.base import NoisePolicy, Sample
    from vlarl_bench.rollout import Rollout
else:
    torch = lazy_import("torch")

LEARNERS = ("optimizer", "critic", "target", "critic_optimizer", "temperature_optimizer")


@dataclass(frozen=True)
class DSRLSettings:
    """Settings; where the authors' (LIBERO with pi0, Robomimic square) differ, theirs are named."""

    bound: float = 0.7
    """b: every number of the noise lies in [-b, b]; authors 1 on LIBERO, 1.5 on square."""
    repeat: bool = added(True, before=False)
    """Whether a chunk's noise is that of one action, repeated along it (the authors with pi0), or of each of its own
    (the authors with diffusion policies)."""
    utd: float = 1.0
    """Gradient steps a collected decision, which take about as many operations as the dearest of the other methods'
    updates; authors 20."""
    batch: int = 256
    """Decisions a gradient step (authors)."""
    capacity: int = 50_000
    """Latest decisions that replay keeps; authors 10 million."""
    gamma: float = 0.99
    """Discount a decision; authors 0.999."""
    lr: float = 9e-4
    """Learning rate of the temperature, and of the actor, where it falls to 0 over the run (Adam); authors 1e-4 on
    LIBERO, 3e-4 on square, constant."""
    width: int = 128
    """Hidden width of the actor, two layers; authors three of 128 (LIBERO) or 2048 (square)."""
    critics: int = 2
    """Members of the Q-ensemble; authors 10 (LIBERO) or 2 (square)."""
    critic_reduction: Literal["min", "mean"] = added("min", before="min")
    """Which of their values counts: the least (SAC, the authors on square), or the mean (the authors on LIBERO)."""
    critic_lr: float = 3e-4
    """Critic learning rate (Adam, authors)."""
    critic_width: int = 256
    """Hidden width of each critic."""
    critic_norm: bool = True
    """Whether critics' layers are normalised (authors on LIBERO; not in SAC). Without it they ran away at once."""
    bounded: bool = True
    """Whether the values that critics learn from are held to [0, 1], which the return of an episode cannot leave: ours.
    Without it they ran away in later rounds even where normalised."""
    polyak: float = 0.02
    """Step of the target critics towards the critics after each gradient step; authors 0.005, with 20 times as many."""
    temperature: float = 0.1
    """Entropy temperature at the start; authors 1, with rewards of -1 a step. From then on it is learned."""
    temperature_lr_ratio: float = added(15.0, before=1.0)
    """The temperature's learning rate as a multiple of `lr` (authors 1, over twenty times as many steps: its logarithm
    moves by no more than its rate a step)."""
    entropy_in_target: bool = False
    """Whether entropy to come counts as value (SAC, the authors on square), or rewards alone (the authors on LIBERO).
    Where the reward is 1 and ends the episode, entropy to come soon outweighs it, and going on is worth more."""
    target_entropy: float = -0.5
    """Entropy that the temperature aims at: nats a number of w / b, of which log 2 is all (authors on LIBERO; 0 on
    square; SAC -1)."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        for name in ("bound", "utd", "lr", "critic_lr", "temperature", "temperature_lr_ratio"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        for name in ("batch", "capacity", "width", "critics", "critic_width"):
            if getattr(self, name) < 1:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be at least 1")
        for name in ("gamma", "polyak"):
            if not 0 < getattr(self, name) <= 1:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be in (0, 1]")
        if self.target_entropy >= 0.69:
            raise BenchError(
                f"algo.target_entropy: {self.target_entropy}; it must be below 0.69, the entropy of all of [-1, 1]"
            )
        if self.bounded and self.entropy_in_target:
            raise BenchError(
                "algo.bounded: True; it must be False with algo.entropy_in_target: values are more than returns then"
            )


class DSRL(Algorithm):
    """Soft actor-critic over the noise that a frozen policy decodes from."""

    name = "dsrl"
    summary = "Diffusion steering (Wagenmaker et al.): soft actor-critic over the noise of a frozen policy"
    requires = frozenset({"noise"})
    learns_from = "rollouts"
    Settings = DSRLSettings
    search = MappingProxyType({"lr": (1e-4, 3e-4, 9e-4), "bound": (0.7, 1.0, 1.5), "repeat": (False, True)})

    def __init__(self, settings: DSRLSettings, policy: NoisePolicy, budget: Budget, seed: int) -> None:
        from vlarl_bench.critics import QEnsemble
        from vlarl_bench.policies.steering import steer

        self.settings = s = settings
        self.generator, self.updates, self.iterations = torch.Generator().manual_seed(seed), 0, budget.iterations
        self.steering = steer(policy, {"bound": s.bound, "width": s.width, "repeat": s.repeat}, seed)
        self.optimizer = torch.optim.Adam(only_actor_learns(policy), lr=s.lr, fused=True)
        shape = (policy.feature_dim + 1, self.steering.own * policy.latent_dim)
        self.target_entropy = s.target_entropy * shape[1]
        self.critic = QEnsemble(s.critics, *shape, s.critic_width, self.generator, s.critic_norm)
        self.target = QEnsemble(s.critics, *shape, s.critic_width, self.generator, s.critic_norm)
        self.target.load_state_dict(self.critic.state_dict())
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=s.critic_lr, fused=True)
        self.log_temperature = torch.tensor(s.temperature).log().requires_grad_()
        rate = s.temperature_lr_ratio * s.lr
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=rate, fused=True)
        self.replay: dict[str, Tensor] = {}

    def act(self, policy: NoisePolicy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """The policy's own decoding, with its noise as trace. Until the first update that is N(0, I), cut off at b and
        repeated where it is to be."""
        noise = policy.start(context, generators).clamp(-self.settings.bound, self.settings.bound)
        noise = self.steering.spread(noise)
        return dataclasses.replace(policy.decode(context, noise), trace=noise)

    def update(self, policy: NoisePolicy, rollout: Rollout) -> dict[str, float]:
        """Adds a round to replay and takes `utd` gradient steps for each of its decisions."""
        s = self.settings
        taken = decisions(policy, rollout)
        metrics = self._foresight(taken) if self.replay else {}
        self._remember(taken)
        anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        self.steering.standardise(self.replay["features"][:, :-1])
        for critic in (self.critic, self.target):
            critic.standardise(self.replay["features"])
        seen: list[dict[str, float]] = []
        for _ in range(max(1, round(s.utd * len(taken)))):
            i = torch.randint(len(self.replay["reward"]), (s.batch,), generator=self.generator)
            batch = {key: rows[i] for key, rows in self.replay.items()}
            now, later = torch.randn(2, *batch["action"].shape, generator=self.generator)
            seen.append(self.step(batch, now, later))
        return metrics | {key: sum(one[key] for one in seen) / len(seen) for key in seen[0]}

    def step(self, batch: dict[str, Tensor], now: Tensor, later: Tensor) -> dict[str, float]:
        """One gradient step of temperature, critics and actor (Haarnoja et al., 2018, eq. 5, 7, 18), in the authors'
        order; `now` and `later` are draws of N(0, 1), of the shape of actions, for the noise at both ends of the
        transitions."""
        s = self.settings
        action, logp = self._draw(batch["features"], now)
        temperature = self.log_temperature.detach().exp()
        temperature_loss = -(self.log_temperature * (logp + self.target_entropy).detach()).mean()
        self._descend(self.temperature_optimizer, temperature_loss)

        with torch.no_grad():
            following, next_logp = self._draw(batch["next_features"], later)
            value = self._reduced(self.target(batch["next_features"], following))
            if s.entropy_in_target:
                value = value - temperature * next_logp
            if s.bounded:
                value = value.clamp(0.0, 1.0)
            goal = batch["reward"] + s.gamma * value * ~batch["ended"]
        error = self.critic(batch["features"], batch["action"]) - goal
        critic_loss = 0.5 * (error**2).mean(1).sum()
        self._descend(self.critic_optimizer, critic_loss)

        value = self._reduced(self.critic(batch["features"], action))
        actor_loss = (temperature * logp - value).mean()
        self._descend(self.optimizer, actor_loss)
        self.target.follow(self.critic, s.polyak)
        return {
            "critic_loss": critic_loss.item(),
            "actor_loss": actor_loss.item(),
            "noise_value": value.mean().item(),
            "temperature": temperature.item(),
            "temperature_loss": temperature_loss.item(),
            "entropy": -logp.mean().item() / action[0].numel(),
        }

    def _draw(self, features: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's w / b, of the actions that have their own, and its log-density [B]. It does not see the time that
        critics see: a policy is not told how much is left."""
        noise, logp = self.steering(features[:, :-1], unit)
        return self._action(noise), logp

    def _action(self, noise: Tensor) -> Tensor:
        """What critics judge of noise [B, H, A]."""
        return noise[:, : self.steering.own] / self.settings.bound

    def _reduced(self, values: Tensor) -> Tensor:
        return values.amin(0) if self.settings.critic_reduction == "min" else values.mean(0)

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = slope
        optimizer.step()

    def _remember(self, taken: Decisions) -> None:
        assert taken.trace is not None
        fresh = {
            "features": taken.features,
            "action": self._action(taken.trace),
            "reward": taken.reward,
            "ended": taken.ended,
            "next_features": taken.next_features,
        }
        old = self.replay or {key: rows[:0] for key, rows in fresh.items()}
        self.replay = {key: torch.cat((old[key], rows))[-self.settings.capacity :] for key, rows in fresh.items()}

    def _foresight(self, taken: Decisions) -> dict[str, float]:
        """How much of the spread of fresh returns the critics explain, if there is any: before they learn them."""
        from vlarl_bench.critics import explained_variance

        assert taken.trace is not None
        with torch.no_grad():
            predicted = self.critic(taken.features, self._action(taken.trace)).mean(0)
        return explained_variance(taken.returns(self.settings.gamma), predicted)

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, critics, temperature, replay and generator; the actor is a part of the policy."""
        return {
            **{name: getattr(self, name).state_dict() for name in LEARNERS},
            "log_temperature": self.log_temperature.detach().clone(),
            "replay": dict(self.replay),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        for name in LEARNERS:
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        self.replay = dict(state["replay"])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]
