"""What `metrics.jsonl` tells reports besides the rows: a line a round of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import BenchError
from ..records import read_metrics
from .rows import Rows
from .runs import RunFolder, training_curve


def metrics_of(run: RunFolder) -> list[dict[str, Any]]:
    """The run's lines, in the order of the rounds; none where it has no such file. Raises BenchError where a value is
    no number."""
    if run.packed_metrics is not None:
        return list(run.packed_metrics)
    path = run.folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    for line in lines:
        for name, value in line.items():
            if value is not None and type(value) not in (int, float):
                raise BenchError(f"{path}: {name} of round {line['iteration']} is {value!r}; it must be a number")
    return lines


def wall_time_curve(run: RunFolder, rows: Rows) -> tuple[list[float], list[float]]:
    """Seconds of training by the end of each round, and the success rate of its episodes among `rows`, as the learner
    explored. Rounds that were not logged are left out; seconds depend on the machine and on what else it did."""
    seconds = {line["iteration"]: line["seconds"] for line in metrics_of(run) if line.get("seconds") is not None}
    rounds = np.unique(rows.column("iteration")[rows.column("phase") == "train"]).tolist()
    known = [(seconds[i], rate) for i, rate in zip(rounds, training_curve(rows)[1], strict=True) if i in seconds]
    return [float(second) for second, _ in known], [rate for _, rate in known]


def cpu_hours(runs: Sequence[RunFolder]) -> float | None:
    """CPU hours of all cores that the average run's training took; None where one of the runs does not say."""
    seconds = [lines[-1].get("cpu_seconds") if (lines := metrics_of(run)) else None for run in runs]
    told = [float(value) for value in seconds if value is not None]
    return sum(told) / len(told) / 3600 if told and len(told) == len(seconds) else None


def machines_of(runs: Sequence[RunFolder]) -> list[str]:
    """CPU models, and GPUs, that the runs were made on."""
    return sorted({machine_of(run) for run in runs})


def machine_of(run: RunFolder) -> str:
    """The CPU that a run was made on, and the GPU where its policy computed on one."""
    found = run.manifest["fingerprint"]
    return " and ".join(str(found[name]) for name in ("cpu", "gpu") if name in found) or "not known"
