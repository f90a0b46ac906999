"""LIBERO's operational-space controller without robosuite's bookkeeping.

robosuite calls its controller 25 times an environment step and spends most of that time on lookups by name, repeated
Jacobians, pseudo-inverses and ring buffers. Here one compiled function does the arithmetic, and MuJoCo is asked for
each quantity once. `tests/tasks/test_simulator.py` holds it against the stock environment.
"""

from typing import Any

import mujoco
import numba
import numpy as np
from robosuite.controllers.osc import set_goal_orientation


@numba.njit(cache=True)
def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


@numba.njit(cache=True)
def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solves matrix [n, n] x = right [n, m] by Cholesky; for these sizes LAPACK's call costs more than the work."""
    n, m = right.shape
    lower = np.zeros((n, n))
    x = right.copy()
    for i in range(n):
        for j in range(i + 1):
            total = matrix[i, j]
            for k in range(j):
                total -= lower[i, k] * lower[j, k]
            lower[i, j] = np.sqrt(total) if i == j else total / lower[j, j]
    for c in range(m):
        for i in range(n):
            for k in range(i):
                x[i, c] -= lower[i, k] * x[k, c]
            x[i, c] /= lower[i, i]
        for i in range(n - 1, -1, -1):
            for k in range(i + 1, n):
                x[i, c] -= lower[k, i] * x[k, c]
            x[i, c] /= lower[i, i]
    return x


