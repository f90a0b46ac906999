"""One ALOHA task, open: gym-aloha's scene, physics and reward, stepped a chunk at a time.

The scenes, the poses that objects start from and the reward are gym-aloha's own. Only the loop around them is ours: the
same MuJoCo calls as dm_control's `Physics.step` makes, the reward from the contact list as arrays, and no image that
nobody looks at (gym-aloha renders three cameras every step and hands out one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import mujoco
import numpy as np
from gym_aloha.constants import (
    ASSETS_DIR,
    DT,
    START_ARM_POSE,
    normalize_puppet_gripper_position,
    unnormalize_puppet_gripper_position,
)
from gym_aloha.utils import sample_box_pose, sample_insertion_pose

from vlarl_bench.errors import BenchError
from vlarl_bench.images import as_shown
from vlarl_bench.suite import Observation, Outcome, Task

from .reward import SUCCESS, make_reward

if TYPE_CHECKING:
    from vlarl_bench.protocol import Protocol

OBJECTS = {"transfer_cube": {"cube": "box"}, "insertion": {"peg": "peg", "socket": "socket"}}
"""Name that a policy is shown -> body in the scene, in the order of their joints."""
HANDS = {"left_hand": "vx300s_left/gripper_link", "right_hand": "vx300s_right/gripper_link"}
"""The same for the robot's own hands; they are shown at the point between the fingertips."""
FINGERTIPS = (0.1347, 0.0, 0.0)
"""That point in a hand's frame (m), where the welds of gym-aloha's end-effector scenes hold it."""
GRIPPERS = (6, 13)
"""Where the two grippers are among the 14 action and proprioception entries."""
LAST_STATE = 2**32 - 1
"""Initial states are seeds of NumPy's RandomState."""
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass(frozen=True)
class Snapshot:
    """Everything that decides the future of an episode."""

    physics: np.ndarray


