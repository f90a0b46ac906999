"""Updates every method on a toy policy as one of several processes; `test_processes.py` starts it.

python processes.py OUT COUNT...: alone, and for each COUNT as that many processes, of which the first writes OUT/COUNT.
"""

import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import torch
from test_sft import Imitator
from toy import ToyChain, ToyFlow, ToyStochasticFlow, ToyTokens, two_stages

from vlarl_bench import distributed, registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.metering import Meter
from vlarl_bench.rollout import Rollout
from vlarl_bench.suite import Demonstration

UPDATES = 2
SMALL = {"critic_steps": 5, "critic_width": 16, "epochs": 2, "minibatch": 24}
CRITIC = {**SMALL, "warmup": 0, "lr": 1e-3}

CASES = {
    "fpo": (ToyFlow, SMALL),
    "fpo standardised": (ToyFlow, {**SMALL, "ratio": "standardised", "explore_steps": 2}),
    "fpo none": (ToyFlow, {**SMALL, "ratio": "none"}),
    "fpo noise": (ToyFlow, {**SMALL, "latent": "noise", "lr": 1e-3, "advantage_over": "minibatch"}),
    "fpo by action": (ToyFlow, {**SMALL, "chunk_credit": False}),
    "fpo-cfm": (ToyFlow, CRITIC),
    "fpo-cfm aspo": (ToyFlow, {**CRITIC, "objective": "aspo", "target_kl": 1e-4}),
    "ar-ppo": (ToyTokens, {**CRITIC, "entropy": 0.01}),
    "dppo": (ToyChain, {**CRITIC, "minibatch": 7}),
    "reinflow": (ToyStochasticFlow, {**CRITIC, "entropy": 0.01}),
    "flow-sde": (ToyStochasticFlow, CRITIC),
    "flow-noise": (ToyStochasticFlow, CRITIC),
    "grpo": (ToyTokens, {"epochs": 2, "minibatch": 24, "group_size": 4}),
    "tpo": (ToyTokens, {"epochs": 2, "group_size": 4}),
    "tpo surrogate": (ToyStochasticFlow, {"epochs": 2, "group_size": 4}),
    "rwfm": (ToyFlow, {"gradient_steps": 3, "minibatch": 16}),
    "dsrl": (ToyFlow, {"utd": 0.1, "width": 16, "critic_width": 16}),
    "sft": (Imitator, {}),
    "sft uneven": (Imitator, {"weight_decay": 0.1}),
}
"""Name of a method, and perhaps of a way to use it -> policy and settings."""


def demonstrations(rollout: Rollout):
    return [
        Demonstration(e.job.task, 0, True, tuple(e.observations[:-1]), np.stack([a[0] for a in e.latents]))
        for e in rollout.episodes
    ]


def update(case: str) -> dict:
    """Weights, metrics and cost of a few updates, on the same data whatever the number of processes."""
    kind, settings = CASES[case]
    cls = registry.get("algorithm", case.split()[0])
    policy = kind(inputs=2)
    size = 5 if case == "sft uneven" else 16
    budget = dataclasses.replace(BUDGETS["quick"], iterations=10, gradient_steps=30, batch_size=size)
    algorithm = cls(cls.Settings(**settings), policy, budget, 0)
    lines = []
    for number in range(UPDATES):
        data = two_stages(kind(inputs=2), 24, number, algorithm.act, group=algorithm.group)
        for i, episode in enumerate(data.episodes):
            episode.success = i % 3 != 0  # so that there is always something to tell apart
        with Meter(policy) as meter:
            metrics = algorithm.update(policy, demonstrations(data) if case.startswith("sft") else data)
        lines.append({**metrics, "flops": meter.flops, "gradient_steps": meter.gradient_steps})
        distributed.check_same("the policy", str([p.double().sum().item() for p in policy.parameters()]))
    return {"weights": {name: p.detach().clone() for name, p in policy.state_dict().items()}, "lines": lines}


def process(number: int, count: int, port: int, out: str) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.joined():
        found = {case: update(case) for case in CASES}
    if number == 0:
        torch.save(found, Path(out) / str(count))


if __name__ == "__main__":
    out, *counts = sys.argv[1:]
    torch.set_num_threads(1)
    process(0, 1, 0, out)  # imports what the others then need not import
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # that of this process, whose port is free
    fork = multiprocessing.get_context("fork")
    for count in map(int, counts):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [fork.Process(target=process, args=(i, count, store.port, out)) for i in range(count)]
        for one in processes:
            one.start()
        for one in processes:
            one.join()
            assert one.exitcode == 0
