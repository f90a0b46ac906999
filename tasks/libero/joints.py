"""The expert's skills with things on joints: drawers are pulled and pushed, doors swung, knobs twisted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from .grasp import Scene, finger_axes, middle
from .motion import CLOSED, OPEN, UP, Actions, Arm

if TYPE_CHECKING:
    from .simulator import LiberoSimulator

RANGES = {
    "open": "default_open_ranges",
    "close": "default_close_ranges",
    "turnon": "default_turnon_ranges",
    "turnoff": "default_turnoff_ranges",
}
"""Where LIBERO's articulated objects say at which joint positions a predicate holds."""


@dataclass(frozen=True)
class Part:
    """A drawer, door or knob, and which way it has to go. Read once, at the start of a skill."""

    slides: bool
    axis: np.ndarray
    """[3] unit vector in the world; motion along (turn about) it by a positive amount fulfils the goal."""
    anchor: np.ndarray
    """[3] m: a point on the axis of a hinge."""
    cloud: np.ndarray
    """[N, 3] its surface points, m."""
    left: float
    """How far it has to go, m or rad."""

    @property
    def swept(self) -> np.ndarray:
        """[M, 2] m: the ground that a drawer covers on its way."""
        ways = np.linspace(0, self.left + 0.02, 6)[:, None, None] * self.axis
        swept: np.ndarray = (self.cloud + ways)[..., :2].reshape(-1, 2)
        return swept


def joint_of(simulator: "LiberoSimulator", name: str) -> int | None:
    """The joint of a drawer (named by the region in it), door or knob, or of what the region is part of."""
    env, model = simulator.env, simulator.model
    region = env.object_sites_dict.get(name)
    owners = [region, env.get_object(region.parent_name)] if region is not None else [env.get_object(name)]
    for owner in owners:
        for joint in getattr(owner, "joints", None) or ():
            index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, joint)
            if model.jnt_type[index] != mujoco.mjtJoint.mjJNT_FREE:
                return int(index)
    return None


def find_part(simulator: "LiberoSimulator", scene: Scene, predicate: str, name: str) -> Part:
    """What has to move so that the predicate comes to hold."""
    joint = joint_of(simulator, name)
    assert joint is not None, f"{name} has no joint"
    env, model, data = simulator.env, simulator.model, simulator.data
    region = env.object_sites_dict.get(name)
    whole = env.get_object(region.parent_name if region is not None else name)
    wanted = float(np.mean(whole.object_properties["articulation"][RANGES[predicate]]))
    left = wanted - float(data.qpos[model.jnt_qposadr[joint]])
    axis = data.xaxis[joint] * np.sign(left)
    slides = bool(model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE)
    return Part(slides, axis, data.xanchor[joint].copy(), scene.of_body(int(model.jnt_bodyid[joint])), abs(left))


def actuate(arm: Arm, part: Part, predicate: str, done: Callable[[], bool]) -> Actions:
    """Moves a part until `done`."""
    if part.slides:
        yield from pull(arm, part, done) if predicate == "open" else shove(arm, part, done)
    elif predicate.startswith("turn"):
        yield from twist(arm, part, done)
    else:
        yield from swing(arm, part, done)


def pull(arm: Arm, part: Part, done: Callable[[], bool]) -> Actions:
    """Pinches a drawer's handle and pulls."""
    orientation = arm.reaching(-part.axis, np.deg2rad(70))
    inwards = orientation.as_matrix()[:, 2]
    handle = _front(part.cloud, part.axis)
    before = handle - 0.12 * inwards
    arm.gripper = OPEN
    yield from arm.rise_to(before[2] + 0.08, orientation)
    yield from arm.move(before + [0, 0, 0.02], orientation, 0.015, steps=90, turn_tolerance=0.15)
    yield from arm.move(before, orientation, 0.01, steps=40, turn_tolerance=0.1)
    yield from arm.move(handle, orientation, 0.008, steps=50, speed=0.4, turn_tolerance=0.2)
    yield from arm.close()
    goal = arm.position + part.axis * (part.left + 0.06)
    yield from arm.move(goal, orientation, 0.01, steps=60, speed=0.6, turn_tolerance=3, until=done)
    arm.gripper = OPEN
    yield from arm.hold(6)
    yield from arm.move(arm.position - 0.08 * inwards, orientation, 0.02, steps=30, turn_tolerance=1)
    yield from arm.move(arm.position + [0, 0, 0.15], orientation, 0.03, steps=30, turn_tolerance=3)


