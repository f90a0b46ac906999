"""What a learner is shown of a round and what acting costs; when training has gone on for too long without a
success, and what it goes on from."""

from collections import Counter
from types import SimpleNamespace

import pytest
from toy import ToyFlow, rollout, sampled

from vlarl_bench import training
from vlarl_bench.checkpoint import Restored
from vlarl_bench.errors import BenchError, Diverged
from vlarl_bench.plan import NOTHING
from vlarl_bench.records import EpisodeLog, MetricsLog
from vlarl_bench.rollout import Episode, Job
from vlarl_bench.suite import Task
from vlarl_bench.training import COLLAPSED, _check_collapse, _flops_of_acting, _rewarded, _round, check_whole

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


TASKS = [Task("toy", "easy", "do it"), Task("hard", "hard", "do it")]


def played():
    """Of eight episodes of each task, by turns, the easy one's first six succeed and the hard one's first two."""
    return [Episode(Job(TASKS[i % 2], i // 2, 0, i), success=i // 2 < (6, 2)[i % 2]) for i in range(16)]


def test_the_control_deals_each_tasks_outcomes_out_anew_every_round():
    plan, episodes = SimpleNamespace(tasks=TASKS), played()

    def shown(rewards, seed, iteration):
        found = _rewarded(plan, SimpleNamespace(rewards=rewards, seed=seed), episodes, iteration)
        assert [episode.job for episode in found] == [episode.job for episode in episodes]
        wins = Counter(episode.job.task.name for episode in found if episode.success)
        assert wins == {"easy": 6, "hard": 2}
        return tuple(episode.success for episode in found)

    dealt = [shown("shuffled", *at) for at in ((0, 1), (0, 2), (1, 1))]
    assert len({shown("success", 0, 1), *dealt}) == 4
    assert shown("shuffled", 0, 1) == dealt[0]
    assert episodes == played()  # rows and success rates are of what happened


def round_of(monkeypatch, episodes, policy, update):
    """One round of a run in which these are collected; its line of metrics."""
    monkeypatch.setattr(training, "_collect", lambda *round: episodes)
    monkeypatch.setattr(training, "_flops_of_acting", lambda *round: 0)
    plan = SimpleNamespace(tasks=TASKS, protocol=SimpleNamespace(horizon={"toy": 20, "hard": 24}, execute=8))
    config = SimpleNamespace(rewards="success", slots=1, budget=SimpleNamespace(iterations=1))
    log, bar = SimpleNamespace(rows=[]), SimpleNamespace(advance=lambda **told: None)
    algorithm = SimpleNamespace(update=update)
    return _round(plan, config, policy, algorithm, None, 1, None, log, dict(NOTHING), bar)


def test_a_decision_of_which_only_a_part_fits_into_an_episode_is_one(monkeypatch):
    given = []
    round_of(monkeypatch, played(), ToyFlow(), lambda policy, data: given.append(data) or {})
    assert given[0].max_decisions == {"toy": 3, "hard": 3}


@pytest.mark.parametrize("invalid", [0, 3])
def test_chunks_that_spelled_nothing_are_counted_where_there_can_be_any(monkeypatch, invalid):
    episodes = played()
    episodes[2].invalid, episodes[5].invalid = invalid, 2 * invalid
    speller = ToyFlow()
    speller.capabilities = ToyFlow.capabilities | {"fast"}
    lines = [round_of(monkeypatch, episodes, policy, lambda *_: {}) for policy in (speller, ToyFlow())]
    assert [line.get("invalid_chunks") for line in lines] == [3 * invalid, None]


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_acting_costs_what_its_decisions_cost_whatever_the_slots(slots):
    """Two episodes of three decisions, each of ten steps of [1, 4] x [4, 4] and [1, 1] x [1, 4]."""
    policy = ToyFlow()
    episodes = rollout(policy, lambda x: True, 2, 0, length=3).episodes
    found = _flops_of_acting(policy, SimpleNamespace(act=sampled), episodes, slots)
    assert found == 6 * 10 * 2 * (16 + 4)
