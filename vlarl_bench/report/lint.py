"""What is wrong with results, in our rows and in others' tables: each finding names where and what."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BenchError
from ..files import read_json_object
from ..power import episodes_needed
from ..stats import CONFIDENCE
from .comparisons import change, families, separation
from .methods import (
    EPISODE,
    Method,
    base_of,
    cell,
    compared_methods,
    noiseless_of,
    scored,
    suites_of,
    titles,
)
from .pack import PACK
from .published import Published, read_published
from .runs import RunFolder, read_all
from .table import noiseless_text

FEW_SEEDS = 3
"""Fewer training seeds than this say next to nothing about a method."""
BUDGET_SLACK = 1.25
"""Environment steps may differ by this factor at equal episodes, since a better policy is done sooner."""
EPSILON = 1e-6
MOST_NAMED = 12
"""Of the names in a finding."""


def lint(paths: Iterable[str]) -> list[str]:
    """Findings about run folders, files or folders of published numbers (TOML), and tables in JSON."""
    findings: list[str] = []
    runs: list[RunFolder] = []
    for path in map(Path, paths):
        if any(
            (folder / name).exists() for folder, name in ((path, "manifest.json"), (path, PACK), (path.parent, PACK))
        ):
            try:
                runs += read_all([path])
            except BenchError as error:
                findings.append(str(error))
        elif path.suffix == ".json":
            findings += lint_cells(str(path), read_json_object(path).get("cells"))
        elif path.suffix == ".toml" or path.is_dir():
            findings += lint_published(read_published(path))
        else:
            raise BenchError(f"lint: {path} is no run folder, no .json table and no .toml of published numbers")
    return findings + lint_runs(runs)


def lint_runs(runs: Sequence[RunFolder]) -> list[str]:
    """Findings about runs that are compared: what is mixed, unequal, missing or too little for a claim."""
    findings = [finding for run in runs for finding in lint_run(run)]
    by_protocol: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_protocol.setdefault(run.manifest["protocol"]["label"], []).append(run)
    if len(by_protocol) > 1:
        parts = "; ".join(f"{label}: {', '.join(str(run.folder) for run in of)}" for label, of in by_protocol.items())
        findings.append(f"mixed protocols, whose scores do not compare: {parts}")
    return findings + [finding for of in by_protocol.values() for finding in lint_methods(compared_methods(of))]


def lint_run(run: RunFolder) -> list[str]:
    """Findings about one run that make its scores worthless."""
    findings = []
    shared = set(run.manifest["protocol"]["train_states"]) & set(run.manifest["protocol"]["eval_states"])
    if shared:
        findings.append(f"{run.folder}: evaluates on {len(shared)} initial states that training may use")
    explored = sum(int((rows.column("decoding") == "explore").sum()) for rows in (run.base, run.evaluated))
    if explored:
        findings.append(f"{run.folder}: {explored} scored rows were played while exploring, as in training")
    return findings


def lint_methods(methods: Sequence[Method]) -> list[str]:
    """Findings about methods that are compared under one protocol, a line a kind."""
    findings = []
    title = titles(methods)
    trained = [method for method in methods if not method.is_base]
    fewest = {m: min(len(m.seeds_on(suite)) for suite in suites_of([m])) for m in trained}
    for n in sorted(set(fewest.values())):
        few = [title[method] for method in trained if fewest[method] == n]
        if n < FEW_SEEDS:
            findings.append(f"{n} training seed(s), and a claim about a method takes {FEW_SEEDS}: {_listed(few)}")
    findings += [finding for method in methods if method.is_base for finding in _lint_base(method, title[method])]
    for suite in suites_of(methods):
        present = [method for method in methods if any(suite in run.suites for run in method.runs)]
        cells = [(method, cell(method, suite)) for method in present]
        missing = [
            f"{title[method]} has {found['episodes']} of {found['expected']} episodes"
            for method, found in cells if not found["complete"]
        ]  # fmt: skip
        for method in present:
            found = noiseless_of(method, suite)
            if found and not found["complete"]:
                missing.append(f"{title[method]} lacks some of those without noise")
        if missing:
            findings.append(f"{suite}: episodes are missing: {_listed(missing)}")
        findings += _lint_budgets(present, suite) + _lint_claims(present, suite) + _lint_noise(present, suite)
    return findings


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _lint_base(method: Method, title: str) -> list[str]:
    """Episodes of a base policy that ended otherwise in another run of the same seed."""
    outcomes = scored(method).groupby(EPISODE, observed=True)["success"].nunique()
    if not (differ := outcomes[outcomes > 1]).size:
        return []
    seeds = ", ".join(str(seed) for seed in sorted(set(differ.index.get_level_values("seed"))))
    return [
        f"{title}: {len(differ)} of {len(outcomes)} episodes, of seed {seeds}, ended otherwise in another of its runs, "
        "as other code or another machine may have it; those of the last run by name count"
    ]


def _lint_budgets(methods: Sequence[Method], suite: str) -> list[str]:
    """Methods that trained on the same policy and tasks with unequal episodes, or else environment steps."""
    findings = []
    for family in families(methods, suite):
        spent = [(method.label, method.budget()) for method in (methods[i] for i in family)]
        spent = [(name, budget) for name, budget in spent if budget["train_episodes"]]
        for unit, slack in (("train_episodes", 1 + EPSILON), ("env_steps", BUDGET_SLACK)):
            amounts = sorted({budget[unit] for _, budget in spent})
            if amounts and amounts[-1] > slack * amounts[0]:
                each = [(a, [name for name, budget in spent if budget[unit] == a]) for a in (amounts[0], amounts[-1])]
                told = "; ".join(f"{amount:,.0f} of {_listed(names)}" for amount, names in each)
                between = f"; {len(amounts) - 2} other amounts between" if len(amounts) > 2 else ""
                where = f"{suite}, {methods[family[0]].policy}"
                findings.append(f"{where}: unequal budgets, {unit.replace('_', ' ')} a run: {told}{between}")
                break
    return findings


def _lint_claims(methods: Sequence[Method], suite: str) -> list[str]:
    """Differences that are seen and not separated."""
    findings = []
    differences, p, _ = separation(methods, suite)
    for family in families(methods, suite):
        pairs = [(i, j) for i, j in itertools.combinations(family, 2) if differences[i, j]]
        untested = [(i, j) for i, j in pairs if np.isnan(p[i, j])]
        open_ = sorted(((i, j) for i, j in pairs if p[i, j] >= 1 - CONFIDENCE), key=lambda pair: p[pair])
        where = f"{suite}, {methods[family[0]].policy}"
        if untested:
            most = 100 * max(abs(differences[pair]) for pair in untested)
            findings.append(
                f"{where}: {len(untested)} pair(s) differ, by up to {most:.1f} points, and are not tested: they "
                "share fewer than two training seeds, or episodes are missing"
            )
        if open_:
            told = [
                f"{methods[i].label} and {methods[j].label} by {100 * abs(differences[i, j]):.1f} points "
                f"(p = {p[i, j]:.2g})" for i, j in open_
            ]  # fmt: skip
            findings.append(
                f"{where}: {len(open_)} pair(s) differ and are not separated (Holm); more training seeds would tell, "
                f"more episodes of these would not: {_listed(told)}"
            )
    return findings


def _lint_noise(methods: Sequence[Method], suite: str) -> list[str]:
    """Gains that are there only while noise is drawn."""
    findings = []
    for method in methods:
        base, noiseless = base_of(method, methods), noiseless_of(method, suite)
        gain = change(method, base, suite) if base else None
        if gain is None or noiseless is None or noiseless["difference"] is None or not noiseless["complete"]:
            continue
        least = gain["value"] if gain["low"] is None else gain["low"]  # seeds that all agree have no interval
        if least > 0 >= noiseless["difference"]:
            findings.append(
                f"{suite}, {method.policy}: {method.label} gains {100 * gain['value']:.1f} points and, without noise, "
                f"none ({noiseless_text(noiseless)}): it may have learned no more than to draw less noise"
            )
    return findings


def lint_published(entries: Sequence[Published]) -> list[str]:
    """Findings about numbers as they were printed."""
    findings = []
    for entry in entries:
        for suite, score in entry.scores.items():
            problem = impossible(score, entry.episodes)
            if problem:
                findings.append(f"{entry.where}: {suite} {score:g}: {problem}")
        problem = average_off(list(entry.scores.values()), entry.printed_average)
        if problem:
            findings.append(f"{entry.where}: {problem}")
    protocols = {entry.protocol for entry in entries}
    if len(protocols) > 1:
        findings.append(f"{len(entries)} published results under {len(protocols)} protocols: they do not compare")
    return findings + _lint_published_claims(entries)


def _lint_published_claims(entries: Sequence[Published]) -> list[str]:
    """The best and the second of one source and suite, where the source's number of episodes cannot tell them apart."""
    findings = []
    counted = [entry for entry in entries if entry.episodes]
    for source in dict.fromkeys(entry.source for entry in counted):
        table = [entry for entry in counted if entry.source == source]
        for suite in dict.fromkeys(suite for entry in table for suite in entry.scores):
            ranked = sorted((e for e in table if suite in e.scores), key=lambda entry: -entry.scores[suite])
            if len(ranked) < 2:
                continue
            first, second = ranked[:2]
            high, low = first.scores[suite] / 100, second.scores[suite] / 100
            played = min(first.episodes or 0, second.episodes or 0)
            rival = second.method if first.base_policy == second.base_policy else _from(second)
            if 0 < low < high < 1 and (needed := episodes_needed(low, high)) > played:
                findings.append(
                    f"{first.where}: {suite}: {100 * high:g} against {100 * low:g} of {rival} is too small a "
                    f"difference for {played:,} episodes: it takes {needed:,} of each to see it 4 times in 5 between "
                    "these two policies, and more where training seeds differ"
                )
    return findings


