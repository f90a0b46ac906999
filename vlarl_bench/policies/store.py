"""A policy as a folder: config.json, model.safetensors, hashes.json (SHA-256 of both) and README.md, the model card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..errors import BenchError
from ..files import explain_oserror
from .adapt import merged_state
from .base import Policy
from .shards import wrong_keys

CONFIG, WEIGHTS, HASHES, CARD = "config.json", "model.safetensors", "hashes.json", "README.md"
LONGEST = 200
"""Characters of what a card says of one thing; what is longer is left to config.json."""


def content_hash(policy: Policy) -> str:
    """First 12 hex digits of the SHA-256 of the configuration and of every tensor: equal means the same policy.

    Adapters count as what they make of the weights beside them, so merging them changes no hash; steering counts once
    it steers."""
    digest = hashlib.sha256(json.dumps(_config(policy), sort_keys=True, separators=(",", ":")).encode())
    for key, tensor in merged_state(policy):
        if not _counts(policy, key):
            continue
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def save_policy(folder: Path | str, policy: Policy, card: Mapping[str, Any], half: bool = False) -> None:
    """Writes a policy folder atomically, over an older policy folder if there is one.

    `card` (for example tasks, made_by, protocol) goes into config.json beside the policy's own configuration. With
    `half`, parameters are stored as float16; buffers (normalisation) keep their precision. Raises BenchError if the
    folder holds something else or cannot be written.
    """
    folder = Path(folder)
    clash = sorted(set(card) & set(_config(policy)))
    if clash:
        raise BenchError(f"card: {', '.join(clash)} belong to the policy's own configuration")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / CONFIG).is_file())):
        raise BenchError(f"folder: {folder} exists and is not a policy folder")
    halved = {key for key, _ in policy.named_parameters()} if half else set()
    tensors = {
        key: (tensor.detach().half() if key in halved else tensor.detach()).cpu().contiguous()
        for key, tensor in policy.state_dict().items()
        if _counts(policy, key)
    }
    files = {
        CONFIG: _lines({**_config(policy), **card}),
        WEIGHTS: to_safetensors(tensors),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[HASHES] = _lines(hashes)
    files[CARD] = _card(policy, card, half).encode()
    try:
        _write_folder(folder, files)
    except OSError as error:
        raise BenchError(f"folder: cannot write {explain_oserror(error, folder)}") from None


def read_policy(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's configuration and tensors, verified against its hashes before either is parsed.

    Raises BenchError naming the file that is missing, damaged or not what it claims to be.
    """
    folder = Path(folder)
    try:
        sums = (folder / HASHES).read_bytes()
        hashes = json.loads(sums)
        files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    except OSError as error:
        raise BenchError(f"policy: cannot read {error.filename}: {error.strerror}") from None
    except ValueError:
        raise BenchError(f"policy: {folder / HASHES} is not JSON") from None
    if sums != _lines(hashes):
        raise BenchError(f"policy: {folder / HASHES} is damaged: it is not as vlarl-bench writes it")
    for name, data in files.items():
        expected = hashes.get(name) if isinstance(hashes, dict) else None
        if hashlib.sha256(data).hexdigest() != expected:
            raise BenchError(f"policy: {folder / name} is damaged, or {folder / HASHES}: their SHA-256 differ")
    try:
        config = json.loads(files[CONFIG])
        tensors = parse_safetensors(files[WEIGHTS])
    except ValueError:
        raise BenchError(f"policy: {folder / CONFIG} is not JSON") from None
    except SafetensorError as error:
        raise BenchError(f"policy: {folder / WEIGHTS} is not a safetensors file: {error}") from None
    if not isinstance(config, dict):
        raise BenchError(f"policy: {folder / CONFIG} is not a JSON object")
    return config, tensors


def _lines(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def load_weights(policy: Policy, tensors: Mapping[str, Tensor], folder: Path | str) -> None:
    """Puts tensors (float16 or float32) into a policy that must have exactly these keys and shapes. Raises BenchError
    naming every tensor that is missing, surplus or of another shape or type."""
    own, file = policy.state_dict(), Path(folder) / WEIGHTS
    problems = wrong_keys(own, tensors)
    for key in sorted(own.keys() & tensors.keys()):
        tensor, right = tensors[key], own[key]
        if tensor.shape != right.shape or tensor.dtype not in (right.dtype, torch.float16):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            problems.append(f"{key} is {found}, should be {right.dtype} {list(right.shape)}")
    if problems:
        raise BenchError(f"policy: {file}: {'; '.join(problems)}; is it another policy's file?")
    policy.load_state_dict(dict(tensors))


def _config(policy: Policy) -> dict[str, Any]:
    """The policy's configuration, with its steering once that steers."""
    if policy.steering is None or not policy.steering.ready:
        return policy.config
    return {**policy.config, "steering": policy.steering.config}


def _counts(policy: Policy, key: str) -> bool:
    """Whether a tensor is part of the policy: all but those of steering that does not steer yet."""
    return policy.steered or not key.startswith("steering.")


def _card(policy: Policy, card: Mapping[str, Any], half: bool) -> str:
    size = sum(p.numel() for p in policy.parameters())
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in policy.parameters()})
    stored = "float16" if half else " and ".join(kinds)
    lines = [
        f"# {policy.config['policy']}",
        "",
        f"{size:,} parameters, stored as {stored}.",
        "",
    ]
    longer = []
    for key, value in card.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if isinstance(value, Mapping) or len(text) > LONGEST:
            longer.append(key)
        else:
            lines.append(f"- {key}: {text}")
    if longer:
        lines.append(f"- in {CONFIG} as well: {', '.join(longer)}")
    return "\n".join(lines) + "\n"


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        fresh.mkdir()
        for name, data in files.items():
            with open(fresh / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(fresh, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
