"""Putting finished runs into a pack: `vlarl-bench pack`."""

import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import BenchError
from ..files import sole_writer
from ..records import read_metrics
from .pack import PACK, Entry, make_entry, meant, read_pack, write_pack
from .runs import read_run


def pack(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Adds the runs of run folders and packs to the pack `out`; returns and raises what `add` does."""
    return add([entry for path in dict.fromkeys(map(Path, paths)) for entry in read_entries(path)], out)


def add(entries: Iterable[Entry], out: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Adds runs to the pack `out`, which is made if need be: all of them or, on an error, none.

    Returns how many were added, how many were there already, and the size in bytes. Raises BenchError for a run whose
    name is taken by one with other content.
    """
    out = Path(out)
    if out.exists() and not (out / PACK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise BenchError(f"out: {out} is there and no pack; name a folder that does not exist yet, or a pack to add to")
    with sole_writer(out):
        before = read_pack(out) if (out / PACK).exists() else []
        packed = {entry.name: entry for entry in before}
        for entry in entries:
            known = packed.setdefault(entry.name, entry)
            differing = sorted(name for name, _ in known.sha256.items() ^ entry.sha256.items())
            if differing:
                raise BenchError(
                    f"out: {out} already has a run {entry.name} with another {differing[0]}; rename the folder of one, "
                    "or choose another --out"
                )
        size = write_pack(out, list(packed.values()))
    return len(packed) - len(before), len(before), size


def read_entries(path: Path) -> list[Entry]:
    """What a run folder, a pack or PACK/NAME holds, ready for another pack; raises BenchError for a run that is not
    finished."""
    if packed := meant(path):
        pack, names = packed
        entries = [entry for entry in read_pack(pack) if fnmatch.fnmatchcase(entry.name, names)]
        if not entries:
            raise BenchError(f"{path}: {pack} has no run of that name")
        return entries
    run = read_run(path)
    if run.torn:
        raise BenchError(f"{path}: {run.torn[0]} ends in an unfinished line; `run --resume` mends it")
    if run.missing:
        raise BenchError(
            f"{path}: not finished, {run.missing} evaluation episodes are missing; `run --resume` plays them"
        )
    metrics = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    name = path.resolve().name
    manifest = run.manifest | {"argv": _placed(run.manifest["argv"], name)}
    config = {k: _anywhere(v) if k in ("base", "demos") else v for k, v in run.config.items()} | {"out": name}
    return [make_entry(name, manifest, config, run.stopped, run.rows, metrics)]


def _placed(argv: Sequence[str], name: str) -> list[str]:
    """The command with `--out NAME`, a base policy and demonstrations by the ends of their paths, and no `--base-from`:
    where things lay on a machine is nobody's business."""
    placed, change = list(argv), {"--out": lambda _: name, "--base": _anywhere, "--demos": _anywhere}
    for i in reversed(range(len(placed))):
        if placed[i].partition("=")[0] == "--base-from":
            del placed[i : i + (1 if "=" in placed[i] else 2)]
    for i, argument in enumerate(placed):
        option, equals, value = argument.partition("=")
        if equals and option in change:
            placed[i] = f"{option}={change[option](value)}"
        elif i and placed[i - 1] in change:
            placed[i] = change[placed[i - 1]](argument)
    return placed


def _anywhere(path: str) -> str:
    """A path from the root as its last two names; others as they are."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path
