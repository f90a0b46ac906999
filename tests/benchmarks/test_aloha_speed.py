"""Speed of the ALOHA simulator against stock gym-aloha and against MuJoCo itself.

`python tests/benchmarks/test_aloha_speed.py` prints the tables of docs/suites/aloha.md. What is compared takes turns in
one process and the fastest turn counts, since whatever else a machine does only ever slows it down.
"""

import subprocess
import sys
import time

import gym_aloha  # noqa: F401  (registers the environments)
import gymnasium
import mujoco
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE

from vlarl_bench import registry

ENVIRONMENTS = {"aloha_transfer_cube": "AlohaTransferCube-v0", "aloha_insertion": "AlohaInsertion-v0"}
CHUNK = 10
ACTIONS = np.tile([*START_ARM_POSE[:6], 0.5, *START_ARM_POSE[8:14], 0.5], (CHUNK, 1))
SUBSTEPS = 10
"""Of 2 ms, in an environment step."""


def open_stock(suite_name):
    """gym-aloha's environment with a camera, as its users make it, after a reset."""
    env = gymnasium.make(f"gym_aloha/{ENVIRONMENTS[suite_name]}", obs_type="pixels_agent_pos", disable_env_checker=True)
    env = env.unwrapped
    env.reset(seed=0)
    return env


def open_ours(suite_name, observation, protocol="tiny"):
    """Our simulator after a reset and a first look, which makes the renderer."""
    suite = registry.get("suite", suite_name)
    simulator = suite.open(suite.tasks[0], suite.protocol(observation, protocol))
    simulator.reset(0)
    simulator.observe()
    return simulator


def contenders(suite_name):
    """Name -> (function that executes some environment steps, how many), for one process and one task."""
    stock, blind = open_stock(suite_name), open_stock(suite_name)
    # Without cameras stock gym-aloha does not exist; this is its physics and its reward.
    blind._env.physics.render = lambda height, width, camera_id: np.zeros((1, 1, 3), np.uint8)
    state, openpi, tiny = (
        open_ours(suite_name, *which) for which in (("state",), ("pixels", "openpi"), ("pixels", "tiny"))
    )
    for _ in range(20):  # until nothing falls any more, so that all have the same contacts
        state.step(ACTIONS), openpi.step(ACTIONS), tiny.step(ACTIONS)
        for action in ACTIONS:
            blind.step(action)
    alone = mujoco.MjData(state.model)
    mujoco.mj_setState(state.model, alone, state.save().physics, mujoco.mjtState.mjSTATE_INTEGRATION)

    def look_after_a_chunk(simulator):
        simulator.step(ACTIONS)
        simulator.observe()

    return {
        "MuJoCo alone (10 mj_step)": (lambda: mujoco.mj_step(state.model, alone, SUBSTEPS * CHUNK), CHUNK),
        "ours, no image": (lambda: look_after_a_chunk(state), CHUNK),
        "stock, images switched off": (lambda: [blind.step(action) for action in ACTIONS], CHUNK),
        "ours, `tiny` images (2 cameras), chunks of 10": (lambda: look_after_a_chunk(tiny), CHUNK),
        "ours, stock's image (480 x 640), chunks of 10": (lambda: look_after_a_chunk(openpi), CHUNK),
        "stock, `env.step`": (lambda: stock.step(ACTIONS[0]), 1),
    }


def fastest(contenders, rounds):
    """Seconds an environment step of each contender: the fastest of some rounds, in which all take turns."""
    times = {name: [] for name, _ in contenders}
    for _ in range(rounds):
        for name, (run, steps) in contenders:
            began = time.perf_counter()
            while time.perf_counter() < began + 0.01:  # a turn: several runs of what is short
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) / steps)
    return {name: min(measured) for name, measured in times.items()}


def step_times(suite_name):
    """`fastest` of all contenders; those that render nothing take a hundred short turns among themselves."""
    competing = list(contenders(suite_name).items())
    return fastest(competing[:3], rounds=100) | fastest(competing[3:], rounds=15)


