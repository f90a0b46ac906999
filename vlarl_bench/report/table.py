"""Tables as pure functions of rows: what a run gained on each task, and several runs side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import BenchError
from ..stats import paired_result, seeds_interval, wilson_interval
from .rows import Rows
from .runs import JUDGED_BY, RunFolder
from .spans import spans

Record = dict[str, Any]

Episode = tuple[str, str, int, int]
"""(suite, task, init_state, repeat): what makes two episodes of a run a pair."""


@dataclass(frozen=True)
class Table:
    """A table before it is rendered."""

    title: str
    notes: tuple[str, ...]
    """What stands behind the numbers; part of the table, never left out."""
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    """Text of each line, one entry a column; the last `totals` lines sum up the others."""
    totals: int
    records: tuple[Record, ...]
    """The numbers of each line, in full precision."""
    cells: tuple[Record, ...]
    """One for each (algorithm, policy, suite, settings), with the records that it is made of."""
    copied: int = 0
    """So many of the last lines were printed by others and measured by nobody here."""


def comparison_table(run: RunFolder) -> Table:
    """Base against fine-tuned policy of one run, for each task and overall."""
    keys = run.manifest["evaluation"]["tasks"]
    lines: list[tuple[str, ...]] = []
    records: list[Record] = []
    cells: list[Record] = []
    name = run.manifest["algorithm"] if run.compares else run.manifest["policy"]
    for key in keys:
        record = _record(run, [key])
        shown = key if len(run.suites) > 1 else key.split("/", 1)[1]
        lines.append((shown.replace("_", " "), *_score_texts(record, run.compares)))
        records.append(record | {"task": key.split("/", 1)[1]})
    totals = [(f"all {len(keys)} tasks", _record(run, keys))]
    if run.owes_noiseless:
        totals.append((f"all {len(keys)} tasks, without noise", _record(run, keys, noiseless=True)))
    for shown, total in totals:
        lines.append((shown, *_score_texts(total, run.compares)))
        records.append(total)
    for suite in run.suites:
        mine = [key for key in keys if key.startswith(f"{suite}/")]
        tasks = [_record(run, [key]) | {"task": key.split("/", 1)[1]} for key in mine]
        cells.append(_cell([_record(run, mine)]) | {"per_task": tasks, "noiseless": noiseless_cell([run], mine)})
    compared = ("base", name, "change, pp [95%]", "p") if run.compares else (name,)
    notes = _notes([run], records) + noiseless_note(cells)
    if run.compares:
        notes += (f"Base policy {run.manifest['policy']} {run.start}. Training: {spent_text(run.spent, run)}.",)
    columns = ("task", *compared)
    return Table(run.title, notes, columns, tuple(lines), len(totals), tuple(records), tuple(cells))


def summary_table(runs: Sequence[RunFolder]) -> Table:
    """Several runs under one protocol: one line a run and suite, and one for all seeds where there are several.

    Runs count as seeds of one experiment only if their configs agree in everything else. Raises BenchError for no
    runs, and for two runs of one experiment with the same seed.
    """
    if not runs:
        raise BenchError("runs: none given; name at least one run folder")
    groups: dict[tuple[str, ...], list[tuple[Record, RunFolder, list[str]]]] = {}
    seen: dict[tuple[Any, ...], RunFolder] = {}
    for run, settings in zip(runs, settings_labels(runs), strict=True):
        for suite in run.suites:
            keys = [key for key in run.manifest["evaluation"]["tasks"] if key.startswith(f"{suite}/")]
            record = _record(run, keys) | {"suite": suite, "settings": settings}
            record["noiseless"] = noiseless_cell([run], keys)
            name = run.method if run.compares else f"{run.method} (evaluation)".strip()
            start = f"{record['policy']} {run.start}"
            experiment = (name, start, suite, settings, run.submitted_by)
            groups.setdefault(experiment, []).append((record, run, keys))
            other = seen.setdefault((experiment, record["seed"]), run)
            if other is not run:
                raise BenchError(
                    f"{other.folder} and {run.folder} are seed {record['seed']} of the same experiment; give one"
                )
    groups = dict(sorted(groups.items(), key=_place))
    several_settings = len({group[3] for group in groups}) > 1
    any_noiseless = any(record["noiseless"] for members in groups.values() for record, *_ in members)
    lines: list[tuple[str, ...]] = []
    records: list[Record] = []
    cells: list[Record] = []
    for group, unsorted in groups.items():
        by_seed = sorted(unsorted, key=lambda member: member[0]["seed"])
        members = [record for record, *_ in by_seed]
        cell = _cell(members) | {"noiseless": noiseless_cell([run for _, run, _ in by_seed], by_seed[0][2])}
        cells.append(cell | {"runs": members})
        for record in members + ([cell] if len(members) > 1 else []):
            seed = str(record["seed"]) if "seed" in record else f"all {len(members)} seeds"
            line: tuple[str, ...] = (
                group[0] + submitter(group[4]),
                group[1],
                record["suite"],
            )
            line += (group[3] or "-",) if several_settings else ()
            line += (training_text(record), seed, _coverage(record), *_score_texts(record, True))
            line += (noiseless_text(record["noiseless"]),) if any_noiseless else ()
            lines.append(line)
            records.append(record)
    columns: tuple[str, ...] = ("algorithm", "base policy", "suite")
    columns += ("settings",) if several_settings else ()
    columns += (TRAINING, "seed", "tasks", "base", "score", "change, pp [95%]", "p")
    columns += (WITHOUT_NOISE,) if any_noiseless else ()
    notes = _notes(runs, records)
    if any(len(members) > 1 for members in groups.values()):
        notes += ("All seeds: the mean change with 95% interval and p, which resample training seeds (Student's t).",)
    notes += noiseless_note(records)
    return Table(f"{len(runs)} runs" if len(runs) > 1 else "1 run", notes, columns, tuple(lines), 0, tuple(records),
                 tuple(cells))  # fmt: skip


def _place(group: tuple[tuple[str, ...], list[tuple[Record, RunFolder, list[str]]]]) -> tuple[Any, ...]:
    """Groups are sorted by suite and policy, then by their score, the best first."""
    (_, policy, suite, *_), members = group
    rates = [record["rate"] for record, *_ in members if record["rate"] is not None]
    return suite, policy, -float(np.mean(rates)) if rates else 0.0, group[0]


NOISELESS = (
    *(base + name for base in ("", "base_") for name in ("expected", "episodes", "successes", "rate", "low", "high")),
    *("difference", "difference_low", "difference_high", "difference_resamples", "p_value", "resamples", "complete"),
)


def noiseless_cell(runs: Sequence[RunFolder], keys: Sequence[str]) -> Record | None:
    """What runs of one experiment scored on these tasks without noise, before and after: the entries `NOISELESS` of a
    record. None where not all of them play so."""
    if not runs or not all(run.owes_noiseless for run in runs):
        return None
    cell = _cell([_record(run, keys, noiseless=True) for run in runs])
    return {name: cell[name] for name in NOISELESS}


def noiseless_text(record: Record | None) -> str:
    """`66/75 to 56/75, -13.3 [-24.0, -2.7]`, below the heading `WITHOUT_NOISE`."""
    if record is None:
        return "-"
    base, after, change, _ = _score_texts(record, True)
    before, reached = (text.split(" ")[0] for text in (base, after))
    return f"{before} to {reached}, {change}" if record["difference"] is not None else after


def noiseless_note(records: Sequence[Record]) -> tuple[str, ...]:
    """What to say of the records' `noiseless`, if there is any."""
    told = (
        "Without noise: each held-out initial state once more, with flows and diffusion decoded from zero noise and "
        "token policies taking the likeliest token; a base policy then plays the same in every seed. A gain that is "
        "not there without noise may be due to drawing less noise alone."
    )
    return (told,) if any(record.get("noiseless") for record in records) else ()


