"""Films on real LIBERO: what is in the file, and what the command says."""

import imageio.v3 as imageio
import pytest

from vlarl_bench import film, registry
from vlarl_bench.cli import main

SIZE, EVERY = 128, 10


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