class AlohaSimulator:
    """One task. Steps bitwise as gym-aloha's `env.step` does after `env.reset(seed=init_state)`."""

    def __init__(self, task: Task, protocol: Protocol, render: bool) -> None:
        self.task, self.protocol = task, protocol
        self.model = _compiled(f"bimanual_viperx_{task.name}.xml", protocol.msaa)
        self.data = mujoco.MjData(self.model)
        self.substeps = round(DT / self.model.opt.timestep)
        self._reward = make_reward(self.model, task.name)
        self._renderable = render
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._start: dict[int, Snapshot] = {}
        self._seen: Observation | None = None

    def reset(self, init_state: int) -> None:
        """What `gymnasium.make(...).reset(seed=init_state)` does: objects at a pose drawn from that seed."""
        if not 0 <= init_state <= LAST_STATE:
            raise BenchError(f"init state: {init_state} of {self.task.key}; it has 0 to {LAST_STATE}")
        if init_state not in self._start:
            self._set(init_state)
            for _ in range(self.protocol.settle_steps):
                self._step(np.array(START_ARM_POSE))
            self._start[init_state] = self.save()
        self.restore(self._start[init_state])

    def _set(self, init_state: int) -> None:
        """The order of dm_control's nested `reset_context`, which never has actuators on.

        Each forward starts the solver from the solution of the one before, so none of them can be left out.
        """
        model, data = self.model, self.data
        poses = object_poses(self.task, init_state)
        actuated = model.opt.disableflags
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
        try:
            mujoco.mj_resetData(model, data)
            mujoco.mj_forward(model, data)
            data.qpos[: len(START_ARM_POSE)] = START_ARM_POSE
            data.qpos[-len(poses) :] = poses
            data.ctrl[:] = START_ARM_POSE
            mujoco.mj_forward(model, data)
            mujoco.mj_forward(model, data)
        finally:
            model.opt.disableflags = actuated

    def step(self, actions: np.ndarray) -> Outcome:
        """Executes [n, 14] actions: six joint angles (rad) and a gripper opening (0 closed, 1 open) for each arm.

        Angles are absolute and not confined to gym-aloha's `action_space`, which says [-1, 1] and means nothing by it:
        only the actuators' own limits hold. Stops at the first success, or when the state explodes: MuJoCo only warns
        of that and starts over from its default state, and dm_control raises.
        """
        controls = self._controls(actions)
        self._seen = None
        for executed, control in enumerate(controls, start=1):
            self._step(control)
            if self.data.warning.number.any():
                mujoco.mj_resetData(self.model, self.data)
                mujoco.mj_forward(self.model, self.data)
                return Outcome(executed, False, broken=True)
            if self.success():
                return Outcome(executed, True)
        return Outcome(len(controls), False)

    def _controls(self, actions: np.ndarray) -> np.ndarray:
        """[n, 16] actuator targets. In the actions' own precision, as gym-aloha computes them."""
        actions = np.asarray(actions)
        if actions.ndim != 2 or actions.shape[1] != 14 or actions.dtype not in (np.float32, np.float64):
            raise BenchError(f"actions: {actions.dtype} {actions.shape}; {self.task.key} takes floats of shape (n, 14)")
        if not np.isfinite(actions).all():
            bad = actions[~np.isfinite(actions)][0]
            raise BenchError(f"actions: {bad}; joint angles (rad) and gripper openings must be finite")
        # Whatever is larger MuJoCo takes for no number; the actuators' limits are far below.
        actions = actions.clip(-mujoco.mjMAXVAL, mujoco.mjMAXVAL)
        left, right = (unnormalize_puppet_gripper_position(actions[:, [i]]) for i in GRIPPERS)
        return np.concatenate([actions[:, :6], left, -left, actions[:, 7:13], right, -right], axis=1)

    def _step(self, control: np.ndarray) -> None:
        """dm_control's legacy step: positions, velocities and contacts are always up to date when it returns."""
        self.data.ctrl[:] = control
        mujoco.mj_step2(self.model, self.data)
        mujoco.mj_step(self.model, self.data, self.substeps - 1)
        mujoco.mj_step1(self.model, self.data)

    def reward(self) -> int:
        """gym-aloha's staged reward, 0 to 4, from the present contacts."""
        return self._reward(self.data)

    def success(self) -> bool:
        """Whether the task is solved at present."""
        return self.reward() == SUCCESS

    def observe(self) -> Observation:
        """Proprioception, and object poses (`state`) or camera images (`pixels`)."""
        if self._seen is None:
            objects, images = {}, {}
            if self.protocol.observation == "state":
                objects = {name: self._pose(body) for name, body in OBJECTS[self.task.name].items()}
                objects |= {name: self._pose(body, FINGERTIPS) for name, body in HANDS.items()}
            else:
                size = self.protocol.render_size or (self.protocol.image_size, self.protocol.image_size)
                images = {
                    camera: as_shown(self.frame(camera, *size), self.protocol) for camera in self.protocol.cameras
                }
            self._seen = Observation(self.task.instruction, self._proprio(), objects, images)
        return self._seen

    def _proprio(self) -> np.ndarray:
        """[14] float32, gym-aloha's `agent_pos`."""
        qpos = self.data.qpos
        left, right = normalize_puppet_gripper_position(qpos[[6, 14]])
        return np.concatenate([qpos[:6], [left], qpos[8:14], [right]]).astype(np.float32)

    def _pose(self, body: str, point: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
        found = self.data.body(body)
        position = found.xpos + found.xmat.reshape(3, 3) @ point
        return np.concatenate([position, np.roll(found.xquat, -1)]).astype(np.float32)

    def save(self) -> Snapshot:
        """Exact snapshot (2 kB)."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, physics, _STATE)
        return Snapshot(physics)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this task."""
        mujoco.mj_setState(self.model, self.data, snapshot.physics, _STATE)
        mujoco.mj_step1(self.model, self.data)  # how a step leaves the data
        self._seen = None

    def render(self, camera: str, size: int) -> np.ndarray:
        """Upright [size, size, 3] uint8 frame, at most 480 a side."""
        return self.frame(camera, size, size)

    def frame(self, camera: str, height: int, width: int) -> np.ndarray:
        """Upright [height, width, 3] uint8 frame; with the protocol's default settings it is stock gym-aloha's."""
        if not self._renderable:
            raise BenchError(f"{self.task.key}: opened without a renderer; open it with video=True")
        if mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera) < 0:
            known = ", ".join(self.model.camera(i).name for i in range(self.model.ncam))
            raise BenchError(f"camera: {camera!r}; ALOHA has {known}")
        if (height, width) not in self._renderers:
            self._renderers[height, width] = self._make_renderer(height, width)
        renderer = self._renderers[height, width]
        renderer.update_scene(self.data, camera)
        return renderer.render()

    def _make_renderer(self, height: int, width: int) -> mujoco.Renderer:
        largest = self.model.vis.global_
        if height > largest.offheight or width > largest.offwidth:
            limit = f"{largest.offheight} x {largest.offwidth}"
            raise BenchError(f"frame: {height} x {width}; ALOHA renders at most {limit}")
        renderer = mujoco.Renderer(self.model, height, width)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self.protocol.shadows
        return renderer

    def close(self) -> None:
        """Frees the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


def object_poses(task: Task, init_state: int) -> np.ndarray:
    """[7 n] positions (m) and quaternions (w, x, y, z) of the task's objects, by gym-aloha's own sampler."""
    sample = sample_box_pose if task.name == "transfer_cube" else sample_insertion_pose
    return np.ravel(sample(init_state))


@cache
def _compiled(scene: str, msaa: bool) -> mujoco.MjModel:
    """A scene of gym-aloha's; compiled once a process and shared, since no simulator changes it but for `_set`."""
    model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / scene))
    if not msaa:
        model.vis.quality.offsamples = 0
    return model
