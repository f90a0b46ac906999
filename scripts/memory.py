"""Memory of environment workers that hold every task of a suite open: `.venv/bin/python scripts/memory.py`.

RSS counts what a process shares with others in full, PSS by its share. The peak is what opening once took.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from vlarl_bench import registry
from vlarl_bench.pool import Pool

LIMITS = {"state": 4.0, "pixels": 8.0}
"""GiB for ten tasks on two workers."""


def memory(pid: int) -> dict[str, float]:
    """GiB of a live process: `Rss`, `Pss` and the highest RSS so far, `VmHWM`."""
    found = {}
    for file in ("smaps_rollup", "status"):
        with open(f"/proc/{pid}/{file}", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name in ("Rss", "Pss", "VmHWM"):
                    found[name] = int(value.split()[0]) / 2**20
    return found


def show(what: str, found: dict[str, float]) -> None:
    """One line of the table."""
    print(f"{what:44} RSS {found['Rss']:5.2f} GiB   PSS {found['Pss']:5.2f}   peak {found['VmHWM']:5.2f}", flush=True)


def workers_with_all_tasks(name: str, mode: str, workers: int) -> None:
    """Opens every task of the suite in every worker, plays a chunk of each, and reports."""
    suite = registry.get("suite", name)
    tasks = suite.tasks[:10]
    slots = {slot: tasks[slot // workers] for slot in range(len(tasks) * workers)}
    with Pool(suite, suite.protocol(mode), workers) as pool:
        pool.call("reset", {slot: (task, 0) for slot, task in slots.items()})
        pool.call("step", dict.fromkeys(slots, np.zeros((8, suite.action_dim))))
        found = [memory(process.pid) for process in multiprocessing.active_children() if process.pid]
    for index, worker in enumerate(found):
        show(f"{name}, {mode}: worker {index + 1}, {len(tasks)} tasks", worker)
    total = {key: sum(worker[key] for worker in found) for key in found[0]}
    show(f"  together (limit {LIMITS[mode]:.0f} GiB)", total)


def _stock(name: str, report: Callable[[Any], None]) -> None:
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    with contextlib.redirect_stdout(io.StringIO()):
        task = benchmark.get_benchmark(name)().get_task(0)
    env = OffScreenRenderEnv(
        bddl_file_name=os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    )
    env.reset()
    report(memory(os.getpid()))


def main() -> None:
    """Reports for one suite, both modes, and for one stock environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mode", choices=("state", "pixels"), nargs="+", default=("state", "pixels"))
    arguments = parser.parse_args()
    for mode in arguments.mode:
        workers_with_all_tasks(arguments.suite, mode, arguments.workers)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_stock, args=(arguments.suite, theirs.send))
    process.start()
    show(f"{arguments.suite}: one stock OffScreenRenderEnv", ours.recv())
    process.join()


if __name__ == "__main__":
    main()
