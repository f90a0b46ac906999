"""Films on real LIBERO: what is in the file, and what the command says."""

import os
import subprocess

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

from vlarl_bench import film, registry
from vlarl_bench.cli import main
from vlarl_bench.errors import BenchError
from vlarl_bench.film import captioned, write_video

SIZE, EVERY = 128, 20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small pictures and few of them: rendering costs more than all the rest."""
    monkeypatch.setattr(film, "SIZE", SIZE)
    monkeypatch.setattr(film, "EVERY", EVERY)


def test_the_expert_s_film_shows_a_whole_success(tmp_path, capsys):
    path = tmp_path / "expert.mp4"
    assert main(["video", "--suite", "libero_object", "--expert", "--out", str(path)]) == 0
    steps = int(capsys.readouterr().out.split()[-2])
    shown = imageio.imread(path)
    frames = -(-steps // EVERY)
    assert len(shown) == frames + 20 // EVERY  # and the last one for a second
    assert shown.shape[2] == SIZE
    assert abs(shown[0].astype(int) - shown[frames - 1]).max() > 50, "something has moved"
    assert (shown[frames - 1] == shown[-1]).mean() > 0.9


def test_a_policy_s_film_ends_where_its_episode_did(tmp_path, capsys):
    path = tmp_path / "policy.mp4"
    task = registry.get("suite", "libero_object").tasks[6].name
    args = ["--suite", "libero_object", "--task", task, "--init-state", "30", "--seed", "1", "--out", str(path)]
    assert main(["video", *args]) == 0
    verdict = capsys.readouterr().out.strip().split(": ")[1]
    assert verdict in ("success", "failure")
    horizon = registry.get("suite", "libero_object").protocol("state").horizon["libero_object"]
    played = len(imageio.imread(path)) - 20 // EVERY
    assert played == horizon // EVERY + 1 if verdict == "failure" else 1 < played < horizon // EVERY


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
    shapes = {captioned(frame(0), INSTRUCTION, "before", False, step).shape for step in (0, 5, 1000)}
    assert len(shapes) == 1
    good, bad = (captioned(frame(0), INSTRUCTION, "before", success, 5) for success in (True, False))
    assert not np.array_equal(good, bad)


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
