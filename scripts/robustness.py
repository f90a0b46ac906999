"""Evaluates what finished runs fine-tuned, and what they began with, on perturbed versions of the tasks they learned.

    python scripts/robustness.py runs/quick/runs/fpo-* --out runs/robustness
    vlarl-bench table runs/robustness/* --layout paper

One `vlarl-bench eval` for each policy and suite, and one of the base policy for each seed and suite. Called again it
goes on: what is finished is left alone, what was interrupted is played again. Needs the runs' `policy` folders,
so no packs, and perturbed suites that call their tasks as the original does, as LIBERO-PRO's do.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.report.runs import RunFolder, read_run

KINDS = ("language", "object", "swap", "task")
"""What LIBERO-PRO changes: wording, looks, places, goal."""


def evaluations(run: RunFolder, suites: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and options of each evaluation of a run's policies; runs of one seed share those of their base policy."""
    tasks = ",".join(sorted(key.split("/", 1)[1] for key in run.manifest["evaluation"]["tasks"]))
    for suite in suites:
        shared = ["--suite", suite, "--policy", run.manifest["policy"], "--tasks", tasks]
        shared += ["--seed", str(run.manifest["seed"]), "--protocol", run.config["protocol"]]
        before = f"{suite}-{run.manifest['policy']}-{run.start}-seed{run.manifest['seed']}"
        yield before, [*shared, "--base", run.config["base"]]
        yield f"{suite}-{run.folder.name}", [*shared, "--base", str(run.folder / "policy")]


def main(arguments: list[str]) -> int:
    """Plays what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; those without a final policy are passed over")
    parser.add_argument("--out", required=True, help="folder of the evaluations")
    parser.add_argument("--suites", default=",".join(f"libero_pro_object_{kind}" for kind in KINDS))
    parser.add_argument("--states", default="25", help="held-out initial states of each task")
    parser.add_argument("--workers", default="2", help="simulator processes")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in options.runs if (Path(folder) / "policy").is_dir()]
    except BenchError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"runs: {', '.join(options.runs)}: none has a policy folder; name finished run folders")
    planned = dict(one for run in runs for one in evaluations(run, options.suites.split(",")))
    for i, (name, command) in enumerate(planned.items(), 1):
        out = Path(options.out) / name
        if (out / "table.md").is_file():
            continue
        print(f"{i} of {len(planned)}: {name}", flush=True)
        if (out / "config.json").is_file():  # an evaluation that was interrupted
            shutil.rmtree(out)
        more = ["--states", options.states, "--workers", options.workers, "--out", str(out)]
        if status := cli.main(["eval", *command, *more]):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
