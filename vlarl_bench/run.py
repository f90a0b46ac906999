"""One run: base evaluation -> (collect -> update)* -> final evaluation -> table, curve and videos.

Both evaluations play the same held-out initial states with the same noise seeds, so every episode after has its pair
before, and each state once more without noise. Everything is on disk before the next step begins: a run that dies
continues from its newest checkpoint. One whose training destroys the policy stops there, and is scored as it was at its
newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import registry
from .base_rows import played_by_another
from .checkpoint import load_checkpoint, load_latest, save_checkpoint
from .config import EvalConfig, RunConfig
from .device import find_device
from .distributed import check_same, from_first, rank, world_size
from .doctor import require_gl
from .errors import BenchError, Diverged
from .files import read_json, write_text_atomic
from .plan import NOTHING, Plan, Spent, plan_evaluation, plan_run
from .pool import LostEpisode, Pool
from .progress import Progress
from .protocol import Decoding
from .records import STOPPED, EpisodeLog, EpisodeRow, LostLog, Phase
from .rollout import Episode, run_shared
from .run_folder import as_begun, claimed, save_last_policy, write_manifest
from .sealed import read_sealed, write_sealed
from .trackers import TrackedMetrics
from .training import check_whole, same_hash, spent_so_far, state, taken_so_far, train

if TYPE_CHECKING:
    from .policies.base import Policy
    from .suite import Demonstration


def run(config: RunConfig, resume: bool = False, tracker: str = "", keep: int = 2, base_from: str = "") -> Path:
    """Runs or, with `resume`, continues `config`; prints the table and returns the run folder. `tracker` names one of
    `trackers.TRACKERS`; the newest `keep` checkpoints stay; of the runs in the folder `base_from` one may have played
    the base evaluation already. Where a launcher started several processes (`distributed.joined`), all of them call
    this and share the work, and the first one writes.

    Raises:
        BenchError: for whatever the user can mend, if possible before anything heavy starts.
    """
    import torch

    require_gl()
    config, device = from_first(config), find_device(config.device)
    plan = plan_run(config)
    method = registry.get("algorithm", config.algorithm)
    _check_processes(config, method)
    with ExitStack() as stack:
        out = stack.enter_context(claimed(config, resume) if rank() == 0 else nullcontext(Path(config.out)))
        plan = as_begun(plan, out)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.threads)
        silent = stack.enter_context(open(os.devnull, "w")) if rank() else None
        progress = stack.enter_context(Progress(silent))
        demonstrations, learned_from = None, None
        if method.learns_from == "demonstrations":
            demonstrations, learned_from = _demonstrations(plan, config, progress)
        policy = _first_policy(plan, demonstrations)
        adapt(policy, config)
        policy.to(device)
        other, base_rows = _played_by_another(plan, policy, "" if resume else base_from)
        if rank() == 0:
            write_manifest(plan, policy, out, learned_from, other)
        algorithm = method(config.settings, policy, config.budget, config.seed)
        log, metrics = _records(stack, out, tracker, config, progress)
        for found in (log, metrics):
            if found.torn:
                progress.say(f"{found.path}: its last line had no end and was removed ({found.torn} bytes)")
        pool = stack.enter_context(_pool(plan, out, progress))
        if other:
            progress.say(
                f"base evaluation: {other} has played the same, and its {len(base_rows)} episodes are taken over"
            )
        progress.say(
            f"{config.algorithm} on {config.policy}: {len(plan.tasks)} of the {len(plan.suite.tasks)} tasks of "
            f"{config.suite}, protocol {plan.protocol.label}{f', {world_size()} processes' if world_size() > 1 else ''}"
        )
        restored = load_latest(out / "checkpoints") if resume else None
        if restored is None and any(row.phase != "base" for row in log.rows):
            raise BenchError(f"resume: {out} has rows of later rounds but no checkpoint to go on from; start a new run")
        if restored is None:
            if plan.base is not None:  # random weights solve nothing
                log.append_all(base_rows)
                _evaluate(plan, "base", 0, policy, pool, log, progress, NOTHING)
            if rank() == 0:
                save_checkpoint(out / "checkpoints", 0, state(policy, algorithm, log, metrics))
            done = 0
        else:
            for problem in restored.problems:
                progress.say(f"passed over {problem}")
            check_whole(restored, log, metrics)
            done = restored.iteration
            policy.load_state_dict(restored.state["policy"])
            algorithm.load_state_dict(restored.state["algorithm"])
            check_same("the newest checkpoint", str(done))
        # With an older checkpoint than its last round's, it must come to that end again.
        if from_first((out / STOPPED).exists()) and done == len(metrics.lines):
            read_sealed(out / STOPPED, older=True)
        else:
            if rank() == 0:
                (out / STOPPED).unlink(missing_ok=True)
            log.rewind(done)
            metrics.rewind(done)
            train(plan, config, policy, algorithm, demonstrations, done, pool, log, metrics, progress, keep)
        done, spent = len(metrics.lines), _spent(out, metrics)
        _merge(policy)
        try:
            _evaluate(plan, "final", done, policy, pool, log, progress, spent)
        except Diverged as error:  # the last update left weights that are finite and decide on what is not
            policy = _without_last_round(plan, config, demonstrations, done, error, log, metrics, progress)
            done = len(metrics.lines)
            _evaluate(plan, "final", done, policy, pool, log, progress, spent)
        if rank():
            return out
        save_last_policy(plan, policy, out, spent)
        rows = log.rows
    _report(out)
    if config.video:
        from .film import film_run

        before = {} if plan.base is None else {"before": plan.load_base().to(device)}
        film_run(plan, {**before, "after": policy}, rows, out)
    return out


def evaluate(config: EvalConfig) -> Path:
    """Plays the held-out episodes with one policy and nothing else; rows have the phase `eval`."""
    require_gl()
    device, plan = find_device(config.device), plan_evaluation(config)
    with ExitStack() as stack:
        out = stack.enter_context(claimed(config, resume=False))
        policy = _first_policy(plan, None).to(device)
        progress = stack.enter_context(Progress())
        write_manifest(plan, policy, out, None)
        log = stack.enter_context(EpisodeLog(out / "episodes.jsonl"))
        pool = stack.enter_context(_pool(plan, out, progress))
        spent = read_json(plan.base / "config.json").get("spent", NOTHING) if plan.base else NOTHING
        _evaluate(plan, "eval", 0, policy, pool, log, progress, spent)
    _report(out)
    if config.video:
        from .film import film_run

        film_run(plan, {"eval": policy}, log.rows, out)
    return out


def _check_processes(config: RunConfig, method: Any) -> None:
    """Raises BenchError where some process of the run would have nothing to do."""
    field = "batch_size" if method.learns_from == "demonstrations" else "episodes"
    most = getattr(config.budget, field)
    if world_size() > most:
        raise BenchError(f"processes: {world_size()}; budget.{field} is {most}, and each process needs one at least")


def _records(
    stack: ExitStack, out: Path, tracker: str, config: RunConfig, progress: Progress
) -> tuple[EpisodeLog, TrackedMetrics]:
    """The run's rows and metrics: in its folder those of the first process, which writes; the others keep the same in
    a folder that goes with them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if rank() else out
    log = stack.enter_context(EpisodeLog(folder / "episodes.jsonl"))
    tracker = "" if rank() else tracker
    metrics = stack.enter_context(TrackedMetrics(folder / "metrics.jsonl", tracker, config, progress.say))
    rows, lines = from_first((log.rows, metrics.lines))
    if rank():
        log.append_all(rows)
        for line in lines:
            metrics.append(line)
    return log, metrics


