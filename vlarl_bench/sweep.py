"""A sweep file, and the cells that it stands for: algorithms x policies x suites x ablations x seeds.

A cell is one `RunConfig` in a folder whose name is derived from the cell, so that the same file always means the same
folders. Cells that differ only in their seed are checked once, as one `Row`: 10,000 cells are planned in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import registry
from .config import BUDGETS, Budget, RunConfig, read, settings_before
from .errors import BenchError
from .files import explained
from .plan import plan_run
from .trackers import TRACKERS


@dataclass(frozen=True)
class Resources:
    """What one cell is given."""

    cpus: int = 2
    """CPU cores of each node; at least the run's `workers` and `threads` should fit."""
    memory_gib: float = 8.0
    """Memory of each node in GiB."""
    gpus: int = 0
    """GPUs of each node."""
    processes: int = 1
    """Processes of each node that share the cell's run, each with the run's `workers` and `threads`."""
    nodes: int = 1
    """Machines that share the cell's run; more than one need SLURM."""
    minutes: int = 240
    """Time limit of a SLURM job. A cell that needs longer is queued again and goes on from its checkpoint."""
    partition: str = ""
    """SLURM partition; empty takes the cluster's default."""
    account: str = ""
    """SLURM account; empty takes the user's default."""

    def check(self, where: str) -> None:
        """Raises BenchError on a value out of range."""
        for name, least in (("cpus", 1), ("gpus", 0), ("processes", 1), ("nodes", 1), ("minutes", 1)):
            if getattr(self, name) < least:
                raise BenchError(f"{where}.{name}: {getattr(self, name)}; it must be at least {least}")
        if self.memory_gib <= 0:
            raise BenchError(f"{where}.memory_gib: {self.memory_gib}; it must be above 0")


@dataclass(frozen=True)
class Options:
    """Fields of a run that are no axis of a sweep; each as `vlarl-bench run --help` says."""

    base: str = "prior"
    unnorm_key: str = ""
    freeze: tuple[str, ...] = ()
    lora: int = 0
    tasks: tuple[str, ...] = ()
    protocol: str = "tiny"
    workers: int = 2
    slots: int = 16
    threads: int = 2
    device: str = "cpu"
    demos: str = ""
    rewards: Literal["success", "shuffled"] = "success"
    video: bool = False


@dataclass(frozen=True)
class Ablation:
    """What departs from the default, under a name: settings, or options of the run such as `rewards`."""

    settings: Any = dataclasses.field(default_factory=dict)
    """Setting -> value."""
    run: Any = dataclasses.field(default_factory=dict)
    """`Options`."""
    algorithms: tuple[str, ...] = ()
    """Whose settings they are; empty means every algorithm of the sweep."""


@dataclass(frozen=True)
class Where:
    """Some of a sweep's cells: those that match every axis that is given."""

    algorithms: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    ablations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Override(Where):
    """What differs in some of the cells; later ones win."""

    settings: Any = dataclasses.field(default_factory=dict)
    budget: Any = dataclasses.field(default_factory=dict)
    run: Any = dataclasses.field(default_factory=dict)
    resources: Any = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class SweepFile:
    """A sweep file as it is written; `Any` stands for tables that are checked against what they change."""

    algorithms: tuple[str, ...]
    policies: tuple[str, ...]
    suites: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Any = "quick"
    """A preset, or a table of numbers with `preset`, from which the others are taken."""
    settings: Any = dataclasses.field(default_factory=dict)
    """Algorithm -> setting -> value."""
    ablations: Any = dataclasses.field(default_factory=dict)
    """Name -> `Ablation`; the cells without one are called `default`."""
    run: Any = dataclasses.field(default_factory=dict)
    """`Options`."""
    resources: Any = dataclasses.field(default_factory=dict)
    """`Resources`."""
    exclude: tuple[Any, ...] = ()
    """Tables of `Where`: cells that the sweep leaves out."""
    override: tuple[Any, ...] = ()
    """Tables of `Override`."""
    parallel: int | None = None
    """Cells at a time. Without it: one on this machine, as many as the cluster grants on SLURM."""
    tracker: str = ""
    """Where metrics are shown besides the run folder: wandb, tensorboard or trackio."""
    out: str = ""
    """Folder of the sweep, from the file's own; empty takes the file's name without its suffix."""
    packed: tuple[str, ...] = ()
    """Packs, from the file's own folder: cells whose configuration a run of one of them has are done."""


