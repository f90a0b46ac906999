"""A scripted expert for LIBERO's pick-and-place tasks. It sees the simulator's true poses; only its actions are kept.

The expert is a generator of actions: a skill yields one clean action, the episode loop executes it (with a little
noise, so that the demonstrations also cover recovery), and the skill looks at the new state to choose the next one.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Demonstration, Observation, Task

from .grasp import Scene, middle, plan_grasp

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

    from .simulator import LiberoSimulator

NOISE = 0.05
"""Std of the executed noise on the translation actions. More of it makes grasps miss: they need 6 mm."""
ROTATION_NOISE = 0.3 * NOISE
NOISE_RENEWAL = 0.1
"""Chance a step that a new noise is drawn; in between it stays, since white noise would average out."""

OPEN, CLOSED = -1.0, 1.0
ATTEMPTS = 3


def demonstrate(simulator: "LiberoSimulator", task: Task, init_state: int, seed: int) -> Demonstration:
    """One expert episode, at most the protocol's horizon long, from a stored initial state.

    The labels are the expert's clean actions; what is executed is the clean action plus correlated noise. The result
    is a pure function of the arguments. In `pixels` mode, where looking costs far more than stepping, the observations
    are made in a second pass that repeats the executed actions, and only when the episode succeeded.

    Raises BenchError when the task needs a skill that the expert lacks.
    """
    rng = np.random.default_rng([seed, init_state, zlib.crc32(task.key.encode())])
    simulator.reset(init_state)
    horizon = simulator.protocol.horizon[task.suite]
    labels: list[np.ndarray] = []
    done: list[np.ndarray] = []
    observations: list[Observation] = []
    look_later = simulator.protocol.observation == "pixels"
    success = False
    noise = np.zeros(6)
    scale = np.repeat([NOISE, ROTATION_NOISE], 3)
    for action in Expert(simulator, task, rng).actions():
        if rng.random() < NOISE_RENEWAL:
            noise = rng.normal(size=6) * scale
        label = action.astype(np.float32)
        executed = label.copy()
        executed[:6] = np.clip(executed[:6] + noise, -1, 1)
        labels.append(label)
        done.append(executed)
        if not look_later:
            observations.append(simulator.observe())
        success = simulator.step(executed[None]).success
        if success or len(labels) == horizon:
            break
    if success and look_later:
        simulator.reset(init_state)
        for executed in done:
            observations.append(simulator.observe())
            simulator.step(executed[None])
    return Demonstration(task, init_state, success, tuple(observations), np.array(labels, np.float32).reshape(-1, 7))


class Expert:
    """Skills over one episode. All positions are world coordinates in metres."""

    def __init__(self, simulator: "LiberoSimulator", task: Task, rng: np.random.Generator) -> None:
        from scipy.spatial.transform import Rotation as rotation

        self.rotation = rotation
        self.simulator = simulator
        self.task = task
        self.rng = rng
        self.gripper = OPEN
        self.scene = Scene(simulator)
        self.resting = simulator.eef_rotation()
        self.held: Rotation = self.resting
        """Orientation in which the object was gripped; it is carried like that."""

    def actions(self) -> Iterator[np.ndarray]:
        """Yields clean [7] actions until the goals hold or every attempt is used up."""
        skills = {"on": self.pick_and_place, "in": self.pick_and_place}
        for predicate, *arguments in self.simulator.env.parsed_problem["goal_state"]:
            skill = skills.get(predicate.lower())
            if skill is None:
                known = ", ".join(skills)
                raise BenchError(f"task: {self.task.key!r} needs the skill {predicate!r}; the expert knows {known}")
            for _ in range(ATTEMPTS):
                if self.simulator.env._eval_predicate([predicate.lower(), *arguments]):
                    break
                yield from skill(*arguments)
        yield from self.hold(20)  # Objects may still be falling into place.

    # Skills

    def pick_and_place(self, name: str, target: str) -> Iterator[np.ndarray]:
        for attempt in range(ATTEMPTS):
            before = self.scene.cloud(name)[:, 2].min()
            yield from self.pick(name, first=attempt == 0)
            if self.scene.cloud(name)[:, 2].min() > before + 0.02:
                yield from self.place(name, target)
                return
            self.gripper = OPEN
            yield from self.move(self.position + [0, 0, 0.08], self.held, 0.02, steps=15, turn_tolerance=3)

    def pick(self, name: str, first: bool) -> Iterator[np.ndarray]:
        grasp = plan_grasp(self.scene, name, None if first else self.rng)
        self.held = self.rotation.from_euler("z", grasp.yaw) * self.resting
        above = grasp.position + [0, 0, 0.10]
        self.gripper = OPEN
        if self.position[2] < above[2] - 0.01:
            yield from self.move([*self.position[:2], above[2]], self.held, 0.02, steps=30, turn_tolerance=3)
        yield from self.move(above, self.held, 0.015, steps=60)
        yield from self.move(grasp.position + [0, 0, 0.03], self.held, 0.01, steps=15)
        yield from self.move(grasp.position, self.held, 0.006, steps=20, speed=0.5)
        yield from self.close()
        yield from self.move(self.position + [0, 0, 0.10], self.held, 0.02, steps=20, speed=0.6, turn_tolerance=3)

    def place(self, name: str, target: str) -> Iterator[np.ndarray]:
        goal = self.scene.support(target)
        clearance, drop = (0.12, 0.06) if "basket" in target else (0.06, 0.003)
        rise = max(0.0, goal[2] + clearance - self.scene.cloud(name)[:, 2].min())
        yield from self.move(self.position + [0, 0, rise], self.held, 0.02, steps=40, turn_tolerance=1)
        # Twice, since the object swings and slips in the fingers on the way.
        for tolerance, steps in ((0.012, 80), (0.006, 15)):
            offset = goal[:2] - middle(self.scene.cloud(name))
            yield from self.move(
                self.position + [*offset, 0], self.held, tolerance, steps=steps, speed=0.8, turn_tolerance=0.3
            )
        for height, tolerance, steps, speed in ((drop + 0.03, 0.02, 40, 1.0), (drop, 0.01, 20, 0.5)):
            descent = min(0.0, goal[2] + height - self.scene.cloud(name)[:, 2].min())
            yield from self.move(
                self.position + [0, 0, descent], self.held, tolerance, steps=steps, speed=speed, turn_tolerance=0.3
            )
        self.gripper = OPEN
        yield from self.hold(6)
        yield from self.move(self.position + [0, 0, 0.15], self.held, 0.03, steps=20, turn_tolerance=1)
        yield from self.hold(5)

    # Motion

    @property
    def position(self) -> np.ndarray:
        return np.array(self.simulator.eef_position(), np.float64)

    def action(self, pose: np.ndarray) -> np.ndarray:
        return np.append(np.clip(pose, -1, 1), self.gripper)

    def hold(self, steps: int) -> Iterator[np.ndarray]:
        for _ in range(steps):
            yield self.action(np.zeros(6))

    def move(
        self,
        goal: Sequence[float] | np.ndarray,
        orientation: "Rotation",
        tolerance: float,
        *,
        steps: int,
        speed: float = 1.0,
        turn_tolerance: float = 0.08,
    ) -> Iterator[np.ndarray]:
        """Servoes the grip site to `goal` within `tolerance` (m; rad for the turn), for at most `steps` steps."""
        drift = np.zeros(6)
        for _ in range(steps):
            error = np.asarray(goal) - self.position
            turn = (orientation * self.simulator.eef_rotation().inv()).as_rotvec()
            if np.linalg.norm(error) < tolerance and np.linalg.norm(turn) < turn_tolerance:
                return
            if np.linalg.norm(error) < 0.04:
                # Robosuite's controller treats translation and rotation apart; where the arm is folded the two pull
                # against each other and come to rest centimetres off, which only an integral term overcomes.
                drift = np.clip(drift + np.append(error * 1.5, turn * 0.2), -0.6, 0.6)
            pose = np.append(shorten(error * 16.0, speed), shorten(turn * 2.0, 0.6))
            yield self.action(pose + drift)

    def close(self) -> Iterator[np.ndarray]:
        """Closes the gripper until the fingers stand still."""
        self.gripper = CLOSED
        still = 0
        width = self.simulator.gripper_width()
        for step in range(25):
            yield self.action(np.zeros(6))
            previous, width = width, self.simulator.gripper_width()
            still = still + 1 if abs(previous - width) < 4e-4 else 0
            if still >= 3 and step > 3:
                return


def shorten(vector: np.ndarray, limit: float) -> np.ndarray:
    """Scales a vector down, direction kept, until no component exceeds `limit`."""
    return vector * min(1.0, limit / max(float(np.abs(vector).max()), 1e-9))
