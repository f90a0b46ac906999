"""Success rates that others published: copied, never measured, and never mixed with what was."""

import math
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import BenchError
from ..files import explained


@dataclass(frozen=True)
class Published:
    """One method of one paper. Scores are per cent, by suite."""

    method: str
    kind: Literal["SFT", "RL"]
    base_policy: str
    protocol: str
    source: str
    scores: dict[str, float]
    printed_average: float | None = None
    episodes: int | None = None
    """Of each score, where the source states them."""
    algorithm: str = ""
    """The algorithm here that implements its method; empty where none does."""
    where: str = field(default="", compare=False)
    """File and number of the entry, for messages."""

    @property
    def average(self) -> float:
        """Recomputed from the scores."""
        return sum(self.scores.values()) / len(self.scores)


_TEXTS = ("method", "kind", "base_policy", "protocol", "source")


def read_published(folder: str | os.PathLike[str]) -> list[Published]:
    """All entries of all `*.toml` files of a folder, or of one file; raises BenchError with file, entry and field."""
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.toml"))
    if not files:
        raise BenchError(f"published: {folder} has no .toml file")
    return [entry for file in files for entry in _read(file)]


def _read(file: Path) -> list[Published]:
    with explained(file):
        text = file.read_text(encoding="utf-8")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BenchError(f"{file}: not valid TOML ({error})") from None
    entries = document.get("result")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BenchError(f"{file}: it must hold [[result]] entries")
    return [_entry(entry, f"{file}, result {i}") for i, entry in enumerate(entries, 1)]


def _entry(entry: dict[str, Any], where: str) -> Published:
    unknown = entry.keys() - {*_TEXTS, "scores", "printed_average", "episodes", "algorithm"}
    if unknown:
        raise BenchError(f"{where}: {', '.join(sorted(unknown))} is unknown")
    for name in _TEXTS:
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise BenchError(f"{where}: {name} is {entry.get(name)!r}; it must be a text that is not empty")
    if entry["kind"] not in ("SFT", "RL"):
        raise BenchError(f"{where}: kind is {entry['kind']!r}; it must be 'SFT' or 'RL'")
    scores = entry.get("scores")
    if not isinstance(scores, dict) or not scores or not all(_number(score) for score in scores.values()):
        raise BenchError(f"{where}: scores is {scores!r}; it must give a number for each suite")
    if not _number(entry.get("printed_average", 0)):
        raise BenchError(f"{where}: printed_average is {entry['printed_average']!r}; it must be a number")
    episodes = entry.get("episodes")
    if episodes is not None and (type(episodes) is not int or episodes < 1):
        raise BenchError(f"{where}: episodes is {episodes!r}; it must be a whole number above 0")
    if not isinstance(entry.get("algorithm", ""), str):
        raise BenchError(f"{where}: algorithm is {entry['algorithm']!r}; it must be the name of an algorithm here")
    return Published(**entry, where=f"{where} ({entry['method']})")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
