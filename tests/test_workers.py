"""Watched processes: real ones, really stopped, hanging and killed."""

import os
import signal
import time
from contextlib import contextmanager

import misbehaving
import numpy as np
import pytest

from vlarl_bench import workers
from vlarl_bench.workers import Worker, WorkerLost, ready


@contextmanager
def started(make, *args):
    worker = Worker(make, args)
    pid = worker.process.pid
    try:
        yield worker
    finally:
        worker.end()
        assert not os.path.exists(f"/proc/{pid}")


def test_answers_come_in_order_and_several_workers_are_waited_for():
    with started(misbehaving.echo) as one, started(misbehaving.echo) as two:
        one.ask(["a", np.arange(3)], [60, 60])
        two.ask(["b"], [60])
        found = ready([one, two])
        assert found and set(found) <= {one, two}
        assert one.answer() == "a"
        np.testing.assert_array_equal(one.answer(), np.arange(3))
        assert two.answer() == "b"


def test_a_worker_that_owes_nothing_may_be_silent(monkeypatch):
    monkeypatch.setattr(workers, "TICK", 0.05)
    with started(misbehaving.echo) as worker:
        worker.ask([1], [60])
        assert worker.answer() == 1
        os.kill(worker.process.pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(worker.process.pid, signal.SIGCONT)
        worker.ask([2], [60])
        assert worker.answer() == 2


def test_a_large_request_to_a_stopped_worker_does_not_block(monkeypatch):
    monkeypatch.setattr(workers, "STOPPED", 1.0)
    with started(misbehaving.echo) as worker:
        os.kill(worker.process.pid, signal.SIGSTOP)
        worker.ask([np.zeros(10**7)], [60])
        with pytest.raises(WorkerLost, match=r"^was stopped \(SIGSTOP\) for 1 s$"):
            worker.answer()


def test_a_worker_stopped_in_the_middle_of_an_answer_is_found(monkeypatch):
    monkeypatch.setattr(workers, "STOPPED", 2.0)
    with started(misbehaving.halting) as worker:
        worker.ask([32], [60])
        until = time.monotonic() + 60
        while not workers._is_stopped(worker.process.pid):  # it has filled the pipe, since nobody reads
            assert time.monotonic() < until
            time.sleep(0.05)
        with pytest.raises(WorkerLost, match=r"^was stopped"):
            worker.answer()


def test_the_reset_that_swallows_every_exception_cannot_spin_for_ever():
    """It answers while nothing is broken."""
    with started(misbehaving.stock_reset) as worker:
        worker.ask(["reset"], [300])
        assert "robot0_joint_pos" in worker.answer()
        worker.ask(["break"], [60])
        assert worker.answer() == "break"
        worker.ask(["reset"], [5])
        with pytest.raises(WorkerLost, match=r"^gave no answer within 5 s$"):
            worker.answer()


def test_a_function_that_cannot_be_made_is_a_lost_worker(capfd):
    with started(misbehaving.echo, "one argument too many") as worker:
        worker.ask([1], [60])
        with pytest.raises(WorkerLost, match=r"^ended with exit code 1$"):
            worker.answer()
    assert "TypeError" in capfd.readouterr().err
