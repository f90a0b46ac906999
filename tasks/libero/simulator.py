"""One LIBERO task, open: stock LIBERO's scene, physics and success test, stepped a chunk at a time.

The scene, the initial states and the goal predicates are LIBERO's own. Ours are how it is built (`scene.py`), the inner
loop, with one forward pass a substep instead of three (`mj_step1`/`mj_step2`), `OscController` and no observables, and
the cameras (`cameras.py`), with no image that nobody looks at. docs/suites/speed.md measures it against the original.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np

from vlarl_bench.errors import BenchError
from vlarl_bench.images import as_shown
from vlarl_bench.suite import Observation, Outcome, Task

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

    from vlarl_bench.protocol import Protocol

logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # "No private macro file found": nothing a user can mend
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import bddl_utils
    from libero.libero.envs.objects import get_object_fn
    from robosuite.utils.transform_utils import quat2axisangle

    from .cameras import Cameras
    from .controller import OscController
    from .scene import open_problem

from .suite import upstream_name  # noqa: E402

SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""What every published LIBERO evaluation does while objects settle: no motion, gripper open."""
WORKSPACES = frozenset({"coffee_table", "floor", "kitchen_table", "living_room_table", "study_table", "table"})
"""Kinds of fixtures that are the scene's floor or table, and that LIBERO does not count among its objects."""
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_POSES = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
"""All that a camera sees of MuJoCo's data."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that decides the future of an episode, and what was last seen of it."""

    physics: np.ndarray
    controller: dict[str, Any]
    seen: Observation | None
    view: tuple[np.ndarray, ...]
    """What the cameras see (`_POSES`); nothing where nothing is rendered."""


