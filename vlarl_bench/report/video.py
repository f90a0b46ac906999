"""Films of single episodes that say what is to be seen."""

import contextlib
import os
from collections.abc import Iterable

import imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_file

GREEN, RED, WHITE, GREY = "#7CFC9A", "#FF9A8B", "#FFFFFF", "#A8A8A8"


def captioned(frame: np.ndarray, instruction: str, when: str, success: bool | None, step: int) -> np.ndarray:
    """Adds a strip above a [H, W, 3] uint8 frame: instruction, which policy, environment step and how it ends.

    when: for example "before (base)"; success None hides the verdict. Returns [H + strip, W, 3] with even sides. The
    strip's height depends only on the width and the instruction, so all frames of a film agree.
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
    if success is not None:
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
