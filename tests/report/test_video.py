import os
import subprocess

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

from vlarl_bench.errors import BenchError
from vlarl_bench.report.video import captioned, write_video

INSTRUCTION = "pick up the alphabet soup and place it in the basket"


def frame(value: int, size: int = 128) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def test_a_film_comes_back_in_order_as_h264(tmp_path):
    path = tmp_path / "before.mp4"
    frames = [captioned(frame(40 * i), INSTRUCTION, "before (base)", False, 8 * i) for i in range(5)]
    write_video(path, frames, 10)
    film = imageio.imread(path)
    assert film.shape == (5, *frames[0].shape)
    means = film[:, -100:].mean(axis=(1, 2, 3))
    assert means == pytest.approx([0, 40, 80, 120, 160], abs=6)
    probe = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr
    assert "h264" in probe
    assert "yuv420p" in probe
    assert "10 fps" in probe
    assert os.listdir(tmp_path) == ["before.mp4"]


@pytest.mark.parametrize("size", [64, 65, 128, 256])
def test_the_caption_leaves_the_picture_alone_and_sides_even(size):
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    shown = captioned(picture, INSTRUCTION, "after (fpo)", True, 10)
    height, width = shown.shape[:2]
    assert height % 2 == width % 2 == 0
    assert width - size in (0, 1)
    top = next(i for i in range(height) if (shown[i : i + 1, :size] == picture[:1]).all())
    assert (shown[top : top + size, :size] == picture).all()
    assert shown[:top].max() > 200, "there is writing above"


def test_all_frames_of_a_film_have_one_size_and_the_verdict_shows():
    shapes = {captioned(frame(0), INSTRUCTION, "before", None, step).shape for step in (0, 5, 1000)}
    assert len(shapes) == 1
    verdicts = [captioned(frame(0), INSTRUCTION, "before", success, 5) for success in (None, True, False)]
    assert not np.array_equal(verdicts[0], verdicts[1])
    assert not np.array_equal(verdicts[1], verdicts[2])


def test_a_film_that_breaks_off_leaves_nothing(tmp_path):
    def broken():
        yield frame(0)
        raise RuntimeError("the simulator is gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_video(tmp_path / "a.mp4", broken(), 10)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="a file is where a folder should be"):
        write_video(tmp_path / "file" / "a.mp4", [frame(0)], 10)
