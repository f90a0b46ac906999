"""LIBERO's speed against the stock environment and against raw `mj_step`. `make bench-sim`; read the ratios.

What runs in one process is timed in CPU seconds, all threads together, so that whatever else the machine does matters
little. Workers are timed by the busiest one's CPU seconds: the time they take on a machine with a core for each.
"""

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import time
from functools import partial

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.pool import Pool

SUITE = registry.get("suite", "libero_object")
STATE = SUITE.protocol("state")
PIXELS = dataclasses.replace(SUITE.protocol("pixels"), image_size=128)
CPU = partial(pytest.mark.benchmark, timer=time.process_time)
CHUNK = np.random.default_rng(0).uniform(-1, 1, (8, 7))


def stock(task, size=0):
    """LIBERO's own environment, constructed; with `size` its two cameras render at every step."""
    from libero.libero import benchmark as upstream
    from libero.libero import get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    with contextlib.redirect_stdout(io.StringIO()):
        suite = upstream.get_benchmark("libero_object")()
        named = suite.get_task(task)
        env = ControlEnv(
            bddl_file_name=f"{get_libero_path('bddl_files')}/{named.problem_folder}/{named.bddl_file}",
            use_camera_obs=bool(size),
            has_offscreen_renderer=bool(size),
            camera_heights=size or 1,
            camera_widths=size or 1,
            horizon=10**9,
        )
    env.init_states = suite.get_task_init_states(task)
    return env


def stock_reset(env, state):
    """As every evaluation does it, with the settle steps."""
    env.seed(0)
    env.reset()
    env.set_init_state(env.init_states[state])
    for _ in range(STATE.settle_steps):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))


def stock_close(env):
    """robosuite frees from whichever OpenGL context is current."""
    if env.sim._render_context_offscreen:
        env.sim._render_context_offscreen.gl_ctx.make_current()
    env.close()


def side(benchmark, untimed):
    """Of stock's pictures, in pixels, which it takes at every step; `untimed` where nothing is timed."""
    return 128 if benchmark.enabled else untimed


@pytest.fixture(scope="module")
def simulator():
    opened = SUITE.open(SUITE.tasks[0], STATE)
    opened.reset(0)
    opened.step(CHUNK[:1])  # compiles
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def seeing():
    opened = SUITE.open(SUITE.tasks[0], PIXELS)
    opened.reset(0)
    opened.observe()
    yield opened
    opened.close()


def again(simulator):
    """What puts the simulator back into one state before each round: an arm that moves about costs more."""
    simulator.reset(0)
    start = simulator.save()
    return lambda: simulator.restore(start)


def look(simulator, chunk):
    simulator.step(chunk)
    return simulator.observe()


class TestStep:
    pytestmark = CPU(group="one step (25 substeps), nothing rendered")

    def test_ours(self, benchmark, simulator):
        benchmark.extra_info.update(role="ours", ratio=4, share=0.6)
        benchmark.pedantic(simulator.step, (CHUNK[:1],), setup=again(simulator), rounds=500)

    def test_raw_mj_step(self, benchmark, simulator):
        import mujoco

        benchmark.extra_info.update(role="bound")

        def substeps():
            for _ in range(25):
                mujoco.mj_step(simulator.model, simulator.data)

        benchmark.pedantic(substeps, setup=again(simulator), rounds=500)

    def test_stock(self, benchmark):
        benchmark.extra_info.update(role="stock")
        env = stock(0)
        stock_reset(env, 0)
        benchmark.pedantic(env.step, (CHUNK[0],), rounds=300, warmup_rounds=5)
        stock_close(env)


class TestCameras:
    """Stock renders at each of the 8 steps, ours when somebody looks."""

    pytestmark = CPU(group="8 steps and a look through 2 cameras at 128x128")

    def test_ours(self, benchmark, seeing):
        benchmark.extra_info.update(role="ours", ratio=6)
        seeing.reset(0)
        benchmark.pedantic(look, (seeing, CHUNK), rounds=10, warmup_rounds=1)

    def test_stock(self, benchmark):
        benchmark.extra_info.update(role="stock")
        env = stock(0, size=side(benchmark, untimed=16))
        env.seed(0)
        env.reset()

        def steps():
            for action in CHUNK:
                env.step(action)

        benchmark.pedantic(steps, rounds=3, warmup_rounds=1)
        stock_close(env)


