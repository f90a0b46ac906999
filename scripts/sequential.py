"""How often the sequential test errs when before and after are the same, and what it saves when they are not.

    python scripts/sequential.py [EXPERIMENTS]

Each experiment plays 150 initial states before and after, and looks after every one of them.
"""

import argparse
import functools

import numpy as np

from vlarl_bench.report.sequential import log_e_values
from vlarl_bench.stats import mcnemar_p

STATES, ALPHA = 150, 0.05


def main() -> None:
    """Prints a line for each pair of success rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiments", type=int, nargs="?", default=10_000, help="how many (default: 10000)")
    experiments = parser.parse_args().experiments
    if experiments < 1:
        parser.error(f"experiments: {experiments}; must be at least 1")
    rng, p_value = np.random.default_rng(0), functools.cache(mcnemar_p)
    for before, after in ((0.1, 0.1), (0.5, 0.5), (0.9, 0.9), (0.5, 0.6), (0.5, 0.7), (0.5, 0.8)):
        # Rates differ between states, by as much before as after.
        shift = rng.uniform(-0.1, 0.1, (experiments, STATES))
        played = [(rng.random(shift.shape) < rate + shift).astype(int) for rate in (before, after)]
        signs = played[1] - played[0]
        reached = log_e_values(signs) >= np.log(1 / ALPHA)
        stops = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, STATES)
        at_end = [p_value(int(g), int(n)) for g, n in zip((signs > 0).sum(1), (signs < 0).sum(1), strict=True)]
        stopped, saved = reached.any(axis=1).mean(), 1 - stops.mean() / STATES
        print(
            f"{before:g} and {after:g}: stops in {100 * stopped:.1f}% of {experiments:,} experiments, saves "
            f"{100 * saved:.0f}% of the pairs; the exact McNemar test after all pairs finds "
            f"{100 * np.mean(np.array(at_end) < ALPHA):.1f}%"
        )


if __name__ == "__main__":
    main()
