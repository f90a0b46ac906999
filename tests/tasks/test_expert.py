"""The scripted expert in the real simulator."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from vlarl_bench.tasks.libero.expert import demonstrate
from vlarl_bench.tasks.libero.suite import LIBERO_OBJECT

from vlarl_bench.errors import BenchError

if TYPE_CHECKING:
    from vlarl_bench.tasks.libero.simulator import LiberoSimulator

SUITE = LIBERO_OBJECT
TASK = SUITE.tasks[6]


@pytest.fixture(scope="module")
def simulator() -> "Iterator[LiberoSimulator]":
    simulator = cast("LiberoSimulator", SUITE.open(TASK, SUITE.protocol("state")))
    yield simulator
    simulator.close()


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
    monkeypatch.setitem(simulator.env.parsed_problem, "goal_state", [["turnon", "flat_stove_1"]])
    with pytest.raises(BenchError, match=rf"{TASK.name}.*turnon"):
        demonstrate(simulator, TASK, 0, seed=0)
