"""Made-up demonstrations of LIBERO-Object, and datasets of them on disk."""

from pathlib import Path

import numpy as np
from vlarl_bench.tasks.libero.suite import LIBERO_OBJECT, LiberoSuite

from vlarl_bench.demo_store import writing
from vlarl_bench.demonstrations import load_demonstrations
from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Demonstration, Observation, Task

SUITE = LIBERO_OBJECT
STATE, PIXELS = SUITE.protocol("state"), SUITE.protocol("pixels")
TASK, OTHER = SUITE.tasks[6], SUITE.tasks[8]
NAMES = {TASK: ("butter_1", "basket_1"), OTHER: ("basket_1", "milk_1", "ketchup_1")}


class OneTask(LiberoSuite):
    tasks = (TASK,)


def episode(init_state: int, steps: int, pixels: bool = False, task: Task = TASK) -> Demonstration:
    rng = np.random.default_rng([init_state, steps])
    observations = tuple(
        Observation(
            task.instruction,
            rng.normal(size=8).astype(np.float32),
            {} if pixels else {name: rng.normal(size=7).astype(np.float32) for name in NAMES[task]},
            {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in PIXELS.cameras} if pixels else {},
        )
        for _ in range(steps)
    )
    return Demonstration(task, init_state, True, observations, rng.uniform(-1, 1, (steps, 7)).astype(np.float32))


def write(folder: Path, episodes, protocol=STATE, seed: int = 0) -> Path:
    """One batch; attempt j began in the episode's init state."""
    root = folder / SUITE.name
    with writing(root, SUITE, SUITE.name, protocol, seed) as writer:
        writer.append(episodes[0].task, [e.init_state for e in episodes], episodes)
    return root


def load(folder: Path, tasks=(TASK,), protocol=STATE, limit=None):
    return load_demonstrations(SUITE, folder, tasks, protocol, limit)


def same(first: Demonstration, second: Demonstration, init_state: bool = True) -> bool:
    def parts(demonstration: Demonstration) -> list[np.ndarray]:
        seen = [
            array
            for observation in demonstration.observations
            for shown in ({"": observation.proprio}, observation.objects, observation.images)
            for _, array in sorted(shown.items())
        ]
        return [demonstration.actions, *seen]

    def names(demonstration: Demonstration) -> list[object]:
        return [(o.instruction, sorted(o.objects), sorted(o.images)) for o in demonstration.observations]

    return (
        (first.task, first.success) == (second.task, second.success)
        and (not init_state or first.init_state == second.init_state)
        and names(first) == names(second)
        and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def one_line(error: BenchError) -> str:
    assert "\n" not in str(error)
    return str(error)
