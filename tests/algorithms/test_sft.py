"""SFT's budget and schedule, on a policy small enough to watch."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import TASK, ToyFlow
from vlarl_bench.algorithms.pi0_fast import Pi0Fast
from vlarl_bench.algorithms.sft import SFT, SFTSettings

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Demonstration, Observation


class Imitator(ToyFlow):
    def sft_loss(self, context, actions, mask, generator, rows=slice(None)):
        noise = torch.randn(len(actions), 1, *actions.shape[1:], generator=generator)
        t = torch.rand(len(actions), 1, generator=generator)
        errors = self.draw_loss(context, actions[rows], t[rows], noise[rows]).mean((1, 3))
        return (errors * mask[rows]).sum() / mask.sum()


def demonstrations():
    seen = tuple(Observation("do it", np.array([i / 10], np.float32)) for i in range(6))
    return [Demonstration(TASK, 0, True, seen, np.full((6, 2), 0.5, np.float32))]


@pytest.mark.parametrize(("steps", "rounds"), [(10, 5), (20, 6), (7, 3), (3, 5)])
def test_the_gradient_steps_are_those_of_the_budget_and_the_rate_never_turns_negative(steps, rounds):
    budget = dataclasses.replace(BUDGETS["smoke"], gradient_steps=steps, iterations=rounds, batch_size=4)
    policy = Imitator()
    algorithm = SFT(SFTSettings(warmup=0), policy, budget, 0)
    rates = []
    inner = algorithm.optimizer.step
    algorithm.optimizer.step = lambda: (rates.append(algorithm.optimizer.param_groups[0]["lr"]), inner())
    for _ in range(rounds):
        algorithm.update(policy, demonstrations())
    assert len(rates) == steps
    assert rates == pytest.approx([1e-3 * (1 - i / steps) for i in range(steps)])


def test_pi0_fast_is_sft_on_the_policies_whose_tokens_are_fasts():
    for name in registry.names("policy"):
        policy = registry.get("policy", name)
        assert registry.runs_on("pi0-fast", name) == ("pi0_fast" in policy.family), name
    assert set(Pi0Fast.__dict__) & {"update", "state_dict", "load_state_dict", "act", "Settings"} == set()
    with pytest.raises(
        BenchError, match=r"'pi0-tiny' lacks fast, .* runs on: pi0-fast-base, pi0-fast-tiny, pi0-fast-tiny-pixels;"
    ):
        registry.check_compatible("pi0-fast", "pi0-tiny")