def _record(run: RunFolder, keys: Sequence[str], noiseless: bool = False) -> Record:
    """The numbers of one line: these tasks of one run, as the protocol decodes or without noise."""
    plan = run.manifest["evaluation"]
    before, scored = run.noiseless if noiseless else (run.base, run.evaluated)
    after, base = _outcomes(scored, keys), _outcomes(before, keys)
    owed = {
        (*key.split("/", 1), state, repeat)
        for key in keys for state in plan["init_states"] for repeat in range(1 if noiseless else plan["repeats"])
    }  # fmt: skip
    change: Record = dataclasses.asdict(paired_result(base, after))
    change |= {"difference_low": change.pop("low"), "difference_high": change.pop("high")}
    change["difference_resamples"] = "initial states"
    base_expected = len(owed) if run.compares and run.config.get("base") != "scratch" else 0
    complete = owed <= after.keys() and (base_expected == 0 or owed <= base.keys())
    if not complete:
        change |= dict.fromkeys(("difference_low", "difference_high", "difference_resamples", "p_value", "mcnemar_p"))
    return {
        "algorithm": run.manifest["algorithm"],
        "policy": run.manifest["policy"],
        "base_checkpoint": run.start,
        "asked_suite": run.manifest["suite"],
        "suite": ", ".join(dict.fromkeys(key.split("/")[0] for key in keys)),
        "seed": run.manifest["seed"],
        "decoding": "zero-noise" if noiseless else run.decoding,
        "tasks": len(keys),
        "suite_tasks": plan["suite_tasks"],
        "expected": len(owed),
        "base_expected": base_expected,
        "complete": complete,
        **_score(after, len(owed)),
        **{f"base_{name}": value for name, value in _score(base, base_expected).items()},
        **(change if change["n_pairs"] else dict.fromkeys(change)),
        **run.spent,
        "protocol": run.manifest["protocol"]["hash"],
        "run": run.folder.name,
        "submitted": run.submitted,
    }


