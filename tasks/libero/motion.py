"""How the scripted expert moves the arm: servoing the grip site and working the gripper, one action at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import mujoco
import numpy as np

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

    from .simulator import LiberoSimulator

OPEN, CLOSED = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])

SHOULDER = np.array([0.0, 0.0, 0.333])
"""m above the Panda's base."""
WRIST_BACK, WRIST_UP = 0.088, 0.2
"""m: where the Panda's wrist is, seen from the grip site when the fingers point down: nearer to the base, and above."""
REACH = 0.66
"""m from shoulder to wrist. At 0.70 the arm is straight, and there the controller can't pull it back any more; at
0.68 it still swings about its goal for a second or two."""

Actions = Iterator[np.ndarray]
"""What every skill is: a generator of [7] actions, which looks at the scene anew after each of them."""


class Arm:
    """The robot as the skills use it. Positions are world coordinates (m) of the grip site, between the fingertips."""

    def __init__(self, simulator: "LiberoSimulator") -> None:
        self.simulator = simulator
        self.gripper = OPEN
        self.resting = simulator.eef_rotation()
        """Fingers down, opening along world y."""
        base = mujoco.mj_name2id(simulator.model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        self.shoulder = simulator.data.xpos[base] + SHOULDER

    @property
    def position(self) -> np.ndarray:
        """[3] m."""
        return np.array(self.simulator.eef_position(), np.float64)

    def about_vertical(self, yaw: float) -> "Rotation":
        """A turn by `yaw` (rad)."""
        from scipy.spatial.transform import Rotation as rotation

        return rotation.from_euler("z", yaw)

    def turned(self, yaw: float) -> "Rotation":
        """The resting orientation turned by `yaw` (rad) about the vertical."""
        return self.about_vertical(yaw) * self.resting

    def reaching(self, inwards: np.ndarray, tilt: float, level: bool = False) -> "Rotation":
        """Fingers tilted by `tilt` (rad) from straight down towards a horizontal direction.

        They open in that plane, or with `level` at right angles to it: the hand is three times as wide as thick. Of the
        two such orientations, half a turn of the wrist apart, the one nearer to the resting one.
        """
        from scipy.spatial.transform import Rotation as rotation

        approach = -np.cos(tilt) * UP + np.sin(tilt) * inwards
        opening = np.cross(UP, inwards) if level else np.cross(approach, np.cross(UP, inwards))
        both = [rotation.from_matrix(np.stack([np.cross(y, approach), y, approach], 1)) for y in (opening, -opening)]
        return min(both, key=lambda orientation: float((orientation * self.resting.inv()).magnitude()))

    def within_reach(self, goal: np.ndarray, orientation: "Rotation") -> "Rotation":
        """The orientation, leant back towards the base as far as it takes for the arm not to be straight at `goal`."""
        from scipy.spatial.transform import Rotation as rotation

        outwards = (goal - self.shoulder) * [1, 1, 0]
        outwards /= max(float(np.linalg.norm(outwards)), 1e-9)
        leant = orientation
        for angle in np.arange(0, 0.65, 0.05):
            leant = rotation.from_rotvec(np.cross(outwards, UP) * angle) * orientation
            wrist = goal - WRIST_UP * leant.as_matrix()[:, 2] - WRIST_BACK * outwards
            if np.linalg.norm(wrist - self.shoulder) < REACH:
                break
        return leant

    def lean(self, goal: np.ndarray) -> float:
        """How far (rad) the hand has to lean back for the fingers to get to `goal` from above; 0 where it is near."""
        return float((self.within_reach(goal, self.resting) * self.resting.inv()).magnitude())

    def action(self, pose: np.ndarray) -> np.ndarray:
        """[7] action of a [6] pose change in controller units."""
        return np.append(np.clip(pose, -1, 1), self.gripper)

    def hold(self, steps: int) -> Actions:
        """Stays where it is."""
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
        gain: float = 16.0,
        until: Callable[[], bool] = lambda: False,
    ) -> Actions:
        """Servoes the grip site to `goal` within `tolerance` (m; rad for the turn), for at most `steps` steps."""
        drift = np.zeros(6)
        for _ in range(steps):
            error = np.asarray(goal) - self.position
            turn = (orientation * self.simulator.eef_rotation().inv()).as_rotvec()
            if until() or (np.linalg.norm(error) < tolerance and np.linalg.norm(turn) < turn_tolerance):
                return
            if np.linalg.norm(error) < 0.04:
                # Robosuite's controller treats translation and rotation apart; where the arm is folded the two pull
                # against each other and come to rest centimetres off, which only an integral term overcomes.
                drift = np.clip(drift + np.append(error * 1.5, turn * 0.2), -0.6, 0.6)
            pose = np.append(shorten(error * gain, speed), shorten(turn * 2.0, 0.6))
            yield self.action(pose + drift)

    def rise_to(self, height: float, orientation: "Rotation") -> Actions:
        """Straight up, if the grip site is lower than `height`, turning on the way."""
        if self.position[2] < height - 0.01:
            yield from self.move([*self.position[:2], height], orientation, 0.02, steps=30, turn_tolerance=3)

    def close(self, where: np.ndarray | None = None) -> Actions:
        """Closes the gripper until the fingers stand still; with `where` [3] (m) the grip site is kept there.

        A zero action means "stay where you are now": the finger that touches first pushes the hand along.
        """
        self.gripper = CLOSED
        still = 0
        width = self.simulator.gripper_width()
        for step in range(25):
            pose = np.zeros(6)
            if where is not None:
                pose[:3] = shorten((where - self.position) * 16.0, 0.5)
            yield self.action(pose)
            previous, width = width, self.simulator.gripper_width()
            still = still + 1 if abs(previous - width) < 4e-4 else 0
            if still >= 3 and step > 3:
                return


def shorten(vector: np.ndarray, limit: float) -> np.ndarray:
    """Scales a vector down, direction kept, until no component exceeds `limit`."""
    return vector * min(1.0, limit / max(float(np.abs(vector).max()), 1e-9))
