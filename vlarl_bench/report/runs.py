"""A run folder as reports see it: manifest, config and rows, checked against one another."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BenchError
from ..protocol import Protocol
from ..records import STOPPED, EpisodeRow, is_torn, read_rows
from ..sealed import read_sealed

PLACE_AND_SPEED = frozenset({"seed", "out", "workers", "slots", "threads", "video", "demos"})
"""Entries of a config in which two runs of the same experiment may differ."""


@dataclass(frozen=True)
class RunFolder:
    """What a finished or interrupted run left on disk."""

    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: tuple[EpisodeRow, ...]
    stopped: dict[str, Any] | None = None
    """In which round (`iteration`) training had destroyed the policy, and the `reason`, if it had."""
    torn: tuple[str, ...] = ()
    """Logs whose last line is unfinished and left out."""

    def __post_init__(self) -> None:
        protocol, tasks = self.manifest["protocol"], set(self.manifest["evaluation"]["tasks"])
        described = Protocol(**{name: value for name, value in protocol.items() if name not in ("hash", "label")})
        if (described.hash, described.label) != (protocol["hash"], protocol["label"]):
            raise BenchError(
                f"{self.folder / 'manifest.json'}: the protocol does not have the hash it claims; altered?"
            )
        if self.config.get("seed") != self.manifest["seed"]:
            told, asked = self.manifest["seed"], self.config.get("seed")
            raise BenchError(f"{self.folder}: seed is {told} in manifest.json and {asked} in config.json; altered?")
        for row in self.rows:
            where = f"{self.folder}: episode {row.key}"
            for name in ("run", "policy"):
                if getattr(row, name) != self.manifest[name]:
                    raise BenchError(f"{where} is of the {name} {getattr(row, name)!r}, not {self.manifest[name]!r}")
            if row.protocol != protocol["hash"]:
                raise BenchError(f"{where} has protocol {row.protocol}, but the manifest says {protocol['label']}")
            if f"{row.suite}/{row.task}" not in tasks:
                raise BenchError(f"{where} is of a task that the manifest does not list")
            if row.phase == "train" and row.init_state not in protocol["train_states"]:
                raise BenchError(f"{where} trains on an initial state that {protocol['label']} does not train on")
            if row.phase != "train" and row.init_state not in protocol["eval_states"]:
                raise BenchError(f"{where} evaluates on an initial state that {protocol['label']} does not hold out")

    @property
    def evaluated(self) -> tuple[EpisodeRow, ...]:
        """The scored rows: `final`, or `eval` in a folder of `vlarl-bench eval`; those of the latest iteration."""
        phase = "final" if self.compares else "eval"
        rows = [row for row in self.rows if row.phase == phase]
        latest = max((row.iteration for row in rows), default=0)
        return tuple(row for row in rows if row.iteration == latest)

    @property
    def base(self) -> tuple[EpisodeRow, ...]:
        """The base policy's rows."""
        return tuple(row for row in self.rows if row.phase == "base")

    @property
    def compares(self) -> bool:
        """Whether this is a run (before and after) and not a lone evaluation."""
        return not any(row.phase == "eval" for row in self.rows)

    @property
    def title(self) -> str:
        """What was run; a control says that it is one."""
        m = self.manifest
        control = ", CONTROL: rewards shuffled" if self.config.get("rewards") == "shuffled" else ""
        what = f"{m['algorithm']} on" if self.compares else "evaluation of"
        return f"{what} {m['policy']}, {m['suite']}, seed {m['seed']}{control}"

    @property
    def decodings(self) -> list[str]:
        """How the scored rows were decoded; the protocol's way if there are none yet."""
        return sorted({row.decoding for row in self.evaluated + self.base}) or [self.manifest["protocol"]["decoding"]]

    @property
    def suites(self) -> list[str]:
        """Concrete suites, in the order of the tasks."""
        return list(dict.fromkeys(task.split("/")[0] for task in self.manifest["evaluation"]["tasks"]))

    def settings(self) -> dict[str, Any]:
        """Everything in which runs of one experiment must agree, flat: `budget.iterations` -> 12."""
        flat = _flatten({name: value for name, value in self.config.items() if name not in PLACE_AND_SPEED})
        if flat.get("base") != "scratch":  # a path says less than the weights found there
            flat["base"] = self.manifest["base_checkpoint"]
        return flat


def read_run(folder: str | os.PathLike[str]) -> RunFolder:
    """Reads and checks one run folder; raises BenchError that names what is missing, damaged or contradictory."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise BenchError(f"{folder}: not a run folder, it has no manifest.json")
    manifest, config = (read_sealed(folder / name, older=True) for name in ("manifest.json", "config.json"))
    rows = read_rows(folder / "episodes.jsonl") if (folder / "episodes.jsonl").exists() else []
    stopped = read_sealed(folder / STOPPED, older=True) if (folder / STOPPED).exists() else None
    logs = [folder / name for name in ("episodes.jsonl", "metrics.jsonl") if (folder / name).exists()]
    torn = tuple(log.name for log in logs if is_torn(log))
    try:
        return RunFolder(folder, manifest, config, tuple(rows), stopped, torn)
    except (KeyError, TypeError) as error:
        raise BenchError(f"{folder / 'manifest.json'}: not a manifest of this version ({error!r} is missing)") from None


def read_runs(folders: Iterable[str | os.PathLike[str]]) -> list[RunFolder]:
    """Reads several run folders, each once, and refuses those that do not compare."""
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    for run in runs[1:]:
        first, other = runs[0].manifest["protocol"], run.manifest["protocol"]
        if first["hash"] != other["hash"]:
            raise BenchError(
                f"{runs[0].folder} has protocol {first['label']} and {run.folder} has {other['label']}: scores under "
                "different protocols do not compare; make one table each"
            )
    return runs


def training_curve(rows: Iterable[EpisodeRow]) -> tuple[list[float], list[float]]:
    """Environment steps by the end of each round of training, and the success rate of its episodes, as the learner
    explored."""
    rounds: dict[int, list[EpisodeRow]] = {}
    for row in rows:
        if row.phase == "train":
            rounds.setdefault(row.iteration, []).append(row)
    order = sorted(rounds)
    steps = np.cumsum([sum(row.steps for row in rounds[i]) for i in order])
    return [float(s) for s in steps], [float(np.mean([row.success for row in rounds[i]])) for i in order]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = item
    return flat
