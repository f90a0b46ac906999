"""Speed of each registered policy, and of pi0 against transformers' own sampler. `make bench-policies`.

Hosts are noisy: what is compared is run in turn, round by round, and the ratio is that of the fastest rounds.
"""

import time

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlarl_bench import registry
from vlarl_bench.suite import Embodiment, Observation

from ..policies.pi0_small import image_inputs

POLICIES = [name for name in registry.names("policy") if not registry.get("policy", name).published]
"""Those that a benchmark can make: published sizes come from a folder."""
TINY_PI0 = ("pi0-tiny", "pi0-tiny-pixels")
CAMERAS = ("agentview", "robot0_eye_in_hand")
TASK = "pick up the milk and place it in the basket"
OBJECTS = ("milk_1", "basket_1", "ketchup_1", "butter_1", "cream_cheese_1", "tomato_sauce_1")


def observe(seed, spec):
    """A made-up observation of the kind that `spec` takes; seven actions, eight numbers of proprioception."""
    draw = np.random.default_rng(seed)
    proprio = draw.normal(scale=0.2, size=8).astype(np.float32)
    if spec.observation == "pixels":
        size = spec.image_size
        images = {camera: draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in CAMERAS}
        return Observation(TASK, proprio, images=images)
    poses = {name: np.r_[draw.normal(scale=0.2, size=3), 0, 0, 0, 1].astype(np.float32) for name in OBJECTS}
    return Observation(TASK, proprio, poses)


@pytest.fixture(scope="module", params=POLICIES)
def subject(request):
    return make(request.param)


def embodiment(spec):
    """A robot like LIBERO's."""
    return Embodiment(7, 8, CAMERAS if spec.observation == "pixels" else ())


def make(name):
    spec = registry.get("policy", name)
    return spec, spec.create(embodiment(spec), [TASK, *OBJECTS], seed=0)


def inputs(spec, policy, size):
    return policy.preprocess([observe(i, spec) for i in range(size)])


def generators(size):
    return [torch.Generator().manual_seed(i) for i in range(size)]


def in_turn(benchmark, *functions, rounds=15):
    """CPU seconds of the fastest round of each, run one after another by one thread; one round if nothing is timed."""
    fastest, threads = [float("inf")] * len(functions), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(rounds + 1 if benchmark.enabled else 1):  # the first one warms up as well
        for i, function in enumerate(functions):
            begin = time.process_time()
            function()
            fastest[i] = min(fastest[i], time.process_time() - begin)
    torch.set_num_threads(threads)
    return fastest


def operations(function):
    """Floating point operations of matrix products, attention aside."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.benchmark(group="encode + sample")
@pytest.mark.parametrize("size", [1, 8])
def test_chunk(benchmark, subject, size):
    """Latency of a batch of action chunks; `chunks_a_second` in extra_info is the throughput."""
    spec, policy = subject
    batch = inputs(spec, policy, size)

    def chunk():
        with torch.no_grad():
            return policy.sample(policy.encode(batch), generators(size))

    assert len(benchmark(chunk).actions) == size
    if benchmark.stats:
        fastest = benchmark.stats.stats.min
        benchmark.extra_info["chunks_a_second"] = size / fastest
        print(f"\n{spec.name}, batch {size}: {fastest * 1e3:.2f} ms, {size / fastest:.0f} chunks a second")


@pytest.mark.benchmark(group="loss + backward, 32 observations")
def test_loss_and_backward(benchmark, subject):
    """Supervised loss with all weights learning."""
    spec, policy = subject
    batch, actions, mask = inputs(spec, policy, 32), torch.zeros(32, policy.chunk, 7), torch.ones(32, policy.chunk)

    def learn():
        policy.zero_grad()
        policy.sft_loss(policy.encode(batch), actions, mask, torch.Generator().manual_seed(0)).backward()

    benchmark(learn)


@pytest.mark.benchmark(group="pi0 against transformers' sample_actions")
@pytest.mark.parametrize("size", [1, 8])
def test_pi0_against_transformers(benchmark, size):
    """Same weights, noise and pixels; from images to a chunk."""
    spec, policy = make("pi0-tiny-pixels")
    batch = inputs(spec, policy, size)
    noise = torch.stack([torch.randn(8, 7, generator=g) for g in generators(size)])

    def ours():
        with torch.no_grad():
            return policy.decode(policy.encode(batch), noise).latent

    def theirs():
        return policy.model.sample_actions(
            policy.normalise_proprio(batch.proprio),
            noise=noise,
            num_steps=policy.euler_steps,
            **image_inputs(policy, batch),
        )

    torch.testing.assert_close(ours(), theirs(), atol=1e-5, rtol=0)
    compare(benchmark, f"batch {size}", ours, theirs, rounds=30)


@pytest.mark.benchmark(group="pi0 against transformers' forward, loss + backward, 32 observations")
def test_pi0_learns_against_transformers(benchmark):
    """Same weights, times, noise and pixels, and all weights learning; transformers' loss is of all numbers, too."""
    spec, policy = make("pi0-tiny-pixels")
    batch, draw = inputs(spec, policy, 32), torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, 32, policy.chunk, 7, generator=draw)
    t = torch.rand(32, generator=draw)

    def ours():
        policy.zero_grad()
        loss = policy.draw_loss(policy.encode(batch), latent, t[:, None], noise[:, None]).mean()
        loss.backward()
        return loss.detach()

    def theirs():
        policy.zero_grad()
        loss = policy.model(
            policy.normalise_proprio(batch.proprio),
            noise=noise,
            timestep=t,
            actions=latent,
            **image_inputs(policy, batch),
        ).loss.mean()
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(ours(), theirs(), atol=1e-5, rtol=1e-5)
    compare(benchmark, "loss + backward, batch 32", ours, theirs, rounds=10)


def compare(benchmark, what, ours, theirs, rounds):
    """Prints how much faster ours is."""
    fast, slow = in_turn(benchmark, ours, theirs, rounds=rounds)
    benchmark.extra_info.update(transformers_ms=slow * 1e3, ours_ms=fast * 1e3, ratio=slow / fast)
    print(f"\n{what}: transformers {slow * 1e3:.2f} ms, ours {fast * 1e3:.2f} ms, {slow / fast:.2f}x")
    benchmark.pedantic(ours, rounds=5)


@pytest.mark.benchmark(group="pi0: 8 loss draws against 1, 32 observations")
@pytest.mark.parametrize("name", TINY_PI0)
def test_pi0_loss_draws(benchmark, name):
    """Prefix, loss and backward; the prefix learns too, and is encoded once whatever the number of draws."""
    spec, policy = make(name)
    batch, latent = inputs(spec, policy, 32), torch.zeros(32, 8, 7)

    def loss(k):
        x, t = torch.randn(32, k, 8, 7), torch.rand(32, k)

        def learn():
            policy.zero_grad()
            policy.draw_loss(policy.encode(batch), latent, t, x).mean().backward()

        return learn

    one, eight = in_turn(benchmark, loss(1), loss(8), rounds=8)
    bound = operations(loss(8)) / operations(loss(1))
    benchmark.extra_info.update(one_ms=one * 1e3, eight_ms=eight * 1e3, ratio=eight / one, operations=bound)
    print(f"\n{name}: 1 draw {one * 1e3:.1f} ms, 8 draws {eight * 1e3:.1f} ms, {eight / one:.2f}x; ", end="")
    print(f"{bound:.2f}x the operations")
    benchmark.pedantic(loss(8), rounds=3)
