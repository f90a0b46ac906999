"""Plots LIBERO's environment steps a second against workers and chunk length: docs/suites/speed.svg.

`MUJOCO_GL=osmesa .venv/bin/python scripts/plot_speed.py`, 1 to 3 minutes. Timed in CPU seconds of the busiest worker:
what the clock would say on a machine with a core for each. Other work on the machine matters little.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from vlarl_bench import registry
from vlarl_bench.pool import Pool
from vlarl_bench.protocol import Protocol

SUITE = registry.get("suite", "libero_object")
TASK = SUITE.tasks[0]
WORKERS = (1, 2, 4)
CHUNKS = (1, 2, 4, 8, 16)
SLOTS = 4
"""Episodes in flight, a multiple of the workers."""
SECONDS = 0.5
"""CPU time that each point is measured for, at least."""
OUT = Path(__file__).parent.parent / "docs" / "suites" / "speed.svg"
PANELS = {
    "nothing rendered (state)": SUITE.protocol("state"),
    "two 128x128 cameras, one look a chunk": dataclasses.replace(SUITE.protocol("pixels"), image_size=128),
}


def busiest() -> float:
    """CPU seconds of the worker process that had most; without workers, of this one."""
    pids = [process.pid for process in multiprocessing.active_children() if process.pid]
    clocks = [(~pid << 3) | 2 for pid in pids]  # clock_getcpuclockid(3), which Python does not have
    return max(map(time.clock_gettime, clocks), default=time.process_time())


def rate(act: Callable[[], Any], steps: int) -> float:
    """Environment steps a second of `act`, which makes `steps` of them."""
    act()
    start, done = busiest(), 0
    while busiest() - start < SECONDS or done < 2:
        act()
        done += 1
    return done * steps / (busiest() - start)


def ours(protocol: Protocol, workers: int) -> list[float]:
    """Steps a second at each chunk length."""
    actions = np.random.default_rng(0).uniform(-1, 1, (max(CHUNKS), 7))
    rates = []
    with Pool(SUITE, protocol, workers) as pool:
        for chunk in CHUNKS:
            pool.call("reset", {slot: (TASK, slot) for slot in range(SLOTS)})
            request = dict.fromkeys(range(SLOTS), actions[:chunk])
            rates.append(rate(lambda request=request: pool.call("step", request), SLOTS * chunk))  # type: ignore[misc]
    return rates


def stock(protocol: Protocol) -> float:
    """Steps a second of LIBERO's own environment in one process; it renders at every step."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    with contextlib.redirect_stdout(io.StringIO()):
        task = benchmark.get_benchmark(TASK.suite)().get_task(0)
    size = protocol.image_size
    env = ControlEnv(
        bddl_file_name=os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file),
        use_camera_obs=bool(size),
        has_offscreen_renderer=bool(size),
        camera_heights=size or 1,
        camera_widths=size or 1,
        horizon=10**9,
    )
    env.seed(0)
    env.reset()
    steps = rate(lambda: env.step(np.zeros(7)), 1)
    env.close()
    return steps


def main() -> None:
    """Measures, prints and draws."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vlarl-bench"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 4), layout="constrained")
    for axis, (title, protocol) in zip(axes, PANELS.items(), strict=True):
        baseline = stock(protocol)
        print(f"{title}: stock {baseline:.1f} steps/s", flush=True)
        axis.axhline(baseline, color="grey", linestyle="--", label="stock, one process")
        for workers, marker in zip(WORKERS, "os^", strict=True):
            rates = ours(protocol, workers)
            print(f"  {workers} workers:", *(f"{value:.0f}" for value in rates), flush=True)
            axis.plot(CHUNKS, rates, marker=marker, label=f"{workers} worker" + "s" * (workers > 1))
        axis.set_xscale("log", base=2)
        axis.set_xticks(CHUNKS, CHUNKS)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("chunk length (environment steps between two looks)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("environment steps / s, all workers")
    axes[-1].legend()
    figure.suptitle(f"LIBERO, with a core for each worker; {SLOTS} episodes in flight", fontsize=12)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None})
    print(f"wrote {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}", file=sys.stderr)


if __name__ == "__main__":
    main()
