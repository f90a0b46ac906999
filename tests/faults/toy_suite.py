"""A suite that costs next to nothing, played by LIBERO's prior: whole runs for tests of what surrounds runs."""

import contextlib
import os
import signal
import time
from pathlib import Path
from unittest import mock

from faulty_suite import FaultySimulator, FaultySuite

from vlarl_bench import registry
from vlarl_bench.protocol import Protocol
from vlarl_bench.suite import Observation, Task

INSTRUCTION = "pick up the alphabet soup and place it in the basket"


class ToySuite(FaultySuite):
    """A chunk takes 2 s while there is a file `TOY_SLOW`; and where there is a file `TOY_KILL`, it kills the run."""

    name = "toy-arm"
    summary = "a chaotic map"
    benchmark = "libero"
    tasks = (Task("toy-arm", "one", INSTRUCTION),)

    def protocol(self, observation, name="tiny"):
        return Protocol(
            **{"name": "toy-state", "version": 1, "observation": "state", "horizon": {"toy-arm": 20}},
            **{"settle_steps": 0, "execute": 4, "train_states": (0, 1), "eval_states": (2, 3)},
        )

    def open(self, task, protocol, video=False):
        return ToySimulator(task, [])


class ToySimulator(FaultySimulator):
    winning = (1, 3)  # of two to train on one, so that there is something to learn

    def step(self, actions):
        if Path(os.environ.get("TOY_SLOW", "none")).exists():
            time.sleep(2)
        with contextlib.suppress(FileNotFoundError):
            Path(os.environ.get("TOY_KILL", "none")).unlink()  # by one of several simulators, whose run it then kills
            os.kill(os.getppid(), signal.SIGKILL)
        return super().step(actions)

    def observe(self):
        seen = super().observe()
        names = dict(zip(("alphabet_soup_1", "basket_1"), seen.objects.values(), strict=True))
        return Observation(seen.instruction, seen.proprio, names)


@contextlib.contextmanager
def installed():
    """The suite as if it were installed, for commands in this process."""
    suite, get = ToySuite(), registry.get
    with mock.patch.object(registry, "get", lambda *name: suite if name == ("suite", suite.name) else get(*name)):
        yield
