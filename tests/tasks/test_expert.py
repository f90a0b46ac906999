"""The scripted expert in the real simulator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from vlarl_bench.tasks.libero.expert import demonstrate, in_order

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Task

if TYPE_CHECKING:
    from vlarl_bench.tasks.libero.simulator import LiberoSimulator

SUITE = registry.get("suite", "libero_object")
TASK = SUITE.tasks[6]


@contextmanager
def opened(task: Task) -> "Iterator[LiberoSimulator]":
    suite = registry.get("suite", task.suite)
    simulator = cast("LiberoSimulator", suite.open(task, suite.protocol("state")))
    try:
        yield simulator
    finally:
        simulator.close()


def named(suite: str, instruction: str) -> Task:
    return next(task for task in registry.get("suite", suite).tasks if task.instruction == instruction)


@pytest.fixture(scope="module")
def simulator() -> "Iterator[LiberoSimulator]":
    with opened(TASK) as simulator:
        yield simulator


@pytest.mark.parametrize("init_state", [0, 7])
def test_expert_solves_the_task(simulator: "LiberoSimulator", init_state: int) -> None:
    demonstration = demonstrate(simulator, TASK, init_state, seed=0)
    assert demonstration.success
    assert demonstration.actions.dtype == np.float32
    assert len(demonstration.observations) == len(demonstration.actions) <= simulator.protocol.horizon[TASK.suite]
    assert np.abs(demonstration.actions).max() <= 1
    # The first observation is the settled initial state, before anything was done.
    simulator.reset(init_state)
    assert np.array_equal(demonstration.observations[0].proprio, simulator.observe().proprio)


def test_same_seed_gives_the_same_episode_and_another_seed_another(simulator: "LiberoSimulator") -> None:
    first, again, other = (demonstrate(simulator, TASK, 1, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.actions, again.actions)
    assert all(
        np.array_equal(a.proprio, b.proprio) for a, b in zip(first.observations, again.observations, strict=True)
    )
    assert first.actions.shape != other.actions.shape or not np.array_equal(first.actions, other.actions)


def test_unknown_skill_names_the_task(simulator: "LiberoSimulator", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(simulator.env.parsed_problem, "goal_state", [["up", "butter_1"]])
    monkeypatch.setattr(simulator.env, "_eval_predicate", lambda _: False)
    with pytest.raises(BenchError, match=rf"{TASK.name}.*'up'"):
        demonstrate(simulator, TASK, 0, seed=0)


@pytest.mark.parametrize(
    ("suite", "instruction"),
    [
        pytest.param("libero_goal", "open the middle drawer of the cabinet", id="open"),
        pytest.param("libero_90", "close the microwave", id="close a door"),
        pytest.param("libero_goal", "turn on the stove", id="turn on"),
        pytest.param("libero_90", "turn off the stove", id="turn off"),
        pytest.param("libero_90", "stack the black bowl at the front on the black bowl in the middle", id="stack"),
        pytest.param("libero_10", "pick up the book and place it in the back compartment of the caddy", id="insert"),
        pytest.param(
            "libero_10", "put the black bowl in the bottom drawer of the cabinet and close it", id="fill and close"
        ),
        pytest.param("libero_10", "put both moka pots on the stove", id="side by side"),
    ],
)
def test_skill(suite: str, instruction: str) -> None:
    task = named(suite, instruction)
    with opened(task) as simulator:
        assert demonstrate(simulator, task, 0, seed=0).success


def test_a_plate_that_must_be_pushed_is_pushed() -> None:
    task = named("libero_goal", "push the plate to the front of the stove")
    with opened(task) as simulator:
        shown = demonstrate(simulator, task, 0, seed=0)
    assert shown.success
    heights = np.array([seen.objects["plate_1"][2] for seen in shown.observations])
    assert np.abs(heights - heights[0]).max() < 0.02
    where = np.array([seen.objects["plate_1"][:2] for seen in shown.observations])
    assert np.linalg.norm(where[-1] - where[0]) > 0.15
    assert np.linalg.norm(np.diff(where, axis=0), axis=1).max() < 0.03
    assert (shown.actions[25:, 6] > 0).all(), "fingers stay closed: nothing is gripped"


def test_containers_are_opened_before_and_closed_after() -> None:
    goals = [("close", "oven"), ("in", "pie", "oven_inside")]
    doors = {"oven_inside": "oven"}
    assert in_order(goals, doors) == [("open", "oven"), goals[1], goals[0]]
    assert in_order(in_order(goals, doors), doors) == [("open", "oven"), goals[1], goals[0]]


def test_what_carries_another_thing_is_placed_first() -> None:
    goals = [("on", "cherry", "cake"), ("on", "cake", "plate"), ("in", "plate", "box")]
    assert in_order(goals, {}) == goals[::-1]


def test_independent_goals_keep_the_order_of_the_task() -> None:
    goals = [("on", "pot", "stove_region"), ("turnon", "stove"), ("close", "drawer"), ("on", "bowl", "cabinet")]
    assert in_order(goals, {}) == goals
    assert in_order([("on", "a", "b"), ("on", "b", "a")], {}) == [("on", "a", "b"), ("on", "b", "a")]