def _demonstrations(plan: Plan, config: RunConfig, progress: Progress) -> tuple[list[Demonstration], dict[str, Any]]:
    """What an algorithm that learns from demonstrations is given, and what the manifest says of it. Without a folder
    of the user's, those that are missing are made first."""
    from .demonstrations import (
        count_demonstrations,
        describe_demonstrations,
        load_demonstrations,
        make_demonstrations,
    )

    folder, count = Path(config.demos or "demos"), config.budget.demos
    if not config.demos and rank() == 0:
        short = [task for task in plan.tasks if count_demonstrations(folder, task) < count]
        if short and world_size() > 1:  # the others would wait for longer than a process that hangs is waited for
            raise BenchError(
                f"demos: {folder} has fewer than {count} of {short[0].key}; make them first, with `vlarl-bench demos "
                f"--suite {config.suite} --mode {plan.protocol.observation} --episodes {count}`"
            )
        if short:
            with progress.phase("expert", count * len(short), "demonstrations") as phase:
                make_demonstrations(
                    plan.suite,
                    short,
                    plan.protocol,
                    count,
                    folder,
                    config.workers,
                    0,
                    lambda made: phase.advance(episodes=made),
                    lambda: progress.say(f"{folder}: waiting for another process that makes demonstrations here"),
                )
    from_first(None)  # has made them by now
    found = load_demonstrations(plan.suite, folder, plan.tasks, plan.protocol, count)
    return found, describe_demonstrations(folder, plan.tasks, plan.protocol, found)


