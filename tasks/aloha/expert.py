"""A scripted expert for both ALOHA tasks. It sees the simulator's true poses; only its actions are kept.

It plans an episode before it begins, as ALOHA's authors did (Zhao et al., 2023): in gym-aloha's end-effector scenes a
weld drags each hand along a path of waypoints, and the joint angles that follow from that are what the expert asks for
in the real task, where nothing but the motors moves the arms. The weld is made stiffer than upstream's, which lags
behind its path by centimetres.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import mujoco
import numpy as np
from gym_aloha.constants import (
    ASSETS_DIR,
    START_ARM_POSE,
    unnormalize_puppet_gripper_position,
)

from vlarl_bench.suite import Demonstration, Observation, Task

from .simulator import GRIPPERS, object_poses

if TYPE_CHECKING:
    from .simulator import AlohaSimulator

NOISE = {"transfer_cube": 0.008, "insertion": 0.002}
"""Std of the executed noise on the joint targets (rad). The peg has 8 mm to spare in the socket,
and more noise makes the fingers grip it too far from its middle."""
NOISE_RENEWAL = 0.04
"""Chance a step that a new noise is drawn; in between it stays, since white noise would average out."""

WELD = (0.9, 0.95)
"""Constraint impedance (`solimp`) of the planner's welds; upstream's 0.25 is soft."""
OPEN, CLOSED = 1.0, 0.0
_START_LEFT, _START_RIGHT = np.array([[-0.31718881, 0.5, 0.29525084], [0.31718881, 0.49999888, 0.29525084]])
"""Where gym-aloha's end-effector tasks begin to drag."""


@dataclass(frozen=True)
class Waypoint:
    """Where one hand shall be at an environment step. Between waypoints everything changes linearly."""

    step: int
    position: np.ndarray
    """[3] world position (m) of the point between the fingertips."""
    turn: np.ndarray
    """[4] quaternion (w, x, y, z) from the orientation in which it points at the other hand."""
    gripper: float
    """0 closed, 1 open."""


def demonstrate(simulator: AlohaSimulator, task: Task, init_state: int, seed: int) -> Demonstration:
    """One expert episode, at most the protocol's horizon long.

    The labels are the planned joint targets; what is executed is those plus correlated noise. Targets are absolute, so
    the label brings an arm back to the plan from wherever the noise took it. The result is a pure function of the
    arguments. In `pixels` mode, where looking costs far more than stepping, the observations are made in a second pass
    that repeats the executed actions, and only when the episode succeeded.
    """
    rng = np.random.default_rng([seed, init_state, zlib.crc32(task.key.encode())])
    labels = plan(task, object_poses(task, init_state))[: simulator.protocol.horizon[task.suite]]
    executed = labels + _noise(rng, len(labels)) * np.float32(NOISE[task.name])
    look_later = simulator.protocol.observation == "pixels"
    observations: list[Observation] = []
    success, steps, broken = False, 0, False
    simulator.reset(init_state)
    while not success and not broken and steps < len(labels):
        if not look_later:
            observations.append(simulator.observe())
        outcome = simulator.step(executed[None, steps])
        success, broken = outcome.success, outcome.broken
        steps += 1
    if success and look_later:
        simulator.reset(init_state)
        for action in executed[:steps]:
            observations.append(simulator.observe())
            simulator.step(action[None])
    return Demonstration(task, init_state, success, tuple(observations), labels[:steps])


def _noise(rng: np.random.Generator, steps: int) -> np.ndarray:
    """[steps, 14] float32 of unit std, constant between renewals; the grippers have none."""
    renewals = np.cumsum(rng.random(steps) < NOISE_RENEWAL)
    noise = rng.normal(size=(steps + 1, 14))[renewals]
    noise[:, GRIPPERS] = 0
    return noise.astype(np.float32)


def plan(task: Task, poses: np.ndarray) -> np.ndarray:
    """[T, 14] float32 joint targets that solve the task from these object poses ([7 n], as `object_poses`)."""
    paths = _transfer_cube(poses[:3]) if task.name == "transfer_cube" else _insertion(poses[:3], poses[7:10])
    left, right = (_follow(path) for path in paths)
    model = _planner(f"bimanual_viperx_end_effector_{task.name}.xml")
    data = mujoco.MjData(model)
    data.qpos[: len(START_ARM_POSE)] = START_ARM_POSE
    data.qpos[-len(poses) :] = poses
    grippers = np.full(2, CLOSED)
    targets = np.empty((len(left), 14))
    for step in range(len(left)):
        targets[step, :6], targets[step, 7:13] = data.qpos[:6], data.qpos[8:14]
        targets[step, GRIPPERS] = grippers
        data.mocap_pos[:] = left[step, :3], right[step, :3]
        data.mocap_quat[:] = left[step, 3:7], right[step, 3:7]
        grippers = np.array([left[step, 7], right[step, 7]])
        opening = unnormalize_puppet_gripper_position(grippers)
        data.ctrl[:] = opening[0], -opening[0], opening[1], -opening[1]
        mujoco.mj_step(model, data, 10)
    return targets.astype(np.float32)


