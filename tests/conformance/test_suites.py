"""What every registered suite must do, whoever wrote it."""

import contextlib
import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Outcome

SUITES = registry.names("suite")
PRO = ("libero_pro_spatial_swap", "libero_pro_object_language", "libero_pro_goal_object", "libero_pro_10_task")
"""Of LIBERO-PRO's suites, each the same code over another of its folders, those that are played: each benchmark once
and each change once."""


def modes(suite):
    """Observation modes that the suite offers."""
    offered = []
    for mode in ("state", "pixels"):
        try:
            suite.protocol(mode)
        except BenchError:
            continue
        offered.append(mode)
    return offered


def concrete(name):
    """Whether the suite has simulators of its own; a group (`libero`) only passes its members' on."""
    return all(task.suite == name for task in registry.get("suite", name).tasks)


def assert_same(a, b):
    """Bitwise equality of two observations."""
    assert a.instruction == b.instruction
    np.testing.assert_array_equal(a.proprio, b.proprio)
    for seen, again in ((a.objects, b.objects), (a.images, b.images)):
        assert seen.keys() == again.keys()
        for name in seen:
            np.testing.assert_array_equal(seen[name], again[name])


@pytest.mark.parametrize("name", SUITES)
class TestDescription:
    def test_tasks_are_unique_and_have_instructions(self, name):
        tasks = registry.get("suite", name).tasks
        assert tasks
        assert len({task.key for task in tasks}) == len(tasks)
        for task in tasks:
            assert task.instruction == task.instruction.strip() != ""
            assert "/" not in task.suite

    def test_each_task_belongs_to_a_registered_suite(self, name):
        for task in registry.get("suite", name).tasks:
            assert concrete(task.suite)
            assert task in registry.get("suite", task.suite).tasks

    def test_summary_is_one_line(self, name):
        summary = registry.get("suite", name).summary
        assert summary.strip() == summary != ""
        assert "\n" not in summary

    def test_training_never_sees_the_evaluation_states(self, name):
        suite = registry.get("suite", name)
        assert modes(suite)
        for mode in modes(suite):
            protocol = suite.protocol(mode)
            assert protocol.train_states
            assert protocol.eval_states
            assert not set(protocol.train_states) & set(protocol.eval_states)
            assert len(set(protocol.train_states)) == len(protocol.train_states)
            assert len(set(protocol.eval_states)) == len(protocol.eval_states)

    def test_protocol_covers_every_task_and_says_what_is_seen(self, name):
        suite = registry.get("suite", name)
        for mode in modes(suite):
            protocol = suite.protocol(mode)
            assert protocol == suite.protocol(mode)
            assert protocol.observation == mode
            assert ("privileged" in protocol.label) == (mode == "state")
            assert bool(protocol.cameras) == bool(protocol.image_size) == (mode == "pixels")
            assert protocol.execute > 0
            assert protocol.settle_steps >= 0
            for task in suite.tasks:
                assert protocol.horizon[task.suite] >= protocol.execute

    def test_unknown_observation_mode_is_one_clear_line(self, name):
        with pytest.raises(BenchError, match="smell") as error:
            registry.get("suite", name).protocol("smell")
        assert "\n" not in str(error.value)

    def test_describing_it_imports_nothing_heavy(self, name, imported):
        assert imported("suite")[name] == []


def played():
    """Suites whose simulators are opened."""
    return [name for name in SUITES if concrete(name) and (not name.startswith("libero_pro_") or name in PRO)]


@pytest.fixture(scope="module", params=played())
def suite(request):
    return registry.get("suite", request.param)


@pytest.fixture(scope="module")
def task(suite):
    return suite.tasks[0]


@pytest.fixture(scope="module")
def plain(suite, task):
    """A simulator as training opens it: the suite's first mode, no video."""
    simulator = suite.open(task, suite.protocol(modes(suite)[0]))
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def filmed(suite, task):
    """The same task, able to render; in `pixels` mode where the suite has it."""
    simulator = suite.open(task, suite.protocol(modes(suite)[-1]), video=True)
    yield simulator
    simulator.close()