def _from(entry: Published) -> str:
    return f"{entry.method} from {entry.base_policy}"


def impossible(score: float, episodes: int | None) -> str:
    """Why a printed percentage cannot be; empty if it can. A score must be a count of episodes, rounded as printed."""
    if not 0 <= score <= 100:
        return "no percentage"
    if episodes is None:
        return ""
    places = _places(score)
    near = range(math.floor(score * episodes / 100), math.ceil(score * episodes / 100) + 1)
    half = 0.5 * 10**-places + EPSILON
    if any(abs(100 * k / episodes - score) <= half for k in near):
        return ""
    shown = " or ".join(f"{k} ({100 * k / episodes:.{places + 1}f}%)" for k in near)
    return f"impossible with {episodes} episodes, where it would be {shown}"


def average_off(parts: Sequence[float], printed: float | None) -> str:
    """Why a printed average does not follow from its parts, whatever was rounded before it; empty if it does."""
    if printed is None:
        return ""
    average = sum(parts) / len(parts)
    slack = 0.5 * 10 ** -max(map(_places, parts)) + 0.5 * 10 ** -_places(printed)
    if abs(printed - average) < slack - EPSILON:
        return ""
    return f"the printed average {printed:g} does not follow from its parts, which average {average:.4g}"


def _places(number: float) -> int:
    """Decimals as printed, at least one: TOML does not tell 97 from 97.0."""
    return max(1, len(f"{number:.6f}".rstrip("0").partition(".")[2]))


