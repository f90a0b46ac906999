"""Where numbers come from: versions, machine, code, and the manifest that a run leaves beside its rows."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .protocol import Protocol


@functools.cache
def _fingerprint() -> dict[str, str]:
    def version(distribution: str) -> str:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    # Several distributions install an import package `libero`, with different assets.
    owners = sorted(set(importlib.metadata.packages_distributions().get("libero", [])))
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "mujoco", "numpy")},
        "libero": ", ".join(f"{owner} {version(owner)}" for owner in owners) or "absent",
        "cpu": _cpu_model(),
        "os": platform.platform(),
    }


_gpu: dict[str, str] = {}


def compute_on(gpu: str) -> None:
    """Has the fingerprint of this process name the GPU that it computes on; none if empty."""
    _gpu.clear()
    _gpu.update({"gpu": gpu} if gpu else {})


def fingerprint() -> dict[str, str]:
    """What besides the code may change a number: versions, renderer (MUJOCO_GL), CPU, operating system, and GPU where
    one is used."""
    return {**_fingerprint(), "MUJOCO_GL": os.environ.get("MUJOCO_GL", "unset"), **_gpu}


def fingerprint_hash(values: Mapping[str, str] | None = None) -> str:
    """First 12 hex digits of the SHA-256 of a fingerprint; of this machine's when none is given."""
    text = json.dumps(dict(fingerprint() if values is None else values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def code_version() -> str:
    """Package version; in a checkout also the commit, and `.dirty` if tracked files differ: `0.1.0+gd9188b8.dirty`;
    `+unknown` where git does not tell."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return __version__
        dirty = ".dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"{__version__}+g{git('rev-parse', '--short=12', 'HEAD')}{dirty}"
    except (OSError, subprocess.SubprocessError):
        return f"{__version__}+unknown" if (root / ".git").exists() else __version__


def make_manifest(
    *,
    run: str,
    argv: Sequence[str],
    algorithm: str,
    policy: str,
    suite: str,
    seed: int,
    base_checkpoint: str,
    protocol: Protocol,
    tasks: Sequence[str],
    suite_tasks: int,
    init_states: Sequence[int],
    repeats: int,
    noiseless: bool = False,
    base_from: str = "",
    demonstrations: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `manifest.json`: where a run came from, and which evaluation episodes it owes.

    tasks are `suite/task` keys; suite_tasks is how many tasks the whole suite has; each of base and final evaluation
    plays tasks x init_states x repeats episodes and, if noiseless, tasks x init_states without noise besides; reports
    mark those that are missing; base_from names the run whose base episodes were taken over, if any were.
    demonstrations says what the run learned from (`demonstrations.describe_demonstrations`), where it learned from any;
    trained says of an evaluated policy how it came from another one (`Plan.trained`), where it did.
    """
    learned_from = {} if demonstrations is None else {"demonstrations": dict(demonstrations)}
    learned_from |= {} if trained is None else {"trained": dict(trained)}
    return {
        "run": run,
        "argv": list(argv),
        "algorithm": algorithm,
        "policy": policy,
        "suite": suite,
        "seed": seed,
        "base_checkpoint": base_checkpoint,
        "protocol": {**dataclasses.asdict(protocol), "hash": protocol.hash, "label": protocol.label},
        "evaluation": {
            "tasks": list(tasks),
            "suite_tasks": suite_tasks,
            "init_states": list(init_states),
            "repeats": repeats,
            "noiseless": noiseless,
            **({"base_from": base_from} if base_from else {}),
        },
        **learned_from,
        "code": code_version(),
        "fingerprint": {**fingerprint(), "hash": fingerprint_hash()},
    }