@pytest.fixture
def actions(suite):
    """[8, A]: one chunk that moves the robot."""
    return np.random.default_rng(0).uniform(-1, 1, (8, suite.action_dim)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Solved:
    """A success of the scripted expert."""

    task: Any
    simulator: Any
    shown: Any
    winning: np.ndarray
    """[T, A] actions that succeed from the demonstration's initial state: what was executed, noise included."""


@pytest.fixture(scope="module")
def solved(suite, task, plain):
    """The first success among the first tasks: a suite may have tasks that no expert can do."""
    protocol, tasks = suite.protocol(modes(suite)[0]), suite.tasks[:3]
    with contextlib.ExitStack() as stack:
        opened = {task: plain}
        for state, tried in itertools.product(protocol.train_states[:5], tasks):
            if tried not in opened:
                opened[tried] = stack.enter_context(contextlib.closing(suite.open(tried, protocol)))
            with recorded(opened[tried]) as executed:
                shown = suite.demonstrate(opened[tried], tried, state, seed=0)
            if shown.success:
                yield Solved(tried, opened[tried], shown, np.array(executed))
                return
    pytest.fail(f"the expert of {suite.name} failed on its first tasks from initial states {protocol.train_states[:5]}")


@contextlib.contextmanager
def recorded(simulator):
    """Every action that is executed after the last reset, as a list that grows."""
    executed = []
    step, reset = simulator.step, simulator.reset

    def recording_step(actions):
        executed.extend(np.array(actions))
        return step(actions)

    def recording_reset(init_state):
        executed.clear()
        reset(init_state)

    simulator.step, simulator.reset = recording_step, recording_reset
    try:
        yield executed
    finally:
        del simulator.step, simulator.reset


def check_observation(suite, protocol, task, seen):
    assert seen.instruction == task.instruction
    assert seen.proprio.shape == (suite.proprio_dim,)
    assert seen.proprio.dtype == np.float32
    assert np.isfinite(seen.proprio).all()
    assert bool(seen.objects) == (protocol.observation == "state")
    for pose in seen.objects.values():
        assert pose.shape == (7,)
        assert pose.dtype == np.float32
        assert np.linalg.norm(pose[3:]) == pytest.approx(1, abs=1e-4)
    assert set(seen.images) == set(protocol.cameras)
    for image in seen.images.values():
        assert image.shape == (protocol.image_size, protocol.image_size, 3)
        assert image.dtype == np.uint8
        assert image.std() > 1


def test_observation_is_what_the_protocol_says(suite, task, plain, filmed):
    for simulator, mode in ((plain, modes(suite)[0]), (filmed, modes(suite)[-1])):
        protocol = suite.protocol(mode)
        simulator.reset(protocol.train_states[0])
        check_observation(suite, protocol, task, simulator.observe())


def test_what_is_shown_has_names_that_are_known_beforehand(suite, task, plain):
    if "state" not in modes(suite):
        pytest.skip("the suite has no state mode")
    plain.reset(0)
    assert set(plain.observe().objects) <= set(suite.object_names(task.suite))


def test_reset_forgets_what_was_before(plain, actions):
    plain.reset(0)
    first = plain.observe()
    plain.step(actions)
    plain.reset(1)
    other = plain.observe()
    plain.reset(0)
    assert_same(first, plain.observe())
    assert any(not np.array_equal(first.objects[name], other.objects[name]) for name in first.objects) or any(
        not np.array_equal(first.images[name], other.images[name]) for name in first.images
    )


def test_actions_move_the_robot(plain, actions):
    plain.reset(0)
    before = plain.observe().proprio
    outcome = plain.step(actions)
    assert outcome.executed == len(actions)
    assert not outcome.success
    assert not np.array_equal(before, plain.observe().proprio)


def test_restore_replays_bitwise(plain, actions):
    plain.reset(0)
    plain.step(actions[:3])
    here = plain.observe()
    snapshot = pickle.loads(pickle.dumps(plain.save()))
    outcome = plain.step(actions)
    there = plain.observe()

    plain.reset(1)  # another episode on the same simulator, as when slots share it
    plain.step(-actions)
    plain.restore(snapshot)
    assert_same(here, plain.observe())
    assert plain.step(actions) == outcome
    assert_same(there, plain.observe())


def test_looking_and_saving_change_nothing(plain, actions):
    plain.reset(0)
    plain.step(actions)
    unseen = plain.observe()
    plain.reset(0)
    for action in actions:
        plain.observe()
        plain.save()
        plain.step(action[None])
    assert_same(unseen, plain.observe())


def test_step_stops_at_the_first_success(solved):
    """In the midst of a chunk, or with its only action."""
    simulator, before, last = solved.simulator, solved.winning[:-3], solved.winning[-3:]
    simulator.reset(solved.shown.init_state)
    assert simulator.step(before) == Outcome(len(before), False)
    snapshot = simulator.save()
    assert simulator.step(np.concatenate([last, np.repeat(last[-1:], 5, axis=0)])) == Outcome(3, True)
    simulator.restore(snapshot)
    assert simulator.step(last[:2]) == Outcome(2, False)
    assert simulator.step(last[2:]) == Outcome(1, True)


def test_demonstration_is_aligned(suite, solved):
    shown = solved.shown
    assert shown.task == solved.task
    assert shown.actions.shape == (len(shown.observations), suite.action_dim)
    assert shown.actions.dtype == np.float32
    protocol = suite.protocol(modes(suite)[0])
    assert len(shown.actions) <= protocol.horizon[shown.task.suite]
    for seen in shown.observations:
        check_observation(suite, protocol, shown.task, seen)


def test_expert_depends_on_state_and_seed_only(suite, solved):
    again = suite.demonstrate(solved.simulator, solved.task, solved.shown.init_state, seed=0)
    np.testing.assert_array_equal(again.actions, solved.shown.actions)


def test_state_mode_never_renders(suite, plain, actions, monkeypatch):
    if "state" not in modes(suite):
        pytest.skip("the suite has no state mode")
    import mujoco

    def rendered(*_, **__):
        raise AssertionError("rendered in state mode")

    monkeypatch.setattr(mujoco, "mjr_render", rendered)
    monkeypatch.setattr(plain, "render", rendered)
    plain.reset(0)
    plain.step(actions)
    plain.observe()


def test_filming_shows_the_scene_and_changes_nothing(suite, task, plain, filmed, actions):
    camera = (suite.protocol(modes(suite)[-1]).cameras or ("agentview",))[0]
    filmed.reset(0)
    first = filmed.render(camera, 48)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    filmed.step(actions)
    assert not np.array_equal(first, filmed.render(camera, 48))

    plain.reset(0)
    plain.step(actions)
    np.testing.assert_array_equal(plain.observe().proprio, filmed.observe().proprio)
