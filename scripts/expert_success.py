"""How often the scripted expert of a suite succeeds, task by task, as a markdown table.

    python scripts/expert_success.py --suite libero_goal --states 0-49 --workers 2 --out goal.md

Every episode is `demonstrate` in state mode with seed 0; nothing is rendered. The file is rewritten after each task.
"""

import argparse
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.files import write_text_atomic
from vlarl_bench.suite import Task


@dataclass(frozen=True)
class Result:
    """One task's episodes."""

    instruction: str
    states: int
    solved: int
    steps: int
    """Sum over the solved ones."""
    failed: tuple[int, ...]
    """Initial states."""


def main() -> None:
    """Reads the arguments, runs the tasks side by side, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", required=True, choices=registry.names("suite"))
    parser.add_argument("--states", default="0-49", help="initial states: 0-49, or 3, or 0-4,10 (default: 0-49)")
    parser.add_argument("--tasks", help="positions in the suite, written like --states (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes; each needs 0.5 GB")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    try:
        states = numbers("--states", arguments.states)
        tasks = registry.get("suite", arguments.suite).tasks
        if arguments.tasks:
            positions = numbers("--tasks", arguments.tasks)
            if max(positions) >= len(tasks):
                raise BenchError(f"--tasks: {max(positions)}; {arguments.suite} has 0 to {len(tasks) - 1}")
            tasks = tuple(tasks[position] for position in positions)
        if arguments.workers < 1:
            raise BenchError(f"--workers: {arguments.workers}; must be at least 1")
    except BenchError as error:
        parser.error(str(error))
    results: list[Result] = []
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for result in pool.map(partial(evaluate, states=states), tasks):
            results.append(result)
            print(row(result), flush=True)
            if arguments.out:
                write_text_atomic(arguments.out, table(results))
    print(table(results))


def evaluate(task: Task, states: tuple[int, ...]) -> Result:
    """One task from each of the initial states."""
    suite = registry.get("suite", task.suite)
    simulator = suite.open(task, suite.protocol("state"))
    try:
        shown = [suite.demonstrate(simulator, task, state, seed=0) for state in states]
    finally:
        simulator.close()
    solved = [len(episode.actions) for episode in shown if episode.success]
    failed = tuple(episode.init_state for episode in shown if not episode.success)
    return Result(task.instruction, len(states), len(solved), sum(solved), failed)


def table(results: Iterable[Result]) -> str:
    """Markdown, with a last row for all tasks together."""
    results = list(results)
    lines = ["| task | solved | steps | failed from states |", "|---|---|---|---|", *map(row, results)]
    solved, states = (sum(getattr(result, key) for result in results) for key in ("solved", "states"))
    lines.append(f"| **all {len(results)}** | **{solved}/{states} ({100 * solved / states:.1f}%)** | | |")
    return "\n".join(lines) + "\n"


def row(result: Result) -> str:
    """One task; `steps` is the mean over the solved episodes."""
    steps = round(result.steps / result.solved) if result.solved else "–"
    failed = ", ".join(map(str, result.failed))
    return f"| {result.instruction} | {result.solved}/{result.states} | {steps} | {failed} |"


def numbers(field: str, text: str) -> tuple[int, ...]:
    """`0-4,10` as (0, 1, 2, 3, 4, 10)."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise BenchError(f"{field}: {text!r}; write numbers and ranges, such as 0-4,10")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


if __name__ == "__main__":
    main()
