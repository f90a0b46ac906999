"""How a sweep of full-size pi0 would run on a large cluster: a calculation, printed as the table in docs/sweeps.md.

    python scripts/cluster_plan.py                      # 1,000 GPUs; every number can be changed: --help

Nothing here was measured on such a cluster. What was measured elsewhere, and what is assumed, is said beside each
number below; the budget is this project's own `standard`, the protocol openpi's.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.records import log_line
from vlarl_bench.report.pack import read_pack

PACK = Path(__file__).parents[1] / "results" / "demo"

NUMBERS: dict[str, tuple[float, str]] = {
    "gpus": (1000, "GPUs of the cluster"),
    "gpus_a_cell": (8, "GPUs, and so processes, of a cell: one node"),
    "seeds": (5, "seeds; methods and suites are those that are installed"),
    "cores": (12, "CPU cores a GPU; assumed: usual for nodes of 8 GPUs"),
    "step_ms": (1.52, "CPU ms an environment step; measured: docs/suites/speed.md, first row"),
    "look_ms": (81.6, "CPU ms a look through two cameras (OSMesa); measured: the same, second row less 8 steps"),
    "parameters": (3.501e9, "parameters; counted: tests/policies/pi0_manifest.json, docs/policies.md"),
    "prefix": (2.92e9, "of them PaliGemma; the rest is the action expert, which is what RL trains"),
    "tokens": (816, "tokens of the prefix: three images of 256 (one of them blank), 48 of text"),
    "chunk_tokens": (51, "tokens of the action expert: state and 50 actions"),
    "euler": (10, "Euler steps that decode a chunk of `pi0-base`: docs/policies.md"),
    "draws": (4, "loss draws a decision, `fpo`'s default"),
    "epochs": (4, "passes over a round, `fpo`'s default"),
    "tflops": (989, "bfloat16 TFLOP/s of a GPU without sparsity; NVIDIA's data sheet of the H100 SXM"),
    "utilisation": (0.3, "share of them that is reached; assumed"),
    "bytes_a_weight": (4, "bytes a stored weight: checkpoints are float32"),
    "hash_gb_s": (0.98, "GB/s of SHA-256 on one core; measured: hashlib on 256 MiB, on two loaded cores"),
    "node_gb_s": (2, "GB/s that a node writes to the shared file system; assumed"),
    "storage_gb_s": (50, "GB/s that all nodes write together; assumed"),
    "syncs": (2000, "small synchronous writes that the file system takes a second; assumed"),
    "link_gb_s": (1, "GB/s at which processes exchange observations (gloo over TCP, pickled); assumed"),
    "array": (1001, "SLURM's MaxArraySize; its default"),
    "cycle": (30, "seconds between two of SLURM's scheduling cycles (bf_interval); its default"),
    "starts": (100, "jobs that one cycle looks at (default_queue_depth); its default"),
    "dollars": (2.5, "dollars a GPU hour; assumed"),
}


def lines(n: argparse.Namespace) -> list[tuple[str, str]]:
    """The table's rows."""
    budget, suites = BUDGETS["standard"], ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    methods = [name for name in registry.names("algorithm") if registry.runs_on(name, "pi0-base")]
    protocols = [registry.get("suite", suite).protocol("pixels", "openpi") for suite in suites]
    steps = sum(p.horizon[suite] for p, suite in zip(protocols, suites, strict=True)) / len(suites)
    decisions = steps / protocols[0].execute
    cells, at_once = len(methods) * len(suites) * n.seeds, n.gpus // n.gpus_a_cell
    waves = math.ceil(cells / at_once)

    flops = n.tflops * 1e12 * n.utilisation
    see = 2 * n.prefix * n.tokens / flops
    expert = 2 * (n.parameters - n.prefix) * n.chunk_tokens / flops
    decide = see + n.euler * expert
    learn = see + n.epochs * n.draws * 3 * expert
    simulate = (steps * n.step_ms + decisions * n.look_ms) / 1000 / n.cores  # of an episode, by a GPU's cores
    act = decisions * decide

    def played(episodes: float) -> tuple[float, float]:
        """(seconds, of them GPU seconds) in which a cell plays so many: deciding and simulating take turns."""
        each = math.ceil(episodes / n.gpus_a_cell)
        return each * (act + simulate), each * act

    evaluation = budget.tasks * budget.eval_states * (budget.eval_repeats + 1)  # each state once without noise
    collect, collect_gpu = played(budget.episodes)
    update = budget.episodes * decisions * learn / n.gpus_a_cell
    seen = budget.episodes * decisions * 2 * 224 * 224 * 3 / 1e9  # GB of a round's images
    trained = n.parameters - n.prefix
    checkpoint = (n.parameters + 2 * trained) * n.bytes_a_weight / 1e9  # GB: weights, and Adam's two moments
    write_alone = checkpoint / n.node_gb_s
    hashing = checkpoint / n.hash_gb_s
    name_weights = n.parameters * n.bytes_a_weight / 1e9 / n.hash_gb_s  # each round, by every process
    exchange = seen / n.link_gb_s
    waiting = exchange + hashing + write_alone + name_weights
    round_s = collect + update + waiting
    evaluate, evaluate_gpu = played(2 * evaluation)
    cell_s = budget.iterations * round_s + evaluate
    busy = (budget.iterations * (collect_gpu + update) + evaluate_gpu) / cell_s
    rows = budget.iterations * budget.episodes + 2 * evaluation
    demo = next(e for e in read_pack(PACK) if (e.config["algorithm"], e.config["seed"]) == ("fpo", 0))
    row_bytes = sum(len(log_line(row.to_json())) for row in demo.rows) / len(demo.rows)
    syncs = (2 * evaluation + budget.iterations * 6) / cell_s + 1 / 15  # a row, a round's files, a heartbeat
    queue = math.ceil(at_once / n.starts) * n.cycle
    total_h = waves * (cell_s + queue) / 3600
    gpu_h = cells * n.gpus_a_cell * cell_s / 3600
    keep = 2 * checkpoint + n.parameters * n.bytes_a_weight / 1e9
    stored = cells * (keep + rows * row_bytes / 1e9) / 1000
    memory = (n.parameters * 4 + trained * 12) / 1e9
    all_learns = n.parameters * 16 / 1e9

    of_a_round = {
        "simulators (a GPU waits for its CPU cores)": collect - collect_gpu,
        "checkpoints (hashed and written by one process, others wait)": hashing + write_alone,
        "the weights' hash that rows carry, by every process": name_weights,
        "observations sent to all processes": exchange,
    }
    of_all = {
        "storage, if checkpoints spread evenly": at_once * checkpoint / round_s / n.storage_gb_s,
        "small writes a second": at_once * syncs / n.syncs,
        "array tasks against MaxArraySize": cells / n.array,
    }
    hours, held = cell_s / 3600, n.gpus_a_cell * seen
    return [
        ("cells", f"{len(methods)} methods x {len(suites)} suites x {n.seeds:.0f} seeds = {cells:.0f}"),
        ("at once", f"{at_once:.0f} cells of {n.gpus_a_cell:.0f} GPUs, {waves} waves"),
        ("queue", f"{math.ceil(cells / n.array)} array job(s); a wave begins within about {queue:.0f} s"),
        (
            "an episode",
            f"{steps:.0f} steps, {decisions:.0f} decisions: {act:.1f} GPU s and {simulate:.1f} s of the cores",
        ),
        ("a round", f"{round_s:.0f} s: collect {collect:.0f}, update {update:.0f}, exchange and write {waiting:.0f}"),
        ("a cell", f"{hours:.1f} h, {hours * n.gpus_a_cell:.0f} GPU hours; GPUs compute {busy:.0%} of the time"),
        ("the sweep", f"{total_h:.1f} h, {gpu_h:,.0f} GPU hours, {gpu_h * n.dollars:,.0f} dollars"),
        ("rows", f"{cells * rows:,.0f} of {row_bytes:.0f} bytes, {at_once * rows / cell_s:.0f} a second"),
        ("fsyncs", f"{at_once * syncs:.0f} a second: rows of evaluations, a round's files, heartbeats"),
        ("storage", f"{keep:.0f} GB a cell (two checkpoints of {checkpoint:.1f}, the policy), {stored:.1f} TB in all"),
        ("memory of a GPU", f"{memory:.0f} GB of weights, gradients, Adam; {all_learns:.0f} if all learns (`sft`)"),
        ("memory of a node", f"{held:.0f} GB of a round's images, which every process holds"),
        *((f"of a round: {name}", f"{s / round_s:.0%}") for name, s in sorted(of_a_round.items(), key=lambda x: -x[1])),
        *((f"of what there is: {name}", f"{share:.0%}") for name, share in of_all.items()),
    ]


def main() -> None:
    """Prints the table, or the numbers that it is made from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (value, meaning) in NUMBERS.items():
        flag, told = f"--{name.replace('_', '-')}", f"{meaning.replace('%', '%%')} (default: {value:g})"
        parser.add_argument(flag, type=float, default=value, help=told)
    parser.add_argument("--sources", action="store_true", help="print each number and where it comes from")
    options = parser.parse_args()
    table = [("number", "value, and where it comes from")] if options.sources else [("what", "how much")]
    if options.sources:
        table += [(name, f"{getattr(options, name):g}: {meaning}") for name, (_, meaning) in NUMBERS.items()]
    else:
        table += lines(options)
    table.insert(1, ("---", "---"))
    print("\n".join(f"| {left} | {right} |" for left, right in table))


if __name__ == "__main__":
    main()
