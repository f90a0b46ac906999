"""The rounds of a run: collect, update, and count what that costs.

A run whose training destroys the policy stops there, with the policy as it was after the last whole round.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import Restored, load_latest, save_checkpoint
from .distributed import check_same, rank, total, world_size
from .errors import BenchError, Diverged
from .plan import NOTHING, Plan, Spent
from .records import STOPPED, EpisodeLog, MetricsLog
from .rollout import Episode, Rollout, episode_seed, run_shared
from .sealed import write_sealed

if TYPE_CHECKING:
    from .algorithm import Algorithm
    from .config import RunConfig
    from .policies.base import Policy
    from .pool import Pool
    from .progress import Phase, Progress
    from .suite import Demonstration

COLLAPSED = 200
"""Training episodes in a row without a success, after there had been one, that end a run."""


def train(
    plan: Plan,
    config: RunConfig,
    policy: Policy,
    algorithm: Algorithm,
    demonstrations: Sequence[Demonstration] | None,
    done: int,
    pool: Pool,
    log: EpisodeLog,
    metrics: MetricsLog,
    progress: Progress,
    keep: int,
) -> None:
    """The rounds that are left; a checkpoint after each, of which the newest `keep` stay, and that of the policy that
    last succeeded while collecting. If the policy is destroyed, it is put back as it was after the last whole round,
    and the run is marked as stopped. Where the run has several processes, the first one writes."""
    budget, out = config.budget, Path(config.out)
    left = budget.iterations - done
    length, unit = (left * budget.episodes, "episodes") if demonstrations is None else (left, "rounds")
    if left == 0:
        return
    with progress.phase("fine-tuning" if plan.base else "training", total=length, unit=unit) as bar:
        for iteration in range(done + 1, budget.iterations + 1):
            spent, began = spent_so_far(metrics), clock()
            try:
                line = _round(plan, config, policy, algorithm, demonstrations, iteration, pool, log, spent, bar)
            except Diverged as error:
                taken = taken_so_far(metrics, began)
                if rank() == 0:
                    write_sealed(out / STOPPED, {"iteration": iteration, "reason": str(error), "spent": spent, **taken})
                progress.say(f"stopped in round {iteration} of {budget.iterations}: {error}; it is scored as it was")
                restored = load_latest(out / "checkpoints")
                assert restored is not None
                policy.load_state_dict(restored.state["policy"])
                return
            line |= {**spent, **taken_so_far(metrics, began)}
            metrics.append(line)
            if demonstrations is None:
                bar.advance(note=f"round {iteration}/{budget.iterations}: {line['train_success']:.0%}")
            else:
                bar.advance(episodes=1, note=", ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "iteration"))
            if rank() == 0:
                content = state(policy, algorithm, log, metrics)
                save_checkpoint(out / "checkpoints", iteration, content, keep, _last_good(log))


def _round(
    plan: Plan,
    config: RunConfig,
    policy: Policy,
    algorithm: Algorithm,
    demonstrations: Sequence[Demonstration] | None,
    iteration: int,
    pool: Pool,
    log: EpisodeLog,
    spent: Spent,
    bar: Phase,
) -> dict[str, Any]:
    """Collects, if the method learns from its own episodes, and updates; returns the round's metrics. `spent` grows by
    what it costs, also where it ends in Diverged."""
    from .metering import Meter, check_finite

    line: dict[str, Any] = {"iteration": iteration} | ({"processes": world_size()} if world_size() > 1 else {})
    data: Any = demonstrations
    if demonstrations is not None and world_size() > 1:
        same_hash(policy)
    if demonstrations is None:
        episodes = _collect(plan, config, policy, algorithm, iteration, pool, log, spent, bar)
        line |= {"train_success": float(np.mean([e.success for e in episodes]))}
        if "fast" in policy.capabilities:
            line["invalid_chunks"] = sum(episode.invalid for episode in episodes)
        spent["env_steps"] += sum(episode.steps for episode in episodes)
        spent["flops"] += _flops_of_acting(policy, algorithm, episodes, config.slots)
        _check_collapse(log)
        horizon, execute = plan.protocol.horizon, plan.protocol.execute
        data = Rollout(
            _rewarded(plan, config, episodes, iteration),
            {task.suite: -(-horizon[task.suite] // execute) for task in plan.tasks},
        )
    meter = Meter(policy, algorithm)
    try:
        with meter:
            line |= algorithm.update(policy, data)
    finally:
        spent["gradient_steps"] += meter.gradient_steps
        spent["flops"] += meter.flops
    check_finite(policy, meter.gradient_steps)
    return line


def _collect(
    plan: Plan,
    config: RunConfig,
    policy: Policy,
    algorithm: Algorithm,
    iteration: int,
    pool: Pool,
    log: EpisodeLog,
    spent: Spent,
    bar: Phase,
) -> list[Episode]:
    """One round's episodes, played the algorithm's way; their rows are on disk."""
    checkpoint = same_hash(policy)
    weights = algorithm.task_weights([task.key for task in plan.tasks])
    episodes = run_shared(
        pool,
        policy,
        plan.train_jobs(iteration, config.budget.episodes, weights, algorithm.group),
        plan.protocol,
        config.slots,
        act=algorithm.act,
        on_episode=lambda e: bar.advance(episodes=1, successes=int(e.success), steps=e.steps),
    )
    log.append_all(plan.row(e, "train", iteration, checkpoint, "explore", spent) for e in episodes)
    return episodes


def same_hash(policy: Policy) -> str:
    """The policy's content hash. Raises BenchError unless all processes of the run have the same weights."""
    from .policies.store import content_hash

    found = content_hash(policy)
    check_same("the policy", found)
    return found


