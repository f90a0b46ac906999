"""Finds algorithms, policies and suites by name, also those of other people's packages.

A package adds one by an entry point in its `pyproject.toml`, in the group `vlarl_bench.algorithms` (an `Algorithm`
class), `vlarl_bench.policies` (a `PolicySpec`) or `vlarl_bench.suites` (a `Suite` class). Only the entry that is
asked for is imported.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, overload

from .errors import BenchError

if TYPE_CHECKING:
    from .algorithm import Algorithm
    from .policies.spec import PolicySpec
    from .suite import Suite

Kind = Literal["algorithm", "policy", "suite"]
GROUPS: dict[Kind, str] = {
    "algorithm": "vlarl_bench.algorithms",
    "policy": "vlarl_bench.policies",
    "suite": "vlarl_bench.suites",
}


def names(kind: Kind) -> tuple[str, ...]:
    """All registered names, sorted; imports nothing."""
    return tuple(sorted(_entries(kind)))


@overload
def get(kind: Literal["algorithm"], name: str) -> type[Algorithm]: ...
@overload
def get(kind: Literal["policy"], name: str) -> PolicySpec: ...
@overload
def get(kind: Literal["suite"], name: str) -> Suite: ...
def get(kind: Kind, name: str) -> Any:
    """Returns the algorithm class, the policy spec or the suite of that name.

    Raises:
        BenchError: if there is no such name (with the nearest one), if two packages claim it, if it cannot be
            imported, or if what it leads to is not what the group holds.
    """
    entries = _entries(kind)
    if name not in entries:
        raise BenchError(f"{kind}: {name!r} is not registered; {did_you_mean(name, entries)}")
    claims = entries[name]
    if len(claims) > 1:
        owners = " and ".join(_owner(entry) for entry in claims)
        raise BenchError(f"{kind}: {name!r} is claimed by {owners}; uninstall all but one of them")
    (entry,) = claims
    try:
        found = entry.load()
        if kind == "suite" and isinstance(found, type):
            found = found()
    except Exception as error:  # someone else's module may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BenchError(f"{kind}: {name!r} ({entry.value} of {_owner(entry)}) cannot be loaded; {reason}") from error
    wrong = _wrong(kind, name, found)
    if wrong:
        raise BenchError(f"{kind}: {name!r} ({entry.value} of {_owner(entry)}) {wrong}")
    return found


def check_compatible(algorithm: str, policy: str) -> None:
    """Raises BenchError unless the policy has every capability that the algorithm requires."""
    missing = get("algorithm", algorithm).requires - get("policy", policy).capabilities
    if not missing:
        return
    policies = ", ".join(name for name in names("policy") if runs_on(algorithm, name)) or "none installed"
    algorithms = ", ".join(name for name in names("algorithm") if runs_on(name, policy)) or "none installed"
    raise BenchError(
        f"policy: {policy!r} lacks {', '.join(sorted(missing))}, which algorithm {algorithm!r} requires; "
        f"{algorithm!r} runs on: {policies}; {policy!r} is trained by: {algorithms}"
    )


def runs_on(algorithm: str, policy: str) -> bool:
    """Whether the policy has every capability that the algorithm requires; False where either cannot be loaded."""
    try:
        return get("algorithm", algorithm).requires <= get("policy", policy).capabilities
    except BenchError:
        return False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? known: x, y`, with the guess only where one is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}known: {', '.join(known) or 'none'}"


@cache
def _entries(kind: Kind) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUPS[kind]):
        found.setdefault(entry.name, []).append(entry)
    return found


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed package"


def _wrong(kind: Kind, name: str, found: Any) -> str:
    """What keeps `found` from being of that kind, or the empty string."""
    if kind == "algorithm":
        from .algorithm import Algorithm

        if not (isinstance(found, type) and issubclass(found, Algorithm)):
            return "is not a subclass of vlarl_bench.algorithm.Algorithm"
        if inspect.isabstract(found):
            return f"does not define {', '.join(sorted(found.__abstractmethods__))}"
        needed: tuple[str, ...] = ("name", "summary", "requires", "learns_from", "Settings")
    elif kind == "suite":
        from .suite import Suite

        if not isinstance(found, Suite):
            return "is not a subclass of vlarl_bench.suite.Suite"
        needed = ("name", "summary", "benchmark", "action_dim", "proprio_dim", "fps", "film_camera")
    else:
        from .policies.spec import PolicySpec

        if not isinstance(found, PolicySpec):
            return "is not a vlarl_bench.policies.spec.PolicySpec"
        needed = ("name",)
    absent = [field for field in needed if not hasattr(found, field)]
    if absent:
        return f"does not define {', '.join(absent)}"
    # Rows are keyed by these names, so the two must not drift apart.
    return "" if found.name == name else f"calls itself {found.name!r}; the entry point must have the same name"
