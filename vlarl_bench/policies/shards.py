"""Folders as others publish them: safetensors, in one file or in shards with an index. Nothing else is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BenchError
from ..files import read_json_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""How torch's own files end, which can run code when they are read."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def shards(folder: Path) -> list[Path]:
    """A network's files: one, or those that the index names. Raises BenchError for an index that names none or leaves
    the folder, and for a folder that has pickles alone."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        refuse_pickles([file for ending in PICKLES for file in sorted(folder.glob(f"*{ending}"))], single.name)
        return [single]
    names = read_json_object(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(n, str) and Path(n).name == n for n in names.values())
    ):
        raise BenchError(f"policy: {index} has no weight_map from tensors to files beside it")
    return [folder / name for name in sorted(set(names.values()))]


def refuse_pickles(pickles: Sequence[Path], name: str) -> None:
    """Raises BenchError if there are any in the place of a safetensors file `name`, saying how to make it of them."""
    if pickles:
        raise BenchError(
            f"policy: {pickles[0].parent} has no {name}; {', '.join(file.name for file in pickles)} "
            f"{'is a pickle' if len(pickles) == 1 else 'are pickles'}, never read: where you trust them, store their "
            f"tensors once with safetensors.torch.save_file(torch.load(..., weights_only=True), '{name}')"
        )


def keys_in(files: Iterable[Path]) -> dict[str, Path]:
    """Every tensor's key, and the file that it is in. Raises BenchError naming the file that cannot be read, or a key
    that two have."""
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise BenchError(f"policy: cannot read {file}: {error}") from None
        if twice := sorted(where.keys() & set(keys)):
            raise BenchError(f"policy: {where[twice[0]]} and {file.name} both have {twice[0]}")
        where |= dict.fromkeys(keys, file)
    return where


def keys_without(prefix: str, keys: Iterable[str]) -> dict[str, str]:
    """Each key by what it is without the prefix, which some have before all of their keys and some before none. Raises
    BenchError if two come to the same, which one of them would silently win."""
    found: dict[str, str] = {}
    for key in sorted(keys):
        if other := found.get(key.removeprefix(prefix)):
            raise BenchError(f"policy: the checkpoint has {key.removeprefix(prefix)} twice, as {other} and as {key}")
        found[key.removeprefix(prefix)] = key
    return found


def wrong_keys(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """What a checkpoint lacks, then what it has that no one knows: a phrase for each key."""
    right, there = set(expected), set(found)
    return [f"lacks {key}" for key in sorted(right - there)] + [f"has unknown {key}" for key in sorted(there - right)]


def read_tensors(files: Iterable[Path], stored: Mapping[str, str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `expected` by name (shapes and types count), each in one of `files` under its key `stored[name]`.

    All are checked before any is read; any floating type is taken, and turned into the one expected. Raises BenchError
    naming every tensor that is missing, surplus, of another shape or of no floating type.
    """
    files = list(files)
    where, wrong = keys_in(files), []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in expected.keys() & stored.keys():
                if where[stored[name]] == file:
                    view = opened.get_slice(stored[name])
                    kind, shape = view.get_dtype(), list(view.get_shape())
                    right = DTYPES[expected[name].dtype]
                    if kind not in DTYPES.values() or shape != list(expected[name].shape):
                        wrong.append(f"{name} is {kind} {shape}, should be {right} {list(expected[name].shape)}")
    problems = wrong_keys(expected, stored) + sorted(wrong)
    if problems:
        named = ", ".join(file.name for file in files)
        raise BenchError(f"policy: {named} in {files[0].parent}: {'; '.join(problems)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name, tensor in expected.items():
                if where[stored[name]] == file:
                    tensors[name] = opened.get_tensor(stored[name]).to(tensor.dtype)
    return tensors


def pick_statistics(stats: Any, unnorm_key: str | None) -> Mapping[str, Any]:
    """The statistics of one dataset. Raises BenchError that lists what there is."""
    if not isinstance(stats, dict) or not stats:
        raise BenchError("norm_stats: neither dataset_statistics.json nor config.json has any")
    there = ", ".join(sorted(stats))
    if unnorm_key is None and len(stats) > 1:
        raise BenchError(f"unnorm_key: the checkpoint was trained on several datasets; choose one of {there}")
    keys = list(stats) if unnorm_key is None else [unnorm_key, f"{unnorm_key}_no_noops"]
    for key in keys:
        if key in stats:
            chosen: Mapping[str, Any] = stats[key]
            return chosen
    raise BenchError(f"unnorm_key: {unnorm_key!r}; the checkpoint has {there}")
