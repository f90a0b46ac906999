"""Films of one episode, played by a policy or by the suite's scripted expert."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import numpy as np

from .errors import BenchError
from .pool import Pool
from .report.video import captioned, write_video
from .rollout import Job, run_episodes

if TYPE_CHECKING:
    from .policies.base import Policy
    from .protocol import Protocol
    from .suite import Suite, Task

SIZE = 256
"""Side of the filmed picture in pixels."""
EVERY = 2
"""Environment steps between two frames: rendering costs far more than stepping."""


def film_policy(
    path: str | os.PathLike[str],
    pool: Pool,
    suite: Suite,
    protocol: Protocol,
    policy: Policy,
    job: Job,
    slots: int,
    who: str,
) -> bool:
    """Plays one episode and writes it as MP4; returns whether it succeeded. `pool` must be open with `video=True`."""
    (episode,) = run_episodes(pool, policy, [job], protocol, slots)
    request = (job.task, job.init_state, episode.actions, suite.film_camera, SIZE, EVERY)
    frames = pool.call("film", {0: request})[0]
    steps = [min(i * EVERY, episode.steps) for i in range(len(frames))]
    _write(path, suite, job.task, frames, steps, who, episode.success)
    return episode.success


def film_expert(
    path: str | os.PathLike[str], suite: Suite, protocol: Protocol, task: Task, init_state: int, seed: int
) -> int:
    """Writes a successful expert episode as MP4 and returns its length in environment steps.

    Raises BenchError where the expert fails, since only its successes are ever shown.
    """
    protocol = dataclasses.replace(protocol, cameras=(suite.film_camera,), image_size=SIZE, render_size=None)
    simulator = suite.open(task, protocol, video=True)
    try:
        shown = suite.demonstrate(simulator, task, init_state, seed)
    finally:
        simulator.close()
    if not shown.success:
        raise BenchError(
            f"init_state: {init_state}; the expert fails from it with seed {seed} at {task.key!r}; try another"
        )
    frames = [seen.images[suite.film_camera] for seen in shown.observations[::EVERY]]
    steps = [i * EVERY for i in range(len(frames))]
    _write(path, suite, task, frames, steps, "scripted expert", True)
    return len(shown.actions)


def _write(
    path: str | os.PathLike[str],
    suite: Suite,
    task: Task,
    frames: list[np.ndarray],
    steps: list[int],
    who: str,
    success: bool,
) -> None:
    pictures = [
        captioned(frame, task.instruction, who, success, step) for frame, step in zip(frames, steps, strict=True)
    ]
    # The last frame stays for a second, so that one sees how it ended.
    fps = suite.fps / EVERY
    write_video(path, pictures + pictures[-1:] * round(fps), fps)
