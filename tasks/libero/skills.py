"""The expert's skills with loose things: pick, place, push. `joints.py` has those with drawers, doors and knobs."""

from typing import TYPE_CHECKING

import numpy as np

from .grasp import Scene, middle, plan_grasp
from .motion import CLOSED, OPEN, Actions, Arm, shorten

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

    from .simulator import LiberoSimulator

ATTEMPTS = 3


class Skills:
    """What the expert can do with one scene."""

    def __init__(self, simulator: "LiberoSimulator", rng: np.random.Generator) -> None:
        self.arm = Arm(simulator)
        self.scene = Scene(simulator)
        self.rng = rng
        self.held: Rotation = self.arm.resting
        """Orientation in which the object was gripped; it is carried like that."""

    def pick_and_place(self, name: str, target: str) -> Actions:
        """Moves a thing onto or into another one."""
        arm = self.arm
        for attempt in range(ATTEMPTS):
            before = self.scene.cloud(name)[:, 2].min()
            yield from self.pick(name, first=attempt == 0)
            if self.scene.cloud(name)[:, 2].min() > before + 0.02:
                yield from self.place(name, target)
                return
            arm.gripper = OPEN
            yield from arm.move(arm.position + [0, 0, 0.08], self.held, 0.02, steps=15, turn_tolerance=3)

    def pick(self, name: str, first: bool) -> Actions:
        """Grips a thing from above and lifts it."""
        arm = self.arm
        grasp = plan_grasp(self.scene, name, None if first else self.rng)
        self.held = arm.turned(grasp.yaw)
        above = grasp.position + [0, 0, 0.10]
        arm.gripper = OPEN
        yield from arm.rise_to(above[2], self.held)
        yield from arm.move(above, self.held, 0.015, steps=60)
        yield from arm.move(grasp.position + [0, 0, 0.03], self.held, 0.01, steps=15)
        yield from arm.move(grasp.position, self.held, 0.006, steps=20, speed=0.5)
        yield from arm.close()
        yield from arm.move(arm.position + [0, 0, 0.10], self.held, 0.02, steps=20, speed=0.6, turn_tolerance=3)

    def place(self, name: str, target: str) -> Actions:
        """Sets the held thing down on or in another one."""
        arm = self.arm
        goal = self.scene.support(target)
        clearance, drop = (0.12, 0.06) if "basket" in target else (0.06, 0.003)
        rise = max(0.0, goal[2] + clearance - self.scene.cloud(name)[:, 2].min())
        yield from arm.move(arm.position + [0, 0, rise], self.held, 0.02, steps=40, turn_tolerance=1)
        # Twice, since the object swings and slips in the fingers on the way.
        for tolerance, steps in ((0.012, 80), (0.006, 15)):
            offset = goal[:2] - middle(self.scene.cloud(name))
            yield from arm.move(
                arm.position + [*offset, 0], self.held, tolerance, steps=steps, speed=0.8, turn_tolerance=0.3
            )
        for height, tolerance, steps, speed in ((drop + 0.03, 0.02, 40, 1.0), (drop, 0.01, 20, 0.5)):
            descent = min(0.0, goal[2] + height - self.scene.cloud(name)[:, 2].min())
            yield from arm.move(
                arm.position + [0, 0, descent], self.held, tolerance, steps=steps, speed=speed, turn_tolerance=0.3
            )
        arm.gripper = OPEN
        yield from arm.hold(6)
        yield from arm.move(arm.position + [0, 0, 0.15], self.held, 0.03, steps=20, turn_tolerance=1)
        yield from arm.hold(5)

    def push(self, name: str, target: str) -> Actions:
        """Slides a thing over the table to a region, with closed fingers behind it."""
        arm, scene = self.arm, self.scene
        goal = scene.support(target)[:2]
        cloud = scene.cloud(name)
        radius = np.ptp(cloud[:, :2], 0).max() / 2
        height = cloud[:, 2].min() + 0.015
        arm.gripper = CLOSED
        way = _direction(goal - middle(cloud))
        start = np.append(middle(cloud) - way * (radius + 0.05), height)
        yield from arm.rise_to(height + 0.15, arm.resting)
        yield from arm.move(start + [0, 0, 0.12], arm.resting, 0.02, steps=60)
        yield from arm.move(start, arm.resting, 0.01, steps=30)
        for _ in range(150):
            centre = middle(scene.cloud(name))
            left = goal - centre
            if np.linalg.norm(left) < 0.02:
                break
            way = _direction(left)
            behind = centre - way * (radius + 0.01)  # where the fingers touch the edge and push it straight
            astray = behind - arm.position[:2]
            astray -= way * (astray @ way)
            step = np.append(way * 0.25 + astray * 16.0, (height - arm.position[2]) * 16.0)
            turn = (arm.resting * arm.simulator.eef_rotation().inv()).as_rotvec()
            yield arm.action(np.append(shorten(step, 0.5), shorten(turn * 2.0, 0.6)))
        yield from arm.move(arm.position - np.append(way * 0.05, 0), arm.resting, 0.02, steps=10, turn_tolerance=1)
        yield from arm.move(arm.position + [0, 0, 0.12], arm.resting, 0.03, steps=20, turn_tolerance=1)


def _direction(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return unit
