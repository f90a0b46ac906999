"""A sweep shown as a table: one line for cells that differ only in their seed, then what needs attention."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .report.spans import spans
from .sweep import DEFAULT, Cell, Row, Sweep
from .sweep_jobs import TO_RUN, State, Word, count, estimate, read_states

if TYPE_CHECKING:
    from rich.console import Group

ORDER: tuple[Word, ...] = ("done", "running", "queued", "failed", "interrupted", "missing", "impossible")
STYLES: dict[Word, str] = {"done": "green", "running": "cyan", "failed": "bold red", "impossible": "dim"}
MOST_LINES = 200
"""Lines of one kind that are shown; `--dry-run` and `status` of a huge sweep count the rest."""
REFRESH = 5.0
"""Seconds between two looks at the files."""


def print_plan(sweep: Sweep, states: Sequence[State]) -> None:
    """Prints the sweep as it stands."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # lines are for other programs, and are not broken
    console.print(_drawn(sweep, states))


def watch(sweep: Sweep) -> None:
    """Shows the sweep until nothing of it runs or waits; Ctrl-C leaves it alone."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            states = read_states(sweep)
            live.update(_drawn(sweep, states), refresh=True)
            if not {"running", "queued"} & {state.word for state in states}:
                return
            time.sleep(REFRESH)


def summary(states: Sequence[State]) -> str:
    """`12 cells: 3 done, 9 missing`."""
    counts = count(states)
    parts = ", ".join(f"{counts[word]} {word}" for word in ORDER if word in counts)
    return f"{len(states)} {'cell' if len(states) == 1 else 'cells'}: {parts}"


def cost(sweep: Sweep, states: Sequence[State]) -> str:
    """What is left to run, in hours, as far as finished cells tell."""
    seconds = estimate(sweep.cells, states)
    left = [c for c, s in zip(sweep.cells, states, strict=True) if s.word in (*TO_RUN, "queued")]
    if not left:
        return "nothing is left to run"
    if not seconds:
        return f"{len(left)} cells to run; their cost is unknown until one like them is done here"
    total = sum(seconds.values()) / 3600
    cpus = sum(seconds[c.name] * c.row.resources.cpus for c in left if c.name in seconds) / 3600
    gpus = sum(seconds[c.name] * c.row.resources.gpus for c in left if c.name in seconds) / 3600
    known = f"{len(seconds)} of {len(left)} cells to run" if len(seconds) < len(left) else f"{len(left)} cells to run"
    return f"{known}: about {total:.3g} h, {cpus:.3g} CPU hours, {gpus:.3g} GPU hours, by finished cells like them"


def _drawn(sweep: Sweep, states: Sequence[State]) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows: dict[int, tuple[Row, list[tuple[Cell, State]]]] = {}
    for cell, state in zip(sweep.cells, states, strict=True):
        rows.setdefault(id(cell.row), (cell.row, []))[1].append((cell, state))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("algorithm", "policy", "suite", "ablation", "seeds"):
        table.add_column(column, overflow="fold")
    for row, members in list(rows.values())[:MOST_LINES]:
        ablation = "" if row.ablation == DEFAULT else row.ablation
        seeds = Text(" · ").join(_seeds(word, members) for word in ORDER if any(s.word == word for _, s in members))
        table.add_row(Text(row.algorithm), Text(row.policy), Text(row.suite), Text(ablation), seeds)
    parts: list[Any] = [table]
    if len(rows) > MOST_LINES:
        parts.append(Text(f"... and {len(rows) - MOST_LINES} more lines"))
    parts += [Text(line) for line in _attention(sweep, states)]
    parts += [Text(summary(states), "bold"), Text(cost(sweep, states)), Text(f"folder: {sweep.out}")]
    return Group(*parts)


def _seeds(word: Word, members: Sequence[tuple[Cell, State]]) -> Any:
    from rich.text import Text

    seeds = [cell.seed for cell, state in members if state.word == word]
    return Text(f"{word} {spans(seeds)}", STYLES.get(word, ""))


def _attention(sweep: Sweep, states: Sequence[State]) -> list[str]:
    """Why cells failed, with their logs; why they cannot run; who runs them."""
    lines: list[str] = []
    for cell, state in zip(sweep.cells, states, strict=True):
        log = f"; log: {sweep.out / state.attempt.log}" if state.attempt and state.attempt.log else ""
        if state.word == "failed":
            lines.append(f"failed: {cell.name}: {state.note}{log}")
        elif state.word in ("running", "interrupted"):
            lines.append(f"{state.word}: {cell.name}: {state.note}{log}")
    names = {f"{cell.name}.json" for cell in sweep.cells}
    others = sum(path.name not in names for path in (sweep.out / "cells").glob("[!.]*.json"))
    if others:
        lines.append(f"besides: {others} cells in {sweep.out} that the file no longer names")
    reasons = {row.impossible: f"{row.algorithm} on {row.policy}, {row.suite}" for row in reversed(sweep.rows)}
    told = [f"impossible: {who}: {why}" for why, who in reversed(reasons.items()) if why]
    if len(told) > 3:  # a page of them would hide the rest; each goes on with what would be possible instead
        told = [*(line.rsplit("; ", 1)[0] for line in told), "`vlarl-bench list` shows what runs on what"]
    lines += told
    return [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else lines
