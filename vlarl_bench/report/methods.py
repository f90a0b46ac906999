"""Methods as reports compare them: runs that differ in nothing but the seed, and the base policies they began with."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BenchError
from ..stats import CONFIDENCE, holm, mean, paired_result, seeds_estimate, seeds_interval, wilson_interval
from .runs import RunFolder
from .table import settings_labels

BASE = "base policy"

Episode = tuple[int, str, str, int, int]
"""(training seed, suite, task, init_state, repeat)"""


@dataclass(frozen=True)
class Method:
    """One line of a comparison: an algorithm with its settings, an evaluation alone, or a base policy."""

    name: str
    policy: str
    checkpoint: str
    """Of the base policy; the first 12 hex digits of its content hash."""
    settings: str
    """In what it differs from others of the same algorithm and policy; empty if in nothing."""
    decoding: str
    runs: tuple[RunFolder, ...]
    seeds: tuple[int, ...]
    """Training seeds; a base policy's are those of the noise it was played with."""
    outcomes: dict[Episode, bool]
    """Success of the scored rows of all seeds."""

    @property
    def label(self) -> str:
        """Name and settings, long lists in short; says so where it is a control."""
        control = " CONTROL" if self.is_control else ""
        short = re.sub(r"\[[^\]]{40,}\]", lambda found: f"[{found[0].count(',') + 1} named]", self.settings)
        return f"{self.name}{control}" + (f" ({short})" if short else "")

    @property
    def is_base(self) -> bool:
        """Whether nothing was trained."""
        return self.name == BASE

    @property
    def is_control(self) -> bool:
        """Whether it was made not to learn, to show what learning adds."""
        return not self.is_base and any(run.config.get("rewards") == "shuffled" for run in self.runs)

    def budget(self) -> dict[str, float]:
        """What the average run spent on training: episodes and environment steps, counted from rows, and what the
        rows say of gradient steps and FLOPs."""
        train = [row for run in self.runs for row in run.rows if row.phase == "train"]
        spent = {
            "train_episodes": len(train) / len(self.runs),
            "env_steps": sum(r.steps for r in train) / len(self.runs),
        }
        for name in ("gradient_steps", "flops"):
            last = [max((getattr(row, name) for row in run.rows), default=0) for run in self.runs]
            if any(last):
                spent[name] = float(np.mean(last))
        return dict.fromkeys(spent, 0.0) if self.is_base else spent


def compared_methods(runs: Sequence[RunFolder]) -> list[Method]:
    """Runs under one protocol as methods, base policies first; raises BenchError where two runs are the same seed of
    the same experiment."""
    groups: dict[tuple[str, str, str, str, str], list[RunFolder]] = {}
    for run, settings in zip(runs, settings_labels(runs), strict=True):
        name = run.manifest["algorithm"] if run.compares else "evaluation"
        for decoding in run.decodings:
            experiment = (name, run.manifest["policy"], run.manifest["base_checkpoint"], settings, decoding)
            groups.setdefault(experiment, []).append(run)
    trained = [_method(*key, members, base=False) for key, members in sorted(groups.items())]
    bases: dict[tuple[str, str, str, str], list[RunFolder]] = {}
    for run in runs:
        judged = ", ".join(sorted(run.manifest["evaluation"]["tasks"]))
        for decoding in {row.decoding for row in run.base}:
            key = (run.manifest["policy"], run.manifest["base_checkpoint"], judged, decoding)
            bases.setdefault(key, []).append(run)
    several = len({judged for _, _, judged, _ in bases}) > 1
    untrained = [
        _method(BASE, policy, checkpoint, f"tasks=[{judged}]" if several else "", decoding, members, base=True)
        for (policy, checkpoint, judged, decoding), members in sorted(bases.items())
    ]
    return untrained + trained


def _method(
    name: str, policy: str, checkpoint: str, settings: str, decoding: str, runs: list[RunFolder], base: bool
) -> Method:
    runs = sorted(runs, key=lambda run: (run.manifest["seed"], str(run.folder)))
    if not base:
        for one, two in itertools.pairwise(runs):
            if one.manifest["seed"] == two.manifest["seed"]:
                raise BenchError(
                    f"{one.folder} and {two.folder} are seed {one.manifest['seed']} of the same experiment; give one"
                )
    outcomes = {
        (run.manifest["seed"], row.suite, row.task, row.init_state, row.repeat): row.success
        for run in runs
        for row in (run.base if base else run.evaluated)
        if row.decoding == decoding
    }
    seeds = tuple(sorted({run.manifest["seed"] for run in runs}))
    return Method(name, policy, checkpoint, settings, decoding, tuple(runs), seeds, outcomes)


def base_of(method: Method, methods: Iterable[Method]) -> Method | None:
    """The base policy that a method began with, judged on the same tasks."""
    mine = {run.folder for run in method.runs}
    for other in methods:
        same = (other.policy, other.checkpoint, other.decoding) == (method.policy, method.checkpoint, method.decoding)
        if other.is_base and not method.is_base and same and mine & {run.folder for run in other.runs}:
            return other
    return None


def suites_of(methods: Iterable[Method]) -> list[str]:
    """Concrete suites that were planned for any of the methods, in order."""
    return list(dict.fromkeys(suite for method in methods for run in method.runs for suite in run.suites))


def scores(method: Method, suite: str) -> np.ndarray:
    """Success rates [S, T] over seeds and planned tasks of a suite; NaN where nothing was played."""
    tasks = planned_tasks(method, suite)
    wins, played = np.zeros((2, len(method.seeds), len(tasks)))
    at_seed, at_task = {seed: i for i, seed in enumerate(method.seeds)}, {task: i for i, task in enumerate(tasks)}
    for (seed, its_suite, task, _, _), success in method.outcomes.items():
        if its_suite == suite:
            wins[at_seed[seed], at_task[task]] += success
            played[at_seed[seed], at_task[task]] += 1
    return np.divide(wins, played, out=np.full_like(wins, np.nan), where=played > 0)


