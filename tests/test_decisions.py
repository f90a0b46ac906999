"""A round's rows by hand: episodes of unlike length, two tasks, a last chunk that was partly executed."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from vlarl_bench.decisions import decisions
from vlarl_bench.rollout import Episode, Job, Rollout
from vlarl_bench.suite import Observation, Task

sys.path.insert(0, str(Path(__file__).parent / "algorithms"))
from toy import ToyFlow

A, B = (Task(suite, name, "do it") for suite, name in (("long", "a"), ("toy", "b")))
FIT = {"long": 8, "toy": 4}


def episode(task, number, executed, success, traced=True):
    """Latents, traces and observations that tell their episode and decision."""
    made = Episode(Job(task, 0, number, number), success=success)
    for i, steps in enumerate(executed):
        made.latents.append(np.full((2, 2), 10 * number + i, np.float32))
        made.actions.append(np.zeros((steps, 2), np.float32))
        if traced:
            made.traces.append(np.full((3, 1), 10 * number + i))
    made.observations += [Observation("", np.array([10 * number + i], np.float32)) for i in range(len(executed) + 1)]
    return made


EPISODES = [episode(B, 0, [2, 2, 1], True), episode(A, 1, [2], False), episode(B, 2, [2, 2], False)]


def test_rows_by_hand():
    taken = decisions(ToyFlow(), Rollout(EPISODES, FIT))
    assert len(taken) == 6
    assert taken.row.tolist() == [0, 1, 2, 4, 6, 7]  # each episode has one more observation than decisions
    assert taken.features.tolist() == [[0, 0], [1, 0.25], [2, 0.5], [10, 0], [20, 0], [21, 0.25]]
    assert taken.next_features.tolist() == [[1, 0.25], [2, 0.5], [3, 0.75], [11, 0.125], [21, 0.25], [22, 0.5]]
    assert taken.latent[:, 0, 0].tolist() == [0, 1, 2, 10, 20, 21]
    assert taken.trace[:, 0, 0].tolist() == [0, 1, 2, 10, 20, 21]
    assert taken.mask.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 1]]
    assert taken.reward.tolist() == [0, 0, 1, 0, 0, 0]
    assert taken.ended.tolist() == [False, False, True, True, False, True]
    assert taken.task.tolist() == [0, 0, 0, 1, 0, 0]
    assert taken.episode.tolist() == [0, 0, 0, 1, 2, 2]
    assert taken.start.tolist() == [0, 0, 0, 1, 0, 0]
    assert taken.returns(0.5).tolist() == [0.25, 0.5, 1, 0, 0, 0]
    assert taken.view(torch.tensor([5, 2])).proprio.tolist() == [[21], [2]]


def test_groups_share_task_and_initial_state():
    """In the order of first appearance; the same state of another task is another group."""
    jobs = [(B, 7), (A, 7), (B, 7), (B, 0), (A, 7)]
    made = [episode(task, i, [2] * (1 + i % 2), False) for i, (task, _) in enumerate(jobs)]
    made = [dataclasses.replace(e, job=Job(e.job.task, s, 0, 0)) for e, (_, s) in zip(made, jobs, strict=True)]
    assert decisions(ToyFlow(), Rollout(made, FIT)).start.tolist() == [0, 1, 1, 0, 2, 2, 1]


def test_without_traces():
    bare = [dataclasses.replace(made, traces=[]) for made in EPISODES]
    assert decisions(ToyFlow(), Rollout(bare, FIT)).trace is None
