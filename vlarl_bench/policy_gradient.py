"""What policy-gradient methods share: advantages over decisions, PPO's clipped surrogate and its epochs, and what a
method with a learned state value keeps.

Shapes: E episodes and N decisions of a round, B of a minibatch, U units that a decision's likelihood is judged in
(tokens, denoising steps, or 1 for the whole chunk).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .distributed import descend
from .errors import BenchError, Diverged
from .lazy import lazy_import

if TYPE_CHECKING:
    import torch

    from .config import Budget
    from .critics import ValueCritic
    from .decisions import Decisions
    from .policies.base import Policy
else:
    torch = lazy_import("torch")


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """Generalised advantage estimates (Schulman et al., 2016, eq. 16) of [n] consecutive decisions.

    `terminated` decisions have no future worth bootstrapping; `ended` ones (terminated, or cut off by a time limit)
    are the last of their episode, so nothing flows back over them. A cut-off decision therefore bootstraps from
    `next_values`, the value of what was seen after it.
    """
    delta = rewards + gamma * next_values * ~terminated - values
    advantages = np.zeros_like(delta)
    following = 0.0
    for i in reversed(range(len(delta))):
        following = delta[i] + (0.0 if ended[i] else gamma * lam * following)
        advantages[i] = following
    return advantages


def clipped_surrogate(
    ratio: torch.Tensor, advantage: torch.Tensor, eps: torch.Tensor | float, eps_high: float | None = None
) -> torch.Tensor:
    """Element-wise PPO objective to maximise (Schulman et al., 2017, eq. 7); shapes broadcast, nothing is reduced.

    `eps_high` widens the upper bound alone (DAPO, Yu et al., 2025, sec. 3.1)."""
    low, high = (
        torch.as_tensor(bound, dtype=ratio.dtype) for bound in (1 - eps, 1 + (eps if eps_high is None else eps_high))
    )
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def advantages(taken: Decisions, critic: ValueCritic, gamma: float, lam: float) -> torch.Tensor:
    """[N] GAE of a round's decisions. Running out of time is the end, as it is for success rates."""
    found = gae(
        taken.reward.numpy(),
        critic(taken.features).numpy(),
        critic(taken.next_features).numpy(),
        taken.ended.numpy(),
        taken.ended.numpy(),
        gamma,
        lam,
    )
    return torch.from_numpy(found.astype(np.float32))


def standardise(advantage: torch.Tensor, task: torch.Tensor, floor: float = 0.05) -> torch.Tensor:
    """[N] advantages [N] less the mean of their task [N], over the deviation of what is left.

    By task: with one mean for all a hard task is nothing but bad examples and is unlearned. Floored: near 100% (or 0%)
    success the spread is noise, and dividing by it would amplify that noise.
    """
    advantage = advantage.clone()
    for number in task.unique():
        advantage[task == number] -= advantage[task == number].mean()
    return advantage / advantage.std(correction=0).clamp_min(floor)


