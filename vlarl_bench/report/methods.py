"""Methods as reports compare them: runs that differ in nothing but the seed, and the base policies they began with."""

import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..errors import BenchError
from ..stats import mean, seeds_estimate, wilson_interval
from .rows import Rows
from .runs import RunFolder
from .table import Record, noiseless_cell, settings_labels, submitter

BASE = "base policy"

EPISODE = ["seed", "suite", "task", "init_state", "repeat"]
"""What makes episodes of two methods a pair; `seed` is the training seed."""


@dataclass(frozen=True, eq=False)
class Method:
    """One line of a comparison: an algorithm with its settings, an evaluation alone, or a base policy."""

    name: str
    policy: str
    checkpoint: str
    """Of the base policy; the first 12 hex digits of its content hash."""
    settings: str
    """In what it differs from others of the same algorithm and policy; empty if in nothing."""
    decoding: str
    submitted_by: str
    """Whose runs they are; empty where they are our own. Runs of several are never seeds of one method."""
    runs: tuple[RunFolder, ...]
    episodes: pd.DataFrame
    """[N] the distinct episodes that any of the compared methods is scored on, in order: the columns `EPISODE`, and
    `cluster`, the same number for repeats of one seed, task and initial state. One object for all of them."""
    results: np.ndarray
    """[N] of this method on each: 1 success, 0 failure, -1 not played."""
    changes: dict[Any, Any] = field(default_factory=dict)
    """What `comparisons.paired` found already, by method and suite: several reports of one page ask for the same."""

    @property
    def label(self) -> str:
        """Name and settings, long lists in short; says so where it is a control."""
        control = " CONTROL" if self.is_control else ""
        short = re.sub(r"\[[^\]]{40,}\]", lambda found: f"[{found[0].count(',') + 1} named]", self.settings)
        short = short.replace("tasks=[]", "tasks=the first")  # where none are named, those of the suite
        return f"{self.name}{control}" + (f" ({short})" if short else "") + submitter(self.submitted_by)

    @property
    def is_base(self) -> bool:
        """Whether nothing was trained."""
        return self.name == BASE

    @property
    def is_control(self) -> bool:
        """Whether it was made not to learn, to show what learning adds."""
        return not self.is_base and any(run.is_control for run in self.runs)

    def seeds_on(self, suite: str) -> tuple[int, ...]:
        """Training seeds that were to be judged on a suite; a base policy's are those of the noise it was played with.
        They differ between suites where some seeds were evaluated elsewhere, too."""
        return tuple(sorted({run.manifest["seed"] for run in self.runs if suite in run.suites}))

    def budget(self) -> dict[str, float]:
        """What the average run spent on training: episodes and environment steps, counted from rows, and what the
        rows say of gradient steps and FLOPs. Where there are only evaluations of what was trained, they tell the rest,
        and the episodes are 0."""
        runs = [run for run in self.runs if run.compares] or self.runs
        spent = {name: sum(run.spent[name] for run in runs) / len(runs) for name in ("train_episodes", "env_steps")}
        for name in ("gradient_steps", "flops"):
            last = [run.spent[name] for run in runs]
            if any(last):
                spent[name] = float(np.mean(last))
        return dict.fromkeys(spent, 0.0) if self.is_base else spent

    def played(self, suite: str) -> np.ndarray:
        """[N] mask of the episodes of a suite that it was scored on."""
        return (self.results >= 0) & (self.episodes["suite"] == suite).to_numpy()