DEFAULT = "default"
AXES = ("algorithms", "policies", "suites", "seeds", "ablations")
IGNORED = ("out", "seed", "workers", "video", "device")
"""Fields of a run that its row's digest leaves out: the seed is added to each cell's, the others change no rows, or as
the device does in rounding alone; cells keep the names that they had before it could be chosen."""


@dataclass(frozen=True)
class Row:
    """Cells that differ only in their seed."""

    algorithm: str
    policy: str
    suite: str
    ablation: str
    seeds: tuple[int, ...]
    config: RunConfig
    """Of the first seed."""
    written: Mapping[str, Any]
    """That config as JSON, paths as in the file: what the names are made of."""
    resources: Resources
    impossible: str
    """Why none of them can run; empty if they can."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    row: Row
    seed: int

    @property
    def config(self) -> RunConfig:
        """The run; its folder is that of the sweep's `runs` with the cell's name."""
        out = str(Path(self.row.config.out) / self.name)
        return dataclasses.replace(self.row.config, seed=self.seed, out=out)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked, and its cells in the order of the axes."""

    path: Path
    out: Path
    file: SweepFile
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the cells, each once."""
        return tuple({id(cell.row): cell.row for cell in self.cells}.values())


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep file and plans its cells.

    Raises:
        BenchError: naming the file, and the first field that is unknown, missing, mistyped, out of range or names
            something that is not installed.
    """
    path = Path(path)
    try:
        with explained(path):
            data = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: not valid TOML; {error}") from None
    try:
        return plan_sweep(data, path)
    except BenchError as error:
        raise BenchError(f"{path}: {error}") from None


def plan_sweep(data: Mapping[str, Any], path: Path) -> Sweep:
    """As `read_sweep`, for what a file at `path` says; other files that it names lie relative to it."""
    file = _read_file(data)
    out = path.parent / (file.out or path.stem)
    if out == path:
        raise BenchError(f"out: {file.out!r}; the file itself has that name; end it in .toml, or set another `out`")
    rows = list(_rows(file, out.absolute() / "runs", path.parent))
    cells = tuple(cell for row in rows for cell in _cells(row))
    if not cells:
        raise BenchError("exclude: no cell is left")
    return Sweep(path, out, file, cells)


def _cells(row: Row) -> Iterator[Cell]:
    """The row's cells, each with its folder name: readable, and with a digest of everything that decides its rows."""
    decides = {name: value for name, value in row.written.items() if name not in IGNORED}
    before = settings_before(row.algorithm)  # cells keep the names that they had before there was a choice
    decides["settings"] = {k: v for k, v in decides["settings"].items() if k not in before or v != before[k]}
    same = hashlib.sha256(json.dumps({**decides, "ablation": row.ablation}, sort_keys=True).encode())
    words = [row.algorithm, row.policy, row.suite, row.ablation]
    readable = "-".join(re.sub(r"[^A-Za-z0-9_]+", "_", word)[:40] for word in words if word != DEFAULT)
    for seed in row.seeds:
        digest = same.copy()
        digest.update(f" seed {seed}".encode())
        yield Cell(f"{readable}-seed{seed}-{digest.hexdigest()[:10]}", row, seed)


