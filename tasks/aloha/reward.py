"""gym-aloha's reward: how far along a task is, 0 to 4, told by what touches what.

Its own `get_reward` (`gym_aloha/tasks/sim.py`) looks up the name of every contact in Python; here the pairs are geom
numbers, found once.
"""

from collections.abc import Callable

import mujoco

SUCCESS = 4
"""Reward of a solved task."""
_LEFT = ("vx300s_left/10_left_gripper_finger",)
_RIGHT = ("vx300s_right/10_right_gripper_finger",)
_CUBE, _PEG, _PIN, _TABLE = ("red_box",), ("red_peg",), ("pin",), ("table",)
_SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")
# What counts as which contact, as upstream asks for it: one finger of each gripper, and geoms in this order only.
_CONTACTS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "transfer_cube": {"left": (_CUBE, _LEFT), "right": (_CUBE, _RIGHT), "cube_on_table": (_CUBE, _TABLE)},
    "insertion": {
        "left": (_SOCKET, _LEFT),
        "right": (_PEG, _RIGHT),
        "peg_on_table": (_PEG, _TABLE),
        "socket_on_table": (_SOCKET, _TABLE),
        "peg_in_socket": (_PEG, _SOCKET),
        "pin": (_PEG, _PIN),
    },
}


def make_reward(model: mujoco.MjModel, task: str) -> Callable[[mujoco.MjData], int]:
    """The reward of `transfer_cube` or `insertion` as a function of the data."""
    wanted = {
        what: frozenset((model.geom(a).id, model.geom(b).id) for a in first for b in second)
        for what, (first, second) in _CONTACTS[task].items()
    }
    stages: dict[str, Callable[..., int]] = {"transfer_cube": _transfer_cube, "insertion": _insertion}
    stage = stages[task]

    def reward(data: mujoco.MjData) -> int:
        touching = set(map(tuple, data.contact.geom.tolist()))
        return stage(**{what: not pairs.isdisjoint(touching) for what, pairs in wanted.items()})

    return reward


def _transfer_cube(left: bool, right: bool, cube_on_table: bool) -> int:
    if left:
        return 3 if cube_on_table else SUCCESS
    if right:
        return 1 if cube_on_table else 2
    return 0


def _insertion(
    left: bool, right: bool, peg_on_table: bool, socket_on_table: bool, peg_in_socket: bool, pin: bool
) -> int:
    lifted = not peg_on_table and not socket_on_table
    if pin:
        return SUCCESS
    if peg_in_socket and lifted:
        return 3
    if left and right:
        return 2 if lifted else 1
    return 0