@numba.njit(cache=True)
def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [n, k] times b [k, m]."""
    out = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for k in range(a.shape[1]):
            for j in range(b.shape[1]):
                out[i, j] += a[i, k] * b[k, j]
    return out


@numba.njit(cache=True)
def osc_torques(
    goal_position: np.ndarray,
    goal_rotation: np.ndarray,
    position: np.ndarray,
    rotation: np.ndarray,
    twist: np.ndarray,
    jacobian: np.ndarray,
    mass: np.ndarray,
    joints: np.ndarray,
    joint_velocity: np.ndarray,
    rest: np.ndarray,
    kp: np.ndarray,
    kd: np.ndarray,
    bias: np.ndarray,
) -> np.ndarray:
    """[7] joint torques that pull the end effector to its goal pose (Khatib, 1987; robosuite's `OSC_POSE`).

    Position and rotation are decoupled, gravity is compensated by `bias`, and in the null space of `jacobian` [6, 7]
    the joints are pulled to `rest` with stiffness 10 and critical damping. `twist` [6] is the end effector's velocity.
    """
    error = np.empty(6)
    error[:3] = goal_position - position
    error[3:] = 0.5 * (
        _cross(rotation[:, 0], goal_rotation[:, 0])
        + _cross(rotation[:, 1], goal_rotation[:, 1])
        + _cross(rotation[:, 2], goal_rotation[:, 2])
    )
    force = (error * kp - twist * kd).reshape(6, 1)
    mobility = _solve(mass, jacobian.T)  # M^-1 J^T
    inverse_inertia = _product(jacobian, mobility)
    wrench = np.empty((6, 1))
    wrench[:3] = _solve(inverse_inertia[:3, :3], force[:3])
    wrench[3:] = _solve(inverse_inertia[3:, 3:], force[3:])
    pull = 10.0 * (rest - joints) - 2.0 * np.sqrt(10.0) * joint_velocity
    posture = _product(mass, pull.reshape(7, 1))
    wrench -= _solve(inverse_inertia, _product(mobility.T, posture))
    return _product(jacobian.T, wrench)[:, 0] + bias + posture[:, 0]


@numba.njit(cache=True)
def _command(
    torques: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    arm: np.ndarray,
    direction: float,
    finger_action: np.ndarray,
    finger_step: np.ndarray,
    finger_bias: np.ndarray,
    finger_weight: np.ndarray,
    fingers: np.ndarray,
    ctrl: np.ndarray,
) -> None:
    """Writes clipped torques and the fingers' next targets into `ctrl`."""
    for i in range(len(arm)):
        ctrl[arm[i]] = min(max(torques[i], low[i]), high[i])
    for i in range(len(fingers)):
        finger_action[i] = min(max(finger_action[i] + finger_step[i] * direction, -1.0), 1.0)
        ctrl[fingers[i]] = finger_bias[i] + finger_weight[i] * finger_action[i]


@numba.njit(cache=True)
def _gather(
    qvel: np.ndarray,
    qpos: np.ndarray,
    dofs: np.ndarray,
    angles: np.ndarray,
    full_jacobian: np.ndarray,
    full_mass: np.ndarray,
    twist: np.ndarray,
    jacobian: np.ndarray,
    mass: np.ndarray,
    joints: np.ndarray,
    joint_velocity: np.ndarray,
) -> None:
    """Picks the arm's entries out of the whole scene's arrays. The site moves with the arm's joints only."""
    for row in range(6):
        total = 0.0
        for column in range(len(dofs)):
            jacobian[row, column] = full_jacobian[row, dofs[column]]
            total += jacobian[row, column] * qvel[dofs[column]]
        twist[row] = total
    for row in range(len(dofs)):
        joints[row] = qpos[angles[row]]
        joint_velocity[row] = qvel[dofs[row]]
        for column in range(len(dofs)):
            mass[row, column] = full_mass[dofs[row], dofs[column]]


class OscController:
    """Drives the Panda arm and gripper of one LIBERO environment (robosuite 1.4, `OSC_POSE`, fixed impedance)."""

    def __init__(self, env: Any) -> None:
        self.model: mujoco.MjModel = env.sim.model._model
        self.data: mujoco.MjData = env.sim.data._data
        robot = env.robots[0]
        stock = robot.controller
        assert stock.uncoupling and stock.interpolator_pos is None and stock.use_delta and stock.use_ori
        assert stock.position_limits is None and stock.orientation_limits is None
        self.rest = np.array(stock.initial_joint)
        self.kp, self.kd = np.array(stock.kp), np.array(stock.kd)
        self.low, self.high = robot.torque_limits
        self.scale_action = stock.scale_action
        self.site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, stock.eef_name)
        self._angles, self._dofs = np.array(stock.qpos_index), np.array(stock.qvel_index)
        self._arm = np.array(robot._ref_joint_actuator_indexes)
        self._fingers = np.array([env.sim.model.actuator_name2id(name) for name in robot.gripper.actuators])
        limits = self.model.actuator_ctrlrange[self._fingers]
        self._finger_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self._finger_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self._finger_step = np.array([-1.0, 1.0]) * robot.gripper.speed
        self.finger_action = np.array(robot.gripper.current_action, dtype=float) * np.ones(2)
        # After a reset robosuite computes its first torque from the robot as the reset left it, even when the state
        # has been set since: `stale` says that `look` must not be called before that torque.
        self.stale: bool = not stock.new_update
        self.goal_position, self.goal_rotation = np.array(stock.goal_pos), np.array(stock.goal_ori)
        self.position, self.rotation = np.array(stock.ee_pos), np.array(stock.ee_ori_mat)
        self.twist = np.concatenate([stock.ee_pos_vel, stock.ee_ori_vel])
        self.joints, self.joint_velocity = np.array(stock.joint_pos), np.array(stock.joint_vel)
        self.jacobian = np.array(stock.J_full, order="C")
        self.mass = np.array(stock.mass_matrix, order="C")
        # Views into MuJoCo's own memory, made once: asking for them costs more than the arithmetic.
        data = self.data
        self._site_position = data.site_xpos[self.site]
        self._site_rotation = data.site_xmat[self.site].reshape(3, 3)
        self._qpos, self._qvel, self._bias, self._ctrl, self._sparse_mass = (
            data.qpos,
            data.qvel,
            data.qfrc_bias,
            data.ctrl,
            data.qM,
        )
        self._full_jacobian = np.zeros((6, self.model.nv))
        self._full_mass = np.zeros((self.model.nv, self.model.nv))

    _VIEW = ("position", "rotation", "twist", "joints", "joint_velocity", "jacobian", "mass")

    def save(self) -> dict[str, Any]:
        """What the next torque depends on besides MuJoCo's own state."""
        names = ("goal_position", "goal_rotation", "finger_action", *(self._VIEW if self.stale else ()))
        return {"stale": self.stale, **{name: getattr(self, name).copy() for name in names}}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Undoes everything since `save`."""
        for name, value in snapshot.items():
            setattr(self, name, value.copy() if isinstance(value, np.ndarray) else value)

    def look(self) -> None:
        """Reads the robot's state; valid after `mj_step1`."""
        jacobian = self._full_jacobian
        self.position, self.rotation = self._site_position.copy(), self._site_rotation.copy()
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.site)
        mujoco.mj_fullM(self.model, self._full_mass, self._sparse_mass)
        _gather(
            self._qvel,
            self._qpos,
            self._dofs,
            self._angles,
            jacobian,
            self._full_mass,
            self.twist,
            self.jacobian,
            self.mass,
            self.joints,
            self.joint_velocity,
        )

    def set_goal(self, action: np.ndarray) -> None:
        """Sets the pose to reach from [6] normalised deltas (position, axis-angle) to the pose last looked at."""
        delta = self.scale_action(action)
        # robosuite keeps the previous orientation goal when no rotation is asked for.
        if np.any(delta[3:] != 0.0):
            self.goal_rotation = np.ascontiguousarray(set_goal_orientation(delta[3:], self.rotation))
        self.goal_position = self.position + delta[:3]

    def apply(self, gripper: float) -> None:
        """Writes one substep's torques and finger targets into `data.ctrl`."""
        torques = osc_torques(
            self.goal_position,
            self.goal_rotation,
            self.position,
            self.rotation,
            self.twist,
            self.jacobian,
            self.mass,
            self.joints,
            self.joint_velocity,
            self.rest,
            self.kp,
            self.kd,
            self._bias[self._dofs],
        )
        _command(
            torques,
            self.low,
            self.high,
            self._arm,
            float(np.sign(gripper)),
            self.finger_action,
            self._finger_step,
            self._finger_bias,
            self._finger_weight,
            self._fingers,
            self._ctrl,
        )
        self.stale = False