def compared_methods(runs: Sequence[RunFolder]) -> list[Method]:
    """Runs under one protocol as methods, base policies first; raises BenchError where two runs are the same seed of
    the same experiment."""
    groups: dict[tuple[str, str, str, str, str, str], list[RunFolder]] = {}
    for run, settings in zip(runs, settings_labels(runs), strict=True):
        if run.method:
            experiment = (run.method, run.manifest["policy"], run.start, settings, run.decoding, run.submitted_by)
            groups.setdefault(experiment, []).append(run)
    trained = [_Group(*key, tuple(_by_seed(members))) for key, members in sorted(groups.items())]
    for group in trained:
        for one, two in itertools.combinations(group.runs, 2):
            if one.manifest["seed"] == two.manifest["seed"] and {*one.suites} & {*two.suites}:
                raise BenchError(
                    f"{one.folder} and {two.folder} are seed {one.manifest['seed']} of the same experiment; give one"
                )
    bases: dict[tuple[str, str, str, str], list[RunFolder]] = {}
    for run in runs:
        if len(untrained(run)):
            key = (run.manifest["policy"], run.manifest["base_checkpoint"], run.decoding, run.submitted_by)
            bases.setdefault(key, []).append(run)
    bare = []
    for (policy, checkpoint, decoding, by), members in sorted(bases.items()):
        alike = _judged_alike(members)
        for same in alike:
            judged = ", ".join(sorted({key for run in same for key in run.manifest["evaluation"]["tasks"]}))
            settings = f"tasks=[{judged}]" if len(alike) > 1 else ""
            bare.append(_Group(BASE, policy, checkpoint, settings, decoding, by, tuple(_by_seed(same))))
    return _methods(bare + trained)


def untrained(run: RunFolder) -> Rows:
    """What a policy played before anything fine-tuned it: the first rows of a run, or those of an evaluation."""
    return run.base if run.method else run.evaluated


def _judged_alike(runs: Iterable[RunFolder]) -> list[list[RunFolder]]:
    """Runs of one policy, together where no suite has them judged on different tasks."""
    groups: list[tuple[dict[str, frozenset[str]], list[RunFolder]]] = []
    for run in sorted(runs, key=lambda run: sorted(run.manifest["evaluation"]["tasks"])):
        for known, members in groups:
            if all(known.get(suite, keys) == keys for suite, keys in run.judged.items()):
                known |= run.judged
                members.append(run)
                break
        else:
            groups.append(({**run.judged}, [run]))
    return [members for _, members in groups]


class _Group(NamedTuple):
    """A method before its episodes are set beside those of others; fields as there."""

    name: str
    policy: str
    checkpoint: str
    settings: str
    decoding: str
    submitted_by: str
    runs: tuple[RunFolder, ...]


def _by_seed(runs: Iterable[RunFolder]) -> list[RunFolder]:
    return sorted(runs, key=lambda run: (run.manifest["seed"], str(run.folder)))


def _methods(groups: Sequence[_Group]) -> list[Method]:
    parts = [scored(group) for group in groups]
    together = pd.concat([_NOTHING, *parts], ignore_index=True)
    for name in ("suite", "task"):
        together[name] = together[name].astype("category")
    number = together.groupby(EPISODE, observed=True).ngroup().to_numpy()
    _, first = np.unique(number, return_index=True)
    episodes = together[EPISODE].iloc[first].reset_index(drop=True)
    episodes["cluster"] = episodes.groupby(EPISODE[:-1], observed=True).ngroup()
    methods, start = [], 0
    for group, part in zip(groups, parts, strict=True):
        results = np.full(len(episodes), -1, dtype=np.int8)
        results[number[start : start + len(part)]] = part["success"]
        start += len(part)
        methods.append(Method(*group, episodes, results))
    return methods


_NOTHING = pd.DataFrame({
    name: pd.Series(dtype={"suite": object, "task": object, "success": bool}.get(name, np.int64))
    for name in (*EPISODE, "success")
})  # fmt: skip


def scored(group: _Group | Method) -> pd.DataFrame:
    """The scored rows of all runs of a method, in their order: EPISODE and `success`."""
    found = []
    for run in group.runs:
        rows = untrained(run) if group.name == BASE else run.evaluated
        columns = {name: rows.column(name) for name in (*EPISODE[1:], "success")}
        found.append(pd.DataFrame({"seed": np.full(len(rows), run.manifest["seed"])} | columns))
    return pd.concat([_NOTHING, *found], ignore_index=True)


def base_of(method: Method, methods: Iterable[Method]) -> Method | None:
    """The base policy that a method began with, judged on the same tasks."""
    for other in methods:
        same = (other.policy, other.checkpoint, other.decoding, other.submitted_by) == (
            method.policy, method.checkpoint, method.decoding, method.submitted_by)  # fmt: skip
        if same and other.is_base and not method.is_base:
            mine, its = ({suite: keys for run in m.runs for suite, keys in run.judged.items()} for m in (method, other))
            shared = mine.keys() & its.keys()
            if shared and all(mine[suite] == its[suite] for suite in shared):
                return other
    return None


