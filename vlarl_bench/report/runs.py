"""A run folder as reports see it: manifest, config and rows, checked against one another."""

import dataclasses
import fnmatch
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import settings_before
from ..errors import BenchError
from ..protocol import Protocol
from ..records import STOPPED, EpisodeRow, Phase, is_torn, read_rows
from ..sealed import read_sealed
from .pack import PACK, meant, metric_lines, read_pack
from .rows import Rows

PLACE_AND_SPEED = frozenset({"seed", "out", "workers", "slots", "threads", "device", "video", "demos"})
"""Entries of a config in which two runs of the same experiment may differ."""
UNREAD = {"rollouts": ("demos", "gradient_steps", "batch_size"), "demonstrations": ("episodes",)}
"""Numbers of a budget that are not for who learns from these, by `Budget`: of no consequence there."""
JUDGED_BY = {"protocol": "protocol", "budget.eval_states": "states", "budget.eval_repeats": "repeats"}
"""Settings of a run that say how it is judged, and what an evaluation's config calls them."""

MANIFEST: dict[str, Any] = {
    "run": str,
    "argv": [str],
    "algorithm": str,
    "policy": str,
    "suite": str,
    "seed": int,
    "base_checkpoint": str,
    "protocol": dict,
    "evaluation": {"tasks": [str], "suite_tasks": int, "init_states": [int], "repeats": int},
    "code": str,
    "fingerprint": dict,
}
"""What reports take from manifest.json, and what it is there; [str] is a list of texts."""
TRAINED: dict[str, Any] = {"base_checkpoint": str, "seed": int, "settings": dict}
"""And what a manifest's `trained` has, if it has one."""
CONFIG: dict[str, Any] = {"settings": dict, "budget": dict, "base": str, "protocol": str, "rewards": str}
"""What reports take from config.json, where it is there."""
STOP: dict[str, Any] = {"iteration": int, "reason": str}
"""What reports take from stopped.json, and ..."""
SPENT: dict[str, Any] = {
    "spent": {"env_steps": int, "gradient_steps": int, "flops": int},
    "seconds": float,
    "cpu_seconds": float,
}
"""... where it is there."""
WORDS = {str: "text", int: "an integer", float: "a number with a point", dict: "a table"}