def _outcomes(rows: Rows, keys: Sequence[str]) -> dict[Episode, bool]:
    rows = rows.where(pd.Series(rows.column("suite") + "/" + rows.column("task")).isin(keys).to_numpy())
    pairs = zip(*(rows.column(name).tolist() for name in ("suite", "task", "init_state", "repeat")), strict=True)
    return dict(zip(pairs, rows.column("success").tolist(), strict=True))


def _score(outcomes: dict[Episode, bool], expected: int) -> Record:
    """Counts and rate, with Wilson's interval where no episode is missing."""
    n, successes = len(outcomes), sum(outcomes.values())
    whole = bool(n) and n >= expected
    low, high = wilson_interval(successes, n) if whole else (None, None)
    return {"episodes": n, "successes": successes, "rate": successes / n if n else None, "low": low, "high": high,
            "resamples": "episodes" if whole else None}  # fmt: skip


def _cell(members: list[Record]) -> Record:
    """Runs of one experiment taken together. The seed is the unit, so pooled episodes get no Wilson interval: they
    share initial states."""
    cell = {name: value for name, value in members[0].items() if name not in ("seed", "run")}
    cell["seeds"] = [record["seed"] for record in members]
    if len(members) == 1:
        return cell
    for name in ("expected", "base_expected", "episodes", "successes", "base_episodes", "base_successes"):
        cell[name] = sum(record[name] for record in members)
    for name in ("rate", "base_rate"):
        rates = [record[name] for record in members if record[name] is not None]
        cell[name] = float(np.mean(rates)) if rates else None
    for name in ("train_episodes", "env_steps", "gradient_steps", "flops"):
        cell[name] = sum(record[name] for record in members) / len(members)
    cell |= dict.fromkeys(("low", "high", "resamples", "base_low", "base_high", "base_resamples"))
    cell["complete"] = all(record["complete"] for record in members)
    changes = [record["difference"] for record in members if record["difference"] is not None]
    pairs = [record for record in members if record["n_pairs"]]
    cell |= {name: sum(record[name] for record in pairs) for name in ("n_pairs", "gained", "lost")}
    cell |= dict.fromkeys(
        ("n_clusters", "difference_low", "difference_high", "difference_resamples", "p_value", "mcnemar_p")
    )
    cell["difference"] = float(np.mean(changes)) if changes else None
    over_seeds = seeds_interval(changes)
    if over_seeds and cell["complete"]:
        cell["difference_low"], cell["difference_high"], cell["p_value"] = over_seeds
        cell["difference_resamples"] = "seeds"
    return cell


def _score_texts(record: Record, compares: bool) -> tuple[str, ...]:
    after = _score_text(record, "", record["expected"])
    if not compares:
        return (after,)
    base = _score_text(record, "base_", record["base_expected"])
    if record["difference"] is None:
        return base, after, "-", "-"
    change = f"{100 * record['difference']:+.1f}" + ("" if record["complete"] else " INCOMPLETE")
    if record["difference_low"] is not None:
        change += f" [{100 * record['difference_low']:+.1f}, {100 * record['difference_high']:+.1f}]"
    return base, after, change, p_text(record["p_value"])


def p_text(p: float | None) -> str:
    """A p value, or a dash where nothing was tested."""
    return "-" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _score_text(record: Record, prefix: str, expected: int) -> str:
    n, successes = record[f"{prefix}episodes"], record[f"{prefix}successes"]
    if n == 0:
        return "not run" if expected else "-"
    text = f"{successes}/{n} {100 * record[f'{prefix}rate']:.0f}%"
    if record[f"{prefix}low"] is not None:
        text += f" [{100 * record[f'{prefix}low']:.0f}, {100 * record[f'{prefix}high']:.0f}]"
    return text if n >= expected else f"{text} INCOMPLETE ({n} of {expected})"


def _coverage(record: Record) -> str:
    """`3 of 20`, and of which suite where that is a group."""
    group = f" ({record['asked_suite']})" if record["asked_suite"] != record["suite"] else ""
    return f"{record['tasks']} of {record['suite_tasks']}{group}"


TRAINING = "steps / gradient steps"
WITHOUT_NOISE = "without noise: before to after, pp [95%]"


def training_text(spent: Mapping[str, float]) -> str:
    """`109,389 / 3,453`, below the heading `TRAINING`."""
    return f"{spent['env_steps']:,.0f} / {spent.get('gradient_steps', 0):,.0f}"


