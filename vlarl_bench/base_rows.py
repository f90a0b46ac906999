"""Base evaluations that another run has played: cells of a sweep share policy, episodes and noise, and so their scores.

On one machine with one code a row is a function of policy, task, initial state, seed and decoding, so to play it again
would be to write it again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError
from .provenance import code_version, fingerprint_hash
from .records import read_rows
from .sealed import read_sealed

if TYPE_CHECKING:
    from .plan import Plan
    from .records import EpisodeRow

SAME = ("policy", "suite", "seed", "lora", "slots", "threads", "device")
"""What two runs must have been asked alike for their base rows to be the same, beyond what rows say."""


def played_by_another(plan: Plan, checkpoint: str, folder: Path) -> tuple[str, list[EpisodeRow]]:
    """Name of a run in `folder` that has played all of this plan's base evaluation, with the base policy of hash
    `checkpoint`, on this code and machine; and its rows as this run would have written them. Nothing if there is none,
    or if the code is not a commit's. Raises BenchError if there is no such folder."""
    if not folder.is_dir():
        raise BenchError(f"base_from: {str(folder)!r}; there is no such folder")
    code = code_version()
    if "+g" not in code or code.endswith(".dirty"):
        return "", []
    mine = plan.config.to_dict()
    for run in sorted(folder.iterdir()):
        if run.name == plan.name or not (run / "episodes.jsonl").is_file():
            continue
        try:
            theirs = read_sealed(run / "config.json", older=True)
            rows = read_rows(run / "episodes.jsonl") if all(theirs.get(name) == mine[name] for name in SAME) else []
        except BenchError:  # damaged, or just being made: this run can do without it
            continue
        played = {
            (row.suite, row.task, row.init_state, row.repeat, row.seed, row.decoding): row
            for row in rows
            if row.phase == "base"
            and (row.checkpoint, row.protocol, row.fingerprint, row.code)
            == (checkpoint, plan.protocol.hash, fingerprint_hash(), code)
        }
        wanted = [
            (job.task.suite, job.task.name, job.init_state, job.repeat, job.seed, decoding)
            for decoding in plan.decodings
            for job in plan.eval_jobs(decoding)
        ]
        if wanted and all(key in played for key in wanted):
            mine_too = (played[key] for key in wanted)
            return run.name, [dataclasses.replace(row, run=plan.name, algorithm=plan.algorithm) for row in mine_too]
    return "", []