class TestOpenState:
    pytestmark = CPU(group="open the next task and reset it, state")

    def test_ours(self, benchmark):
        benchmark.extra_info.update(role="ours", ratio=3)
        tasks = itertools.cycle(SUITE.tasks)

        def switch():
            simulator = SUITE.open(next(tasks), STATE)
            simulator.reset(0)
            simulator.close()

        benchmark.pedantic(switch, rounds=6, warmup_rounds=1)

    def test_stock(self, benchmark):
        benchmark.extra_info.update(role="stock")
        tasks = itertools.cycle(range(10))

        def switch():
            env = stock(next(tasks))
            stock_reset(env, 0)
            stock_close(env)

        benchmark.pedantic(switch, rounds=3, warmup_rounds=1)


class TestOpenPixels:
    pytestmark = CPU(group="open the next task, reset and look, pixels")

    def test_ours(self, benchmark):
        benchmark.extra_info.update(role="ours", ratio=3)
        tasks = itertools.cycle(SUITE.tasks)

        def switch():
            simulator = SUITE.open(next(tasks), PIXELS)
            simulator.reset(0)
            simulator.observe()
            simulator.close()

        benchmark.pedantic(switch, rounds=6, warmup_rounds=1)

    def test_stock(self, benchmark):
        benchmark.extra_info.update(role="stock")
        tasks = itertools.cycle(range(10))

        def switch():
            env = stock(next(tasks), size=side(benchmark, untimed=0))  # its pictures were tried above
            stock_reset(env, 0)
            stock_close(env)

        benchmark.pedantic(switch, rounds=2, warmup_rounds=1)


class TestReset:
    """To a state not seen before, with the settle steps; ours restores a state that it has seen in under 1 ms."""

    pytestmark = CPU(group="reset an open task, state")

    def test_ours(self, benchmark, simulator):
        benchmark.extra_info.update(role="ours", ratio=3)
        states = itertools.cycle(range(50))

        def reset():
            simulator._settled.clear()
            simulator.reset(next(states))

        benchmark.pedantic(reset, rounds=20, warmup_rounds=1)

    def test_stock(self, benchmark):
        benchmark.extra_info.update(role="stock")
        env = stock(0)
        states = itertools.cycle(range(50))
        benchmark.pedantic(lambda: stock_reset(env, next(states)), rounds=3, warmup_rounds=1)
        stock_close(env)


def busiest_worker():
    """CPU seconds of the worker process that had most."""
    pids = [process.pid for process in multiprocessing.active_children()]
    clocks = [(~pid << 3) | 2 for pid in pids]  # clock_getcpuclockid(3), which Python does not have
    return max(map(time.clock_gettime, clocks), default=time.process_time())


def chunks_on(workers, protocol, benchmark):
    """8 episodes of one task, a chunk of 8 steps each; one episode a worker, blind, where nothing is timed."""
    slots, protocol = (range(8), protocol) if benchmark.enabled else (range(workers), STATE)
    with Pool(SUITE, protocol, workers) as pool:
        pool.call("reset", {slot: (SUITE.tasks[0], slot) for slot in slots})
        benchmark.pedantic(pool.call, ("step", dict.fromkeys(slots, CHUNK)), rounds=8, warmup_rounds=2)


class TestWorkersState:
    pytestmark = pytest.mark.benchmark(group="2 workers against 1, 8 chunks of 8, state", timer=busiest_worker)

    def test_two(self, benchmark):
        benchmark.extra_info.update(role="ours", ratio=1.8)
        chunks_on(2, STATE, benchmark)

    def test_one(self, benchmark):
        benchmark.extra_info.update(role="stock")
        chunks_on(1, STATE, benchmark)


class TestWorkersPixels:
    pytestmark = pytest.mark.benchmark(group="2 workers against 1, 8 chunks of 8, two cameras", timer=busiest_worker)

    def test_two(self, benchmark):
        benchmark.extra_info.update(role="ours", ratio=1.8)
        chunks_on(2, PIXELS, benchmark)

    def test_one(self, benchmark):
        benchmark.extra_info.update(role="stock")
        chunks_on(1, PIXELS, benchmark)
