"""Episodes: the only place that steps environments.

A fixed number of slots is filled with episodes; each turn the policy decides for all slots in one batch and worker
processes execute the chunks. The batch has the same shape whatever the number of workers, every episode has its own
noise generator, and an episode in flight is an exact snapshot: so the same jobs give the same episodes with 1, 2 or 4
workers, and a worker that is lost costs time and nothing else.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .distributed import gathered, rank, world_size
from .errors import Diverged
from .suite import Observation, Task

if TYPE_CHECKING:
    import torch

    from .policies.base import Policy, Sample
    from .pool import Pool
    from .protocol import Protocol

    Act = Callable[[Policy, Any, Sequence[torch.Generator] | None], Sample]


def episode_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part (run seed, purpose, task, state, repeat) and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Job:
    """One episode to run."""

    task: Task
    init_state: int
    repeat: int
    seed: int
    """Seeds the policy's noise; the environment itself is deterministic."""


@dataclass
class Episode:
    """One finished episode of n decisions."""

    job: Job
    observations: list[Observation] = field(default_factory=list)
    """n + 1: what was seen at each decision, and after the last."""
    latents: list[np.ndarray] = field(default_factory=list)
    """n x [H, A] float32: the normalised chunks that were decoded."""
    traces: list[np.ndarray] = field(default_factory=list)
    """n x [...] all that was drawn for each of them; empty where the way of acting does not tell."""
    actions: list[np.ndarray] = field(default_factory=list)
    """n x [executed, A] float32: what the environment executed, environment units."""
    success: bool = False
    invalid: int = 0
    """Decisions at which what was drawn spelled no chunk (`Sample.invalid`)."""

    @property
    def executed(self) -> list[int]:
        """Environment steps of each decision."""
        return [len(actions) for actions in self.actions]

    @property
    def steps(self) -> int:
        """Environment steps of the episode."""
        return sum(self.executed)


@dataclass(frozen=True)
class Rollout:
    """Finished episodes, and what a learner needs to know about how they were limited."""

    episodes: Sequence[Episode]
    max_decisions: Mapping[str, int]
    """Suite -> decisions that fit into its horizon."""


def run_episodes(
    pool: Pool,
    policy: Policy,
    jobs: Sequence[Job],
    protocol: Protocol,
    slots: int,
    act: Act | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    keep_seen: bool = True,
) -> list[Episode]:
    """Runs every job and returns the episodes in the jobs' order.

    `slots` episodes are in flight at a time, and the policy always decides for exactly that many (empty slots repeat
    another's observation). `act` is the algorithm's way to act while collecting; without it the protocol's decoding is
    used. `on_episode` is called as episodes finish. Without `keep_seen` a finished episode forgets its observations:
    the images of all of them may be more than there is memory.
    """
    import torch

    waiting = deque(enumerate(jobs))
    done: list[Episode | None] = [None] * len(jobs)
    flying: dict[int, tuple[int, Episode, torch.Generator]] = {}
    while waiting or flying:
        starting: dict[int, tuple[Task, int]] = {}
        for slot in range(slots):
            if slot not in flying and waiting:
                index, job = waiting.popleft()
                flying[slot] = (index, Episode(job), torch.Generator().manual_seed(job.seed))
                starting[slot] = (job.task, job.init_state)
        for slot, seen in pool.call("reset", starting).items():
            flying[slot][1].observations.append(seen)

        sample = _decide(policy, flying, slots, protocol, act)
        latents, actions = sample.latent.numpy(), sample.actions.numpy()
        requests = {}
        for slot, (_, episode, _) in flying.items():
            left = protocol.horizon[episode.job.task.suite] - episode.steps
            requests[slot] = actions[slot][: min(protocol.execute, left)]
        for slot, (outcome, seen) in pool.call("step", requests).items():
            index, episode, _ = flying[slot]
            episode.observations.append(seen)
            episode.latents.append(latents[slot])
            if sample.trace is not None and act is not None:
                episode.traces.append(sample.trace[slot].numpy())
            if sample.invalid is not None:
                episode.invalid += int(sample.invalid[slot])
            episode.actions.append(requests[slot][: outcome.executed])
            episode.success = outcome.success
            if outcome.success or outcome.broken or episode.steps >= protocol.horizon[episode.job.task.suite]:
                done[index] = episode
                del flying[slot]
                pool.free(slot)
                if not keep_seen:
                    episode.observations.clear()
                if on_episode:
                    on_episode(episode)
    return [episode for episode in done if episode is not None]


def run_shared(
    pool: Pool,
    policy: Policy,
    jobs: Sequence[Job],
    protocol: Protocol,
    slots: int,
    act: Act | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    keep_seen: bool = True,
) -> list[Episode]:
    """`run_episodes` by all processes of a run: of N each plays every N-th job, and all get every episode.

    Each has `slots` in flight, so that episodes are those of one process to the bit. `on_episode` is called as this
    process's own finish, and for the others' when all have.
    """
    if world_size() == 1:
        return run_episodes(pool, policy, jobs, protocol, slots, act, on_episode, keep_seen)
    mine = jobs[rank() :: world_size()]
    try:
        played: Any = run_episodes(pool, policy, mine, protocol, slots, act, on_episode, keep_seen)
    except Diverged as error:
        played = error
    shares = gathered(played)
    for share in shares:
        if isinstance(share, Diverged):
            raise share
    if on_episode:
        for share in shares[: rank()] + shares[rank() + 1 :]:
            for episode in share:
                on_episode(episode)
    return [shares[i % world_size()][i // world_size()] for i in range(len(jobs))]


def _decide(
    policy: Policy,
    flying: dict[int, tuple[int, Episode, torch.Generator]],
    slots: int,
    protocol: Protocol,
    act: Act | None,
) -> Sample:
    """A chunk for each slot; rows of empty slots mean nothing."""
    import torch

    spare = next(iter(flying.values()))[1].observations[-1]
    seen, generators = [], []
    for slot in range(slots):
        if slot in flying:
            seen.append(flying[slot][1].observations[-1])
            generators.append(flying[slot][2])
        else:
            seen.append(spare)
            generators.append(torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = policy.encode(policy.preprocess(seen))
        if act is not None:
            sample = act(policy, context, generators)
        else:
            sample = policy.sample(context, generators if protocol.decoding == "sampled" else None)
    latents, actions = sample.latent.numpy(), sample.actions.numpy()
    for slot, (_, episode, _) in flying.items():
        if not (np.isfinite(actions[slot]).all() and np.isfinite(latents[slot]).all()):
            job = episode.job
            raise Diverged(
                f"policy: it decided on NaN or infinite actions in {job.task.key}, init state {job.init_state}, "
                f"decision {len(episode.actions)}; if it was being trained, lower the learning rate"
            )
    return sample