class LiberoSimulator:
    """One task. Steps as the stock environment does after `reset(); set_init_state(...)`, up to rounding."""

    def __init__(self, task: Task, protocol: Protocol, render: bool) -> None:
        self.task, self.protocol = task, protocol
        with contextlib.redirect_stdout(io.StringIO()):
            suite = benchmark.get_benchmark(upstream_name(task.suite))()
        names = [upstream.name for upstream in suite.tasks]
        index = names.index(task.name)
        self.init_states = np.asarray(suite.get_task_init_states(index))
        self._bddl = bddl_file(suite.get_task(index))
        self._cameras: Cameras | None = None
        self._open(render)
        self._seen: Observation | None = None
        self._look()
        self._after_reset = self.save()
        self._settled: dict[int, Snapshot] = {}

    def _open(self, visuals: bool) -> None:
        self.visuals = visuals
        self.env = open_problem(self._bddl, visuals)
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        self.controller = OscController(self.env)
        self.substeps = int(self.env.control_timestep / self.env.model_timestep)
        robot = self.env.robots[0]
        self._hand = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, robot.robot_model.eef_name)
        self._fingers = np.array(robot._ref_gripper_joint_pos_indexes)
        self._bodies = {**self.env.obj_body_id, **self._moving_parts()}
        self._view = mujoco.MjData(self.model) if visuals else None
        """What the cameras see; robosuite's cameras look before the last substep."""
        self._copied = [(getattr(self._view, name), getattr(self.data, name)) for name in _POSES if visuals]

    def show_surfaces(self) -> None:
        """Opens the scene again with the meshes that it shows, if it has none; what is planned on them needs it.

        The physics is the same, and snapshots stay valid.
        """
        if not self.visuals:
            now = self.save()
            self.env.close()
            self._open(visuals=True)
            self.restore(now)

    def reset(self, init_state: int) -> None:
        """Stock `reset()`, `set_init_state(init_states[init_state])` and the protocol's settle steps.

        The stock reset rebuilds the model and takes a second; restoring what it left behind is exact and is not
        repeated. Fixtures that LIBERO places at random stand where a reset after `seed(0)` puts them.
        """
        if not 0 <= init_state < len(self.init_states):
            raise BenchError(f"init state: {init_state} of {self.task.key}; it has 0 to {len(self.init_states) - 1}")
        if init_state not in self._settled:
            self.restore(self._after_reset)
            self.env.sim.set_state_from_flattened(self.init_states[init_state])
            self.env.sim.forward()
            self.env._post_process()
            self._look()
            self._seen = None
            for _ in range(self.protocol.settle_steps):
                self._step(SETTLE_ACTION)
            self._settled[init_state] = self.save()
        self.restore(self._settled[init_state])

    def step(self, actions: np.ndarray) -> Outcome:
        """Executes [n, 7] actions in [-1, 1] (others are clipped by the controller); stops at the first success."""
        self._seen = None
        for executed, action in enumerate(np.asarray(actions, dtype=np.float64), start=1):
            self._step(action)
            if self.success():
                return Outcome(executed, True)
        return Outcome(len(actions), False)

    def _step(self, action: np.ndarray) -> None:
        model, data, controller = self.model, self.data, self.controller
        for substep in range(self.substeps):
            mujoco.mj_step1(model, data)
            if not controller.stale:
                controller.look()
            if substep == 0:
                controller.set_goal(action[:6])
            controller.apply(action[6])
            mujoco.mj_step2(model, data)
            if substep == self.substeps - 2:
                self._look()
        self.env._post_process()

    def _look(self) -> None:
        for seen, now in self._copied:
            seen[:] = now

    def success(self) -> bool:
        """LIBERO's own goal predicates on the present state."""
        return bool(self.env._check_success())

    def observe(self) -> Observation:
        """Proprioception, and object poses (`state`) or camera images (`pixels`)."""
        if self._seen is None:
            objects, images = {}, {}
            if self.protocol.observation == "state":
                objects = {name: self._pose(body) for name, body in self._bodies.items()}
            else:
                images = {camera: as_shown(self._frame(camera), self.protocol) for camera in self.protocol.cameras}
            self._seen = Observation(self.task.instruction, self._proprio(), objects, images)
        return self._seen

    def _moving_parts(self) -> dict[str, int]:
        """Body of each drawer, door or knob that the goal is about: its pose tells how far it is open."""
        parts = {}
        for _, *names in self.env.parsed_problem["goal_state"]:
            for name in names:
                owner = self.env.object_sites_dict.get(name) or self.env.get_object(name)
                for joint in getattr(owner, "joints", None) or ():
                    index = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_JOINT, joint)
                    if self.model.jnt_type[index] != mujoco.mjtJoint.mjJNT_FREE:
                        body = int(self.model.jnt_bodyid[index])
                        parts[mujoco.mj_id2name(self.model, mujoco.mjtObj.mjOBJ_BODY, body)] = body
        return parts

    def _proprio(self) -> np.ndarray:
        quaternion = np.roll(self.data.xquat[self._hand], -1)
        fingers = self.data.qpos[self._fingers]
        return np.concatenate([self.eef_position(), quat2axisangle(quaternion), fingers]).astype(np.float32)

    def _pose(self, body: int) -> np.ndarray:
        return np.concatenate([self.data.xpos[body], np.roll(self.data.xquat[body], -1)]).astype(np.float32)

    def eef_position(self) -> np.ndarray:
        """[3] world position of the grip site (m)."""
        return self.data.site_xpos[self.controller.site].copy()

    def eef_rotation(self) -> Rotation:
        """World rotation of the hand."""
        from scipy.spatial.transform import Rotation

        return Rotation.from_quat(np.roll(self.data.xquat[self._hand], -1))

    def gripper_width(self) -> float:
        """Distance between the fingers (m)."""
        left, right = self.data.qpos[self._fingers]
        return float(left - right)

    def save(self) -> Snapshot:
        """Exact snapshot (a few kB).

        MuJoCo's poses lag its state by one substep, as in the stock environment, and a restored state cannot tell by
        how much: so what was seen, or is to be rendered, travels with the snapshot.
        """
        if self.protocol.observation == "state":
            self.observe()
        physics = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, physics, _STATE)
        return Snapshot(physics, self.controller.save(), self._seen, tuple(seen.copy() for seen, _ in self._copied))

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this task."""
        mujoco.mj_setState(self.model, self.data, snapshot.physics, _STATE)
        mujoco.mj_forward(self.model, self.data)  # derived quantities, for whoever looks before the next step
        mujoco.mj_setState(self.model, self.data, snapshot.physics, _STATE)  # forward moved the solver's warm start
        self.controller.restore(snapshot.controller)
        if snapshot.view:
            for (seen, _), view in zip(self._copied, snapshot.view, strict=True):
                seen[:] = view
        else:  # taken before `show_surfaces`
            self._look()
        self.env._post_process()  # the stove's burner glows or not
        self._seen = snapshot.seen

    def show(self, state: np.ndarray) -> None:
        """Puts the scene into a flat MuJoCo state (time, qpos, qvel) as it is, for looking at it."""
        self.env.sim.set_state_from_flattened(state)
        self.env.sim.forward()
        self._look()
        self._seen = None

    def render(self, camera: str, size: int) -> np.ndarray:
        """Upright [size, size, 3] uint8 frame."""
        return self._render(camera, size, size).copy()

    def _frame(self, camera: str) -> np.ndarray:
        size = self.protocol.image_size
        return self._render(camera, *(self.protocol.render_size or (size, size)))

    def _render(self, camera: str, height: int, width: int) -> np.ndarray:
        if self._view is None:
            raise BenchError(f"video: {self.task.key} was opened without; open(..., video=True) can render")
        if self._cameras is None:
            self._cameras = Cameras(self.model, self._view, self.env.shown, self.protocol.msaa)
        return self._cameras.render(camera, height, width)

    def close(self) -> None:
        """Frees the scene and the renderer."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None
        self.env.close()


def object_names(suite: str) -> tuple[str, ...]:
    """Names of all objects, fixtures and moving parts of a suite's tasks, sorted; read without opening a scene."""
    with contextlib.redirect_stdout(io.StringIO()):
        tasks = benchmark.get_benchmark(upstream_name(suite))().tasks
        problems = [bddl_utils.robosuite_parse_problem(bddl_file(task)) for task in tasks]
    kinds = [item for problem in problems for part in ("objects", "fixtures") for item in problem[part].items()]
    shown = {name: kind for kind, names in kinds for name in names if kind not in WORKSPACES}
    return tuple(sorted({*shown, *(part for name, kind in shown.items() for part in _part_names(kind, name))}))


def _part_names(kind: str, name: str) -> list[str]:
    """Bodies of an object's asset that move on joints of their own, such as a cabinet's drawers."""
    asset = get_object_fn(kind)(name=name).get_obj()
    return [b.get("name") for b in asset.iter("body") if any(j.get("type") != "free" for j in b.findall("joint"))]


def bddl_file(task: Any) -> str:
    """Path of the file that describes one of LIBERO's own tasks."""
    return os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
