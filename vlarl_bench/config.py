"""What a run is asked to do, as frozen dataclasses; written whole into the run folder and read back on `--resume`."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import registry
from .device import check_device
from .errors import BenchError

if TYPE_CHECKING:
    from .protocol import Protocol
    from .suite import Suite, Task


@dataclass(frozen=True)
class Budget:
    """How much data and compute a run may use. The same numbers for every algorithm that is compared."""

    tasks: int
    """Tasks of the suite, at most, where `--tasks` names none."""
    iterations: int
    """Rounds of collecting and updating; of updating alone for algorithms that learn from demonstrations."""
    episodes: int
    """Training episodes per iteration, over all tasks."""
    eval_states: int
    """Held-out initial states per task in the evaluations before and after."""
    eval_repeats: int
    """Episodes per task and held-out initial state; where decoding draws no noise, one: it would repeat itself."""
    demos: int
    """Expert episodes per task (algorithms that learn from demonstrations)."""
    gradient_steps: int
    """Optimiser steps (algorithms that learn from demonstrations)."""
    batch_size: int
    """Action chunks per optimiser step (algorithms that learn from demonstrations)."""

    def __post_init__(self) -> None:
        read(Budget, dataclasses.asdict(self), "budget")
        for field in dataclasses.fields(self):
            _at_least(1, f"budget.{field.name}", getattr(self, field.name))

    def check_protocol(self, protocol: Protocol) -> None:
        """Raises BenchError if the budget asks for more held-out states than the protocol has."""
        if self.eval_states > len(protocol.eval_states):
            raise BenchError(
                f"budget.eval_states: {self.eval_states}; {protocol.label} holds out {len(protocol.eval_states)}"
            )


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: everything that decides its rows, and where they go."""

    algorithm: str
    suite: str
    policy: str
    budget: Budget
    settings: Any
    """The algorithm's `Settings`."""
    out: str
    """Run folder."""
    base: str = "prior"
    """Weights to start from: `prior` (shipped with the policy), `scratch` (random) or a policy folder."""
    unnorm_key: str = ""
    """Training data whose action scales to use, where a published folder has several."""
    freeze: tuple[str, ...] = ()
    """Parts of the policy, by dotted name, that nothing trains."""
    lora: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains the weights."""
    tasks: tuple[str, ...] = ()
    """Task names or `suite/name` keys; empty takes the first `budget.tasks` that the base policy was trained on."""
    protocol: str = "tiny"
    """How it is evaluated: `tiny` or the name of a published protocol that the suite has."""
    seed: int = 0
    workers: int = 2
    """Simulator processes; changes the speed, never the rows."""
    slots: int = 16
    """Episodes in flight, decoded as one batch."""
    threads: int = 2
    """CPU threads of the learner. Sums over another number of threads round differently, so they are part of what
    makes a run repeat to the bit."""
    device: str = "cpu"
    """Where the policy computes: `cpu`, `cuda`, or one GPU such as `cuda:1`."""
    demos: str = ""
    """Folder of demonstrations; empty makes them first, if the algorithm learns from them."""
    rewards: Literal["success", "shuffled"] = "success"
    """What the learner is told: `shuffled` permutes outcomes within each task, a control that must not learn."""
    video: bool = True
    """Whether to film one episode before and one after."""

    def __post_init__(self) -> None:
        read(RunConfig, dataclasses.asdict(self), "config")
        check_settings(self.settings)
        _at_least(1, "threads", self.threads)
        _at_least(0, "lora", self.lora)
        for i, part in enumerate(self.freeze):
            if not part or part in self.freeze[:i]:
                raise BenchError(f"freeze: {part!r}; names must be distinct and not empty")
        if not self.algorithm:
            raise BenchError("algorithm: ''; it must not be empty")
        _check_common(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the equal config back."""
        data: dict[str, Any] = _listed(dataclasses.asdict(self))
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunConfig:
        """Reads what `to_dict` wrote; the registry supplies the type of `settings`.

        Raises:
            BenchError: naming the first field that is unknown, missing, mistyped or out of range.
        """
        if isinstance(data, Mapping):
            data = {"device": "cpu", **data}  # of before it could be chosen
        config = dict(read(RunConfig, data, "config"))
        settings = registry.get("algorithm", config["algorithm"]).Settings
        given = config["settings"]
        given = {**settings_before(config["algorithm"]), **given} if isinstance(given, Mapping) else given
        config["settings"] = settings(**read(settings, given, "algo"))
        config["budget"] = Budget(**config["budget"])
        return RunConfig(**config)


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation without training, resolved."""

    suite: str
    policy: str
    out: str
    """Run folder."""
    base: str = "prior"
    """Weights: `prior` (shipped with the policy) or a policy folder."""
    unnorm_key: str = ""
    """Training data whose action scales to use, where a published folder has several."""
    tasks: tuple[str, ...] = ()
    """Task names or `suite/name` keys; empty takes all tasks of the suite."""
    protocol: str = "tiny"
    """How it is evaluated: `tiny` or the name of a published protocol that the suite has."""
    states: int = 25
    """Held-out initial states per task."""
    repeats: int = 1
    """Episodes per task and held-out initial state; where decoding draws no noise, one: it would repeat itself."""
    decoding: Literal["protocol", "sampled", "zero-noise"] = "protocol"
    """`protocol` is what that says."""
    seed: int = 0
    workers: int = 2
    """Simulator processes; changes the speed, never the rows."""
    slots: int = 16
    """Episodes in flight, decoded as one batch."""
    device: str = "cpu"
    """Where the policy computes: `cpu`, `cuda`, or one GPU such as `cuda:1`."""
    video: bool = False

    def __post_init__(self) -> None:
        read(EvalConfig, dataclasses.asdict(self), "config")
        _check_common(self)
        for name in ("states", "repeats"):
            _at_least(1, name, getattr(self, name))

    def check_protocol(self, protocol: Protocol) -> None:
        """Raises BenchError if more held-out states are asked for than the protocol has."""
        if self.states > len(protocol.eval_states):
            raise BenchError(f"states: {self.states}; {protocol.label} holds out {len(protocol.eval_states)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data: dict[str, Any] = _listed(dataclasses.asdict(self))
        return data


def check_settings(settings: Any) -> None:
    """Checks the types of an algorithm's settings and, through their own `check()` if there is one, their ranges."""
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise BenchError(f"settings: {settings!r}; it must be the algorithm's Settings")
    read(type(settings), dataclasses.asdict(settings), "algo")
    if hasattr(settings, "check"):
        settings.check()


