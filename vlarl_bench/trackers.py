"""Trackers: where a run's metrics are shown besides `metrics.jsonl`, which is always written and is what counts.

Each is an optional package, imported only when it is asked for. All show the names of `metrics.jsonl`. One that fails
is told of once and left out from then on; it never stops a run.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from . import registry
from .config import RunConfig
from .errors import BenchError, install
from .records import MetricsLog


class Tracker(Protocol):
    """What a tracker is asked to do."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows one iteration's metrics."""

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases, offline unless `WANDB_MODE` says otherwise: `wandb sync RUN/wandb/offline-run-*` uploads."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        out = Path(config.out).resolve()
        mode: Any = os.environ.get("WANDB_MODE", "offline")  # another word than wandb knows is refused there
        self._run = wandb.init(
            project="vlarl-bench",
            id=out.name[-128:],
            name=out.name,
            dir=str(out),
            config=config.to_dict(),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """`tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, config: RunConfig) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.out) / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """trackio's local database in `RUN/trackio`; `TRACKIO_DIR=RUN/trackio trackio show` opens its dashboard."""

    def __init__(self, config: RunConfig) -> None:
        out = Path(config.out).resolve()
        os.environ["TRACKIO_DIR"] = str(out / "trackio")  # read when the package is imported
        import trackio

        self._trackio = trackio
        trackio.init(project="vlarl-bench", name=out.name, config=config.to_dict(), resume="allow", embed=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, tuple[str, Callable[[RunConfig], Tracker]]] = {
    "wandb": ("wandb", Wandb),
    "tensorboard": ("tensorboard", TensorBoard),
    "trackio": ("trackio", Trackio),
}
"""Name -> the package that it needs, and how it begins."""


def check_tracker(name: str) -> None:
    """Raises BenchError unless `name` is empty or a tracker whose package is installed."""
    if not name:
        return
    if name not in TRACKERS:
        raise BenchError(f"tracker: {name!r}; {registry.did_you_mean(name, TRACKERS)}")
    if importlib.util.find_spec(TRACKERS[name][0]) is None:
        raise BenchError(f"tracker: {name!r} is not installed; {install(name)}")


class TrackedMetrics(MetricsLog):
    """A run's `metrics.jsonl` whose new lines a tracker shows, too."""

    def __init__(self, path: Path, name: str, config: RunConfig, say: Callable[[str], None]) -> None:
        super().__init__(path)
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        if name:
            self._try(lambda: self._begin(config))

    def append(self, line: Mapping[str, Any]) -> None:
        super().append(line)
        tracker = self._tracker
        if tracker is not None:
            numbers = {
                key: float(value)
                for key, value in line.items()
                if isinstance(value, int | float) and key != "iteration" and math.isfinite(value)
            }
            self._try(lambda: tracker.log(numbers, step=line["iteration"]))

    def close(self) -> None:
        super().close()
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._try(tracker.close)

    def _begin(self, config: RunConfig) -> None:
        self._tracker = TRACKERS[self._name][1](config)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a third party's, of any kind
            self._tracker = None
            first = str(error).strip().partition("\n")[0]
            self._say(f"tracker {self._name} failed and is left out; metrics.jsonl has everything: {first}")
