"""What an update of each registered method costs, and what FPO's draws gain from a shared prefix. `make bench-updates`.

Hosts are noisy: what is compared is run in turn, round by round, in CPU seconds of one thread; the fastest counts.
"""

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from vlarl_bench.algorithms.fpo import chunk_loss

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.rollout import Episode, Job, Rollout
from vlarl_bench.suite import Demonstration, Task

from .test_policy_speed import POLICIES, in_turn, inputs, make, observe

DECISIONS, LENGTH = 32, 8
BUDGET = dataclasses.replace(BUDGETS["quick"], iterations=100, gradient_steps=100)
"""Of one gradient step an update, which methods that learn from demonstrations take from it."""


def subject(method):
    """The first policy that it runs on."""
    return next(name for name in POLICIES if registry.runs_on(method, name))


def settings(method, timed):
    """The defaults; where nothing is timed, with little to do."""
    cls = registry.get("algorithm", method).Settings
    quick = {"critic_steps": 5, "utd": 0.1, "epochs": 1, "gradient_steps": 3, "minibatch": 8}
    return cls(**({} if timed else {key: quick[key] for key in quick if hasattr(cls, key)}))


@torch.no_grad()
def rollout(spec, policy, algorithm, decisions):
    """Made-up episodes in which `algorithm` acted: siblings from each initial state, every other one a success."""
    episodes = []
    for number in range(decisions // LENGTH):
        task, state = Task("made-up", f"task {number // 4}", "go"), number // 2
        seen = [observe(100 * number + i, spec) for i in range(LENGTH + 1)]
        generators = [torch.Generator().manual_seed(100 * number + i) for i in range(LENGTH)]
        drawn = algorithm.act(policy, policy.encode(policy.preprocess(seen[:-1])), generators)
        episode = Episode(Job(task, state, number % 2, number), seen, list(drawn.latent.numpy()))
        episode.traces = [] if drawn.trace is None else list(drawn.trace.numpy())
        episode.actions, episode.success = list(drawn.actions.numpy()), number % 2 == 0
        episodes.append(episode)
    return Rollout(episodes, max_decisions={"made-up": LENGTH})


def experience(spec, policy, algorithm, size):
    """What the method learns from, and the observations in it that it learns at; a made-up expert does nothing."""
    if algorithm.learns_from == "rollouts":
        data = rollout(spec, policy, algorithm, size)
        return data, [seen for episode in data.episodes for seen in episode.observations[:-1]]
    seen, actions = tuple(observe(i, spec) for i in range(size)), np.zeros((size, policy.action_dim), np.float32)
    return [Demonstration(Task("made-up", "task", "go"), 0, True, seen, actions)], seen


def peak(function):
    """MiB that the process grew by, at most, while the function ran; none where the kernel does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is asked for now
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = status("VmRSS")
        function()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        function()
        return float("nan")


def status(name):
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


@pytest.mark.benchmark(group="update of 32 decisions")
@pytest.mark.parametrize("method", registry.names("algorithm"))
def test_update(benchmark, method):
    """As a multiple of encoding the same observations, the policy's own supervised loss on them and its backward to the
    actor. Who learns from demonstrations takes one gradient step on as many of their steps, of the whole policy."""
    torch.manual_seed(0)
    cls, (spec, policy) = registry.get("algorithm", method), make(subject(method))
    size = DECISIONS if benchmark.enabled else 2 * LENGTH
    algorithm = cls(settings(method, benchmark.enabled), policy, dataclasses.replace(BUDGET, batch_size=size), 0)
    data, _ = experience(spec, policy, algorithm, size)
    metrics = algorithm.update(policy, data)  # in which critics may learn alone
    data, observations = experience(spec, policy, algorithm, size)
    assert all(np.isfinite(value) for value in metrics.values())
    _, plain = make(subject(method))
    actor = plain.requires_grad_(False).actor_parameters()
    for parameter in actor:
        parameter.requires_grad_(True)
    batch = plain.preprocess(observations)
    actions, mask = torch.zeros(size, plain.chunk, plain.action_dim), torch.ones(size, plain.chunk)

    def once():
        loss = plain.sft_loss(plain.encode(batch), actions, mask, torch.Generator().manual_seed(0))
        torch.autograd.grad(loss, actor)

    def update():
        algorithm.update(policy, data)

    unit, whole = in_turn(benchmark, once, update, rounds=1)
    benchmark.extra_info.update(multiple=whole / unit, unit_ms=unit * 1e3)
    print(f"\n{method} on {spec.name}: {whole * 1e3:.0f} ms, {whole / unit:.1f}x forward + backward", end="")
    print(f" ({unit * 1e3:.0f} ms)", end="")
    if benchmark.enabled:
        benchmark.extra_info["peak_mib"] = memory = peak(update)
        print(f"; peak {memory:.0f} MiB above what it holds")
    benchmark.pedantic(once, rounds=1)


@pytest.mark.benchmark(group="FPO's loss, 8 draws, 32 observations: shared prefix")
@pytest.mark.parametrize("name", ["pi0-tiny", "pi0-tiny-pixels"])
def test_fpo_draws_share_their_prefix(benchmark, name):
    """One encoding and 8 draws an observation, against the same draws with an encoding each; backward to the actor."""
    spec, policy = make(name)
    actor = policy.requires_grad_(False).actor_parameters()
    for parameter in actor:
        parameter.requires_grad_(True)
    size, k = (32, 8) if benchmark.enabled else (2, 8)
    draw = torch.Generator().manual_seed(0)
    batch, latent = inputs(spec, policy, size), torch.randn(size, policy.chunk, 7, generator=draw)
    t = torch.rand(size, k, generator=draw)
    noise = torch.randn(size, k, policy.chunk, 7, generator=draw)
    mask, again = torch.ones(size, policy.chunk), torch.arange(size).repeat_interleave(k)

    def shared():
        with torch.no_grad():
            context = policy.encode(batch)
        loss = chunk_loss(policy, context, latent, mask, t, noise, True)
        torch.autograd.grad(loss.mean(), actor)
        return loss.detach()

    def apart():
        with torch.no_grad():
            context = policy.encode(batch.index(again))
        draws = t.view(-1, 1), noise.flatten(0, 1)[:, None]
        loss = chunk_loss(policy, context, latent[again], mask[again], *draws, True)
        torch.autograd.grad(loss.mean(), actor)
        return loss.detach().view(size, k)

    torch.testing.assert_close(shared(), apart(), rtol=1e-4, atol=1e-5)
    fast, slow = in_turn(benchmark, shared, apart, rounds=3)
    memory = [peak(function) for function in (shared, apart)]
    benchmark.extra_info.update(apart_ms=slow * 1e3, ratio=slow / fast, peak_mib=memory[0], apart_peak_mib=memory[1])
    print(f"\n{name}: apart {slow * 1e3:.0f} ms, shared {fast * 1e3:.0f} ms, {slow / fast:.2f}x", end="")
    print(f"; peak {memory[1]:.0f} and {memory[0]:.0f} MiB")
    benchmark.pedantic(shared, rounds=1)
