"""A suite in pure NumPy whose simulator misbehaves on demand. In a file of its own, since workers import it."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from vlarl_bench.errors import BenchError
from vlarl_bench.protocol import Protocol
from vlarl_bench.suite import Demonstration, Observation, Outcome, Suite, Task

NAMES = ("cube", "plate")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong, where, and how often: `times` is kept by files in `folder`, since the worker dies of it."""

    kind: str
    task: str
    folder: Path
    at: str = "step"
    """`open`, `reset` or `step`."""
    init_state: int = 0
    after: int = 5
    """Environment steps before it, if `at` is `step`."""
    times: int = 1

    def strike(self) -> str:
        """Does it, or returns what the simulator is to do to its answer."""
        for i in range(self.times):
            try:
                os.close(os.open(self.folder / f"{self.kind}-{self.task}-{i}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return self._strike()
        return ""

    def _strike(self) -> str:
        if self.kind in ("SIGKILL", "SIGSTOP", "SIGSEGV"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        elif self.kind == "exit":
            os._exit(3)
        elif self.kind == "sys.exit":
            sys.exit(4)
        elif self.kind == "raise":
            raise ArithmeticError("the arm\nfell off")
        elif self.kind == "mistake":
            raise BenchError("init state: 7; it has 0 to 3")
        elif self.kind == "loop":
            while True:
                pass
        elif self.kind in ("sleep", "slow"):
            time.sleep(10**6 if self.kind == "sleep" else 3)
        else:
            return self.kind
        return ""


class FaultySuite(Suite):
    name = "faulty"
    summary = "misbehaves"
    benchmark = "faulty"
    action_dim = 7
    proprio_dim = 8
    fps = 20
    film_camera = "none"
    tasks = tuple(Task("faulty", name, f"move the {name}") for name in ("one", "two", "three"))

    def __init__(self, *faults):
        self.faults = faults

    def protocol(self, observation):
        return Protocol(
            **{"name": "tiny-state", "version": 1, "observation": "state", "horizon": {"faulty": 20}},
            **{"settle_steps": 0, "execute": 4, "train_states": (0, 1), "eval_states": (2, 3)},
        )

    def open(self, task, protocol, video=False):
        return FaultySimulator(task, [fault for fault in self.faults if fault.task == task.name])

    def demonstrate(self, simulator, task, init_state, seed):
        """Eight steps, which succeed with seed 1."""
        simulator.reset(init_state)
        actions, observations = np.full((8, 7), 0.01 * init_state, np.float32), []
        for action in actions:
            observations.append(simulator.observe())
            simulator.step(action[None])
        return Demonstration(task, init_state, seed == 1, tuple(observations), actions)


class FaultySimulator:
    """A chaotic map pushed by the actions: any slip in what was executed shows in every later observation."""

    winning = (3,)
    """Initial states whose episodes succeed at the 17th step, whatever is done."""

    def __init__(self, task, faults):
        self.task, self.faults, self.spoil = task, faults, ""
        self._strike("open")

    def _strike(self, at):
        for fault in self.faults:
            if fault.at != at or (at != "open" and self.init_state != fault.init_state):
                continue
            if at != "step" or self.steps == fault.after:
                self.spoil = fault.strike() or self.spoil

    def reset(self, init_state):
        self.init_state, self.steps = init_state, 0
        self.state = np.linspace(0.1, 0.9, 8 + 7 * len(NAMES)) / (1 + init_state + len(self.task.name))
        self._strike("reset")

    def step(self, actions):
        for executed, action in enumerate(actions, start=1):
            self._strike("step")
            push = np.resize(0.5 + 0.4 * np.tanh(np.asarray(action, dtype=np.float64)), self.state.shape)
            self.state = 0.5 * push + 0.5 * 3.9 * self.state * (1 - self.state)
            self.state = np.clip(self.state, 0, 1)
            self.steps += 1
            if self.spoil == "broken":
                self.spoil = ""
                return Outcome(executed, False, broken=True)
            if self.spoil == "drift":
                self.state[0], self.spoil = self.state[0] + 1e-4, ""
            if self.steps == 17 and self.init_state in self.winning:
                return Outcome(executed, True)
        return Outcome(99 if self.spoil == "steps" else len(actions), False)

    def observe(self):
        proprio = self.state[:8].astype(np.float32)
        objects = {name: self.state[8 + 7 * i : 15 + 7 * i].astype(np.float32) for i, name in enumerate(NAMES)}
        if self.spoil == "nan":
            proprio[3] = np.nan
        elif self.spoil == "inf":
            objects["plate"][6] = -np.inf
        elif self.spoil == "shape":
            proprio = proprio[:7]
        elif self.spoil == "dtype":
            objects["cube"] = objects["cube"].astype(np.float64)
        elif self.spoil == "none":
            return None
        elif self.spoil == "unpicklable":
            return lambda: None
        return Observation(self.task.instruction, proprio, objects)

    def save(self):
        return self.init_state, self.steps, self.state.copy()

    def restore(self, snapshot):
        self.init_state, self.steps, state = snapshot
        self.state = state.copy()

    def close(self):
        pass
