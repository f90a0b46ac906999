"""Trackers, the real ones where they are installed. `metrics.jsonl` is what counts, whatever they do."""

import importlib.util
import json
import math
import sqlite3
import time

import pytest

from vlarl_bench import registry, trackers
from vlarl_bench.config import BUDGETS, RunConfig
from vlarl_bench.errors import BenchError
from vlarl_bench.records import read_metrics
from vlarl_bench.trackers import TrackedMetrics, check_tracker

LINES = [{"iteration": i, "loss": 1.0 / i, "train_success": 0.25 * i, "nothing": math.nan} for i in (1, 2, 3)]


def track(tmp_path, name, lines=LINES):
    """Logs lines under a tracker; returns what was said."""
    settings = registry.get("algorithm", "fpo").Settings()
    config = RunConfig("fpo", "libero", "pi0-tiny", BUDGETS["smoke"], settings, str(tmp_path))
    told: list[str] = []
    with TrackedMetrics(tmp_path / "metrics.jsonl", name, config, told.append) as metrics:
        for line in lines:
            metrics.append(line)
    return told


def test_tensorboard_shows_the_same_names_and_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track(tmp_path, "tensorboard") == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "train_success"]
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])


def test_wandb_is_offline_and_leaves_a_folder_to_sync(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert track(tmp_path, "wandb") == []
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # a process of its own writes it
    while not all(name in file.read_bytes() for name in (b"loss", b"train_success")):  # its format has no reader
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_trackio_keeps_a_local_database(tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:  # importing it would fix its folder
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", "overwritten")
    assert track(tmp_path, "trackio") == []
    (file,) = tmp_path.glob("trackio/*.db")
    with sqlite3.connect(file) as database:
        shown = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    assert [line["loss"] for line in shown] == pytest.approx([1.0, 0.5, 1 / 3])


@pytest.mark.parametrize("at", ["begin", "log", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_stops_nothing(tmp_path, monkeypatch, at):
    class Broken:
        def __init__(self, config):
            self.may_fail("begin")

        def may_fail(self, where):
            if where == at:
                raise ConnectionError("no network\nand more")

        def log(self, metrics, step):
            self.may_fail("log")

        def close(self):
            self.may_fail("close")

    monkeypatch.setitem(trackers.TRACKERS, "broken", ("json", Broken))
    told = track(tmp_path, "broken")
    assert told == ["tracker broken failed and is left out; metrics.jsonl has everything: no network"]
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5, 1 / 3]


def test_an_unknown_or_absent_tracker_is_a_mistake_before_anything_begins(monkeypatch):
    check_tracker("")
    with pytest.raises(BenchError, match=r"tracker: 'wandbb'; did you mean 'wandb'\?"):
        check_tracker("wandbb")
    monkeypatch.setitem(trackers.TRACKERS, "absent", ("no_such_package", None))
    with pytest.raises(BenchError, match=r"tracker: 'absent' is not installed; run, in the checkout: .*'\.\[absent\]'"):
        check_tracker("absent")