def _first_policy(plan: Plan, demonstrations: Sequence[Demonstration] | None) -> Policy:
    """The base policy; random weights get their vocabulary and normalisation from the demonstrations."""
    if plan.base is not None:
        return plan.load_base()
    assert demonstrations is not None
    words = {task.instruction for task in plan.tasks}
    words |= {name for demonstration in demonstrations for name in demonstration.observations[0].objects}
    policy = plan.spec.create(plan.suite.embodiment(plan.protocol), sorted(words), plan.config.seed)
    policy.fit_normalisation(
        [demonstration.actions for demonstration in demonstrations],
        np.stack([seen.proprio for demonstration in demonstrations for seen in demonstration.observations]),
    )
    return policy


def adapt(policy: Policy, config: RunConfig) -> None:
    """Freezes what is not to learn, and puts adapters where they are to learn in the weights' place."""
    from .policies.adapt import add_lora, freeze

    freeze(policy, config.freeze)
    if config.lora:
        add_lora(policy, config.lora, seed=config.seed)
    if not policy.actor_parameters():
        raise BenchError(f"freeze: {', '.join(config.freeze)}; nothing is left that an algorithm may train")


def _without_last_round(
    plan: Plan,
    config: RunConfig,
    demonstrations: Sequence[Demonstration] | None,
    done: int,
    error: Diverged,
    log: EpisodeLog,
    metrics: TrackedMetrics,
    progress: Progress,
) -> Policy:
    """The policy of the checkpoint before the last round's, and the run marked as stopped in that round, as if it had
    been found then. Raises `error` where there is no such checkpoint."""
    folder = Path(config.out) / "checkpoints"
    earlier = folder / f"{done - 1:06d}"
    if from_first((Path(config.out) / STOPPED).exists() or not earlier.is_dir()):
        raise error
    progress.say(f"stopped in round {done}: {error}; it is scored as it was before")
    policy = _first_policy(plan, demonstrations)
    adapt(policy, config)
    registry.get("algorithm", config.algorithm)(config.settings, policy, config.budget, config.seed)  # may add a part
    policy.load_state_dict(load_checkpoint(earlier)[1]["policy"])
    policy.to(find_device(config.device))
    _merge(policy)
    taken = taken_so_far(metrics)
    if rank() == 0:  # in an order in which a kill at any point leaves what resuming goes on from
        shutil.rmtree(folder / f"{done:06d}")
        stopped = {"iteration": done, "reason": str(error), "spent": spent_so_far(metrics)} | taken
        write_sealed(Path(config.out) / STOPPED, stopped)
    log.forget("final")  # what the round played stays: it was spent
    metrics.rewind(done - 1)
    return policy


