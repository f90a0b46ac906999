"""How long a report of many rows takes, and how much memory: makes runs, packs them, and times `vlarl-bench`.

    python scripts/bench_rows.py OUT                          # a million rows of 200 runs, as a pack
    python scripts/bench_rows.py OUT --rows 100000 --folders  # fewer, as run folders too

The runs are made up: 10 methods whose episodes succeed by chance on 10 tasks, a quarter of the rows base, a quarter
final and half training. OUT keeps them, and later calls read them.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vlarl_bench.files import write_json_atomic, write_text_atomic
from vlarl_bench.protocol import Protocol
from vlarl_bench.provenance import make_manifest
from vlarl_bench.records import log_line
from vlarl_bench.report.pack import PACK, make_entry, write_pack
from vlarl_bench.report.rows import Rows

TRAIN, HELD_OUT = tuple(range(25)), tuple(range(25, 50))
TASKS = tuple(f"put_the_object_{i}_into_the_basket" for i in range(10))
METHODS = 10


def made_up(name: str, method: int, n: int, protocol: Protocol, rng: np.random.Generator) -> Rows:
    """[n] rows of one run, n a multiple of 1,000."""
    repeats = n // 4 // (len(TASKS) * len(HELD_OUT))
    task, state, repeat = (
        part.ravel() for part in np.meshgrid(range(len(TASKS)), HELD_OUT, range(repeats), indexing="ij")
    )
    training = np.arange(n // 2)
    iteration = np.concatenate([0 * task, 1 + training // 100, 0 * task + training[-1] // 100 + 1])
    phase = np.repeat(["base", "train", "final"], [n // 4, n // 2, n // 4]).astype(object)
    chance = np.select([phase == "base", phase == "final"], [0.5, 0.5 + 0.03 * method], 0.5)
    steps, train = rng.integers(60, 200, n), phase == "train"
    taken = np.cumsum(steps * train)
    same = {
        "run": name, "algorithm": f"method-{method}", "policy": "pi0-tiny", "checkpoint": "0" * 12, "suite": "made_up",
        "observation": "state", "protocol": protocol.hash, "fingerprint": "f" * 12, "code": "0.1.0",
    }  # fmt: skip
    return Rows({
        **{field: np.full(n, value, dtype=object) for field, value in same.items()},
        "phase": phase,
        "iteration": iteration,
        "task": np.array(TASKS, dtype=object)[np.concatenate([task, training % len(TASKS), task])],
        "init_state": np.concatenate([state, training // 10 % len(TRAIN), state]),
        "repeat": np.concatenate([repeat, training // 250, repeat]),
        "seed": rng.integers(2**63 - 1, size=n),
        "decoding": np.where(train, "explore", "sampled").astype(object),
        "success": rng.random(n) < chance,
        "steps": steps,
        "return_": rng.random(n),
        "env_steps": taken,
        "gradient_steps": 10 * iteration,
        "flops": 10**9 * taken,
    })  # fmt: skip


def make(out: Path, n: int, runs: int, folders: bool) -> None:
    """Writes the pack `out`/pack and, if asked, run folders in `out`/runs."""
    protocol = Protocol("made-up", 1, "state", {"made_up": 200}, 10, 8, TRAIN, HELD_OUT)
    rng, entries = np.random.default_rng(0), []
    for number in range(runs):
        seed, method = divmod(number, METHODS)
        name = f"method-{method}-seed{seed}"
        rows = made_up(name, method, n // runs, protocol, rng)
        config = {"algorithm": f"method-{method}", "seed": seed, "base": "prior", "budget": {"iterations": 1}}
        manifest = make_manifest(
            run=name, argv=["run"], algorithm=f"method-{method}", policy="pi0-tiny", suite="made_up", seed=seed,
            base_checkpoint="0" * 12, protocol=protocol, tasks=[f"made_up/{task}" for task in TASKS],
            suite_tasks=len(TASKS), init_states=HELD_OUT, repeats=n // runs // 4 // 250,
        )  # fmt: skip
        entries.append(make_entry(name, manifest, config, None, rows, []))
        if folders:
            folder = out / "runs" / name
            write_json_atomic(folder / "manifest.json", manifest)
            write_json_atomic(folder / "config.json", config)
            write_text_atomic(folder / "episodes.jsonl", b"".join(log_line(row.to_json()) for row in rows).decode())
    write_pack(out / "pack", entries)


def main() -> None:
    """Prints, for each form that is there, wall time, CPU time and peak memory of the leaderboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows in all (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=200, help="runs (default: %(default)s)")
    parser.add_argument("--folders", action="store_true", help="as run folders too")
    asked = parser.parse_args()
    if asked.rows % (1000 * asked.runs) or asked.runs % METHODS:
        parser.error(f"--runs must be a multiple of {METHODS} and --rows one of 1000 times --runs")
    if not (asked.out / "pack" / PACK).exists():
        make(asked.out, asked.rows, asked.runs, asked.folders)
    for form in ("pack", "runs"):
        if not (asked.out / form).exists():
            continue
        paths = [str(asked.out / form)] if form == "pack" else sorted(map(str, (asked.out / form).iterdir()))
        command = [sys.executable, "-m", "vlarl_bench", "leaderboard", *paths, "--published", "", "--out"]
        start = time.perf_counter()
        child = subprocess.Popen([*command, str(asked.out / "site")], stdout=subprocess.PIPE, text=True)
        told = child.stdout.read().strip() if child.stdout else ""
        _, status, used = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"leaderboard: exit status {status}")
        print(
            f"{form}: {time.perf_counter() - start:.1f} s, CPU {used.ru_utime + used.ru_stime:.1f} s, "
            f"{used.ru_maxrss / 2**20:.2f} GiB: {told}"
        )


if __name__ == "__main__":
    main()