@cache
def _planner(scene: str) -> mujoco.MjModel:
    model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / scene))
    model.eq_solimp[:, :2] = WELD
    return model


def _follow(path: Sequence[Waypoint]) -> np.ndarray:
    """[T, 8] position, quaternion and gripper at each step from the first waypoint to the last."""
    steps = [waypoint.step for waypoint in path]
    values = np.array([[*waypoint.position, *waypoint.turn, waypoint.gripper] for waypoint in path])
    times = np.arange(steps[-1] + 1)
    return np.stack([np.interp(times, steps, column) for column in values.T], axis=1)


def _turn(axis: str, degrees: float) -> np.ndarray:
    """[4] quaternion (w, x, y, z) of a turn about x or y."""
    half = np.radians(degrees) / 2
    return np.array([np.cos(half), np.sin(half) * (axis == "x"), np.sin(half) * (axis == "y"), 0])


_LEVEL = _turn("x", 0)
_DOWN_LEFT, _DOWN_RIGHT = _turn("y", 60), _turn("y", -60)
"""Hands that point down to the table."""
_ACROSS = _turn("x", 90)
"""A hand turned on its side, to grip between the other hand's fingers."""


def _transfer_cube(cube: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    """The right hand lifts the cube to the middle; the left comes when it is still, takes it and draws back."""
    meet, take, away = np.array([[0, 0.5, 0.25], [0, 0.5, 0.24], [-0.12, 0.5, 0.24]])
    left = [
        Waypoint(0, _START_LEFT, _LEVEL, CLOSED),
        Waypoint(100, away, _ACROSS, OPEN),
        Waypoint(190, away, _ACROSS, OPEN),
        Waypoint(240, take, _ACROSS, OPEN),
        Waypoint(270, take, _ACROSS, CLOSED),
        Waypoint(290, take, _ACROSS, CLOSED),
        Waypoint(330, away, _ACROSS, CLOSED),
        Waypoint(350, away, _ACROSS, CLOSED),
    ]
    right = [
        Waypoint(0, _START_RIGHT, _LEVEL, CLOSED),
        Waypoint(70, cube + [0, 0, 0.08], _DOWN_RIGHT, OPEN),
        Waypoint(100, cube + [0, 0, -0.015], _DOWN_RIGHT, OPEN),
        Waypoint(130, cube + [0, 0, -0.015], _DOWN_RIGHT, CLOSED),
        Waypoint(190, meet, _DOWN_RIGHT, CLOSED),
        Waypoint(270, meet, _DOWN_RIGHT, CLOSED),
        Waypoint(290, meet, _DOWN_RIGHT, OPEN),
        Waypoint(330, meet + [0.1, 0, 0], _DOWN_RIGHT, OPEN),
        Waypoint(350, meet + [0.1, 0, 0], _DOWN_RIGHT, OPEN),
    ]
    return left, right


def _insertion(peg: np.ndarray, socket: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    """The right hand lifts the peg, the left the socket; they meet in the middle and push into one another."""
    meet = np.array([0, 0.5, 0.15])
    higher = meet + [0, 0, 0.009]  # the peg hangs lower in its hand than the socket does
    left = [
        Waypoint(0, _START_LEFT, _LEVEL, CLOSED),
        Waypoint(90, socket + [0, 0, 0.08], _DOWN_LEFT, OPEN),
        Waypoint(130, socket + [0, 0, -0.03], _DOWN_LEFT, OPEN),
        Waypoint(180, socket + [0, 0, -0.03], _DOWN_LEFT, CLOSED),
        Waypoint(245, meet + [-0.1, 0, 0], _DOWN_LEFT, CLOSED),
        Waypoint(290, meet + [-0.05, 0, 0], _DOWN_LEFT, CLOSED),
        Waypoint(350, meet + [-0.05, 0, 0], _DOWN_LEFT, CLOSED),
    ]
    right = [
        Waypoint(0, _START_RIGHT, _LEVEL, CLOSED),
        Waypoint(90, peg + [0, 0, 0.08], _DOWN_RIGHT, OPEN),
        Waypoint(130, peg + [0, 0, -0.027], _DOWN_RIGHT, OPEN),
        Waypoint(180, peg + [0, 0, -0.027], _DOWN_RIGHT, CLOSED),
        Waypoint(245, higher + [0.1, 0, 0], _DOWN_RIGHT, CLOSED),
        Waypoint(290, higher + [0.05, 0, 0], _DOWN_RIGHT, CLOSED),
        Waypoint(350, higher + [0.05, 0, 0], _DOWN_RIGHT, CLOSED),
    ]
    return left, right
