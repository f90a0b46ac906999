"""Films of one episode, played by a policy or by the suite's scripted expert."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import BenchError
from .files import atomic_file
from .pool import Pool
from .rollout import Job, run_episodes

if TYPE_CHECKING:
    from .plan import Plan
    from .policies.base import Policy
    from .protocol import Protocol
    from .records import EpisodeRow, Phase
    from .suite import Suite, Task

SIZE = 256
"""Side of the filmed picture in pixels."""
EVERY = 2
"""Environment steps between two frames: rendering costs far more than stepping."""
GREEN, RED, WHITE, GREY = "#7CFC9A", "#FF9A8B", "#FFFFFF", "#A8A8A8"


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


def telling(plan: Plan, rows: Sequence[EpisodeRow]) -> Job:
    """The first held-out episode that failed before and succeeded after; if there is none, the first of all."""
    decoding, keys = plan.protocol.decoding, ("phase", "suite", "task", "init_state", "repeat")
    outcome = {tuple(getattr(row, key) for key in keys): row.success for row in rows if row.decoding == decoding}

    def of(phase: Phase, job: Job) -> bool | None:
        return outcome.get((phase, job.task.suite, job.task.name, job.init_state, job.repeat))

    jobs = plan.eval_jobs(decoding)
    return next((job for job in jobs if of("base", job) is False and of("final", job) is True), jobs[0])


def film_run(plan: Plan, players: dict[str, Policy], rows: Sequence[EpisodeRow], out: Path) -> None:
    """Films one held-out episode, played by each policy with the same noise seed, as `<name>.mp4`."""
    job = telling(plan, rows)
    with Pool(plan.suite, plan.protocol, workers=1, video=True) as pool:
        for name, player in players.items():
            who = f"{name} {plan.algorithm}"
            film_policy(out / f"{name}.mp4", pool, plan.suite, plan.protocol, player, job, plan.config.slots, who)


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


def captioned(frame: np.ndarray, instruction: str, when: str, success: bool, step: int) -> np.ndarray:
    """Adds a strip above a [H, W, 3] uint8 frame: instruction, which policy, environment step and how it ends.

    when: for example "before (base)". Returns [H + strip, W, 3] with even sides. The strip's height depends only on the
    width and the instruction, so all frames of a film agree.
    """
    height, width = frame.shape[:2]
    size = max(11, width // 20)
    font = ImageFont.load_default(size)
    lines = _wrap(instruction, font, width - 8)
    strip = (len(lines) + 1) * (size + 4) + 8
    canvas = Image.new("RGB", (width + width % 2, strip + height + (strip + height) % 2))
    canvas.paste(Image.fromarray(frame), (0, strip))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((4, 3 + i * (size + 4)), line, WHITE, font)
    bottom = 3 + len(lines) * (size + 4)
    draw.text((4, bottom), f"{when}, step {step}", GREY, font)
    verdict = "success" if success else "failure"
    draw.text((width - 4, bottom), verdict, GREEN if success else RED, font, anchor="ra")
    return np.asarray(canvas)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write_video(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes [H, W, 3] uint8 frames, all of one size with even sides, as MP4 (H.264, yuv420p), whole or not at all.

    Raises BenchError when the disk is full or read-only.
    """
    with atomic_file(path) as temporary:
        writer = imageio.get_writer(
            temporary, format="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2
        )
        # imageio's own `with` leaves ffmpeg running, and writing, when an exception passes through it.
        with contextlib.closing(writer):
            for frame in frames:
                writer.append_data(frame)
