"""Rollouts on real simulators: the same jobs give the same episodes, and no process outlives its pool."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_suite import NAMES, Fault, FaultySuite
from hypothesis import given, settings
from hypothesis import strategies as st

from vlarl_bench import pool as pools
from vlarl_bench import registry, workers
from vlarl_bench.errors import BenchError
from vlarl_bench.pool import Patience, Pool
from vlarl_bench.rollout import Job, episode_seed, run_episodes

SUITE = registry.get("suite", "libero_object")
PROTOCOL = SUITE.protocol("state")


@pytest.fixture(scope="module")
def policy():
    spec = registry.get("policy", "pi0-tiny")
    return spec.create(SUITE.embodiment(PROTOCOL), [task.instruction for task in SUITE.tasks], seed=0)


@pytest.fixture(scope="module")
def short():
    """The same protocol with episodes of 20 steps: a chunk of 8, one of 8, one cut to 4."""
    return dataclasses.replace(PROTOCOL, horizon={"libero_object": 20})


def jobs():
    return [Job(SUITE.tasks[i % 2], i, 0, episode_seed(0, i)) for i in range(5)]


def play(policy, protocol, workers, order=None):
    wanted = jobs() if order is None else [jobs()[i] for i in order]
    with Pool(SUITE, protocol, workers) as pool:
        return run_episodes(pool, policy, wanted, protocol, slots=3)


def assert_same(mine, theirs):
    """Two lists of episodes are equal bit by bit."""
    assert [episode.job for episode in mine] == [episode.job for episode in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert (a.executed, a.success) == (b.executed, b.success)
        for x, y in zip(a.latents + a.actions, b.latents + b.actions, strict=True):
            np.testing.assert_array_equal(x, y)
        for seen, other in zip(a.observations, b.observations, strict=True):
            np.testing.assert_array_equal(seen.proprio, other.proprio)
            assert seen.objects.keys() == other.objects.keys()
            for name in seen.objects:
                np.testing.assert_array_equal(seen.objects[name], other.objects[name])


@pytest.fixture(scope="module")
def one(policy, short):
    """What one worker plays, undisturbed."""
    return play(policy, short, workers=1)


def test_workers_and_order_change_nothing(policy, short, one):
    """More workers than slots; two of them are played with below."""
    order = [4, 2, 0, 3, 1]
    more = play(policy, short, workers=4, order=order)
    assert {tuple(episode.executed) for episode in one} == {(8, 8, 4)}
    assert_same(more, [one[index] for index in order])


def test_libero_does_not_notice_that_a_worker_was_killed(policy, short, one):
    turns, losses = [], []
    with Pool(SUITE, short, workers=2, on_loss=losses.append) as pool:

        def act(policy, context, generators):
            turns.append(None)
            if len(turns) == 2:  # in the middle of the first three episodes, two of which this worker plays
                os.kill(pool.pids[0], signal.SIGKILL)
            return policy.sample(context, generators)

        disturbed = run_episodes(pool, policy, jobs(), short, slots=3, act=act)
    assert [(loss.task, loss.init_state, loss.doing) for loss in losses] == [(SUITE.tasks[0], 0, "step")]
    assert_same(disturbed, one)


FAULTY_TASKS = FaultySuite.tasks
FAULTY_PROTOCOL = FaultySuite().protocol("state")
PATIENCE = Patience(open=30, step=9, each=0)


@pytest.fixture(scope="module")
def pilot():
    spec = registry.get("policy", "pi0-tiny")
    words = [task.instruction for task in FAULTY_TASKS] + list(NAMES)
    return spec.create(FaultySuite().embodiment(FAULTY_PROTOCOL), words, seed=0)


def faulty_jobs():
    return [Job(task, state, 0, episode_seed(task.name, state)) for task in FAULTY_TASKS for state in range(4)]


@pytest.fixture(scope="module")
def undisturbed(pilot):
    with Pool(FaultySuite(), FAULTY_PROTOCOL, workers=1) as pool:
        episodes = run_episodes(pool, pilot, faulty_jobs(), FAULTY_PROTOCOL, slots=4)
    assert {(episode.steps, episode.success) for episode in episodes} == {(20, False), (17, True)}
    return episodes


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(workers, "STOPPED", 2.0)


def disturbed(pilot, *faults):
    """All episodes with those faults, and the losses; nobody is left behind."""
    losses = []
    with Pool(FaultySuite(*faults), FAULTY_PROTOCOL, 2, on_loss=losses.append, patience=PATIENCE) as pool:
        try:
            return run_episodes(pool, pilot, faulty_jobs(), FAULTY_PROTOCOL, slots=4), losses
        finally:
            pool.__exit__()
            assert not any(os.path.exists(f"/proc/{pid}") for pid in pool.pids)


def test_an_episode_whose_physics_break_down_has_failed(pilot, undisturbed, tmp_path):
    episodes, losses = disturbed(pilot, Fault("broken", "two", tmp_path, init_state=3))
    assert losses == []
    ended = [(a.job, a.steps, a.success) for a, b in zip(episodes, undisturbed, strict=True) if a.steps != b.steps]
    assert ended == [(Job(FAULTY_TASKS[1], 3, 0, episode_seed("two", 3)), 6, False)]


FAULTS = [
    ("SIGKILL", "step", "was killed by SIGKILL, perhaps for want of memory (try --workers 1) (at step)"),
    ("SIGSEGV", "step", "was killed by SIGSEGV (at step)"),
    ("SIGSTOP", "step", "was stopped (SIGSTOP) for 2 s (at step)"),
    ("exit", "step", "ended with exit code 3 (at step)"),
    ("sys.exit", "step", "ended with exit code 4 (at step)"),
    ("raise", "step", "raised ArithmeticError: the arm fell off, in _strike (faulty_suite.py:"),
    ("loop", "step", "gave no answer within 9 s (at step)"),
    ("sleep", "step", "gave no answer within 9 s (at step)"),
    ("nan", "step", "returned proprio = nan at [3] (at step)"),
    ("inf", "step", "returned plate = -inf at [6] (at step)"),
    ("shape", "step", "returned proprio as [7] float32 where [8] float32 was due (at step)"),
    ("dtype", "step", "returned cube as [7] float64 where [7] float32 was due (at step)"),
    ("none", "step", "returned NoneType where an Observation was due (at step)"),
    ("steps", "step", "returned 99 executed steps with success False where 4 were asked for (at step)"),
    ("unpicklable", "step", "pickle local object"),
    ("raise", "reset", "(at reset)"),
    ("nan", "reset", "returned proprio = nan at [3] (at reset)"),
    ("sleep", "open", "gave no answer within 30 s (at reset)"),
    ("exit", "open", "ended with exit code 3 (at reset)"),
]


@pytest.mark.parametrize(("kind", "at", "told"), FAULTS, ids=[f"{kind}-{at}" for kind, at, _ in FAULTS])
def test_a_lost_worker_is_named_replaced_and_changes_nothing(pilot, undisturbed, hasty, tmp_path, kind, at, told):
    episodes, losses = disturbed(pilot, Fault(kind, "two", tmp_path, at))
    (loss,) = losses
    either = 1 if at == "open" else 0  # both workers open the task, with one of these each
    assert loss.task.name == "two" and loss.init_state in (0, either)
    assert str(loss).startswith(f"faulty/two, init state {loss.init_state}: the environment worker ")
    assert told in str(loss)
    assert ("Traceback" in loss.trace) == (kind in ("raise", "unpicklable"))
    assert_same(episodes, undisturbed)


def test_two_losses_of_an_episode_are_borne_and_three_are_not(pilot, undisturbed, tmp_path):
    for folder, times in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        fault = Fault("raise", "three", tmp_path / folder, init_state=1, after=9, times=times)
        if times == 2:
            episodes, losses = disturbed(pilot, fault)
            assert len(losses) == 2
            assert_same(episodes, undisturbed)
        else:
            with pytest.raises(
                BenchError, match=r"^faulty/three, init state 1: .* fell off, in .* lost 3 wo"
            ) as caught:
                disturbed(pilot, fault)
            assert "\n" not in str(caught.value)


def test_several_faults_in_one_run(pilot, undisturbed, hasty, tmp_path):
    faults = [
        Fault("SIGKILL", "one", tmp_path, init_state=0, after=0),
        Fault("SIGSTOP", "one", tmp_path, init_state=1, after=7),
        Fault("raise", "two", tmp_path, "reset", init_state=2),
        Fault("exit", "three", tmp_path, "open"),
        Fault("nan", "three", tmp_path, init_state=3, after=16),
    ]
    episodes, losses = disturbed(pilot, *faults)
    assert len(losses) == len(faults)
    assert_same(episodes, undisturbed)


def test_a_mistake_of_the_user_is_passed_on_at_once(pilot, tmp_path):
    with pytest.raises(BenchError, match=r"^init state: 7; it has 0 to 3$"):
        disturbed(pilot, Fault("mistake", "one", tmp_path, "reset"))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_slow_worker_is_not_a_lost_one(pilot, undisturbed, hasty, tmp_path):
    episodes, losses = disturbed(pilot, Fault("slow", "one", tmp_path))
    assert not losses
    assert_same(episodes, undisturbed)


def test_workers_that_die_while_nothing_is_asked_of_them(pilot, undisturbed, hasty):
    turns, losses = [], []
    with Pool(FaultySuite(), FAULTY_PROTOCOL, workers=2, on_loss=losses.append) as pool:

        def act(policy, context, generators):
            turns.append(None)
            if len(turns) == 3:
                os.kill(pool.pids[0], signal.SIGKILL)
                os.kill(pool.pids[1], signal.SIGSTOP)
            return policy.sample(context, generators)

        episodes = run_episodes(pool, pilot, faulty_jobs(), FAULTY_PROTOCOL, slots=4, act=act)
    assert {loss.why.split()[1] for loss in losses} == {"killed", "stopped"}
    assert_same(episodes, undisturbed)


moments = st.tuples(st.floats(0, 1), st.integers(0, 1), st.sampled_from([signal.SIGKILL, signal.SIGSTOP]))


@settings(max_examples=5)
@given(strikes=st.lists(moments, min_size=1, max_size=2))
def test_random_kills_at_random_moments_change_nothing(pilot, undisturbed, strikes):
    losses = []
    with (
        pytest.MonkeyPatch.context() as patch,
        Pool(FaultySuite(), FAULTY_PROTOCOL, workers=2, on_loss=losses.append) as pool,
    ):
        patch.setattr(workers, "STOPPED", 1.0)

        def strike(worker, number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pool.pids[worker], number)

        timers = [threading.Timer(after, strike, (worker, number)) for after, worker, number in strikes]
        for timer in timers:
            timer.start()
        struck = False
        while not struck:  # the last run begins when all has happened, so that nothing stays unfound
            struck = not any(timer.is_alive() for timer in timers)
            assert_same(run_episodes(pool, pilot, faulty_jobs(), FAULTY_PROTOCOL, slots=4), undisturbed)
    assert 1 <= len(losses) <= len(strikes)


def test_a_simulator_that_does_not_repeat_itself_is_named(pilot, tmp_path):
    faults = [Fault("drift", "one", tmp_path, after=2), Fault("exit", "one", tmp_path)]
    with pytest.raises(BenchError, match=r"^faulty/one, init state 0: played again .* not deterministic$"):
        disturbed(pilot, *faults)


def test_a_worker_closes_simulators_that_no_episode_needs(monkeypatch):
    """A suite of many tasks is more than fits into memory."""
    monkeypatch.setattr(pools, "MOST_OPEN", 2)
    opened, closed = [], []

    class Noted(FaultySuite):
        def open(self, task, protocol, video=False):
            simulator = super().open(task, protocol, video)
            opened.append(task.name)
            simulator.close = lambda: closed.append(task.name)
            return simulator

    worker = pools._Worker(Noted(), FAULTY_PROTOCOL, False)
    a, b, c, d, e = (dataclasses.replace(FaultySuite.tasks[0], name=name) for name in "abcde")
    worker.reset(0, (a, 0))
    first = worker.reset(1, (b, 0))
    worker.reset(2, (c, 0))
    worker.reset(1, (d, 0))
    assert (opened, closed) == (["a", "b", "c", "d"], [])  # each had an episode in flight when the next came
    worker.reset(2, (a, 1))
    worker.reset(0, (e, 0))
    assert (closed, list(worker.simulators)) == (["b", "c"], [d, a, e])
    outcome, _ = worker.step(1, np.zeros((1, 7), np.float32))
    assert outcome.executed == 1  # d goes on
    np.testing.assert_array_equal(worker.reset(1, (b, 0)).proprio, first.proprio)


def test_nan_actions_are_the_policys_fault(pilot):
    def act(policy, context, generators):
        sample = policy.sample(context, generators)
        turns.append(None)
        if len(turns) == 3:
            sample.actions[1, 2, 5] = float("nan")
        return sample

    turns, losses = [], []
    named = pytest.raises(BenchError, match=r"^policy: .* NaN or infinite .* faulty/one, init state 1, decision 2")
    with Pool(FaultySuite(), FAULTY_PROTOCOL, workers=2, on_loss=losses.append) as pool, named:
        run_episodes(pool, pilot, faulty_jobs(), FAULTY_PROTOCOL, slots=4, act=act)
    assert not losses


def test_decisions_that_spell_no_chunk_are_counted(pilot, undisturbed):
    """The first of the four slots says nothing valid at every second turn."""

    def act(policy, context, generators):
        turns.append(None)
        invalid = torch.tensor([len(turns) % 2 == 0, False, False, False])
        return dataclasses.replace(policy.sample(context, generators), invalid=invalid)

    turns = []
    with Pool(FaultySuite(), FAULTY_PROTOCOL, workers=1) as pool:
        episodes = run_episodes(pool, pilot, faulty_jobs()[:4], FAULTY_PROTOCOL, slots=4, act=act)
    assert [episode.invalid for episode in episodes] == [len(episodes[0].actions) // 2, 0, 0, 0]
    assert not any(episode.invalid for episode in undisturbed)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """Also one that is in an endless loop, one that is stopped and one that has nothing to do."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import pathlib\n"
        "from faulty_suite import Fault, FaultySuite\n"
        "from vlarl_bench.pool import Pool\n"
        "if __name__ == '__main__':\n"
        f"    folder = pathlib.Path({str(tmp_path)!r})\n"
        "    suite = FaultySuite(Fault('loop', 'one', folder, 'open'), Fault('SIGSTOP', 'two', folder, 'open'))\n"
        "    pool = Pool(suite, suite.protocol('state'), 3)\n"
        "    print(*pool.pids, flush=True)\n"
        "    pool.call('reset', {0: (suite.tasks[0], 0), 1: (suite.tasks[1], 0), 2: (suite.tasks[2], 0)})\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent / "faults")},
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 3
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*-0"))) < 2:  # both are in it
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


def test_seeds_depend_on_every_part():
    seeds = {
        episode_seed(*parts)
        for parts in [(0, "eval", "t", 1), (1, "eval", "t", 1), (0, "train", "t", 1), (0, "eval", "t", 2)]
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
