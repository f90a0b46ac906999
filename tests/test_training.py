"""When training has gone on for too long without a success, and what it goes on from."""

import pytest

from vlarl_bench.checkpoint import Restored
from vlarl_bench.errors import BenchError, Diverged
from vlarl_bench.records import EpisodeLog, MetricsLog
from vlarl_bench.training import COLLAPSED, _check_collapse, check_whole

from .test_records import row


@pytest.mark.parametrize(
    ("first", "failures", "stops"),
    [([True], COLLAPSED, True), ([True], COLLAPSED - 1, False), ([], COLLAPSED + 50, False)],
)
def test_collapse_is_many_failures_after_a_success(tmp_path, first, failures, stops):
    outcomes = [*first, *[False] * failures]
    with EpisodeLog(tmp_path / "episodes.jsonl") as log:
        log.append_all(row(init_state=i, success=outcome) for i, outcome in enumerate(outcomes))
        log.append(row(phase="final", success=True))  # held-out episodes say nothing about training
        if stops:
            with pytest.raises(Diverged, match="collapsed: none of the last 200 training episodes"):
                _check_collapse(log)
        else:
            _check_collapse(log)


@pytest.mark.parametrize("short", ["", "episodes.jsonl", "metrics.jsonl"])
def test_logs_that_lost_whole_lines_since_the_checkpoint_are_named(tmp_path, short):
    with EpisodeLog(tmp_path / "episodes.jsonl") as log, MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        log.append_all(row(phase=phase, iteration=i) for phase, i in (("base", 0), ("train", 1), ("train", 2)))
        metrics.append({"iteration": 1})
        metrics.append({"iteration": 2})
        lines = {"episodes.jsonl": 2, "metrics.jsonl": 1}  # by the end of round 1
        check_whole(Restored(1, {}, []), log, metrics)  # a checkpoint of an earlier version
        if not short:
            check_whole(Restored(1, {"lines": lines}, []), log, metrics)
            return
        lines[short] += 1
        found = f"{lines[short] - 1} lines up to round 1, but its checkpoint was made with {lines[short]}"
        with pytest.raises(BenchError, match=f"{short}: {found}"):
            check_whole(Restored(1, {"lines": lines}, []), log, metrics)
