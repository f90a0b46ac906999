"""How often a suite's scripted expert succeeds: a row a task, over all initial states of the suite's own protocol.

python scripts/expert_success.py aloha
"""

import argparse
import sys

from vlarl_bench import registry
from vlarl_bench.errors import BenchError


def main() -> int:
    """Prints a Markdown table; exit status 2 for a suite that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("--seed", type=int, default=0, help="seeds the noise on the executed actions")
    options = parser.parse_args()
    try:
        suite = registry.get("suite", options.suite)
        protocol = suite.protocol("state")
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    states = [*protocol.train_states, *protocol.eval_states]
    print("| task | successes | steps: shortest, mean, longest | fails from states |\n|---|---|---|---|")
    for task in suite.tasks:
        simulator = suite.open(task, protocol)
        shown = [suite.demonstrate(simulator, task, state, options.seed) for state in states]
        simulator.close()
        steps = [len(episode.actions) for episode in shown if episode.success] or [0]
        failed = ", ".join(str(episode.init_state) for episode in shown if not episode.success) or "-"
        spread = f"{min(steps)}, {sum(steps) / len(steps):.0f}, {max(steps)}"
        solved = f"{sum(episode.success for episode in shown)}/{len(states)}"
        print(f"| `{task.key}` | {solved} | {spread} | {failed} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
