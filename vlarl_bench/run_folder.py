"""A run's folder as the run writes it: claimed by its configuration, described by its manifest, closed by its policy.

What reads such folders is `report/runs.py`; rows are `records.py`, checkpoints `checkpoint.py`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EvalConfig, RunConfig
from .distributed import from_first, rank
from .errors import BenchError
from .files import explained
from .plan import Plan, Spent
from .provenance import code_version, make_manifest
from .sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from .policies.base import Policy


@contextmanager
def claimed(config: RunConfig | EvalConfig, resume: bool) -> Iterator[Path]:
    """The run folder, claimed by its config.json before anything that takes long, so that a bad name is told at once
    and no two processes share one. A run that ends before its manifest is there gives the folder back."""
    out = Path(config.out)
    if resume:
        if not (out / "config.json").is_file():
            raise BenchError(f"resume: {out} is not a run folder; it has no config.json")
        yield out
        return
    again = f", or continue that run with --resume {out}" if isinstance(config, RunConfig) else ""
    with explained(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BenchError(f"out: {out} exists; choose another folder{again}")
        out.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(out / "config.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise BenchError(f"out: {out} was just taken by another process; choose another folder") from None
    try:
        write_sealed(out / "config.json", config.to_dict())
        yield out
    except BaseException:
        if not (out / "manifest.json").exists():
            with suppress(OSError):
                (out / "config.json").unlink()
                out.rmdir()
        raise


def as_begun(plan: Plan, out: Path) -> Plan:
    """The plan of a run that goes on: it plays what its manifest owes, also where code of now would play otherwise."""
    owed = None
    if rank() == 0 and (out / "manifest.json").exists():
        owed = read_sealed(out / "manifest.json", older=True)["evaluation"]
    owed = from_first(owed)
    if owed is None:
        return plan
    return dataclasses.replace(plan, repeats=owed["repeats"], noiseless=bool(owed.get("noiseless")))


def write_manifest(
    plan: Plan, policy: Policy, out: Path, demonstrations: dict[str, Any] | None, base_from: str = ""
) -> None:
    """Writes the manifest; a resumed run keeps its own, and must still be the run that it describes. `base_from` names
    the run that the base evaluation is taken from, if it is."""
    from .policies.store import content_hash

    config = plan.config
    manifest = make_manifest(
        run=plan.name,
        argv=sys.argv[1:],
        algorithm=plan.algorithm,
        policy=config.policy,
        suite=config.suite,
        seed=config.seed,
        base_checkpoint=content_hash(policy),
        protocol=plan.protocol,
        tasks=[task.key for task in plan.tasks],
        suite_tasks=len(plan.suite.tasks),
        init_states=plan.protocol.eval_states[: plan.states],
        repeats=plan.repeats,
        noiseless=plan.noiseless,
        base_from=base_from,
        demonstrations=demonstrations,
        trained=plan.trained if isinstance(config, EvalConfig) else None,
    )
    if not (out / "manifest.json").exists():
        write_sealed(out / "manifest.json", manifest)
        return
    first = read_sealed(out / "manifest.json", older=True)
    for name, was, now in (
        ("run", first["run"], manifest["run"]),
        ("base policy", first["base_checkpoint"], manifest["base_checkpoint"]),
        ("protocol", first["protocol"]["label"], manifest["protocol"]["label"]),
        ("tasks", first["evaluation"]["tasks"], manifest["evaluation"]["tasks"]),
        ("demonstrations", *((m.get("demonstrations") or {}).get("digest") for m in (first, manifest))),
    ):
        if was != now:
            raise BenchError(
                f"resume: {out}: the {name} was {was} and is now {now}; put it back as it was, or start a new run"
            )


def save_last_policy(plan: Plan, policy: Policy, out: Path, spent: Spent) -> None:
    """Writes the policy that was judged last, with a card that says where it comes from and what it saw."""
    from .policies.store import save_policy
    from .report.runs import read_run

    run = read_run(out)
    card = {
        "tasks": [task.key for task in plan.tasks],
        "made_by": shlex.join(["vlarl-bench", *read_sealed(out / "manifest.json", older=True)["argv"]]),
        "algorithm": plan.algorithm,
        "protocol": plan.protocol.hash,
        "train_states": sorted({*plan.protocol.train_states, *plan.learned_from()}),
        "learned_tasks": sorted({*(task.key for task in plan.tasks), *plan.learned_tasks()}),
        "code": code_version(),
        "spent": spent,
        "trained": {"base_checkpoint": run.start, "seed": run.manifest["seed"], "settings": run.settings()},
    }
    save_policy(out / "policy", policy, card)
