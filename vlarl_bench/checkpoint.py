"""Checkpoints that are whole or absent: safetensors and JSON, each with its SHA-256, renamed into place when complete.

A checkpoint is a folder: `state.safetensors` (every tensor), `state.json` (everything else and where each tensor goes)
and `hashes.json`. Nothing in it can run code when it is read.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from .errors import BenchError
from .files import explained, fsync

FORMAT = "vlarl-bench checkpoint 1"
TENSORS, STATE, HASHES = "state.safetensors", "state.json", "hashes.json"


class Restored(NamedTuple):
    """What `load_latest` found."""

    iteration: int
    state: dict[Any, Any]
    problems: list[str]
    """One line for each newer checkpoint that was passed over because it is damaged."""


def save_checkpoint(
    folder: str | os.PathLike[str], iteration: int, state: dict[Any, Any], keep: int = 2, also: int | None = None
) -> Path:
    """Writes `folder/000012` for iteration 12 and removes all but the newest `keep` checkpoints and that of iteration
    `also`.

    folder is the run's `checkpoints` folder. state nests dicts (keys str or int), lists and tuples of tensors, bool,
    int, float, str and None; anything else raises TypeError. A crash at any point leaves either the old or the new
    set of whole checkpoints. Raises BenchError when the disk is full or read-only.
    """
    folder = Path(folder)
    target = folder / f"{iteration:06d}"
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps({"iteration": iteration, "state": _encode(state, "", tensors)}, allow_nan=False)
    contents = {TENSORS: save_tensors(tensors), STATE: text.encode()}
    contents[HASHES] = _seal(
        {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    )
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while saving
            shutil.rmtree(leftover)
        temporary = folder / f".{target.name}.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
                fsync(temporary / name)
            fsync(temporary)
            if target.exists():  # damaged, or written before a resume from an older one
                os.rename(target, folder / f".{target.name}.old.tmp")
            os.rename(temporary, target)
            fsync(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
            raise
        for old in [path for path in checkpoints(folder) if path != target][max(keep, 1) - 1 :]:
            if int(old.name) != also:
                shutil.rmtree(old)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
    return target


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint folders, newest first, damaged ones too."""
    if not Path(folder).is_dir():
        return []
    with explained(folder):
        return sorted((p for p in Path(folder).iterdir() if p.name.isdigit() and p.is_dir()), reverse=True)


def load_latest(folder: str | os.PathLike[str]) -> Restored | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Raises BenchError if there are checkpoints and all of them are damaged.
    """
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            iteration, state = load_checkpoint(path)
        except BenchError as error:
            problems.append(str(error))
        else:
            return Restored(iteration, state, problems)
    if problems:
        raise BenchError(f"{folder}: no checkpoint can be used: {'; '.join(problems)}; start a new run")
    return None


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[int, dict[Any, Any]]:
    """Reads one checkpoint folder; returns (iteration, state), bitwise what was saved, tensors on the CPU.

    Raises BenchError that names the file and what is wrong with it: missing, truncated, altered or foreign.
    """
    path = Path(path)
    contents: dict[str, bytes] = {}
    for name in (HASHES, STATE, TENSORS):
        with explained(path / name):
            contents[name] = (path / name).read_bytes()
    damaged = BenchError(f"{path / HASHES}: damaged, or not a checkpoint of vlarl-bench")
    try:
        seal = json.loads(contents[HASHES])
        if seal["format"] != FORMAT:
            raise BenchError(f"{path / HASHES}: format is {seal['format']!r}, expected {FORMAT!r}")
        # Its own digest first, so that a fault in the list of digests is not blamed on the files listed.
        if _seal(seal["files"]) != contents[HASHES]:
            raise damaged
        expected = {name: (seal["files"][name]["bytes"], seal["files"][name]["sha256"]) for name in (STATE, TENSORS)}
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    for name, (size, digest) in expected.items():
        if len(contents[name]) != size:
            raise BenchError(f"{path / name}: {len(contents[name])} bytes, expected {size}: truncated or replaced")
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise BenchError(f"{path / name}: content does not match its SHA-256 in {HASHES}: altered or damaged")
    document = json.loads(contents[STATE])
    return document["iteration"], _decode(document["state"], load_tensors(contents[TENSORS]))


def _seal(files: dict[str, dict[str, Any]]) -> bytes:
    """`hashes.json` for these files' sizes and digests; carries a digest of itself."""
    body = json.dumps(files, sort_keys=True)
    return json.dumps(
        {"format": FORMAT, "files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1
    ).encode()


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a value; containers and what JSON lacks become an object with one key that says what it is."""
    if isinstance(value, torch.Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        # safetensors refuses views that share memory, such as tied weights.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"checkpoint key {key!r} at {path or 'the top'}: expected str or int")
            pairs.append([key, _encode(item, f"{path}/{key}", tensors)])
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"checkpoint entry {path} is a {type(value).__name__}: expected tensors, numbers, text or nests")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}