def _read_file(data: Mapping[str, Any]) -> SweepFile:
    file = SweepFile(**_filled(SweepFile, data, "sweep"))
    for axis in AXES[:4]:
        entries = getattr(file, axis)
        if not entries:
            raise BenchError(f"{axis}: []; name at least one")
        for i, entry in enumerate(entries):
            if entry in entries[:i]:
                raise BenchError(f"{axis}[{i}]: {entry!r}; it is there twice")
    kinds: tuple[tuple[str, registry.Kind], ...] = (
        ("algorithms", "algorithm"),
        ("policies", "policy"),
        ("suites", "suite"),
    )
    for axis, kind in kinds:
        for i, name in enumerate(getattr(file, axis)):
            try:
                registry.get(kind, name)
            except BenchError as error:
                raise BenchError(f"{axis}[{i}]: {error}") from None
    for i, seed in enumerate(file.seeds):
        if not 0 <= seed < 2**31:
            raise BenchError(f"seeds[{i}]: {seed}; it must be in [0, {2**31 - 1}]")
    if file.parallel is not None and file.parallel < 1:
        raise BenchError(f"parallel: {file.parallel}; it must be at least 1")
    if file.tracker and file.tracker not in TRACKERS:
        raise BenchError(f"tracker: {file.tracker!r}; {registry.did_you_mean(file.tracker, TRACKERS)}")
    folders = {"out": file.out, **{f"packed[{i}]": pack for i, pack in enumerate(file.packed)}}
    for field, folder in folders.items():
        if "\0" in folder or (field != "out" and not folder):
            raise BenchError(f"{field}: {folder!r}; it must be the name of a folder")
    for name in _table(file.settings, "settings"):
        if name not in file.algorithms:
            raise BenchError(f"settings.{name}: not in algorithms; {registry.did_you_mean(name, file.algorithms)}")
    return file


def _rows(file: SweepFile, runs: Path, folder: Path) -> Iterator[Row]:
    """Every row of the product that is not excluded."""
    ablations = _ablations(file)
    excluded = [Where(**_filled(Where, item, f"exclude[{i}]")) for i, item in enumerate(file.exclude)]
    overrides = [Override(**_filled(Override, item, f"override[{i}]")) for i, item in enumerate(file.override)]
    for kind, items in (("exclude", excluded), ("override", overrides)):
        for i, item in enumerate(items):
            _check_axes(file, ablations, item, f"{kind}[{i}]")
    for axes in itertools.product(file.algorithms, file.policies, file.suites, (DEFAULT, *ablations)):
        algorithm, policy, suite, ablation = axes
        if ablation != DEFAULT and ablations[ablation].algorithms and algorithm not in ablations[ablation].algorithms:
            continue
        # Seeds that the same overrides change are one row.
        groups: dict[tuple[int, ...], list[int]] = {}
        for seed in file.seeds:
            cell = (algorithm, policy, suite, seed, ablation)
            if not any(_matches(where, cell) for where in excluded):
                changed = tuple(i for i, override in enumerate(overrides) if _matches(override, cell))
                groups.setdefault(changed, []).append(seed)
        for changed, seeds in groups.items():
            changes = [(f"override[{i}]", overrides[i]) for i in changed]
            yield _row(
                file, (algorithm, policy, suite, ablation), seeds, ablations.get(ablation), changes, runs, folder
            )


def _row(
    file: SweepFile,
    axes: tuple[str, str, str, str],
    seeds: list[int],
    ablation: Ablation | None,
    changes: list[tuple[str, Override]],
    runs: Path,
    folder: Path,
) -> Row:
    algorithm, policy, suite, name = axes
    kind = registry.get("algorithm", algorithm).Settings
    settings = _changed(kind, {}, file.settings.get(algorithm, {}), f"settings.{algorithm}", axes)
    budget = _budget(file.budget)
    options = _filled(Options, file.run, "run")
    if ablation is not None:
        settings = _changed(kind, settings, ablation.settings, f"ablations.{name}.settings", axes)
        options = _filled(Options, {**options, **ablation.run}, f"ablations.{name}.run")
    resources = _filled(Resources, file.resources, "resources")
    for where, change in changes:
        settings = _changed(kind, settings, change.settings, f"{where}.settings", axes)
        budget = _filled(Budget, {**budget, **_table(change.budget, f"{where}.budget")}, f"{where}.budget")
        options = _filled(Options, {**options, **_table(change.run, f"{where}.run")}, f"{where}.run")
        resources = _filled(
            Resources, {**resources, **_table(change.resources, f"{where}.resources")}, f"{where}.resources"
        )
    Resources(**resources).check("resources")
    try:
        written = RunConfig(
            algorithm, suite, policy, Budget(**budget), kind(**settings), "out", seed=seeds[0], **options
        )
    except BenchError as error:
        raise BenchError(f"cell {' '.join(word for word in axes if word != DEFAULT)}: {error}") from None
    paths: dict[str, Any] = {
        field: str((folder / value).absolute())
        for field, value in (("base", written.base), ("demos", written.demos))
        if value and not (field == "base" and value in ("prior", "scratch"))
    }
    config = dataclasses.replace(written, out=str(runs), **paths)
    reason = _impossible(config)
    return Row(*axes, tuple(seeds), config, written.to_dict(), Resources(**resources), reason)


