"""Episodes: the only place that steps environments.

A fixed number of slots is filled with episodes; each turn the policy decides for all slots in one batch and worker
processes execute the chunks. The batch has the same shape whatever the number of workers, every episode has its own
noise generator, and an episode in flight is an exact snapshot: so the same jobs give the same episodes with 1, 2 or 4
workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BenchError
from .suite import Observation, Outcome, Suite, Task

if TYPE_CHECKING:
    import torch

    from .policies.base import Policy, Sample
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
    actions: list[np.ndarray] = field(default_factory=list)
    """n x [executed, A] float32: what the environment executed, environment units."""
    success: bool = False

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
    max_decisions: int
    """Decisions that fit into the horizon."""


class Pool:
    """Worker processes that hold simulators. Use as a context manager: no process outlives it."""

    def __init__(self, suite: Suite, protocol: Protocol, workers: int, video: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, suite, protocol, video), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def call(self, command: str, by_slot: dict[int, Any]) -> dict[int, Any]:
        """Sends each slot's request to the worker that owns the slot; returns each slot's answer."""
        shares: dict[int, dict[int, Any]] = {}
        for slot, request in by_slot.items():
            shares.setdefault(slot % len(self._pipes), {})[slot] = request
        answers: dict[int, Any] = {}
        for worker, share in shares.items():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: told below, where it is asked
                self._pipes[worker].send((command, share))
        for worker in shares:
            try:
                ok, answer = self._pipes[worker].recv()
            except (EOFError, ConnectionResetError):
                code = self._processes[worker].exitcode
                raise BenchError(
                    f"environment worker {worker} died (exit code {code}): out of memory? try --workers 1"
                ) from None
            if not ok:
                kind, text = answer
                raise BenchError(text) if kind == "BenchError" else RuntimeError(f"environment worker failed:\n{text}")
            answers |= answer
        return answers


def _serve(pipe: Connection, suite: Suite, protocol: Protocol, video: bool) -> None:
    """A worker's life: answer commands until the pipe closes, which also happens when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    worker = _Worker(suite, protocol, video)
    while True:
        try:
            command, share = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        answer: tuple[bool, Any]
        try:
            answer = (True, {slot: getattr(worker, command)(slot, request) for slot, request in share.items()})
        except BenchError as error:
            answer = (False, ("BenchError", str(error)))
        except Exception:
            answer = (False, ("bug", traceback.format_exc()))
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


class _Worker:
    """The simulators of one process, one a task, shared by its slots."""

    def __init__(self, suite: Suite, protocol: Protocol, video: bool) -> None:
        self.suite, self.protocol, self.video = suite, protocol, video
        self.simulators: dict[Task, Any] = {}
        self.owner: dict[Task, int] = {}
        self.snapshots: dict[int, tuple[Task, Any]] = {}

    def _open(self, task: Task) -> Any:
        if task not in self.simulators:
            self.simulators[task] = self.suite.open(task, self.protocol, self.video)
        return self.simulators[task]

    def open(self, _slot: int, task: Task) -> None:
        self._open(task)

    def reset(self, slot: int, request: tuple[Task, int]) -> Observation:
        task, init_state = request
        simulator = self._open(task)
        simulator.reset(init_state)
        seen = simulator.observe()
        self._keep(slot, task, simulator)
        return seen

    def step(self, slot: int, actions: np.ndarray) -> tuple[Outcome, Observation]:
        task, snapshot = self.snapshots[slot]
        simulator = self.simulators[task]
        if self.owner[task] != slot:
            simulator.restore(snapshot)
        outcome = simulator.step(actions)
        seen = simulator.observe()
        self._keep(slot, task, simulator)
        return outcome, seen

    def _keep(self, slot: int, task: Task, simulator: Any) -> None:
        self.snapshots[slot] = (task, simulator.save())
        self.owner[task] = slot

    def film(self, slot: int, request: tuple[Task, int, list[np.ndarray], str, int, int]) -> list[np.ndarray]:
        task, init_state, chunks, camera, size, every = request
        simulator = self._open(task)
        simulator.reset(init_state)
        self.owner[task] = slot
        actions = np.concatenate(chunks)
        frames = [simulator.render(camera, size)]
        for start in range(0, len(actions), every):
            simulator.step(actions[start : start + every])
            frames.append(simulator.render(camera, size))
        return frames


def run_episodes(
    pool: Pool,
    policy: Policy,
    jobs: Sequence[Job],
    protocol: Protocol,
    slots: int,
    act: Act | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Runs every job and returns the episodes in the jobs' order.

    `slots` episodes are in flight at a time, and the policy always decides for exactly that many (empty slots repeat
    another's observation). `act` is the algorithm's way to act while collecting; without it the protocol's decoding is
    used. `on_episode` is called as episodes finish.
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

        latents, actions = _decide(policy, flying, slots, protocol, act)
        requests = {}
        for slot, (_, episode, _) in flying.items():
            left = protocol.horizon[episode.job.task.suite] - episode.steps
            requests[slot] = actions[slot][: min(protocol.execute, left)]
        for slot, (outcome, seen) in pool.call("step", requests).items():
            index, episode, _ = flying[slot]
            episode.observations.append(seen)
            episode.latents.append(latents[slot])
            episode.actions.append(requests[slot][: outcome.executed])
            episode.success = outcome.success
            if outcome.success or episode.steps >= protocol.horizon[episode.job.task.suite]:
                done[index] = episode
                del flying[slot]
                if on_episode:
                    on_episode(episode)
    return [episode for episode in done if episode is not None]


def _decide(
    policy: Policy,
    flying: dict[int, tuple[int, Episode, torch.Generator]],
    slots: int,
    protocol: Protocol,
    act: Act | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and actions, [slots, H, A] each; rows of empty slots mean nothing."""
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
    return sample.latent.numpy(), sample.actions.numpy()
