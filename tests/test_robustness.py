"""The script that plays many runs' policies on LIBERO-PRO: which evaluations, of which tasks."""

import runpy
from pathlib import Path

from vlarl_bench.registry import get
from vlarl_bench.report.runs import read_all

ROOT = Path(__file__).parents[1]


def test_each_suite_is_played_with_the_run_s_own_tasks_of_it_and_the_base_policy_once_a_seed():
    evaluations = runpy.run_path(str(ROOT / "scripts" / "robustness.py"))["evaluations"]
    runs = read_all([ROOT / "results" / "main"])
    planned = dict(one for run in runs for one in evaluations(run, ["swap", "task"]))
    bases = {(run.manifest["policy"], run.start, run.manifest["seed"]) for run in runs}
    assert len(planned) == 3 * 2 * (len(runs) + len(bases))
    for name, command in planned.items():
        options = dict(zip(command[::2], command[1::2], strict=True))
        assert name.startswith(f"{options['--suite']}-")
        known = {task.name for task in get("suite", options["--suite"]).tasks}
        assert len(options["--tasks"].split(",")) == 2
        assert known >= set(options["--tasks"].split(","))
