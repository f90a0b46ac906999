"""Progress of a run: a live bar in a terminal, plain lines when piped. Written to stderr; stdout is for results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

PLAIN_EVERY = 5.0
"""Seconds between two plain lines."""


class Progress:
    """Shows one phase at a time.

    >>> with Progress() as progress, progress.phase("base evaluation", total=150) as phase:
    ...     phase.advance(episodes=1, successes=1, steps=120)
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._bars: Bars | None = None

    def __enter__(self) -> Progress:
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                console=Console(file=self._stream),
                refresh_per_second=4,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, text: str) -> None:
        """Prints one lasting line, above the bar if there is one."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"{text}\n", end="", file=self._stream, flush=True)  # in one piece: threads of a sweep tell, too

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "episodes") -> Iterator[Phase]:
        """One stretch of work of `total` units; leaves one line behind when it is done, none when it fails."""
        phase = Phase(name, total, unit, self._clock)
        bar: Any = None
        if self._bars is not None:
            bar = self._bars.add_task(name, total=total, status="")
        else:
            self.say(f"{name}: {total} {unit}")
        last = self._clock()

        def show() -> None:
            nonlocal last
            if self._bars is not None:
                self._bars.update(bar, completed=phase.done, status=phase.status())
            elif self._clock() - last >= PLAIN_EVERY and phase.done < total:
                last = self._clock()
                self.say(f"{name}: {phase.status()}")

        phase._show = show
        try:
            yield phase
        finally:
            if self._bars is not None:
                self._bars.remove_task(bar)
        self.say(f"{name}: {phase.summary()}")


class Phase:
    """Counters of one phase; `done`, `successes` and `steps` are totals so far."""

    def __init__(self, name: str, total: int, unit: str, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.successes = self.steps = 0
        self._note = ""
        self._clock = clock
        self._start = clock()
        self._show: Callable[[], None] = lambda: None

    def advance(self, episodes: int = 0, successes: int = 0, steps: int = 0, note: str = "") -> None:
        """Adds finished units (`episodes`, or whatever the phase's unit is), successes among them and environment
        steps; `note` (say, the loss) stays until the next one."""
        self.done += episodes
        self.successes += successes
        self.steps += steps
        self._note = note or self._note
        self._show()

    def status(self) -> str:
        """`35/150 episodes · success 43% · 820 env steps/s · 1:23 left`."""
        left = self._elapsed() / self.done * (self.total - self.done) if self.done else None
        parts = [f"{self.done}/{self.total} {self.unit}", *self._rates()]
        return " · ".join([*parts, f"{_clock_time(left)} left" if left is not None else "estimating"])

    def summary(self) -> str:
        """The line that stays: what was done, how it went, how long it took."""
        return " · ".join([f"{self.done} {self.unit}", *self._rates(), f"took {_clock_time(self._elapsed())}"])

    def _elapsed(self) -> float:
        return max(self._clock() - self._start, 1e-9)

    def _rates(self) -> list[str]:
        parts = []
        if self.unit == "episodes":
            if self.done:
                parts.append(f"success {self.successes / self.done:.0%}")
            parts.append(f"{self.steps / self._elapsed():.0f} env steps/s")
        elif self.done:
            parts.append(f"{self.done / self._elapsed():.1f} {self.unit}/s")
        return [*parts, self._note] if self._note else parts


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
