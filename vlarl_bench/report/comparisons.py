"""Methods against their base policy and against one another, on episodes that both played."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from ..stats import CONFIDENCE, PairedResult, holm, paired_changes, seeds_interval
from .methods import Method, planned_episodes, planned_tasks


class Paired(NamedTuple):
    """How the episodes of a suite that two methods share changed from one to the other."""

    result: PairedResult
    by_seed: list[float]
    """Mean change of each shared training seed."""
    complete: bool
    """Whether the shared seeds have all episodes that both owe."""


def paired(before: Method, after: Method, suite: str) -> Paired:
    """Compares the episodes of a suite that both played."""
    if (before, suite) in after.changes:
        return after.changes[before, suite]
    shared = before.played(suite) & after.played(suite)
    changes = after.results[shared] - before.results[shared]
    seeds, seed = np.unique(after.episodes["seed"].to_numpy()[shared], return_inverse=True)
    by_seed = np.bincount(seed, changes) / np.bincount(seed)
    owed = min(planned_episodes(method, suite, seeds) for method in (before, after))
    result = paired_changes(changes, after.episodes["cluster"].to_numpy()[shared])
    found = Paired(result, by_seed.tolist(), bool(owed) and len(changes) >= owed)
    after.changes[before, suite] = found
    return found


def change(method: Method, base: Method, suite: str) -> dict[str, Any] | None:
    """How a method changed its base policy on shared episodes, with interval and p: over seeds where several are
    shared (Student's t), else over initial states; neither where episodes are missing. None without shared episodes."""
    shared = base.played(suite) & method.played(suite)
    if not shared.any():
        return None
    result, by_seed, _ = paired(base, method, suite)
    found: dict[str, Any] = {
        "value": result.difference, "base": float(base.results[shared].mean()), "low": None, "high": None, "p": None,
        "resamples": "seeds", "complete": int(shared.sum()) >= planned_episodes(method, suite),
    }  # fmt: skip
    if not found["complete"]:
        return found | {"resamples": None}
    if len(by_seed) > 1:
        over_seeds = seeds_interval(by_seed)
        return found if over_seeds is None else found | dict(zip(("low", "high", "p"), over_seeds, strict=True))
    return found | {"low": result.low, "high": result.high, "p": result.p_value, "resamples": "initial states"}


def change_text(found: dict[str, Any] | None) -> str:
    """A change in points with its interval; says where episodes are missing."""
    if found is None:
        return "-"
    text = f"{100 * found['value']:+.1f}"
    if not found["complete"]:
        return f"{text} INCOMPLETE"
    return text if found["low"] is None else f"{text} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def families(methods: Sequence[Method], suite: str) -> list[list[int]]:
    """Methods that compete on a suite, as lists of their places: those from the same base policy that are judged on the
    same tasks by the same decoding, that policy among them."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, method in enumerate(methods):
        if tasks := planned_tasks(method, suite):
            same = (method.policy, method.checkpoint, method.decoding, tuple(sorted(tasks)))
            found.setdefault(same, []).append(i)
    return list(found.values())


class Separation(NamedTuple):
    """All pairs of M methods on one suite."""

    differences: np.ndarray
    """[M, M] of rates, row minus column, on shared episodes."""
    p: np.ndarray
    """[M, M] Holm-corrected; NaN where a pair is not tested."""
    reach: np.ndarray
    """[M, M] the difference from which on Student's t would separate the pair as the first of its family, at the
    spread that its seeds show; NaN where a pair is not tested."""


def separation(methods: Sequence[Method], suite: str) -> Separation:
    """Tests the pairs of each of the `families` that share at least two training seeds with no episode missing.

    Pairs share seed, task, initial state and repeat. p is the larger of the exact sign-flip test with (seed, task,
    initial state) as the unit, which speaks of these trained policies, and Student's t over seeds, which speaks of the
    methods. Trained methods against one another are corrected together, and so are those against their base policy.
    """
    n = len(methods)
    differences, p, reach = np.zeros((n, n)), np.full((n, n), np.nan), np.full((n, n), np.nan)
    for i, j in itertools.combinations(range(n), 2):
        differences[i, j] = paired(methods[j], methods[i], suite).result.difference
        differences[j, i] = -differences[i, j]
    for family in families(methods, suite):
        pairs = list(itertools.combinations(family, 2))
        for against_base in (False, True):
            tested, raw = [], []
            for i, j in pairs:
                result, by_seed, complete = paired(methods[j], methods[i], suite)
                based = methods[i].is_base or methods[j].is_base
                if based == against_base and complete and len(by_seed) > 1:
                    over_seeds = seeds_interval(by_seed)
                    tested.append((i, j, by_seed))
                    raw.append(1.0 if over_seeds is None else max(result.p_value, over_seeds[2]))
            for (i, j, by_seed), value in zip(tested, holm(raw), strict=True):
                least = student.isf((1 - CONFIDENCE) / 2 / len(tested), len(by_seed) - 1)
                p[i, j] = p[j, i] = value
                reach[i, j] = reach[j, i] = least * np.std(by_seed, ddof=1) / len(by_seed) ** 0.5
    return Separation(differences, p, reach)


def best(methods: Sequence[Method], suite: str) -> list[int]:
    """Those methods that are separated above all others of their family; controls do not count."""
    found = []
    for family in families(methods, suite):
        rivals = [i for i in family if not methods[i].is_control]
        differences, p, _ = separation([methods[i] for i in rivals], suite)
        above = (differences > 0) & (p < 1 - CONFIDENCE)
        found += [i for k, i in enumerate(rivals) if len(rivals) > 1 and above[k].sum() == len(rivals) - 1]
    return found


def reach_notes(methods: Sequence[Method], suites: Sequence[str]) -> list[str]:
    """How large a difference the present seeds could separate, a line a suite and base policy."""
    notes = []
    for suite in suites:
        for family in families(methods, suite):
            trained = [methods[i] for i in family if not methods[i].is_base]
            reach = separation(trained, suite).reach[np.triu_indices(len(trained), 1)]
            tested = reach[~np.isnan(reach)]
            if not len(reach):
                continue
            where = f"{suite}, {trained[0].policy} {trained[0].checkpoint}"
            note = f"{where}: {len(tested)} of {len(reach)} pairs of methods are tested"
            if len(tested):
                least = f"{100 * float(np.median(tested)):.1f} points"
                note += f"; at the spread that their seeds show, the median pair must differ by {least} to be separated"
                note += " as the first"
            notes.append(f"{note}.")
    return notes
