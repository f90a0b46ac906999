"""A test that may be looked at after every episode, and stop there: anytime-valid, by SciPy's closed form.

Each unit (a task's initial state, its repeats together) that a policy changed is a gain or a loss. Were before and
after the same, either would be as likely, whatever came before, and then the e-value below is a martingale that starts
at 1: it ever reaches 1/alpha with probability alpha at most (Ville, 1939; Robbins, 1970). It is the likelihood ratio of
a share of gains drawn uniformly from [0, 1] against one half (Ramdas, Gruenwald, Vovk and Shafer, 2023).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaln

from ..errors import BenchError
from .runs import RunFolder


def log_e_values(signs: np.ndarray) -> np.ndarray:
    """[..., N] natural logarithm of the e-value after each of N units, of their signs: 1 gained, -1 lost, 0 neither."""
    gained, lost = np.cumsum(signs > 0, axis=-1), np.cumsum(signs < 0, axis=-1)
    return (gained + lost) * math.log(2) + betaln(1 + gained, 1 + lost)


@dataclass(frozen=True)
class Replay:
    """What the test would have done with a finished evaluation."""

    pairs: int
    """Pairs of episodes, before and after, that were played ..."""
    used: int
    """... and how many of them the test would have seen, if it stopped."""
    stopped: bool
    gained: int
    """Units gained among those seen ..."""
    lost: int
    """... and lost."""
    e_value: float
    """When it stopped, or at the end."""


def replay(run: RunFolder, alpha: float = 0.05) -> Replay:
    """Goes through a run's pairs state by state, and within one task by task: an order that no outcome can change. (On
    disk rows lie as episodes ended, where a success comes before the failures that it began with.)

    Raises BenchError for a run that has not two whole evaluations.
    """
    if not run.compares or not len(run.base):
        raise BenchError(
            f"{run.folder}: has no episodes before and after to compare; give a run that evaluated its base"
        )
    if run.missing:
        raise BenchError(f"{run.folder}: {run.missing} evaluation episodes are missing; finish it with `run --resume`")
    plan = run.manifest["evaluation"]
    tasks, states = ({key: i for i, key in enumerate(plan[name])} for name in ("tasks", "init_states"))
    changes = np.zeros((len(states), len(tasks)), dtype=int)
    for sign, rows in ((1, run.evaluated), (-1, run.base)):
        columns = zip(*(rows.column(n) for n in ("suite", "task", "init_state", "success")), strict=True)
        for suite, task, state, success in columns:
            if state in states:
                changes[states[state], tasks[f"{suite}/{task}"]] += sign * int(success)
    signs = np.sign(changes).ravel()
    logarithms = log_e_values(signs)
    reached = np.flatnonzero(logarithms >= math.log(1 / alpha))
    units = int(reached[0]) + 1 if len(reached) else len(signs)
    seen, repeats = signs[:units], plan["repeats"]
    gained, lost = int((seen > 0).sum()), int((seen < 0).sum())
    return Replay(
        len(signs) * repeats, units * repeats, len(reached) > 0, gained, lost, math.exp(logarithms[units - 1])
    )