def select_tasks(suite: Suite, wanted: tuple[str, ...], count: int, field: str = "tasks") -> tuple[Task, ...]:
    """The wanted tasks (names, where they are unique in the suite, or keys) in the suite's order; if none, the first
    `count`. `field` is what the user gave them as.

    Raises:
        BenchError: for a name that the suite lacks or has twice.
    """
    tasks = suite.tasks
    if not wanted:
        return tasks[:count]
    chosen = set()
    for word in wanted:
        matches = [task for task in tasks if word in (task.key, task.name)]
        if not matches:
            near = registry.did_you_mean(word, [t.key if "/" in word else t.name for t in tasks]).split("known:")[0]
            where = f"suite {suite.name!r}; {near}`vlarl-bench list --json` shows all"
            raise BenchError(f"{field}: {word!r} is not in {where}")
        if len(matches) > 1:
            raise BenchError(f"{field}: {word!r} names {len(matches)} tasks; write {matches[0].key!r}")
        chosen.add(matches[0])
    return tuple(task for task in tasks if task in chosen)


def added(default: Any, before: Any) -> Any:
    """A field of an algorithm's settings that came later: runs whose configuration lacks it did as with `before`."""
    return dataclasses.field(default=default, metadata={"before": before})


def settings_before(algorithm: str) -> dict[str, Any]:
    """Of an algorithm's settings those that were `added`, and what runs without them did; none of an algorithm that is
    not here, such as another group's."""
    if algorithm not in registry.names("algorithm"):
        return {}
    fields = dataclasses.fields(registry.get("algorithm", algorithm).Settings)
    return {f.name: f.metadata["before"] for f in fields if "before" in f.metadata}


