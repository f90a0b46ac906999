"""The expert's skills with loose things: pick, place, push. `joints.py` has those with drawers, doors and knobs."""

from typing import TYPE_CHECKING

import numpy as np

from .grasp import Scene, middle, plan_grasp
from .motion import CLOSED, OPEN, Actions, Arm

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
        grasp = plan_grasp(self.scene, name, None if first else self.rng, arm.lean)
        above = grasp.position + [0, 0, 0.10]
        self.held = arm.within_reach(above, arm.within_reach(grasp.position, arm.turned(grasp.yaw)))
        arm.gripper = OPEN
        yield from arm.rise_to(above[2], self.held)
        yield from arm.move(above, self.held, 0.015, steps=60)
        yield from arm.move(grasp.position + [0, 0, 0.03], self.held, 0.01, steps=15)
        if np.linalg.norm(grasp.position + [0, 0, 0.03] - arm.position) > 0.012:  # A stretched arm swings past.
            yield from arm.move(grasp.position + [0, 0, 0.03], self.held, 0.006, steps=30, gain=6.0)
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
        """Slides a thing over the table to a region, with closed fingers: against the rim of a dish from inside.

        From inside the dish follows the fingers; pushed from behind it would turn aside.
        """
        arm, scene = self.arm, self.scene
        goal = scene.support(target)[:2]
        cloud = scene.cloud(name)
        bottom, radius = cloud[:, 2].min(), np.ptp(cloud[:, :2], 0).max() / 2
        hollow = scene.floor(name) < cloud[:, 2].max() - 0.005
        ahead = radius - 0.03 if hollow else -radius - 0.012
        height = (scene.floor(name) if hollow else bottom) + 0.008
        arm.gripper = CLOSED
        start = middle(cloud) + _direction(goal - middle(cloud)) * (0 if hollow else ahead - 0.03)
        yield from arm.rise_to(height + 0.15, arm.resting)
        yield from arm.move([*start, height + 0.10], arm.resting, 0.02, steps=60)
        yield from arm.move([*start, height], arm.resting, 0.008, steps=30, speed=0.5)
        for _ in range(150):
            left = goal - middle(scene.cloud(name))
            if np.linalg.norm(left) < 0.015:
                break
            way = _direction(left)
            contact = middle(scene.cloud(name)) + way * ahead
            yield from arm.move([*(contact + way * 0.02), height], arm.resting, 0.0, steps=1, speed=0.4)
        yield from arm.move(arm.position + [0, 0, 0.12], arm.resting, 0.03, steps=20, turn_tolerance=1)


def _direction(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return unit
