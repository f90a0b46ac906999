"""Evaluates what finished runs fine-tuned, and what they began with, on perturbed versions of the tasks they learned.

    python scripts/robustness.py runs/main/runs/fpo-* --out runs/robustness
    vlarl-bench table runs/robustness/* --layout paper

One `vlarl-bench eval` for each policy and LIBERO-PRO suite made from a suite that the run has tasks of, and one of the
base policy for each seed and suite. Called again it goes on: what is finished is left alone, as is what another call is
playing, and what was interrupted is played again. Needs the runs' `policy` folders, so no packs.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlarl_bench.errors import BenchError
from vlarl_bench.files import sole_writer
from vlarl_bench.report.runs import RunFolder, read_run

KINDS = ("language", "object", "swap", "task")
"""What LIBERO-PRO changes: wording, looks, places, goal."""


def evaluations(run: RunFolder, kinds: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and options of each evaluation of a run's policies; runs of one seed share those of their base policy.
    LIBERO-PRO calls its tasks as the original suite does."""
    tasks: dict[str, list[str]] = {}
    for key in sorted(run.manifest["evaluation"]["tasks"]):
        original, name = key.split("/", 1)
        tasks.setdefault(original.replace("libero_", "libero_pro_"), []).append(name)
    for suite, names in ((f"{changed}_{kind}", names) for changed, names in tasks.items() for kind in kinds):
        shared = ["--suite", suite, "--policy", run.manifest["policy"], "--tasks", ",".join(names)]
        shared += ["--seed", str(run.manifest["seed"]), "--protocol", run.config["protocol"]]
        before = f"{suite}-{run.manifest['policy']}-{run.start}-seed{run.manifest['seed']}"
        yield before, [*shared, "--base", run.config["base"]]
        yield f"{suite}-{run.folder.name}", [*shared, "--base", str(run.folder / "policy")]


def main(arguments: list[str]) -> int:
    """Plays what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; those without a final policy are passed over")
    parser.add_argument("--out", required=True, help="folder of the evaluations")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is changed (default: all)")
    parser.add_argument("--states", default="25", help="held-out initial states of each task")
    parser.add_argument("--workers", default="2", help="simulator processes")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in options.runs if (Path(folder) / "policy").is_dir()]
    except BenchError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"runs: {', '.join(options.runs)}: none has a policy folder; name finished run folders")
    planned = dict(one for run in runs for one in evaluations(run, options.kinds))
    more = ["--states", options.states, "--workers", options.workers]
    for i, (name, command) in enumerate(planned.items(), 1):
        if status := play(Path(options.out) / name, [*command, *more], f"{i} of {len(planned)}"):
            return status
    return 0


def play(out: Path, command: list[str], number: str) -> int:
    """One evaluation, into `out`, unless it is finished or another call is playing it; returns the exit status. As it
    begins it is announced with its `number`. It has a process of its own, so that its manifest has its own command."""
    try:
        with sole_writer(out.parent / ".playing" / out.name):
            if (out / "table.md").is_file():
                return 0
            print(f"{number}: {out.name}", flush=True)
            if out.exists():  # interrupted
                shutil.rmtree(out)
            return subprocess.call([sys.executable, "-P", "-m", "vlarl_bench", "eval", *command, "--out", str(out)])
    except BenchError as error:
        print(f"passed over: {error}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:  # told by the evaluation
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
