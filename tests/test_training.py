"""When training has gone on for too long without a success."""

import pytest

from vlarl_bench.errors import Diverged
from vlarl_bench.records import EpisodeLog
from vlarl_bench.training import COLLAPSED, _check_collapse

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