def _impossible(config: RunConfig) -> str:
    """Why the parts of a run do not fit each other; empty if they do."""
    reason = _incompatible(config.algorithm, config.policy)
    if reason:
        return reason
    try:
        plan_run(config)
    except BenchError as error:
        return str(error)
    return ""


@functools.cache
def _incompatible(algorithm: str, policy: str) -> str:
    try:
        registry.check_compatible(algorithm, policy)
    except BenchError as error:
        return str(error)
    return ""


def _ablations(file: SweepFile) -> dict[str, Ablation]:
    found = {}
    for name, item in _table(file.ablations, "ablations").items():
        where = f"ablations.{name}"
        if name == DEFAULT or not name:
            raise BenchError(f"{where}: the name {name!r} is taken by the cells without an ablation; choose another")
        ablation = Ablation(**_filled(Ablation, item, where))
        for algorithm in ablation.algorithms:
            if algorithm not in file.algorithms:
                near = registry.did_you_mean(algorithm, file.algorithms)
                raise BenchError(f"{where}.algorithms: {algorithm!r} is not in algorithms; {near}")
        changes = [_table(getattr(ablation, field), f"{where}.{field}") for field in ("settings", "run")]
        if not any(changes):
            raise BenchError(f"{where}: it changes nothing; give settings, or options of run")
        found[name] = ablation
    return found


def _check_axes(file: SweepFile, ablations: Mapping[str, Any], where: Where, at: str) -> None:
    known = {axis: getattr(file, axis) for axis in AXES[:4]} | {"ablations": (DEFAULT, *ablations)}
    if all(not getattr(where, axis) for axis in AXES) and at.startswith("exclude"):
        raise BenchError(f"{at}: {{}}; it would leave out every cell; name {', '.join(AXES)}")
    for axis in AXES:
        for entry in getattr(where, axis):
            if entry not in known[axis]:
                near = registry.did_you_mean(str(entry), map(str, known[axis]))
                raise BenchError(f"{at}.{axis}: {entry!r} is not in {axis}; {near}")


def _matches(where: Where, axes: tuple[str, str, str, int, str]) -> bool:
    return all(not (wanted := getattr(where, name)) or value in wanted for name, value in zip(AXES, axes, strict=True))


def _budget(given: Any) -> dict[str, Any]:
    """Numbers of the budget: a preset, or a table with `preset` and what differs."""
    table = {"preset": given} if isinstance(given, str) else dict(_table(given, "budget"))
    preset = table.pop("preset", "quick")
    if not isinstance(preset, str) or preset not in BUDGETS:
        raise BenchError(f"budget.preset: {preset!r} is no preset; {registry.did_you_mean(str(preset), BUDGETS)}")
    return _filled(Budget, {**dataclasses.asdict(BUDGETS[preset]), **table}, "budget")


def _changed(kind: Any, before: Mapping[str, Any], changes: Any, where: str, axes: tuple[str, ...]) -> dict[str, Any]:
    """An algorithm's settings with some changed."""
    table, known = _table(changes, where), [field.name for field in dataclasses.fields(kind)]
    for name in table:
        if name not in known:
            near = registry.did_you_mean(name, known)
            raise BenchError(f"{where}.{name}: unknown field; {near}; algorithm {axes[0]!r} has no such setting")
    return _filled(kind, {**before, **table}, where)


def _filled(kind: Any, given: Any, where: str) -> dict[str, Any]:
    """Fields of a dataclass: those given, checked, and the defaults of the others."""
    defaults = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    table = _table(given, where)
    for field in dataclasses.fields(kind):
        if field.name not in table and field.name not in defaults:
            raise BenchError(f"{where}.{field.name}: missing; every {kind.__name__} needs it")
    found: dict[str, Any] = read(kind, {**defaults, **table}, where)
    return found


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BenchError(f"{where}: {value!r}; it must be a table")
    return value
