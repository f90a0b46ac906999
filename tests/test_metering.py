"""Costs against counts by hand; gradients that are not finite are told by name."""

import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlarl_bench.algorithm import uncounted
from vlarl_bench.distributed import descend
from vlarl_bench.errors import Diverged
from vlarl_bench.metering import Meter, check_finite


def learn(net, x, optimizer):
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def test_a_linear_layer_by_hand():
    net, x = nn.Linear(3, 4), torch.randn(5, 3)
    optimizer = torch.optim.Adam(net.parameters())
    with Meter(net) as meter, torch.no_grad():
        net(x)
    assert (meter.flops, meter.gradient_steps) == (2 * 5 * 3 * 4, 0)
    with Meter(net) as meter:
        for _ in range(3):
            learn(net, x, optimizer)
    assert meter.gradient_steps == 3
    assert meter.flops == 3 * 2 * (2 * 5 * 3 * 4)  # forward, and the weight's gradient; nothing asks for the input's
    learn(net, x, optimizer)
    assert meter.gradient_steps == 3  # outside nothing is counted


def test_attention_by_hand():
    """B heads of n queries and m keys, d wide: scores and mixture are two products of n m d each."""
    b, n, m, d = 2, 5, 7, 8
    query = torch.randn(1, b, n, d, requires_grad=True)
    keys = torch.randn(1, b, m, d)
    with Meter(nn.Identity()) as meter, torch.no_grad():
        F.scaled_dot_product_attention(query, keys, keys)
    assert meter.flops == 2 * 2 * b * n * m * d
    with Meter(nn.Identity()) as meter:
        F.scaled_dot_product_attention(query, keys, keys).sum().backward()
    assert meter.flops == (2 + 5) * 2 * b * n * m * d  # backward computes the scores once more, and four gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_not_differentiated_costs_the_same(mode):
    """Under inference_mode linear layers and attention come to a mode whole, as operations without a formula."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv = nn.Linear(8, 8), nn.Conv1d(2, 2, 1)

        def forward(self, x):
            x = self.conv(self.inner(x))
            return F.scaled_dot_product_attention(x[None], x[None], x[None]) @ x.mT

    net, x = Net(), torch.randn(3, 2, 8)
    with mode():
        plain = net(x)
        with Meter(net) as meter:
            metered = net(x)
    assert torch.equal(plain, metered)
    assert meter.flops == 2 * 3 * (2 * 8 * 8 + 2 * 2 * 8 + 2 * 2 * 2 * 8 + 2 * 2 * 8)


def test_what_is_only_reported_costs_nothing():
    net, x = nn.Linear(3, 4), torch.randn(5, 3)
    with Meter(net) as meter, torch.no_grad():
        with suppress(ValueError), uncounted():
            net(x)
            raise ValueError
        assert meter.flops == 0
        net(x)
    assert meter.flops == 2 * 5 * 3 * 4


def test_convolution_by_hand():
    net = nn.Conv2d(3, 4, 2, stride=2, bias=False)
    with Meter(net) as meter, torch.no_grad():
        net(torch.randn(1, 3, 6, 6))
    assert meter.flops == 2 * 9 * 4 * 3 * 4


def test_a_gradient_that_is_not_finite_is_told_by_name_and_step():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), torch.randn(5, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Meter(net):
        learn(net, x, optimizer)
        learn(net, x, optimizer)
        net(x).square().mean().backward()
        net[1].bias.grad[0] = float("nan")
        before = [p.clone() for p in net.parameters()]
        with pytest.raises(Diverged, match=r"the gradient of 1\.bias is not finite at gradient step 3"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    critic = nn.Linear(3, 1)
    stray = torch.optim.SGD(critic.parameters(), lr=0.1)
    with Meter(net), pytest.raises(Diverged, match=r"a tensor of shape \(1, 3\) outside the policy"):
        learn(critic, x * float("inf"), stray)
    method = SimpleNamespace(learner=SimpleNamespace(critic=critic))
    with Meter(net, method), pytest.raises(Diverged, match=r"the gradient of learner\.critic\.weight is not finite"):
        learn(critic, x * float("inf"), stray)


def test_the_tensor_that_is_told_is_the_one_whose_gradient_it_was():
    """And not the first one, which a gradient norm that is no number would have made all of them into."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), torch.randn(5, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = net(x).square().mean() + float("inf") * net[1].bias.sum()
    with Meter(net), pytest.raises(Diverged, match=r"the gradient of 1\.bias is not finite at gradient step 1"):
        descend(optimizer, loss, 1.0)


def test_numbers_that_are_not_finite_are_told_by_name():
    net = nn.Linear(2, 2)
    check_finite(net, 7)
    with torch.no_grad():
        net.bias[1] = float("inf")
    with pytest.raises(Diverged, match="bias is not finite after gradient step 7"):
        check_finite(net, 7)


MEASURED = """
import subprocess, sys, time
from vlarl_bench.metering import cpu_seconds

busy = "import time\\nwhile time.process_time() < 0.5: pass\\nprint(flush=True)\\ninput()"
before = cpu_seconds()
with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    time.sleep(0.2)  # waiting costs nothing
    print(cpu_seconds() - before)
    child.communicate(b"\\n")
print(cpu_seconds() - before)
"""


def test_cpu_seconds_are_those_of_the_workers_too_while_they_live_and_after():
    """In a process that has no other children."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, timeout=120)
    lives, after = map(float, done.stdout.split())
    assert 0.45 < lives < 0.8  # half a second, less what is lost where the kernel counts in hundredths
    assert lives <= after < 1.0