def spent_text(spent: Mapping[str, float], run: RunFolder) -> str:
    """What training took, in words; `run` is one of those that spent it."""
    parts = []
    if spent["train_episodes"]:
        parts.append(f"{spent['train_episodes']:,.0f} episodes, {spent['env_steps']:,.0f} steps")
    elif spent["env_steps"]:
        parts.append(f"{spent['env_steps']:,.0f} steps")
    elif run.method:
        parts.append(f"{run.settings().get('budget.demos', '?')} demonstrations a task")
    if spent.get("gradient_steps"):
        parts.append(f"{spent['gradient_steps']:,.0f} gradient steps")
    if spent.get("flops"):
        parts.append(f"{spent['flops']:.1e} FLOPs")
    return ", ".join(parts) or "none"


def settings_labels(runs: Sequence[RunFolder]) -> list[str]:
    """For each run, the settings in which it differs from other runs of the same algorithm and policy. How it was
    judged counts only among runs on one suite: it is no other method that was judged elsewhere, too."""
    flats = [run.settings() for run in runs]
    families = [(run.method, run.manifest["policy"], run.submitted_by) for run in runs]
    labels = []
    for run, family, flat in zip(runs, families, flats, strict=True):
        kin = [i for i, theirs in enumerate(families) if theirs == family]
        beside = [i for i in kin if {*runs[i].suites} & {*run.suites}]
        odd = []
        for name in sorted({name for i in kin for name in flats[i]}):
            among = beside if name in JUDGED_BY else kin
            if len({repr(flats[i].get(name)) for i in among}) > 1:
                odd.append(name)
        labels.append(", ".join(f"{name.removeprefix('settings.')}={flat.get(name, '(absent)')}" for name in odd))
    return labels


def submitter(by: str) -> str:
    """What is said behind the name of a method that another group ran."""
    return f", submitted by {by}" if by else ""


def _notes(runs: Sequence[RunFolder], records: Sequence[Record]) -> tuple[str, ...]:
    what, how, *machines = protocol_notes(runs)
    notes = [
        what,
        how,
        "Scores: successes/episodes and 95% interval, which resamples episodes (Wilson). Change: paired by initial "
        "state and repeat; 95% interval and two-sided p (exact sign-flip test) resample initial states.",
        *machines,
    ]
    if not all(part["complete"] for record in records for part in (record, record.get("noiseless")) if part):
        again = "; continue with `vlarl-bench run --resume DIR`" if any(run.compares for run in runs) else ""
        notes.append(f"INCOMPLETE: episodes are missing{again}.")
    return tuple(notes)


def protocol_notes(runs: Sequence[RunFolder]) -> tuple[str, ...]:
    """What was played, how, and where: protocol, tasks, states, seeds, counts, code and machines."""
    protocol = runs[0].manifest["protocol"]
    plans = [run.manifest["evaluation"] for run in runs]
    coverage = dict.fromkeys(
        f"{len(plan['tasks'])} of {plan['suite_tasks']} tasks of {run.manifest['suite']}"
        for run, plan in zip(runs, plans, strict=True)
    )
    seen = {
        "state": "state: object poses and proprioception, privileged, no camera",
        "pixels": "pixels: " + ", ".join(protocol["cameras"]),
    }[protocol["observation"]]
    states = {state for plan in plans for state in plan["init_states"]}
    repeats = sorted({plan["repeats"] for plan in plans})
    seeds = {run.manifest["seed"] for run in runs}
    scored = [rows for run in runs for rows in (run.base, run.evaluated)]
    decodings, codes, machines = (
        sorted({value for rows in scored for value in set(rows.column(name))})
        for name in ("decoding", "code", "fingerprint")
    )
    notes = [
        f"Covers {'; '.join(coverage)}. Protocol {protocol['label']}. Observation {seen}.",
        f"Decoding {', '.join(decodings or [protocol['decoding']])}. Held-out initial states {spans(states)}, "
        f"{' or '.join(map(str, repeats))} episode(s) each; seed {spans(seeds)}; "
        f"{sum(len(run.base) for run in runs)} base and {sum(len(run.evaluated) for run in runs)} scored episodes. "
        f"Code {', '.join(codes) or '-'}.",
    ]
    if len(machines) > 1:
        notes.append(f"Rows come from {len(machines)} machines or installations: {', '.join(machines)}.")
    for run in runs:
        for log in run.torn:
            notes.append(
                f"{run.folder / log}: its last line is unfinished and left out; the run is writing it, or was killed: "
                f"then `vlarl-bench run --resume {run.folder}` mends it."
            )
        if run.stopped:
            notes.append(
                f"{run.folder.name} was stopped in round {run.stopped['iteration']}, and is scored as it was before: "
                f"{run.stopped['reason']}."
            )
    return tuple(notes)
