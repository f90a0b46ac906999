"""The expert's skills with loose things: pick, place, push. `joints.py` has those with drawers, doors and knobs."""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from .grasp import Scene, finger_axes, middle, plan_grasp
from .joints import joint_of
from .motion import CLOSED, OPEN, Actions, Arm

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

    from .simulator import LiberoSimulator

ATTEMPTS = 3
MOST_SWINGS = 16
"""Of the hand, to shake something off."""
HAND_ROOM = 0.1
"""m beside a thing that the open hand needs when it comes down on it."""


class Skills:
    """What the expert can do with one scene."""

    def __init__(self, simulator: "LiberoSimulator", rng: np.random.Generator) -> None:
        self.arm = Arm(simulator)
        self.scene = Scene(simulator)
        self.rng = rng
        self.held: Rotation = self.arm.resting
        """Orientation in which the object was gripped; it is carried like that."""

    def pick_and_place(self, name: str, target: str, aside: float = 0.0) -> Actions:
        """Moves a thing onto or into another one; `aside` (m) of its middle, along x, where it shares the place."""
        arm = self.arm
        for attempt in range(ATTEMPTS):
            before = self.scene.cloud(name)[:, 2].min()
            yield from self.pick(name, target, first=attempt == 0)
            if self.scene.cloud(name)[:, 2].min() > before + 0.02:
                yield from self.place(name, target, aside)
                return
            arm.gripper = OPEN
            yield from arm.move(arm.position + [0, 0, 0.08], self.held, 0.02, steps=15, turn_tolerance=3)

    def pick(self, name: str, target: str, first: bool) -> Actions:
        """Grips a thing from above and lifts it."""
        arm = self.arm
        grasp = plan_grasp(self.scene, name, None if first else self.rng, arm.lean, self._way(name, target))
        above = grasp.position + [0, 0, 0.10]
        self.held = arm.within_reach(above, arm.within_reach(grasp.position, arm.turned(grasp.yaw)))
        arm.gripper = OPEN
        yield from arm.rise_to(above[2], self.held)
        yield from arm.move(above, self.held, 0.015, steps=60)
        if np.linalg.norm(above - arm.position) > 0.025:  # Something is in the way: over it.
            yield from arm.rise_to(above[2] + 0.12, self.held)
            yield from arm.move(above + [0, 0, 0.12], self.held, 0.015, steps=30)
            yield from arm.move(above, self.held, 0.015, steps=20)
        yield from arm.move(grasp.position + [0, 0, 0.03], self.held, 0.01, steps=15)
        if arm.lean(above) and np.linalg.norm(grasp.position + [0, 0, 0.03] - arm.position) > 0.012:
            # A stretched arm swings past.
            yield from arm.move(grasp.position + [0, 0, 0.03], self.held, 0.006, steps=30, gain=6.0)
        yield from arm.move(grasp.position, self.held, 0.006, steps=20, speed=0.5)
        bottoms = self._bottoms()
        yield from arm.close(grasp.position if grasp.rim else None)
        yield from arm.move(arm.position + [0, 0, 0.10], self.held, 0.02, steps=20, speed=0.6, turn_tolerance=3)
        yield from self._shake_off(name, bottoms)

    def _bottoms(self) -> dict[str, float]:
        """m: the lowest point of every loose thing."""
        return {other: float(self.scene.cloud(other)[:, 2].min()) for other in self.scene.env.objects_dict}

    def _shake_off(self, name: str, before: dict[str, float]) -> Actions:
        """Rolls the hand to and fro about the line of the rim until nothing hangs from the lifted thing any more.

        What a thing stood on may stick to it: a bowl's foot fits into a ramekin. `before` has the `_bottoms`.
        """
        axis = self.held.as_matrix()[:, 0]
        for swing in range(MOST_SWINGS):
            risen = {other for other, bottom in self._bottoms().items() if bottom > before[other] + 0.02}
            if name not in risen or not any(before[other] < before[name] for other in risen):
                return
            for _ in range(3):
                yield self.arm.action(np.append(np.zeros(3), axis if swing % 2 else -axis))

    def _way(self, name: str, target: str) -> np.ndarray | None:
        """[3] m: how far a thing will travel, when it goes where there may be little room for the hand."""
        if joint_of(self.arm.simulator, target) is None:
            return None
        cloud = self.scene.cloud(name)
        return self.scene.support(target) - [*middle(cloud), cloud[:, 2].min() - 0.02]

    def _dropped(self, name: str) -> bool:
        """Whether a thing is no longer in the hand."""
        cloud, here = self.scene.cloud(name), self.arm.position
        return bool(np.linalg.norm(middle(cloud) - here[:2]) > 0.2 or cloud[:, 2].max() < here[2] - 0.05)

    def place(self, name: str, target: str, aside: float = 0.0) -> Actions:
        """Sets the held thing down on or in another one."""
        goal = self.scene.support(target)
        goal[0] += aside
        clearance, drop = self._heights(target)
        yield from self.carry(name, goal, clearance, drop, target if drop < 0 else None)

    def carry(self, name: str, goal: np.ndarray, clearance: float, drop: float, inside: str | None = None) -> Actions:
        """Brings the held thing to `goal` [3] and lets it go: carried `clearance` above it, let go `drop` above it.

        `inside` is a narrow region that it is turned to fit into.
        """
        arm = self.arm
        cloud = self.scene.cloud(name)
        over = max(goal[2] + clearance, self.scene.highest_between(name, middle(cloud), goal[:2]) + 0.02)
        rise = max(0.0, over - cloud[:, 2].min())
        yield from arm.move(arm.position + [0, 0, rise], self.held, 0.02, steps=40, turn_tolerance=1)
        if inside is not None:
            self.held = arm.about_vertical(self._fitting(name, inside)) * self.held
        # Twice, since the object swings and slips in the fingers on the way.
        for tolerance, steps in ((0.012, 80), (0.006, 15)):
            offset = goal[:2] - middle(self.scene.cloud(name))
            yield from arm.move(
                arm.position + [*offset, 0], self.held, tolerance, steps=steps, speed=0.8, turn_tolerance=0.3
            )
            if self._dropped(name):
                arm.gripper = OPEN
                return
        for height, tolerance, steps, speed in ((drop + 0.03, 0.02, 40, 1.0), (drop, 0.01, 20, 0.5)):
            descent = min(0.0, goal[2] + height - self.scene.cloud(name)[:, 2].min())
            yield from arm.move(
                arm.position + [0, 0, descent], self.held, tolerance, steps=steps, speed=speed, turn_tolerance=0.3
            )
        arm.gripper = OPEN
        yield from arm.hold(6)
        yield from arm.move(arm.position + [0, 0, 0.15], self.held, 0.03, steps=20, turn_tolerance=1)
        yield from arm.hold(5)

    def keep_away(self, name: str, ground: np.ndarray, room: float) -> Actions:
        """Moves a thing that stands nearer than `room` (m) to some ground [M, 2] (m) to the nearest place that does not
        and where no other thing stands."""
        cloud = self.scene.cloud(name)
        radius = np.ptp(cloud[:, :2], 0).max() / 2
        here, bottom = middle(cloud), cloud[:, 2].min()

        def free(spot: np.ndarray, things: np.ndarray) -> float:
            return float(np.linalg.norm(things - spot, axis=1).min()) - radius

        if free(here, ground) > room:
            return
        low = self.scene.others(name)
        low = low[low[:, 2] < cloud[:, 2].max() + 0.05, :2]
        ring = [
            here + distance * np.array([np.cos(angle), np.sin(angle)])
            for distance in np.arange(0.04, 0.36, 0.02)
            for angle in np.deg2rad(np.arange(0, 360, 15))
        ]
        fit = [spot for spot in ring if free(spot, ground) > room and free(spot, low) > 0.02]
        near = [spot for spot in fit if not self.arm.lean(np.append(spot, bottom))]
        if not near:
            return
        yield from self.pick(name, name, first=True)
        yield from self.carry(name, np.append(near[0], bottom), 0.06, 0.003)

    def _heights(self, target: str) -> tuple[float, float]:
        """How high (m) above a target's middle a thing is carried, and let go."""
        if "basket" in target:
            return 0.12, 0.06
        if joint_of(self.arm.simulator, target) is not None:
            return 0.10, 0.02
        if "contain" in target:
            depth = self.scene.room(target)[2]
            return depth + 0.05, -depth + 0.01
        return 0.06, 0.003

    def _fitting(self, name: str, target: str) -> float:
        """The least turn (rad, about the vertical) with which a thing's footprint fits into a region."""
        footprint, room = self.scene.cloud(name)[:, :2], self.scene.room(target)[:2]

        def misfit(turn: float) -> float:
            extent = [np.ptp(footprint @ axis) / 2 for axis in finger_axes(-turn)[::-1]]
            return float(np.maximum(extent - room, 0).sum()) + 0.003 * abs(turn)

        return float(min(np.deg2rad(np.arange(-90, 91, 5)), key=misfit))

    def push(self, name: str, target: str, clear: bool) -> Actions:
        """Slides a thing over the table to a region, with closed fingers: against the rim of a dish from inside.

        From inside the dish follows the fingers; pushed from behind it would turn aside. What it meets is pushed along,
        or moved aside first if `clear`, which takes longer.
        """
        arm, scene = self.arm, self.scene
        goal = scene.support(target)[:2]
        cloud = scene.cloud(name)
        bottom, radius = cloud[:, 2].min(), np.ptp(cloud[:, :2], 0).max() / 2
        hollow = scene.floor(name) < cloud[:, 2].max() - 0.005
        ahead = radius - 0.03 if hollow else -radius - 0.012
        height = scene.floor(name) - 0.002 if hollow else bottom + 0.008
        path = self._clear_path(name, goal, radius)
        way = np.concatenate([np.linspace(a, b, 20) for a, b in itertools.pairwise([middle(cloud), *path])])
        for other in scene.env.objects_dict:
            if clear and other != name:
                yield from self.keep_away(other, way, radius + 0.01)
        arm.gripper = CLOSED
        start = middle(cloud) + _direction(path[0] - middle(cloud)) * (0 if hollow else ahead - 0.03)
        yield from arm.rise_to(height + 0.15, arm.resting)
        yield from arm.move([*start, height + 0.10], arm.resting, 0.02, steps=60)
        yield from arm.move([*start, height], arm.resting, 0.008, steps=30, speed=0.5)
        for corner in path:
            if hollow:  # else the fingers would slip over the rim at a bend
                yield from arm.move([*middle(scene.cloud(name)), height], arm.resting, 0.012, steps=15, speed=0.3)
            nearest, since = np.inf, 0
            while since < 15:  # else it is stuck
                left = corner - middle(scene.cloud(name))
                if (distance := float(np.linalg.norm(left))) < 0.015:
                    break
                nearest, since = (distance, 0) if distance < nearest - 0.003 else (nearest, since + 1)
                contact = middle(scene.cloud(name)) + _direction(left) * (ahead + 0.02)
                yield from arm.move([*contact, height], arm.resting, 0.0, steps=1, speed=0.35)
        yield from arm.move(arm.position + [0, 0, 0.12], arm.resting, 0.03, steps=20, turn_tolerance=1)

    def _clear_path(self, name: str, goal: np.ndarray, radius: float) -> list[np.ndarray]:
        """Corners ([2] m) of a way over the table on which the fewest other things are pushed along; straight if free.

        Of the ways with one corner on either side of the straight line.
        """
        start = middle(self.scene.cloud(name))
        straight = goal - start
        beside = np.array([-straight[1], straight[0]]) / 8
        low = self.scene.others(name)
        low = low[low[:, 2] < self.scene.cloud(name)[:, 2].max() + 0.05, :2]

        def pushed(path: list[np.ndarray]) -> float:
            corners = [start, *path]
            points = np.concatenate([np.linspace(a, b, 20) for a, b in itertools.pairwise(corners)])
            near = np.linalg.norm(low[:, None] - points, axis=-1).min(1) < radius + 0.01
            return float(near.sum())

        corners = [
            start + straight * s + beside * k for s in (0.5, 0.75, 1.0, 1.2) for k in (1, -1, 2, -2, 3, -3, 4, -4)
        ]
        height = self.scene.cloud(name)[:, 2].max()
        paths = [[goal]] + [[corner, goal] for corner in corners if not self.arm.lean(np.append(corner, height))]
        return min(paths, key=pushed)


def _direction(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return unit
