"""Choosing settings: the same number of trials for every method, on one suite, on training states only.

A trial is an ordinary run under the protocol `tuning`, which learns from some training states and is judged on others;
the states that tables are made from are never seen. The first trial has the defaults, the others are drawn from the
values that the method names (`Algorithm.search`). All trials stay on disk, failures too.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import registry
from .config import RunConfig
from .errors import BenchError
from .records import write_text_atomic
from .sealed import read_sealed

if TYPE_CHECKING:
    from .options import Tune

SUITE = "libero_object"
"""The declared tuning suite. Tasks of it are also compared on, from other initial states."""


def choices(algorithm: str, trials: int, seed: int) -> list[Any]:
    """Settings of each trial: the defaults, then distinct others, the same for the same arguments.

    Raises:
        BenchError: if the method names no values, or fewer combinations than trials.
    """
    method = registry.get("algorithm", algorithm)
    if not method.search:
        raise BenchError(f"algo: {algorithm!r} names no settings to search")
    default = method.Settings()
    names = tuple(method.search)
    grid = [
        dataclasses.replace(default, **dict(zip(names, v, strict=True)))
        for v in itertools.product(*method.search.values())
    ]
    others = [settings for settings in grid if settings != default]
    if not 1 <= trials <= len(others) + 1:
        raise BenchError(f"trials: {trials}; {algorithm!r} has {len(others) + 1} combinations of {', '.join(names)}")
    order = np.random.default_rng(seed).permutation(len(others))
    return [default, *(others[i] for i in order[: trials - 1])]


def tune(asked: Tune) -> Path:
    """Runs the trials that are missing, prints a table of all and the options of the best; returns their folder."""
    from .run import run

    folder = Path(asked.out) / f"{asked.algo}-{asked.policy}-{asked.suite}"
    for number, settings in enumerate(choices(asked.algo, asked.trials, asked.seed)):
        trial = folder / f"trial{number:02d}"
        config = RunConfig(
            algorithm=asked.algo,
            suite=asked.suite,
            policy=asked.policy,
            budget=asked.numbers,
            settings=settings,
            out=str(trial),
            base=asked.base,
            protocol="tuning",
            seed=asked.seed,
            workers=asked.workers,
            video=False,
        )
        begun = (trial / "config.json").is_file()
        if begun and _elsewhere(trial, config) != config:
            raise BenchError(f"out: {trial} holds a trial of other settings; choose another folder with --out")
        if not (trial / "policy" / "config.json").is_file():
            run(config, resume=begun)
    text = report(folder, asked.trials)
    write_text_atomic(folder / "trials.md", text)
    print(text)
    return folder


def _elsewhere(trial: Path, config: RunConfig) -> RunConfig:
    """What a trial's folder holds, as if it had been started from here with so many workers."""
    stored = RunConfig.from_dict(read_sealed(trial / "config.json", older=True))
    return dataclasses.replace(stored, out=config.out, workers=config.workers)


def report(folder: Path, trials: int) -> str:
    """Markdown table of all trials, from their rows, and the options of the best: most held-back successes, and of
    equals the earliest."""
    from .report.runs import read_run

    runs = [read_run(folder / f"trial{number:02d}") for number in range(trials)]
    names = registry.get("algorithm", runs[0].manifest["algorithm"]).search
    lines, scores = [], []
    for number, found in enumerate(runs):
        base, after = (f"{sum(row.success for row in rows)}/{len(rows)}" for rows in (found.base, found.evaluated))
        scores.append(sum(row.success for row in found.evaluated))
        spent = found.evaluated[0]
        values = [f"{found.config['settings'][name]:g}" for name in names]
        remark = f"stopped in round {found.stopped['iteration']}" if found.stopped else ""
        cells = (str(number), *values, base, after, f"{spent.gradient_steps}", f"{spent.flops / 1e12:.1f}", remark)
        lines.append("| " + " | ".join(cells) + " |")
    best = int(np.argmax(scores))
    chosen = " ".join(f"--algo.{name.replace('_', '-')} {runs[best].config['settings'][name]:g}" for name in names)
    head = ("trial", *names, "before", "after", "gradient steps", "TFLOP", "")
    first = runs[0]
    return "\n".join([
        f"{trials} trials of {first.manifest['algorithm']} on {first.manifest['policy']}, {first.manifest['suite']}, "
        f"protocol {first.manifest['protocol']['label']}, seed {first.manifest['seed']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *lines,
        "",
        f"Best: trial {best}: `{chosen}`",
        "",
    ])  # fmt: skip