def lint_cells(where: str, cells: Any) -> list[str]:
    """Findings about the cells of a table in JSON, ours or another's: counts and rates that contradict each other."""
    if not isinstance(cells, list) or not all(isinstance(each, dict) for each in cells):
        raise BenchError(f"{where}: it has no list of cells, as `vlarl-bench table --format json` writes")
    findings = []
    for i, each in enumerate(cells, 1):
        name = f"{where}, cell {i} ({each.get('algorithm')} on {each.get('policy')}, {each.get('suite')})"
        episodes, successes, rate = (each.get(field) for field in ("episodes", "successes", "rate"))
        if type(episodes) is not int or type(successes) is not int or not 0 <= successes <= episodes:
            findings.append(f"{name}: {successes} successes of {episodes} episodes")
            continue
        whole = each.get("complete", True)
        if isinstance(rate, float | int) and episodes and whole and abs(rate - successes / episodes) > 1e-3:
            findings.append(f"{name}: rate {rate:g}, but {successes}/{episodes} is {successes / episodes:.4g}")
        low, high = each.get("low"), each.get("high")
        if not all(value is None or isinstance(value, float | int) for value in (rate, low, high)):
            findings.append(f"{name}: rate {rate!r}, low {low!r} and high {high!r} must be numbers")
        elif None not in (low, high, rate) and not low - EPSILON <= rate <= high + EPSILON:
            findings.append(f"{name}: rate {rate:g} lies outside its interval [{low:g}, {high:g}]")
        seeds = each.get("seeds")
        if not seeds:
            findings.append(f"{name}: no seeds are named")
        elif each.get("best") and isinstance(seeds, list) and len(seeds) < FEW_SEEDS:
            findings.append(f"{name}: called best with {len(seeds)} training seed(s); a claim takes {FEW_SEEDS}")
        for part in ("runs", "per_task"):
            members = each.get(part) or []
            if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
                findings.append(f"{name}: {part} is {members!r:.80}; it must be a list of objects")
                continue
            for field in ("episodes", "successes"):
                counts = [member.get(field, 0) for member in members]
                if others := [count for count in counts if type(count) is not int]:
                    findings.append(f"{name}: {field} of one of its {part} is {others[0]!r:.80}; it must be an integer")
                elif members and (total := sum(counts)) != each[field]:
                    findings.append(f"{name}: {field} {each[field]}, but its {part} add up to {total}")
    protocols = {str(each["protocol"]) for each in cells if each.get("protocol")}
    if len(protocols) > 1:
        findings.append(f"{where}: mixed protocols, whose scores do not compare: {', '.join(sorted(protocols))}")
    return findings + _lint_cell_budgets(where, cells)


def _lint_cell_budgets(where: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of one suite and base policy that say how many training episodes they had, and differ in it."""
    groups: dict[tuple[str, ...], dict[float, list[str]]] = {}
    for each in cells:
        spent = each.get("train_episodes")
        if isinstance(spent, int | float) and spent > 0:
            same = tuple(str(each.get(field)) for field in ("suite", "policy", "base_checkpoint"))
            groups.setdefault(same, {}).setdefault(spent, []).append(str(each.get("algorithm")))
    return [
        f"{where}: {suite}, {policy}: unequal budgets, train episodes a run: "
        f"{min(of):,.0f} of {_listed(of[min(of)])}; {max(of):,.0f} of {_listed(of[max(of)])}"
        for (suite, policy, _), of in groups.items() if len(of) > 1
    ]  # fmt: skip
