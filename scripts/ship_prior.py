"""Puts a finished run's policy among the priors that the package ships, in half precision.

    python scripts/ship_prior.py RUN_FOLDER POLICY_NAME

The model card names the run's command, its tasks and what it scored; reproduce the prior by that command and this one.
"""

import argparse
import shlex
from pathlib import Path

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.files import write_text_atomic
from vlarl_bench.policies.spec import PRIORS
from vlarl_bench.policies.store import CARD, read_policy, save_policy
from vlarl_bench.report.render import to_markdown
from vlarl_bench.report.runs import RunFolder, read_run
from vlarl_bench.report.table import comparison_table
from vlarl_bench.sealed import read_sealed
from vlarl_bench.stats import wilson_interval


def main() -> None:
    """Reads the arguments and ships."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("policy", choices=registry.names("policy"), help="whose prior it becomes")
    arguments = parser.parse_args()
    try:
        ship(arguments.run, arguments.policy)
    except BenchError as error:
        parser.error(str(error))


def ship(run: Path, name: str) -> None:
    """Reads the run, writes the prior."""
    spec = registry.get("policy", name)
    policy = spec.load(run / "policy")
    config, _ = read_policy(run / "policy")
    card = {key: config[key] for key in sorted(config.keys() - policy.config.keys())}
    manifest, asked = (read_sealed(run / name, older=True) for name in ("manifest.json", "config.json"))
    card["made_by"] = shlex.join(["vlarl-bench", *manifest["argv"]])
    card["demonstrations"] = manifest["demonstrations"]  # priors with one digest have learned from the same
    folder = PRIORS / name / registry.get("suite", manifest["suite"]).benchmark
    folder.parent.mkdir(parents=True, exist_ok=True)
    demos = ["vlarl-bench", "demos", "--suite", manifest["suite"], "--mode", spec.observation]
    demos += ["--episodes", str(asked["budget"]["demos"]), "--out", asked["demos"]]
    tasks = manifest["evaluation"]["tasks"]
    if len(tasks) < manifest["evaluation"]["suite_tasks"]:
        demos += ["--tasks", ",".join(tasks)]
    save_policy(folder, policy, card, half=True)
    text = (folder / CARD).read_text()
    text += (
        "\nA prior to fine-tune, from few demonstrations so that reinforcement learning has room. Reproduce it with\n\n"
        f"```sh\n{shlex.join(demos)}\n{card['made_by']}\n"
        f"python scripts/ship_prior.py {asked['out']} {name}\n```\n\n"
        "It is a start for comparing fine-tuning methods in simulation and good for nothing else: it is small, has\n"
        "seen scripted demonstrations only, and must not drive a robot. Its scores are no scores of the published\n"
        "models that it is shaped after.\n\n"
        "Below is what that run scored on held-out initial states, before its weights were rounded to half\n"
        "precision.\n\n"
    )
    found = read_run(run)
    write_text_atomic(folder / CARD, text + by_suite(found) + "\n" + to_markdown(comparison_table(found)))


def by_suite(found: RunFolder) -> str:
    """A Markdown table of successes and their Wilson 95% intervals, with noise and without. A prior of which the two
    differ by much is no start for a comparison: whatever narrows it would seem to teach it."""
    scored = [("success", found.evaluated), ("without noise", found.noiseless[1])]
    scored = [(name, rows) for name, rows in scored if len(rows)]
    lines = ["| suite | " + " | ".join(name for name, _ in scored) + " |", "|---|" + "---|" * len(scored)]
    for suite in found.suites:
        cells = []
        for _, rows in scored:
            outcomes = rows.column("success")[rows.column("suite") == suite]
            n, successes = len(outcomes), int(outcomes.sum())
            low, high = wilson_interval(successes, n)
            cells.append(f"{successes}/{n} {successes / n:.0%} [{low:.0%}, {high:.0%}]")
        lines.append(f"| {suite} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