def titles(methods: Sequence[Method]) -> dict[Method, str]:
    """Labels, with as much of the base policy as it takes to tell those of several apart."""
    policies, checkpoints = ({tuple(getattr(m, n) for n in names) for m in methods}
                             for names in (("policy",), ("policy", "checkpoint")))  # fmt: skip
    if len(checkpoints) <= 1:
        return {method: method.label for method in methods}
    whole = len(checkpoints) > len(policies)
    return {m: f"{m.label} on {m.policy}{f' {m.checkpoint}' if whole else ''}" for m in methods}


def suites_of(methods: Iterable[Method]) -> list[str]:
    """Concrete suites that were planned for any of the methods, in order."""
    return list(dict.fromkeys(suite for method in methods for run in method.runs for suite in run.suites))


def in_order(methods: Iterable[Method], suites: Sequence[str]) -> list[Method]:
    """Base policies, each followed by what was trained from it: the best on these suites first."""

    def place(method: Method) -> tuple[Any, ...]:
        rates = [rate for suite in suites if (rate := cell(method, suite)["rate"]) is not None]
        return method.policy, method.checkpoint, not method.is_base, -np.mean(rates) if rates else 0.0, method.label

    return sorted(methods, key=place)


def scores(method: Method, suite: str) -> np.ndarray:
    """Success rates [S, T] over seeds and planned tasks of a suite; NaN where nothing was played."""
    seeds, tasks = method.seeds_on(suite), planned_tasks(method, suite)
    at = method.played(suite)
    shape = (len(seeds), len(tasks))
    cells = pd.Index(seeds).get_indexer(method.episodes["seed"][at]) * len(tasks)
    cells += pd.Index(tasks).get_indexer(method.episodes["task"][at])
    played = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    wins = np.bincount(cells, method.results[at], shape[0] * shape[1]).reshape(shape)
    return np.divide(wins, played, out=np.full(shape, np.nan), where=played > 0)


def planned_tasks(method: Method, suite: str) -> list[str]:
    """Names of the tasks of a suite that any run of the method was to be judged on."""
    keys = dict.fromkeys(key for run in method.runs for key in run.manifest["evaluation"]["tasks"])
    return [key.split("/", 1)[1] for key in keys if key.startswith(f"{suite}/")]


def noiseless_of(method: Method, suite: str) -> Record | None:
    """What it scored on a suite without noise, before and after, as `table.noiseless_cell` has it."""
    keys = [f"{suite}/{task}" for task in planned_tasks(method, suite)]
    return None if method.is_base else noiseless_cell([run for run in method.runs if suite in run.suites], keys)


def planned_episodes(method: Method, suite: str, seeds: Collection[int] | None = None) -> int:
    """Episodes of a suite that all seeds together owe, or some of them."""
    owed: dict[int, int] = {}
    for run in method.runs:
        plan = run.manifest["evaluation"]
        tasks = sum(key.startswith(f"{suite}/") for key in plan["tasks"])
        here = tasks * len(plan["init_states"]) * plan["repeats"]
        owed[run.manifest["seed"]] = max(here, owed.get(run.manifest["seed"], 0))
    return sum(n for seed, n in owed.items() if seeds is None or seed in seeds)


def cell(method: Method, suite: str) -> dict[str, Any]:
    """Score and counts of one method on one suite. The interval is over seeds where there are several, else Wilson's
    over episodes; none where episodes are missing."""
    outcomes = method.results[method.played(suite)]
    table, owed = scores(method, suite), planned_episodes(method, suite)
    n, successes = len(outcomes), int(outcomes.sum())
    found: dict[str, Any] = {
        "algorithm": method.name,
        "policy": method.policy,
        "base_checkpoint": method.checkpoint,
        "settings": method.settings,
        "suite": suite,
        "protocol": method.runs[0].manifest["protocol"]["hash"],
        "decoding": method.decoding,
        "submitted": method.runs[0].submitted,
        "seeds": list(method.seeds_on(suite)),
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