def wrong(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """What of `wanted` is missing or something else, a phrase each."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        inside = f"{where}." if where else ""
        yield from (f"{inside}{name} is missing" for name in wanted.keys() - found.keys())
        for name in wanted.keys() & found.keys():
            yield from wrong(found[name], wanted[name], f"{inside}{name}")
    elif isinstance(wanted, list) and isinstance(found, list):
        if others := [each for each in found if type(each) is not wanted[0]]:
            yield f"{where} has {others[0]!r:.80}, where all must be {WORDS[wanted[0]]}"
    elif type(found) is not wanted:
        kind = dict if isinstance(wanted, dict) else wanted
        yield f"{where} is {found!r:.80}; it must be {'a list' if isinstance(kind, list) else WORDS[kind]}"


@dataclass(frozen=True)
class RunFolder:
    """What a finished or interrupted run left on disk."""

    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: Rows
    stopped: dict[str, Any] | None = None
    """In which round (`iteration`) training had destroyed the policy, and the `reason`, if it had."""
    submitted: dict[str, str] | None = None
    """Who sent it (`by`, `contact`, `licence`, `source`); None where it is our own."""
    packed_metrics: tuple[dict[str, Any], ...] | None = None
    """Lines of `metrics.jsonl` where the run is of a pack; else they are in the folder (`metrics.metrics_of`)."""
    torn: tuple[str, ...] = ()
    """Logs whose last line is unfinished and left out."""

    def __post_init__(self) -> None:
        of_manifest = MANIFEST | ({"trained": TRAINED} if self.trained is not None else {})
        of_config = {name: kind for name, kind in CONFIG.items() if name in self.config}
        checked = [("manifest.json", self.manifest, of_manifest), ("config.json", self.config, of_config)]
        if self.stopped is not None:
            of_stopped = STOP | {name: kind for name, kind in SPENT.items() if name in self.stopped}
            checked.append(("stopped.json", self.stopped, of_stopped))
        for file, content, wanted in checked:
            if problems := ", ".join(sorted(wrong(content, wanted))):
                raise BenchError(f"{self.folder / file}: not of this version; {problems}")
        protocol, tasks = self.manifest["protocol"], set(self.manifest["evaluation"]["tasks"])
        described = Protocol(**{name: value for name, value in protocol.items() if name not in ("hash", "label")})
        if (described.hash, described.label) != (protocol["hash"], protocol["label"]):
            raise BenchError(
                f"{self.folder / 'manifest.json'}: the protocol does not have the hash it claims; altered?"
            )
        if self.config.get("seed") != self.manifest["seed"]:
            told, asked = self.manifest["seed"], self.config.get("seed")
            raise BenchError(f"{self.folder}: seed is {told} in manifest.json and {asked} in config.json; altered?")
        rows, label = self.rows, protocol["label"]
        train, states = rows.column("phase") == "train", rows.column("init_state")
        run, policy = self.manifest["run"], self.manifest["policy"]
        self._refuse(rows.column("run") != run, lambda row: f"is of the run {row.run!r}, not {run!r}")
        self._refuse(rows.column("policy") != policy, lambda row: f"is of the policy {row.policy!r}, not {policy!r}")
        self._refuse(
            rows.column("protocol") != protocol["hash"],
            lambda row: f"has protocol {row.protocol}, but the manifest says {label}",
        )
        others = (rows.column("decoding") != self.decoding) & (rows.column("decoding") != "explore")
        besides = (self.decoding == "sampled") & np.isin(rows.column("phase"), ("base", "final"))
        self._refuse(
            others & ~(besides & (rows.column("decoding") == "zero-noise")),
            lambda row: f"is {row.decoding}, but the protocol decodes {self.decoding}",
        )
        for suite, task in set(zip(rows.column("suite"), rows.column("task"), strict=True)):
            if f"{suite}/{task}" not in tasks:
                of_it = (rows.column("suite") == suite) & (rows.column("task") == task)
                self._refuse(of_it, lambda _: "is of a task that the manifest does not list")
        self._refuse(
            train & ~np.isin(states, protocol["train_states"]),
            lambda _: f"trains on an initial state that {label} does not train on",
        )
        self._refuse(
            ~train & ~np.isin(states, protocol["eval_states"]),
            lambda _: f"evaluates on an initial state that {label} does not hold out",
        )

    def _refuse(self, wrong: np.ndarray, why: Callable[[EpisodeRow], str]) -> None:
        """Raises BenchError about the first row that a mask [N] marks, if any."""
        if wrong.any():
            row = self.rows[int(wrong.argmax())]
            raise BenchError(f"{self.folder}: episode {row.key} {why(row)}")

    @property
    def submitted_by(self) -> str:
        """Whose it is; empty where it is our own."""
        return self.submitted["by"] if self.submitted else ""

    @functools.cached_property
    def evaluated(self) -> Rows:
        """The scored rows: `final`, or `eval` in a folder of `vlarl-bench eval`; those of the latest iteration."""
        return self._latest("final" if self.compares else "eval")

    @functools.cached_property
    def base(self) -> Rows:
        """The base policy's rows."""
        return self._latest("base")

    @functools.cached_property
    def noiseless(self) -> tuple[Rows, Rows]:
        """What base and fine-tuned policy played without noise besides; none in a run from before there was that, in
        an evaluation, and where the protocol draws no noise anyway."""
        return self._latest("base", noiseless=True), self._latest("final", noiseless=True)

    def _latest(self, phase: Phase, noiseless: bool = False) -> Rows:
        """Rows of a phase and its latest iteration, decoded as the protocol says or without noise besides."""
        apart = (self.rows.column("decoding") == "zero-noise") & (self.decoding == "sampled")
        rows = self.rows.where((self.rows.column("phase") == phase) & (apart == noiseless))
        iteration = rows.column("iteration")
        return rows.where(iteration == iteration.max(initial=0))

    def rows_of(self, suite: str) -> Rows:
        """All rows of one of its suites."""
        return self.rows.where(self.rows.column("suite") == suite)

    @functools.cached_property
    def compares(self) -> bool:
        """Whether this is a run (before and after) and not a lone evaluation."""
        return "states" not in self.config

    @functools.cached_property
    def trained(self) -> dict[str, Any] | None:
        """Of an evaluation of a policy that a run fine-tuned: that run's `base_checkpoint`, `seed` and `settings`."""
        found: dict[str, Any] | None = self.manifest.get("trained")
        return found

    @property
    def method(self) -> str:
        """The algorithm that made the scored policy from the one it began with; empty where nothing was fine-tuned."""
        return self.manifest["algorithm"] if self.compares or self.trained else ""

    @functools.cached_property
    def spent(self) -> dict[str, int]:
        """What training took: episodes and environment steps, counted from rows, and what the rows say of gradient
        steps and FLOPs. An evaluation has no rows of training: the scored ones tell its steps."""
        train = self.rows.column("phase") == "train"
        told = {name: int(self.rows.column(name).max(initial=0)) for name in ("env_steps", "gradient_steps", "flops")}
        counted = {"env_steps": int(self.rows.column("steps")[train].sum())} if self.compares else {}
        return {"train_episodes": int(train.sum()), **told, **counted}

    @property
    def is_control(self) -> bool:
        """Whether it was made not to learn."""
        settings = self.trained["settings"] if self.trained else self.config
        return settings.get("rewards") == "shuffled"

    @property
    def title(self) -> str:
        """What was run; a control says that it is one."""
        m = self.manifest
        control = ", CONTROL: rewards shuffled" if self.is_control else ""
        what = ("" if self.compares else "evaluation of ") + (f"{self.method} on " if self.method else "")
        return f"{what}{m['policy']}, {m['suite']}, seed {m['seed']}{control}"

    @property
    def decoding(self) -> str:
        """How the protocol decodes, and so the scored rows."""
        return str(self.manifest["protocol"]["decoding"])

    @property
    def owes_noiseless(self) -> bool:
        """Whether it plays the held-out states without noise besides."""
        return bool(self.manifest["evaluation"].get("noiseless"))

    @property
    def missing(self) -> int:
        """How many of the evaluation episodes that it owes are not there."""
        plan, missing = self.manifest["evaluation"], 0
        evaluations = [(self.base, self.evaluated, plan["repeats"])]
        evaluations += [(*self.noiseless, 1)] if self.owes_noiseless else []
        for before, after, repeats in evaluations:
            owed = len(plan["tasks"]) * len(plan["init_states"]) * repeats
            for rows in (after, *((before,) if self.compares and self.config.get("base") != "scratch" else ())):
                planned = np.isin(rows.column("init_state"), plan["init_states"]) & (rows.column("repeat") < repeats)
                missing += owed - int(planned.sum())
        return missing

    @property
    def suites(self) -> list[str]:
        """Concrete suites, in the order of the tasks."""
        return list(dict.fromkeys(task.split("/")[0] for task in self.manifest["evaluation"]["tasks"]))

    @functools.cached_property
    def judged(self) -> dict[str, frozenset[str]]:
        """The tasks of each suite that it owes episodes of."""
        keys = self.manifest["evaluation"]["tasks"]
        return {suite: frozenset(key for key in keys if key.startswith(f"{suite}/")) for suite in self.suites}

    def settings(self) -> dict[str, Any]:
        """Everything in which runs of one experiment must agree, flat: `budget.iterations` -> 12. Of an evaluation of
        a fine-tuned policy, what that was trained with, as if it had been judged so at once."""
        before = {f"settings.{name}": value for name, value in settings_before(self.manifest["algorithm"]).items()}
        if self.trained:
            here = {name: self.config[was] for name, was in JUDGED_BY.items() if was in self.config}
            found = {**before, **self.trained["settings"], **here}
            return _of_consequence(found, "demonstrations" in found)
        flat = _flatten({name: value for name, value in self.config.items() if name not in PLACE_AND_SPEED})
        given = self.manifest.get("demonstrations")
        learned_from = {"demonstrations": given["digest"]} if given else {}
        found = before | flat | {"base": self.start} | learned_from  # a path says less than what was found there
        return _of_consequence(found, given is not None)

    @property
    def start(self) -> str:
        """Hash of the policy that it started from; `scratch` for random weights, which differ by seed."""
        if self.trained:
            return str(self.trained["base_checkpoint"])
        return "scratch" if self.config.get("base") == "scratch" else str(self.manifest["base_checkpoint"])


def read_run(folder: str | os.PathLike[str]) -> RunFolder:
    """Reads and checks one run folder; raises BenchError that names what is missing, damaged or contradictory."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        inside = [str(found.parent) for name in ("manifest.json", PACK) for found in sorted(folder.glob(f"*/{name}"))]
        more = f"; {len(inside)} of these below it: name {', '.join(inside[:5])}" if inside else ""
        more += ", ..." if len(inside) > 5 else ""
        raise BenchError(f"{folder}: not a run folder, it has no manifest.json, nor a pack, with a {PACK}{more}")
    manifest, config = (read_sealed(folder / name, older=True) for name in ("manifest.json", "config.json"))
    rows = read_rows(folder / "episodes.jsonl") if (folder / "episodes.jsonl").exists() else []
    stopped = read_sealed(folder / STOPPED, older=True) if (folder / STOPPED).exists() else None
    logs = [folder / name for name in ("episodes.jsonl", "metrics.jsonl") if (folder / name).exists()]
    torn = tuple(log.name for log in logs if is_torn(log))
    return _checked(folder, manifest, config, Rows.of(rows), stopped, torn=torn)


def _checked(folder: Path, manifest: Any, config: Any, rows: Rows, stopped: Any, **more: Any) -> RunFolder:
    try:
        return RunFolder(folder, manifest, config, rows, stopped, **more)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # in the protocol, which is somebody's JSON
        reason = f"{type(error).__name__}: {error}"
        raise BenchError(f"{folder / 'manifest.json'}: not of this version; its protocol is wrong ({reason})") from None


def read_all(paths: Iterable[str | os.PathLike[str]]) -> list[RunFolder]:
    """Reads run folders, packs, and single runs of packs (PACK/NAME, where NAME may have * and ?), each run once."""
    found: dict[Path, RunFolder] = {}
    packs: dict[Path, list[RunFolder]] = {}
    for path in map(Path, paths):
        packed = meant(path)
        if packed is None:
            runs = [read_run(path)]
        else:
            pack, names = packed
            packs[pack] = packs.get(pack) or _packed_runs(pack)
            runs = [run for run in packs[pack] if fnmatch.fnmatchcase(run.folder.name, names)]
            if not runs:
                raise BenchError(f"{path}: {pack} has no run of that name")
        for run in runs:
            found.setdefault(run.folder.resolve(), run)
    return list(found.values())


def _packed_runs(pack: Path) -> list[RunFolder]:
    return [
        _checked(
            pack / each.name,
            each.manifest,
            each.config,
            each.rows,
            each.stopped,
            submitted=each.submitted,
            packed_metrics=tuple(metric_lines(each.metrics)),
        )
        for each in read_pack(pack)
    ]


def find_runs(folder: str | os.PathLike[str]) -> list[RunFolder]:
    """The run folders and packs directly below a folder, if any."""
    return read_all(
        found.parent for name in ("manifest.json", PACK) for found in sorted(Path(folder).glob(f"*/{name}"))
    )


def read_runs(folders: Iterable[str | os.PathLike[str]]) -> list[RunFolder]:
    """Reads several run folders and packs, each run once, and refuses those that do not compare."""
    runs = read_all(folders)
    for run in runs[1:]:
        first, other = runs[0].manifest["protocol"], run.manifest["protocol"]
        if first["hash"] != other["hash"]:
            raise BenchError(
                f"{runs[0].folder} has protocol {first['label']} and {run.folder} has {other['label']}: scores under "
                "different protocols do not compare; make one table each"
            )
    return runs


def pooled(run: RunFolder) -> RunFolder:
    """The same run with the suites of its group (libero) as one, whose tasks are called SUITE/NAME. A run of one suite
    that was asked for by its own name is left alone."""
    group = run.manifest["suite"]
    if group in run.suites:
        return run
    plan = run.manifest["evaluation"]
    tasks = [f"{group}/{key}" for key in plan["tasks"]]
    return dataclasses.replace(
        run,
        manifest={**run.manifest, "evaluation": {**plan, "tasks": tasks}},
        rows=run.rows.as_one_suite(group),
    )


def training_curve(rows: Rows) -> tuple[list[float], list[float]]:
    """Environment steps by the end of each round of training, and the success rate of its episodes, as the learner
    explored."""
    rows = rows.where(rows.column("phase") == "train")
    _, place, played = np.unique(rows.column("iteration"), return_inverse=True, return_counts=True)
    taken = np.bincount(place, rows.column("steps"), len(played))
    successes = np.bincount(place, rows.column("success"), len(played))
    return np.cumsum(taken).tolist(), (successes / played).tolist()


def _of_consequence(settings: dict[str, Any], demonstrated: bool) -> dict[str, Any]:
    """Without what the budget has for those who learn from something else."""
    unread = {f"budget.{name}" for name in UNREAD["demonstrations" if demonstrated else "rollouts"]}
    return {name: value for name, value in settings.items() if name not in unread}


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = item
    return flat
