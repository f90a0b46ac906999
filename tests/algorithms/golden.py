"""Inputs of the numbers that the authors' code gave (`flow_golden.json` says how), and what compares ours with them."""

import json
import math
from pathlib import Path

import torch
from toy import ToyContext, ToyStochasticFlow

from vlarl_bench.decisions import Decisions
from vlarl_bench.policy_gradient import ascend

GOLDEN = json.loads((Path(__file__).parent / "flow_golden.json").read_text())


def formula(n, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + n).view(shape)


def copy_of_the_golden_flow():
    policy = ToyStochasticFlow(0, dtype=torch.float64)
    with torch.no_grad():
        for n, parameter in enumerate((policy.w, policy.u, policy.b, policy.v), 1):
            parameter.copy_(0.3 * formula(n, *parameter.shape))
    return policy


def seen(n, latent=None, trace=None):
    """n decisions of the golden flow, all executed whole."""
    nothing = torch.zeros(n)
    return Decisions(
        context=ToyContext(formula(6, n, 1)),
        row=torch.arange(n),
        features=nothing,
        next_features=nothing,
        latent=latent,
        trace=trace,
        mask=torch.ones(n, 2, dtype=torch.float64),
        reward=nothing,
        ended=nothing,
        task=nothing,
        episode=nothing,
        start=nothing,
    )


def surrogate_gradient(score, old, advantage, clip, parameters, **more):
    """Metrics of `ascend`, which leaves its gradient in `parameters`: first all score `old`, as the ratio must be 1 on
    the first pass; in the second step they score what `score` says. The clipped fraction is the mean over both."""
    calls = []

    def staged(i):
        calls.append(i)
        now = score(i)
        return now if len(calls) == 3 else now._replace(logp=old[i] + 0 * now.logp)

    optimizer = torch.optim.SGD(parameters, lr=0.0)
    generator = torch.Generator().manual_seed(0)
    return ascend(staged, advantage, clip, optimizer, generator, 2, len(old), grad_norm=1e9, **more)