def _spent(out: Path, metrics: TrackedMetrics) -> Spent:
    """What training has cost, a round that was stopped included."""
    stopped = read_sealed(out / STOPPED, older=True) if (out / STOPPED).exists() else {}
    spent: Spent = stopped.get("spent") or spent_so_far(metrics)  # until 2026-11-29 it was not said
    return spent


def _merge(policy: Policy) -> None:
    """Adapters become part of the weights: what is judged and stored then is one and the same policy."""
    from .policies.adapt import merge_lora

    merge_lora(policy)


def _pool(plan: Plan, out: Path, progress: Progress) -> Pool:
    """This process's workers; each loss is told at once and kept in `lost.jsonl`, or `lost.N.jsonl` for process N."""
    name = f"lost.{rank()}.jsonl" if rank() else "lost.jsonl"

    def tell(loss: LostEpisode) -> None:
        with LostLog(out / name) as log:
            number = log.append(loss.to_json())
        progress.say(f"loss {number}, see {name}: {loss}")

    return Pool(plan.suite, plan.protocol, plan.config.workers, on_loss=tell)


def _played_by_another(plan: Plan, policy: Policy, base_from: str) -> tuple[str, list[EpisodeRow]]:
    """`played_by_another` of the first process, on all of them."""
    if not base_from or plan.base is None:
        return "", []
    checkpoint = same_hash(policy)
    return from_first(played_by_another(plan, checkpoint, Path(base_from)) if rank() == 0 else ("", []))


def _evaluate(
    plan: Plan,
    phase: Phase,
    iteration: int,
    policy: Policy,
    pool: Pool,
    log: EpisodeLog,
    progress: Progress,
    spent: Spent,
) -> None:
    """Plays the held-out jobs that have no row yet, decoded in each of the plan's ways; each finished episode is on
    disk before the next turn."""
    checkpoint = same_hash(policy)
    for decoding in plan.decodings:
        _evaluate_decoded(plan, decoding, phase, iteration, policy, checkpoint, pool, log, progress, spent)


def _evaluate_decoded(
    plan: Plan,
    decoding: Decoding,
    phase: Phase,
    iteration: int,
    policy: Policy,
    checkpoint: str,
    pool: Pool,
    log: EpisodeLog,
    progress: Progress,
    spent: Spent,
) -> None:
    jobs = [job for job in plan.eval_jobs(decoding) if plan.key(phase, iteration, job, decoding) not in log]
    if not jobs:
        return
    protocol = dataclasses.replace(plan.protocol, decoding=decoding)
    name = {"base": "base evaluation", "final": "final evaluation"}.get(phase, "evaluation")
    name += "" if decoding == plan.protocol.decoding else " without noise"
    with progress.phase(name, total=len(jobs)) as bar:

        def keep(episode: Episode) -> None:
            log.append(plan.row(episode, phase, iteration, checkpoint, decoding, spent))
            bar.advance(episodes=1, successes=int(episode.success), steps=episode.steps)

        episodes = run_shared(pool, policy, jobs, protocol, plan.config.slots, on_episode=keep, keep_seen=False)
    invalid = sum(episode.invalid for episode in episodes)
    if invalid:
        progress.say(f"{name}: {invalid} of {sum(len(e.actions) for e in episodes)} decisions spelled no action chunk")


def _report(out: Path) -> None:
    """Table and learning curve, from the rows on disk; the table also goes to stdout."""
    from .report.curve import write_curve
    from .report.render import print_table, to_markdown
    from .report.runs import read_run
    from .report.table import comparison_table

    found = read_run(out)
    table = comparison_table(found)
    write_text_atomic(out / "table.md", to_markdown(table))
    if found.compares:
        write_curve(out / "curve.png", found)
    print_table(table)
    print(f"\nrun folder: {out}")