def mixed(outcome: torch.Tensor, start: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """[E] bool of episodes with outcomes [E] (1 success, 0 failure) and groups `start` [E]: whether an episode's group
    has both outcomes, and a share of successes from `low` to `high`. Other groups have nothing to compare."""
    kept = torch.zeros(len(outcome), dtype=torch.bool)
    for number in start.unique():
        group = start == number
        share = outcome[group].mean()
        kept[group] = (share > 0) & (share < 1) & (share >= low) & (share <= high)
    return kept


def group_advantages(outcome: torch.Tensor, start: torch.Tensor, baseline: Literal["grpo", "rloo"]) -> torch.Tensor:
    """[E] advantage of each episode within its group `start` [E], 0 in a group of one.

    `grpo`: (R - mean) / (deviation + 1e-6), the deviation over n - 1 (Shao et al., 2024, as SimpleVLA-RL computes it).
    `rloo`: R - mean of the others (Ahmadian et al., 2024).
    """
    advantage = torch.zeros_like(outcome)
    for number in start.unique():
        group = start == number
        found = outcome[group]
        if len(found) == 1:
            continue
        if baseline == "rloo":
            advantage[group] = found - (found.sum() - found) / (len(found) - 1)
        else:
            advantage[group] = (found - found.mean()) / (found.std() + 1e-6)
    return advantage


def weigh_episodes(advantage: torch.Tensor, episode: torch.Tensor) -> torch.Tensor:
    """[N] advantages of decisions of the episodes [N], such that in a mean over decisions each episode has the same
    weight, however many decisions it took. A clipped surrogate is proportional to its advantage, so this weighs it."""
    _, number, count = episode.unique(return_inverse=True, return_counts=True)
    return advantage * (len(episode) / (len(count) * count[number]))


def only_actor_learns(policy: Policy) -> list[torch.nn.Parameter]:
    """The actor's parameters, and no other of the policy's requires a gradient any more.

    Raises BenchError for a policy that came with its noise steered: what it steers is not to change under it.
    """
    policy.check_trainable()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    actor = policy.actor_parameters()
    for parameter in actor:
        parameter.requires_grad_(True)
    return actor


def anneal(optimizer: torch.optim.Optimizer, lr: float, done: int, planned: int) -> None:
    """Sets the learning rate of the iteration after `done` of `planned`: it falls linearly towards 0, so that the last
    updates settle, from `lr`, or from a parameter group's own `initial_lr`. The same for every method that learns by
    gradient steps on a policy's own weights."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", lr) * max(1 - done / planned, 0.0)


def draw_times(policy: Policy, shape: tuple[int, ...], tau_min: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform times at which a denoising loss is asked for (1 = noise), of flow policies none below `tau_min`.

    Near 0 a flow's loss asks for a noise that nothing can know, which is most of its gradient's noise, and a decoder of
    n Euler steps never looks below 1 / n. A diffusion policy's decoder looks everywhere."""
    least = tau_min if "flow" in policy.capabilities else 0.0
    return least + (1 - least) * torch.rand(*shape, generator=generator)


def minibatches(n: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Numbers below n, each epoch in another order, in parts of at most `size` that are as equal as can be: the last
    one of an epoch must not be a step on a handful."""
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).tensor_split(math.ceil(n / size))


def check_actor_critic(settings: Any) -> None:
    """Raises BenchError if a setting that `ActorCritic` and `ascend` read is out of range."""
    for name in ("lr", "critic_lr"):
        if getattr(settings, name) <= 0:
            raise BenchError(f"algo.{name}: {getattr(settings, name)}; it must be above 0")
    for name in ("epochs", "minibatch", "critic_batch", "critic_width", "window"):
        if getattr(settings, name) < 1:
            raise BenchError(f"algo.{name}: {getattr(settings, name)}; it must be at least 1")
    for name in ("warmup", "critic_steps"):
        if getattr(settings, name) < 0:
            raise BenchError(f"algo.{name}: {getattr(settings, name)}; it must be at least 0")
    for name in ("gamma", "gae_lambda"):
        if not 0 < getattr(settings, name) <= 1:
            raise BenchError(f"algo.{name}: {getattr(settings, name)}; it must be in (0, 1]")


class ActorCritic:
    """What a PPO method with a state value keeps from round to round: the actor's optimiser, the critic, a generator.

    `settings` has the fields that `check_actor_critic` names. The first `warmup` rounds train the critic alone, but at
    most all rounds of the budget but the last: a run always trains its policy.
    """

    def __init__(
        self, settings: Any, policy: Policy, optimizer: torch.optim.Optimizer, budget: Budget, seed: int
    ) -> None:
        from .critics import ValueCritic

        self.settings, self.optimizer, self.updates = settings, optimizer, 0
        self.iterations = budget.iterations
        self.warmup = min(settings.warmup, budget.iterations - 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.critic = ValueCritic(
            policy.feature_dim + 1,
            settings.critic_width,
            settings.critic_lr,
            settings.critic_steps,
            settings.critic_batch,
            settings.window,
            self.generator,
        )

    def judge(self, taken: Decisions) -> tuple[torch.Tensor | None, dict[str, float]]:
        """Fits the critic to a round; then standardised advantages [N] of its decisions (None while only the critic
        learns), and metrics."""
        s = self.settings
        metrics = self.critic.fit(taken.features, taken.returns(s.gamma))
        anneal(self.optimizer, s.lr, self.updates, self.iterations)
        self.updates += 1
        if self.updates <= self.warmup:
            return None, metrics
        advantage = advantages(taken, self.critic, s.gamma, s.gae_lambda)
        return standardise(advantage, taken.task), metrics | {"advantage_std": advantage.std(correction=0).item()}

    def ascend(
        self,
        score: Callable[[torch.Tensor], Score],
        advantage: torch.Tensor,
        clip: torch.Tensor | float,
        **options: Any,
    ) -> dict[str, float]:
        """`ascend` with the settings' epochs and minibatches; `options` are more of its arguments."""
        s = self.settings
        return ascend(score, advantage, clip, self.optimizer, self.generator, s.epochs, s.minibatch, **options)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, critic and generator."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load_state_dict(state["critic"])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]


class Score(NamedTuple):
    """How likely a minibatch of decisions is under the present policy."""

    logp: torch.Tensor
    """[B, U] log-probability of each unit."""
    mask: torch.Tensor
    """[B, U] bool: false for units that decided nothing that was executed."""
    entropy: torch.Tensor
    """[B] summed entropy of what was drawn and executed ..."""
    drawn: torch.Tensor
    """[B] ... and of how many draws that is the sum."""

    @property
    def mean_entropy(self) -> torch.Tensor:
        """Scalar: of a draw."""
        return self.entropy.sum() / self.drawn.sum().clamp_min(1)


def check_first_ratio(off: torch.Tensor) -> None:
    """Of `off`, by how much ratios differ from 1 before the first step: raises Diverged if that is no number, and
    BenchError if it is more than rounding, for then the same policy was given two scores."""
    if not off.isfinite().all():
        raise Diverged("the ratio of the policy to itself is not finite before gradient step 1")
    if float(off.max()) > 1e-3:
        raise BenchError(
            f"ratio: off 1 by {float(off.max()):.2g} before the first update; the same policy must score its own "
            "decisions alike"
        )


def ascend(
    score: Callable[[torch.Tensor], Score],
    advantage: torch.Tensor,
    clip: torch.Tensor | float,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    epochs: int,
    minibatch: int,
    clip_high: float | None = None,
    entropy: float = 0.0,
    target_kl: float = float("inf"),
    grad_norm: float = 1.0,
    objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    log_ratio_limit: float = math.inf,
    old: torch.Tensor | None = None,
) -> dict[str, float]:
    """PPO's epochs (Schulman et al., 2017, alg. 1) over N decisions; the mean is over units that count.

    `score(i)` scores the decisions i [B], on every process of the run all of them (`Decisions.spread`); `advantage` is
    [N] or [N, U]; `clip` is a number or [U], `clip_high` another upper bound; `objective(ratio [B, U], advantage)`
    takes the place of the clipped surrogate. A log-ratio beyond `log_ratio_limit` counts as that, so that no outlier
    overflows; its gradient passes as if it did not. `old` is what all score before, where that is known. Stops before
    the first step at which the policy is `target_kl` from where it began (mean over units, estimator k3 of Schulman,
    2020). Metrics are means over the steps taken; `kl` is over the last epoch's, and says how far the policy went.
    Raises BenchError if the first ratio is not 1, for then `score` gives the same policy two scores, and
    Diverged if it is no number.
    """
    n = len(advantage)
    if old is None:
        with torch.no_grad():
            old = torch.cat([score(i).logp for i in torch.arange(n).split(minibatch)])
    seen: dict[str, list[float]] = {"clip_fraction": [], "ratio_off_one": [], "kl": [], "entropy": []}
    for i in minibatches(n, minibatch, epochs, generator):
        now = score(i)
        log_ratio = torch.where(now.mask, now.logp - old[i], 0.0)
        log_ratio = log_ratio + (log_ratio.clamp(-log_ratio_limit, log_ratio_limit) - log_ratio).detach()
        ratio, units = log_ratio.exp(), now.mask.sum().clamp_min(1)
        off = (ratio.detach() - 1).abs()
        if not seen["kl"]:
            check_first_ratio(off)
        seen["kl"].append(((ratio - 1 - log_ratio) * now.mask).sum().item() / units.item())
        if seen["kl"][-1] > target_kl:
            break
        gain = advantage[i] if advantage.dim() == 2 else advantage[i, None]
        surrogate = objective(ratio, gain) if objective else clipped_surrogate(ratio, gain, clip, clip_high)
        loss = -(surrogate * now.mask).sum() / units - entropy * now.mean_entropy
        descend(optimizer, loss, grad_norm)
        beyond = (ratio < 1 - clip) | (ratio > 1 + (clip if clip_high is None else clip_high))
        seen["clip_fraction"].append((beyond & now.mask).sum().item() / units.item())
        seen["ratio_off_one"].append((off * now.mask).sum().item() / units.item())
        seen["entropy"].append(now.mean_entropy.item())
    seen["kl"] = seen["kl"][-math.ceil(n / minibatch) :]
    return {name: float(np.mean(values)) for name, values in seen.items()}
