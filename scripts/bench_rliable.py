"""Times bootstrap replicates of an interquartile mean here and in rliable, and compares every definition they share.

    PYTHONPATH=. python scripts/bench_rliable.py                    # the ratio, and definitions equal to 1e-9
    PYTHONPATH=. python scripts/bench_rliable.py --golden tests/stats_golden.json   # write what tests hold us to

To be run by the Python of an environment that has rliable 1.2.0 and pandas 2 (it fails to import with pandas 3).
CPU seconds of one run in turn on the same scores: 6 methods x 10 seeds x 10 tasks.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from rliable import library, metrics

from vlarl_bench import stats
from vlarl_bench.files import write_json_atomic

METHODS, SEEDS, TASKS, EPISODES = 6, 10, 10, 50
THRESHOLDS = np.linspace(0, 1, 11)


def main() -> None:
    """Definitions first, then the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicates", type=int, default=50_000)
    parser.add_argument("--golden", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    scores = rng.binomial(EPISODES, rng.beta(3, 2, (METHODS, 1, TASKS)), (METHODS, SEEDS, TASKS)) / EPISODES
    cases = [scores[0], scores[1], scores[2][:3], scores[3][:5, :4], scores[4][:7, :3], scores[5][:1]]
    golden = [case(one, cases[(i + 1) % len(cases)]) for i, one in enumerate(cases)]
    if options.golden:
        write_json_atomic(options.golden, {"made_by": "scripts/bench_rliable.py, rliable 1.2.0", "cases": golden})
        return
    worst = max(difference(each) for each in golden)
    print(f"definitions: largest difference {worst:.1e}")
    if worst > 1e-9:
        raise SystemExit("definitions differ")
    timed(scores, options.replicates)


def case(scores: np.ndarray, others: np.ndarray) -> dict[str, object]:
    """What rliable makes of one matrix of scores [S, T], and of its common tasks with another."""
    tasks = min(scores.shape[1], others.shape[1])
    return {
        "scores": scores.tolist(),
        "others": others.tolist(),
        "mean": float(metrics.aggregate_mean(scores)),
        "iqm": float(metrics.aggregate_iqm(scores)),
        "optimality_gap": float(metrics.aggregate_optimality_gap(scores)),
        "optimality_gap_0.6": float(metrics.aggregate_optimality_gap(scores, 0.6)),
        "probability_of_improvement": float(metrics.probability_of_improvement(scores[:, :tasks], others[:, :tasks])),
        "performance_profile": library.score_distributions(scores, THRESHOLDS).tolist(),
    }


def difference(golden: dict[str, object]) -> float:
    """Largest absolute difference between our numbers and theirs."""
    scores, others = np.array(golden["scores"]), np.array(golden["others"])
    tasks = min(scores.shape[1], others.shape[1])
    ours = {
        "mean": stats.mean(scores),
        "iqm": stats.iqm(scores),
        "optimality_gap": stats.optimality_gap(scores),
        "optimality_gap_0.6": stats.optimality_gap(scores, 0.6),
        "probability_of_improvement": stats.probability_of_improvement(scores[:, :tasks], others[:, :tasks]),
        "performance_profile": stats.performance_profile(scores, THRESHOLDS),
    }
    return max(float(np.abs(value - np.array(golden[name])).max()) for name, value in ours.items())


def timed(scores: np.ndarray, replicates: int) -> None:
    """Both on the same scores. rliable draws seeds within each task; ours draws seeds, then tasks within each."""
    rng, episodes = np.random.default_rng(0), np.full(scores.shape[1:], EPISODES)
    start = time.process_time()
    for each in scores:
        np.percentile(stats.iqm(stats.hierarchical_bootstrap(each, replicates, rng)), [2.5, 97.5])
    two = time.process_time() - start
    start = time.process_time()
    for each in scores:
        drawn = stats.hierarchical_bootstrap(each, replicates, rng, episodes=episodes)
        np.percentile(stats.iqm(drawn), [2.5, 97.5])
    three = time.process_time() - start
    start = time.process_time()
    by_name = {str(i): each for i, each in enumerate(scores)}
    library.get_interval_estimates(by_name, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=replicates)
    theirs = time.process_time() - start
    print(
        f"{replicates} replicates of {len(scores)} methods x {scores.shape[1]} seeds x {scores.shape[2]} tasks, CPU s:"
    )
    print(f"  ours, seed and task           {two:8.2f}   {theirs / two:6.1f} times faster")
    print(f"  ours, seed, task and episode  {three:8.2f}   {theirs / three:6.1f} times faster")
    print(f"  rliable                       {theirs:8.2f}")


if __name__ == "__main__":
    main()