def shove(arm: Arm, part: Part, done: Callable[[], bool]) -> Actions:
    """Pushes a drawer in, with closed fingers against its handle and the hand clear of the handles above."""
    orientation = arm.reaching(part.axis, np.deg2rad(40), level=True)
    handle = _front(part.cloud, -part.axis)
    before = handle - 0.08 * part.axis + [0, 0, 0.005]
    arm.gripper = CLOSED
    yield from arm.rise_to(before[2] + 0.15, orientation)
    yield from arm.move(before + [0, 0, 0.15], orientation, 0.02, steps=80, turn_tolerance=0.3)
    yield from arm.move(before, orientation, 0.015, steps=50, turn_tolerance=0.2)
    goal = before + part.axis * (part.left + 0.2)
    yield from arm.move(goal, orientation, 0.01, steps=80, speed=0.5, turn_tolerance=3, until=done)
    yield from arm.move(arm.position - 0.06 * part.axis, orientation, 0.02, steps=20, turn_tolerance=1)
    yield from arm.move(arm.position + [0, 0, 0.15], orientation, 0.03, steps=30, turn_tolerance=1)


def twist(arm: Arm, part: Part, done: Callable[[], bool]) -> Actions:
    """Grips a knob by its ridge from above and turns it."""
    top = part.cloud[:, 2].max()
    ridge = part.cloud[part.cloud[:, 2] > top - 0.012]
    sense = float(np.sign(part.axis[2]))
    angles = np.deg2rad(np.arange(-90, 46, 5))
    yaw = min(angles, key=lambda a: float(np.ptp(ridge[:, :2] @ finger_axes(a)[0]) + 0.002 * abs(a)))
    grip = np.append(middle(ridge), top - 0.012)
    orientation = arm.turned(yaw)
    arm.gripper = OPEN
    yield from arm.rise_to(grip[2] + 0.12, orientation)
    yield from arm.move(grip + [0, 0, 0.10], orientation, 0.01, steps=90)
    yield from arm.move(grip, orientation, 0.006, steps=40, speed=0.5)
    yield from arm.close()
    here = arm.position
    for step in range(40):
        orientation = arm.turned(yaw + sense * min(1.3, 0.06 * (step + 1)))
        yield from arm.move(here, orientation, 0, steps=1, speed=0.4, until=done)
        if done():
            break
    arm.gripper = OPEN
    yield from arm.hold(6)
    yield from arm.move(arm.position + [0, 0, 0.12], arm.turned(yaw), 0.03, steps=25, turn_tolerance=3)


def swing(arm: Arm, part: Part, done: Callable[[], bool]) -> Actions:
    """Pushes a door about its hinge, with closed fingers near its free edge."""
    from scipy.spatial.transform import Rotation as rotation

    relative = part.cloud - part.anchor
    relative = relative - np.outer(relative @ part.axis, part.axis)
    reach = np.linalg.norm(relative, axis=1)
    edge = relative[reach > reach.max() - 0.01].mean(0) * 0.9
    height = part.cloud[:, 2].max() - 0.01

    def behind(angle: float) -> np.ndarray:
        point = part.anchor + rotation.from_rotvec(part.axis * angle).apply(edge)
        return np.append(point[:2], height)

    first = -0.035 / float(np.linalg.norm(edge)) - 0.25
    arm.gripper = CLOSED
    start = behind(first)
    yield from arm.rise_to(start[2] + 0.12, arm.resting)
    yield from arm.move(start + [0, 0, 0.12], arm.resting, 0.015, steps=80, turn_tolerance=0.3)
    yield from arm.move(start, arm.resting, 0.01, steps=40, turn_tolerance=0.3)
    for angle in np.linspace(first, part.left + 0.3, 40):
        yield from arm.move(behind(angle), arm.resting, 0.01, steps=3, speed=0.6, turn_tolerance=1, until=done)
        if done():
            break
    yield from arm.move(arm.position + 0.12 * UP, arm.resting, 0.03, steps=25, turn_tolerance=1)


def _front(cloud: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """[3] middle of the part of a cloud that sticks out farthest: a drawer's handle."""
    along = cloud @ direction
    tip = cloud[along > along.max() - 0.015]
    middle_: np.ndarray = (tip.max(0) + tip.min(0)) / 2
    return middle_
