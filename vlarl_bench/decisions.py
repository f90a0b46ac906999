"""A round's episodes as learners want them: one row a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .distributed import Rows, own, rank, shared, spread, world_size
from .errors import BenchError
from .lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .policies.base import Policy
    from .rollout import Rollout
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class Decisions:
    """N decisions in the order in which they were taken, episode after episode."""

    context: Any
    """Every observation of the round, encoded: n + 1 rows for an episode of n decisions. Where a run has several
    processes, those rows that are this one's (`distributed.own`)."""
    row: Tensor
    """[N] number of the observation that a decision was taken from; the next one shows what it led to."""
    features: Tensor
    """[N, F + 1] what a critic sees: the policy's features, and how much of the episode's time is over (0 to 1)."""
    next_features: Tensor
    """[N, F + 1] the same of what a decision led to."""
    latent: Tensor
    """[N, H, A] the normalised chunk."""
    trace: Tensor | None
    """[N, ...] all that was drawn for it, where the policy kept that."""
    mask: Tensor
    """[N, H] 1 for the actions that were executed."""
    reward: Tensor
    """[N] 1 where the task was solved, else 0."""
    ended: Tensor
    """[N] bool, the last of its episode."""
    task: Tensor
    """[N] number of its task, counted from 0 in the order of first appearance."""
    episode: Tensor
    """[N] number of its episode."""
    start: Tensor
    """[N] number of its group: the episodes that share task and initial state."""

    def __len__(self) -> int:
        return len(self.row)

    def view(self, i: Tensor) -> Any:
        """The encoded observations of the decisions `i`. Raises BenchError if another process of the run holds one."""
        row = self.row[i]
        if world_size() > 1 and (row % world_size() != rank()).any():
            raise BenchError("processes: this method cannot share a run; it scores decisions without Decisions.spread")
        return self.context.index(row // world_size())

    def spread(self, score: Callable[[Tensor], Rows]) -> Callable[[Tensor], Rows]:
        """`score`, of decisions i [B], such that each process scores those whose observation it holds, and all of them
        get all values."""
        return lambda i: spread(lambda mine: score(i[mine]), self.row[i])

    def returns(self, gamma: float) -> Tensor:
        """[N] discounted sum of the rewards from a decision to its episode's end; running out of time is a failure."""
        found = torch.zeros(len(self))
        following = 0.0
        for i in reversed(range(len(self))):
            following = float(self.reward[i]) + (0.0 if self.ended[i] else gamma * following)
            found[i] = following
        return found


def decisions(policy: Policy, rollout: Rollout) -> Decisions:
    """Encodes a round's observations, without gradients, and lines up what was decided."""
    episodes = rollout.episodes
    tasks = list(dict.fromkeys(episode.job.task for episode in episodes))
    starts = [(episode.job.task, episode.job.init_state) for episode in episodes]
    groups = list(dict.fromkeys(starts))
    first = 0
    time: list[float] = []
    row: list[int] = []
    last: list[bool] = []
    solved: list[float] = []
    for episode in episodes:
        n = len(episode.latents)
        row += range(first, first + n)
        first += n + 1
        time += [i / rollout.max_decisions[episode.job.task.suite] for i in range(n + 1)]
        last += [False] * (n - 1) + [True]
        solved += [0.0] * (n - 1) + [float(episode.success)]
    seen = [seen for episode in episodes for seen in episode.observations]
    with torch.no_grad():
        with shared():
            context, mine = policy.encode_round([seen[i] for i in own(len(seen)).tolist()])
        features = spread(lambda _: mine, torch.arange(len(seen)))
        features = torch.cat([features, torch.tensor(time)[:, None]], dim=1)
    latent = torch.from_numpy(np.stack([x for episode in episodes for x in episode.latents]))
    traces = [x for episode in episodes for x in episode.traces]
    executed = torch.tensor([n for episode in episodes for n in episode.executed])
    return Decisions(
        context=context,
        row=torch.tensor(row),
        features=features[row],
        next_features=features[torch.tensor(row) + 1],
        latent=latent,
        trace=torch.from_numpy(np.stack(traces)) if traces else None,
        mask=(torch.arange(latent.shape[1]) < executed[:, None]).float(),
        reward=torch.tensor(solved),
        ended=torch.tensor(last),
        task=torch.tensor([tasks.index(episode.job.task) for episode in episodes for _ in episode.latents]),
        episode=torch.tensor([number for number, episode in enumerate(episodes) for _ in episode.latents]),
        start=torch.tensor([groups.index(start) for start, e in zip(starts, episodes, strict=True) for _ in e.latents]),
    )