def planned_tasks(method: Method, suite: str) -> list[str]:
    """Names of the tasks of a suite that any run of the method was to be judged on."""
    keys = dict.fromkeys(key for run in method.runs for key in run.manifest["evaluation"]["tasks"])
    return [key.split("/", 1)[1] for key in keys if key.startswith(f"{suite}/")]


def planned_episodes(method: Method, suite: str) -> int:
    """Episodes of a suite that all seeds together owe."""
    owed: dict[int, int] = {}
    for run in method.runs:
        plan = run.manifest["evaluation"]
        tasks = sum(key.startswith(f"{suite}/") for key in plan["tasks"])
        owed[run.manifest["seed"]] = tasks * len(plan["init_states"]) * plan["repeats"]
    return sum(owed.values())


def cell(method: Method, suite: str) -> dict[str, Any]:
    """Score and counts of one method on one suite. The interval is over seeds where there are several, else Wilson's
    over episodes; none where episodes are missing."""
    outcomes = [success for key, success in method.outcomes.items() if key[1] == suite]
    table, owed = scores(method, suite), planned_episodes(method, suite)
    n, successes = len(outcomes), sum(outcomes)
    found: dict[str, Any] = {
        "algorithm": method.name,
        "policy": method.policy,
        "base_checkpoint": method.checkpoint,
        "settings": method.settings,
        "suite": suite,
        "decoding": method.decoding,
        "seeds": list(method.seeds),
        "tasks": len(planned_tasks(method, suite)),
        "expected": owed,
        "episodes": n,
        "successes": successes,
        "complete": bool(owed) and n >= owed,
        "rate": successes / n if n else None,
        "low": None,
        "high": None,
        "resamples": None,
    }
    if not found["complete"]:
        return found
    found["rate"] = float(mean(table))
    if len(table) > 1:
        estimate = seeds_estimate(mean, table)
        found |= {"low": estimate.low, "high": estimate.high, "resamples": "seeds"}
    else:
        low, high = wilson_interval(successes, n)
        found |= {"low": low, "high": high, "resamples": "episodes"}
    return found


def change(method: Method, base: Method, suite: str) -> dict[str, Any] | None:
    """How a method changed its base policy on shared episodes, with interval and p: over seeds where several are
    shared (Student's t), else over initial states. None without shared episodes."""
    before, after = ({key: s for key, s in m.outcomes.items() if key[1] == suite} for m in (base, method))
    shared = before.keys() & after.keys()
    if not shared:
        return None
    paired = paired_result(before, after)
    found: dict[str, Any] = {
        "value": paired.difference, "base": sum(before[key] for key in shared) / len(shared), "low": None, "high": None,
        "p": None, "resamples": "seeds",
    }  # fmt: skip
    by_seed = _changes_by_seed(before, after)
    if len(by_seed) > 1:
        over_seeds = seeds_interval(by_seed)
        return found if over_seeds is None else found | dict(zip(("low", "high", "p"), over_seeds, strict=True))
    return found | {"low": paired.low, "high": paired.high, "p": paired.p_value, "resamples": "initial states"}


def _changes_by_seed(before: Mapping[Episode, bool], after: Mapping[Episode, bool]) -> list[float]:
    """Mean change of each seed's shared episodes."""
    changes: dict[Any, list[int]] = {}
    for key in before.keys() & after.keys():
        changes.setdefault(key[0], []).append(int(after[key]) - int(before[key]))
    return [float(np.mean(each)) for each in changes.values()]


def separation(methods: Sequence[Method], suite: str) -> tuple[np.ndarray, np.ndarray]:
    """Differences of rates [M, M] (row minus column) on shared episodes, and Holm-corrected p-values.

    Pairs share seed, task, initial state and repeat. p is the larger of the exact sign-flip test with (seed, task,
    initial state) as the unit, which speaks of these trained policies, and Student's t over seeds, which speaks of the
    methods; 1 where fewer than two seeds are shared.
    """
    n = len(methods)
    differences, p = np.zeros((n, n)), np.ones((n, n))
    pairs = list(itertools.combinations(range(n), 2))
    raw = []
    for i, j in pairs:
        one, two = ({key: success for key, success in methods[k].outcomes.items() if key[1] == suite} for k in (i, j))
        paired = paired_result(two, one)
        differences[i, j], differences[j, i] = paired.difference, -paired.difference
        over_seeds = seeds_interval(_changes_by_seed(two, one))
        raw.append(1.0 if over_seeds is None else max(paired.p_value, over_seeds[2]))
    for (i, j), value in zip(pairs, holm(raw), strict=True):
        p[i, j] = p[j, i] = value
    return differences, p


def best(methods: Sequence[Method], suite: str) -> list[int]:
    """Those methods that are separated above all others that were judged on the same tasks; controls do not count."""
    found = []
    for tasks in {tuple(planned_tasks(method, suite)): None for method in methods}:
        rivals = [
            i for i, method in enumerate(methods)
            if tasks and tuple(planned_tasks(method, suite)) == tasks and not method.is_control
        ]  # fmt: skip
        differences, p = separation([methods[i] for i in rivals], suite)
        above = (differences > 0) & (p < 1 - CONFIDENCE)
        found += [i for k, i in enumerate(rivals) if len(rivals) > 1 and above[k].sum() == len(rivals) - 1]
    return found
