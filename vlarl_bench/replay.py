"""What the policies that a run kept do on the same training states: from the base policy to the last one.

A report reads rows and nothing else; latents are in no row, so they are played anew, as an evaluation plays, from
weights that verify against the run's manifest and rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import registry
from .checkpoint import checkpoints, load_checkpoint
from .config import RunConfig
from .errors import BenchError
from .plan import Plan, plan_run
from .pool import Pool
from .rollout import Episode, Job, episode_seed, run_episodes
from .run import adapt

if TYPE_CHECKING:
    from .policies.base import Policy
    from .progress import Phase, Progress
    from .report.runs import RunFolder


@dataclass(frozen=True)
class Played:
    """What one policy of a run did: N decisions in E episodes."""

    iteration: int
    """Rounds of training that it had had; 0 for the base policy."""
    checkpoint: str
    """First 12 hex digits of its content hash."""
    chunks: np.ndarray
    """[N, H, A] the latents: normalised action chunks, as they were decoded."""
    executed: np.ndarray
    """[N] how many of each chunk's actions were executed."""
    episode: np.ndarray
    """[N] which episode each belongs to."""
    success: np.ndarray
    """[E] bool."""


def replay(run: RunFolder, states: int, workers: int, progress: Progress) -> list[Played]:
    """Has every policy that the run kept play the first `states` training states of each of its tasks, with the same
    noise; oldest first. Nothing is written.

    Raises BenchError if the run kept none but its base policy, or if what it kept is not what its rows were played by.
    """
    import torch

    config, plan = _plan(run)
    jobs = [
        Job(task, state, 0, episode_seed(config.seed, "analyze", task.key, state))
        for task in plan.tasks
        for state in plan.protocol.train_states[:states]
    ]
    threads = torch.get_num_threads()
    played: list[Played] = []
    try:
        torch.set_num_threads(config.threads)
        with Pool(plan.suite, plan.protocol, workers) as pool:
            for iteration, policy in _kept(run, plan, config):
                with progress.phase(f"{run.folder.name}, round {iteration}", len(jobs)) as bar:

                    def tell(episode: Episode, bar: Phase = bar) -> None:
                        bar.advance(episodes=1, successes=int(episode.success), steps=episode.steps)

                    episodes = run_episodes(
                        pool, policy, jobs, plan.protocol, config.slots, on_episode=tell, keep_seen=False
                    )
                played.append(_played(iteration, policy, episodes))
    finally:
        torch.set_num_threads(threads)
    return played


def _plan(run: RunFolder) -> tuple[RunConfig, Plan]:
    """What was asked, and its plan; raises BenchError where this version, or what is installed, would make another."""
    if not run.compares:
        raise BenchError(f"{run.folder}: an evaluation has one policy; latents are compared along a run")
    config = RunConfig.from_dict({**run.config, "out": str(run.folder)})
    if config.base == "scratch":
        raise BenchError(f"{run.folder}: trained from random weights, so there is no base policy to compare with")
    plan, told = plan_run(config), run.manifest
    for what, was, now in (
        ("protocol", told["protocol"]["label"], plan.protocol.label),
        ("tasks", told["evaluation"]["tasks"], [task.key for task in plan.tasks]),
    ):
        if was != now:
            raise BenchError(f"{run.folder}: its {what} was {was} and would now be {now}; use the version that made it")
    return config, plan


def _kept(run: RunFolder, plan: Plan, config: RunConfig) -> Iterator[tuple[int, Policy]]:
    """(rounds of training, policy) of the base policy, of each checkpoint and of the final policy, one at a time."""
    from .policies.store import content_hash

    kept = sorted(path for path in checkpoints(run.folder / "checkpoints") if int(path.name) > 0)
    final = run.folder / "policy"
    if not kept and not final.is_dir():
        raise BenchError(f"{run.folder}: it kept no policy: there is neither policy/ nor a checkpoint of a round")
    policy = plan.load_base()
    _check_hash("base policy", content_hash(policy), run.manifest["base_checkpoint"], plan.base)
    yield 0, policy
    last = max((row.iteration for row in run.evaluated), default=0)
    for path in kept:
        if int(path.name) == last and final.is_dir():
            continue  # the final policy once more
        iteration, state = load_checkpoint(path)
        policy = plan.load_base()
        adapt(policy, config)
        # Some methods give the policy a part to train, and its weights are in the checkpoint.
        method = registry.get("algorithm", plan.algorithm)
        method(config.settings, policy, config.budget, config.seed)
        try:
            policy.load_state_dict(state["policy"])
        except (KeyError, RuntimeError):
            raise BenchError(
                f"{path}: holds another policy than this version makes; use the one that wrote it"
            ) from None
        yield iteration, policy
    if final.is_dir():
        policy = plan.spec.load(final)
        for row in run.evaluated[:1]:
            _check_hash("final policy", content_hash(policy), row.checkpoint, final)
        yield last, policy


def _check_hash(what: str, now: str, was: str, where: object) -> None:
    if now != was:
        raise BenchError(f"{where}: the {what} has the hash {now}, but the run's was {was}; put that back")


def _played(iteration: int, policy: Policy, episodes: Sequence[Episode]) -> Played:
    from .policies.store import content_hash

    return Played(
        iteration,
        content_hash(policy),
        np.concatenate([np.stack(episode.latents) for episode in episodes])[..., : policy.action_dim],
        np.concatenate([episode.executed for episode in episodes]),
        np.repeat(np.arange(len(episodes)), [len(episode.latents) for episode in episodes]),
        np.array([episode.success for episode in episodes]),
    )