def _check_collapse(log: EpisodeLog) -> None:
    """Raises Diverged where training had successes once and has had none for very long."""
    outcomes = [row.success for row in log.rows if row.phase == "train"]
    if any(outcomes[:-COLLAPSED]) and not any(outcomes[-COLLAPSED:]):
        raise Diverged(
            f"collapsed: none of the last {COLLAPSED} training episodes succeeded, and earlier ones did; the policy "
            f"that last succeeded is checkpoint {_last_good(log)}"
        )


def _last_good(log: EpisodeLog) -> int | None:
    """The round after which the policy was as it last succeeded while collecting; None where it never did."""
    last = max((row.iteration for row in log.rows if row.phase == "train" and row.success), default=None)
    return None if last is None else last - 1


def _flops_of_acting(policy: Policy, algorithm: Algorithm, episodes: Sequence[Episode], slots: int) -> int:
    """Operations of all decisions of these episodes, from those of one batch; a batch's empty slots do not count."""
    import torch

    from .metering import Meter

    seen = [episodes[i % len(episodes)].observations[0] for i in range(slots)]
    with torch.no_grad(), Meter(policy) as meter:
        context = policy.encode(policy.preprocess(seen))
        algorithm.act(policy, context, [torch.Generator().manual_seed(row) for row in range(slots)])
    return meter.flops // slots * sum(len(episode.latents) for episode in episodes)


def spent_so_far(metrics: MetricsLog) -> Spent:
    """What whole rounds of training have cost up to now."""
    return {name: line[name] for line in metrics.lines[-1:] for name in NOTHING} or dict(NOTHING)


def clock() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and its workers, from some moments on."""
    from .metering import cpu_seconds

    return time.monotonic(), cpu_seconds()


def taken_so_far(metrics: MetricsLog, began: tuple[float, float] | None = None) -> dict[str, float]:
    """`seconds`, and `cpu_seconds` of all processes, that whole rounds have taken, and the one that `began` then."""
    now, cpu = (0.0, 0.0) if began is None else (now - then for now, then in zip(clock(), began, strict=True))
    taken = {"seconds": now, "cpu_seconds": total(cpu)}
    for earlier in metrics.lines[-1:]:
        taken = {name: earlier.get(name, 0.0) + more for name, more in taken.items()}  # cpu_seconds: since 2026-11-28
    return {name: round(value, 3) for name, value in taken.items()}


def _rewarded(plan: Plan, config: RunConfig, episodes: list[Episode], iteration: int) -> list[Episode]:
    """The episodes as the learner sees them; the control `shuffled` permutes outcomes within each task."""
    if config.rewards == "success":
        return episodes
    rng = np.random.default_rng(episode_seed(config.seed, "shuffle", iteration))
    outcome: dict[int, bool] = {}
    for task in plan.tasks:
        members = [i for i, episode in enumerate(episodes) if episode.job.task == task]
        outcome |= dict(zip(members, rng.permutation([episodes[i].success for i in members]).tolist(), strict=True))
    return [dataclasses.replace(episode, success=outcome[i]) for i, episode in enumerate(episodes)]


def state(policy: Policy, algorithm: Algorithm, log: EpisodeLog, metrics: MetricsLog) -> dict[str, Any]:
    """What a checkpoint holds: what training goes on with, and how many lines the logs had by then."""
    lines = {log.path.name: len(log.rows), metrics.path.name: len(metrics.lines)}
    return {"policy": policy.state_dict(), "algorithm": algorithm.state_dict(), "lines": lines}


def check_whole(restored: Restored, log: EpisodeLog, metrics: MetricsLog) -> None:
    """Raises BenchError if a log has lost whole lines, which their own checksums cannot tell, since the checkpoint."""
    rows = [row for row in log.rows if row.phase != "final" and row.iteration <= restored.iteration]
    lines = [line for line in metrics.lines if line["iteration"] <= restored.iteration]
    for path, found in ((log.path, len(rows)), (metrics.path, len(lines))):
        owed = restored.state.get("lines", {}).get(path.name, found)  # checkpoints of earlier versions do not say
        if found != owed:
            raise BenchError(
                f"{path}: {found} lines up to round {restored.iteration}, but its checkpoint was made with {owed}; "
                "restore the file from a copy, or start a new run"
            )
