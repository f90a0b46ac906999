"""Speed of what a learner does between environment steps. `make bench`; hosts are noisy, compare within one run."""

import numpy as np
import pytest
import torch

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.distributed import descend

SUITE = registry.get("suite", "libero_object")
PROTOCOL = SUITE.protocol("state")


@pytest.fixture(scope="module")
def simulator():
    opened = SUITE.open(SUITE.tasks[0], PROTOCOL)
    opened.reset(0)
    opened.step(np.zeros((1, 7)))  # compiles
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def policy():
    spec = registry.get("policy", "pi0-tiny")
    return spec.create(SUITE.embodiment(PROTOCOL), [task.instruction for task in SUITE.tasks], seed=0)


@pytest.mark.benchmark(group="pi0-tiny")
@pytest.mark.parametrize("size", [1, 16])
def test_decide(benchmark, simulator, policy, size):
    """Preprocess, encode and sample: what a turn of the rollout costs besides physics."""
    simulator.reset(0)
    seen = [simulator.observe()] * size
    generators = [torch.Generator().manual_seed(i) for i in range(size)]

    def decide():
        with torch.no_grad():
            policy.sample(policy.encode(policy.preprocess(seen)), generators)

    benchmark(decide)


@pytest.mark.benchmark(group="fpo")
def test_one_gradient_step_of_the_actor(benchmark, simulator, policy):
    """Loss, backward and Adam on one default minibatch."""
    from vlarl_bench.algorithms.fpo import FPO, FPOSettings, actor_loss, chunk_loss

    settings = FPOSettings()
    algorithm = FPO(settings, policy, BUDGETS["quick"], 0)
    simulator.reset(0)
    n = settings.minibatch
    with torch.no_grad():
        context = policy.encode(policy.preprocess([simulator.observe()] * n))
    g = torch.Generator().manual_seed(0)
    latent, mask = torch.randn(n, 8, 7, generator=g), torch.ones(n, 8)
    t, noise = torch.rand(n, settings.draws, generator=g), torch.randn(n, settings.draws, 8, 7, generator=g)
    advantage = torch.randn(n, generator=g)
    with torch.no_grad():
        old = chunk_loss(policy, context, latent, mask, t, noise, True).flatten()
        gain = advantage.repeat_interleave(settings.draws)

    def step():
        new = chunk_loss(policy, context, latent, mask, t, noise, True).flatten()
        loss, _ = actor_loss(new, old, gain, settings)
        descend(algorithm.optimizer, loss, 1.0)

    benchmark(step)