def opening_times(rounds):
    """Seconds to have a task open and reset, again in the same process; and to reset an open one."""
    suite_name = "aloha_insertion"
    simulator, stock = open_ours(suite_name, "state"), open_stock(suite_name)
    jobs = {
        "open and reset, ours": lambda: open_ours(suite_name, "state"),
        "open and reset, ours, `tiny` images": lambda: open_ours(suite_name, "pixels").close(),
        "open and reset, stock": lambda: open_stock(suite_name),
        "reset, ours": lambda: (simulator.reset(1), simulator.observe()),
        "reset, stock": lambda: stock.reset(seed=1),
    }
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: min(measured) for name, measured in times.items()}


OURS = """
from vlarl_bench import registry
suite = registry.get("suite", "aloha")
opened = [suite.open(task, suite.protocol({observation!r})) for task in suite.tasks]
for simulator in opened:
    simulator.reset(0), simulator.observe()
"""
STOCK = """
import gym_aloha, gymnasium
ids = "gym_aloha/AlohaTransferCube-v0", "gym_aloha/AlohaInsertion-v0"
opened = [gymnasium.make(name, obs_type="pixels_agent_pos") for name in ids]
for env in opened:
    env.reset(seed=0)
"""


def resident_memory(code):
    """MiB that a fresh process has used at most when it has run `code`."""
    code += "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) // 1024


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def competing(request):
    return contenders(request.param)


COMPARED = {
    "10 steps and a 480x640 image": {
        "ours": "ours, stock's image (480 x 640), chunks of 10",
        "stock": "stock, `env.step`",
        "ratio": 8,
    },
    "10 steps, nothing rendered": {
        "ours": "ours, no image",
        "stock": "stock, images switched off",
        "bound": "MuJoCo alone (10 mj_step)",
        "share": 0.6,
    },
}


@pytest.mark.parametrize(
    ("what", "role"),
    [(what, role) for what in COMPARED for role in ("ours", "stock", "bound") if role in COMPARED[what]],
)
def test_speed(benchmark, request, competing, what, role):
    suite_name, compared = request.node.callspec.params["competing"], COMPARED[what]
    benchmark.group = f"{suite_name}: {what}"
    targets = {key: compared[key] for key in ("ratio", "share") if role == "ours" and key in compared}
    benchmark.extra_info.update(role=role, **targets)
    run, steps = competing[compared[role]]

    def chunk():
        for _ in range(CHUNK // steps):
            run()

    benchmark.pedantic(chunk, rounds=3 if steps == 1 else 30, warmup_rounds=1)


def main():
    """Prints everything as Markdown."""
    print("| an environment step | transfer cube, ms | insertion, ms |\n|---|---|---|")
    cube, insertion = (step_times(name) for name in ENVIRONMENTS)
    for name in cube:
        print(f"| {name} | {cube[name] * 1e3:.2f} | {insertion[name] * 1e3:.2f} |")
    for times in (cube, insertion):
        mujoco_alone, ours, blind, tiny, shown, stock = times.values()
        print(
            f"\nours over stock: {stock / shown:.0f}x with its image, {stock / tiny:.0f}x with `tiny` images, "
            f"{blind / ours:.2f}x without images; {mujoco_alone / ours:.0%} of the speed of MuJoCo alone"
        )
    print("\n| once in a while | ms |\n|---|---|")
    for name, seconds in opening_times(rounds=5).items():
        print(f"| {name} | {seconds * 1e3:.1f} |")
    print("\n| a process with | resident, MiB |\n|---|---|")
    state, pixels = (OURS.format(observation=observation) for observation in ("state", "pixels"))
    for name, code in {
        "both tasks, ours, `state`": state,
        "both, ours, `pixels`": pixels,
        "both, stock": STOCK,
    }.items():
        print(f"| {name} | {resident_memory(code)} |")


if __name__ == "__main__":
    main()