def read(annotation: Any, value: Any, where: str) -> Any:
    """Checks a JSON-like value against a type and returns it in that type; dataclasses come back as dicts of fields.

    Raises:
        BenchError: naming the field (`where`), the value and what would be right.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is typing.Annotated:
        return read(args[0], value, where)
    if dataclasses.is_dataclass(annotation):
        return _read_fields(annotation, value, where)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise BenchError(f"{where}: {value!r}; it must be one of {', '.join(map(repr, args))}")
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and args[1] is types.NoneType:
        return None if value is None else read(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BenchError(f"{where}: {value!r}; it must be a list")
        kinds = (args[0],) * len(value) if args[1:] == (Ellipsis,) else args
        if len(kinds) != len(value):
            raise BenchError(f"{where}: {value!r}; it must have {len(kinds)} entries")
        return tuple(read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if annotation is float and type(value) in (int, float):
        if not -sys.float_info.max <= value <= sys.float_info.max:  # an integer, too, that no float can hold
            raise BenchError(f"{where}: {value!r:.80}; it must be finite")
        return float(value)
    if annotation in (bool, int, float, str):
        if type(value) is not annotation:
            raise BenchError(f"{where}: {value!r}; it must be {_WORDS[annotation]}")
        return value
    raise TypeError(f"{where}: settings cannot have the type {annotation!r}")


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def _read_fields(kind: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BenchError(f"{where}: {value!r}; it must be a table of {kind.__name__} fields")
    hints = _hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for name in value:
        if name not in known:
            raise BenchError(f"{where}.{name}: unknown field; {registry.did_you_mean(str(name), known)}")
    for name in known:
        if name not in value:
            raise BenchError(f"{where}.{name}: missing; the file is incomplete or of another version")
    return {name: read(hints[name], value[name], f"{where}.{name}") for name in known}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)  # slow, and a sweep asks for each of its rows


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _check_common(config: RunConfig | EvalConfig) -> None:
    for name in ("suite", "policy", "out", "base", "protocol"):
        if not getattr(config, name):
            raise BenchError(f"{name}: ''; it must not be empty")
    check_range("seed", config.seed, 0, 2**31 - 1)
    check_range("workers", config.workers, 1, MOST_WORKERS)
    check_range("slots", config.slots, 1, MOST_SLOTS)
    check_device(config.device)
    for i, task in enumerate(config.tasks):
        if not task or task in config.tasks[:i]:
            raise BenchError(f"tasks: {task!r}; names must be distinct and not empty")


def check_range(where: str, value: int, least: int, most: int) -> None:
    """Raises BenchError unless least <= value <= most."""
    if not least <= value <= most:
        raise BenchError(f"{where}: {value}; it must be in [{least}, {most}]")


def _at_least(least: int, where: str, value: int) -> None:
    if value < least:
        raise BenchError(f"{where}: {value}; it must be at least {least}")


MOST_WORKERS, MOST_SLOTS, MOST_PROCESSES = 256, 4096, 1024
"""Beyond these a typing error is likelier than a machine that can do it."""

BUDGETS = {
    "smoke": Budget(
        tasks=1,
        iterations=1,
        episodes=4,
        eval_states=2,
        eval_repeats=1,
        demos=2,
        gradient_steps=10,
        batch_size=32,
    ),
    "quick": Budget(
        tasks=3,
        iterations=6,
        episodes=72,
        eval_states=25,
        eval_repeats=2,
        demos=25,
        gradient_steps=2000,
        batch_size=256,
    ),
    "standard": Budget(
        tasks=10,
        iterations=60,
        episodes=120,
        eval_states=25,
        eval_repeats=4,
        demos=25,
        gradient_steps=20000,
        batch_size=256,
    ),
}
