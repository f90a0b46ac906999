"""Taking in another group's results: `vlarl-bench submit`."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..errors import BenchError
from ..provenance import fingerprint_hash
from .lint import lint_run, lint_runs
from .pack import PACK, Entry, read_pack
from .packing import add, read_entries
from .runs import RunFolder, read_all


@dataclasses.dataclass(frozen=True)
class Sender:
    """Who submits; kept with each run."""

    by: str
    contact: str
    licence: str
    source: str

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value != " ".join(value.split()) or (not value and name != "source"):
                raise BenchError(f"{name}: {value!r}; it must be one line of text that is not empty")

    @property
    def pack(self) -> str:
        """Name of its pack: `Some Lab (X)` has `some-lab-x`."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.by.lower()).strip("-")
        if not slug:
            raise BenchError(f"by: {self.by!r}; it must have a letter from a to z or a digit, for the folder's name")
        return slug


def submit(paths: Sequence[str], sender: Sender, results: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Checks the runs of run folders and packs, and adds them to the sender's pack below `results`: all, or none.

    Returns the pack and what lint has to say of the runs, for readers; or None and why they are refused, a line each.
    """
    pack, entries, runs, refused = Path(results) / sender.pack, list[Entry](), list[RunFolder](), list[str]()
    for path in map(Path, dict.fromkeys(paths)):
        try:
            entries += read_entries(path)
            runs += read_all([path])
        except BenchError as error:
            refused.append(str(error))
    known = {
        each.sha256["episodes.jsonl"]: found.parent / each.name
        for found in sorted(Path(results).glob(f"*/{PACK}"))
        if found.parent != pack
        for each in read_pack(found.parent)
    }
    for entry, run in zip(entries, runs if not refused else [], strict=not refused):
        refused += [f"{run.folder}: {problem}" for problem in problems(run)] + lint_run(run)
        if entry.sha256["episodes.jsonl"] in known:
            refused.append(f"{run.folder}: has the episodes of {known[entry.sha256['episodes.jsonl']]}, which is there")
    if (pack / PACK).exists():
        others = {(each.submitted or {}).get("by") for each in read_pack(pack)} - {sender.by}
        if others:
            refused.append(f"by: {pack} holds results of {others.pop()}; submit under another name")
    if refused:
        return None, refused
    add([dataclasses.replace(entry, submitted=vars(sender)) for entry in entries], pack)
    return pack, lint_runs(runs)


def problems(run: RunFolder) -> list[str]:
    """What keeps a run from being shown beside others: what this version's suites, protocols and rules do not know."""
    manifest, config, rows = run.manifest, run.config, run.rows
    plan, protocol, found = manifest["evaluation"], manifest["protocol"], []

    def check(holds: Any, words: str) -> None:
        if not holds:
            found.append(words)

    check(config.get("rewards", "success") in ("success", "shuffled"), "rewards in config.json is no way to reward")
    check(len(run.evaluated), "it has no scored episode")
    for name in ("algorithm", "observation"):
        told = protocol["observation"] if name == "observation" else manifest[name]
        if name == "observation" or run.compares:
            check((rows.column(name) == told).all(), f"some rows have another {name} than {told}")
    base = rows.column("checkpoint")[rows.column("phase") == "base"]
    check((base == manifest["base_checkpoint"]).all(),
          f"rows of the base policy are not of checkpoint {manifest['base_checkpoint']}")  # fmt: skip
    machine = {name: value for name, value in manifest["fingerprint"].items() if name != "hash"}
    check(fingerprint_hash(machine) == manifest["fingerprint"]["hash"], "the machine's fingerprint has another hash")
    steps = rows.column("steps")
    horizon = np.array([protocol["horizon"].get(suite, 0) for suite in rows.column("suite")], dtype=int)
    check(((steps >= 1) & (steps <= horizon)).all(), "episodes are longer than the horizon, or have no steps")
    try:
        suite = registry.get("suite", manifest["suite"])
        known = suite.protocol(protocol["observation"], config.get("protocol", "tiny"))
    except BenchError as error:
        return [*found, str(error)]
    check(known.hash == protocol["hash"], f"protocol {protocol['label']} is not {known.label} of this version")
    check(set(plan["init_states"]) <= set(known.eval_states) and not set(known.train_states) & set(known.eval_states),
          f"it is to be judged on initial states that {known.label} does not hold out")  # fmt: skip
    tasks = {task.key for task in suite.tasks}
    unknown = sorted(set(plan["tasks"]) - tasks)
    check(not unknown, f"{manifest['suite']} has no task {', '.join(unknown)}")
    check(plan["suite_tasks"] == len(tasks), f"{manifest['suite']} has {len(tasks)} tasks, not {plan['suite_tasks']}")
    return found
