"""Our reward against gym-aloha's own, over every combination of the contacts that either of them asks for."""

import itertools
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
from gym_aloha.constants import ASSETS_DIR
from gym_aloha.tasks.sim import InsertionTask, TransferCubeTask
from vlarl_bench.tasks.aloha.reward import make_reward

LEFT, RIGHT = "vx300s_left/10_left_gripper_finger", "vx300s_right/10_right_gripper_finger"
CASES = {
    "transfer_cube": (
        TransferCubeTask,
        [
            ("red_box", LEFT),
            ("red_box", RIGHT),
            ("red_box", "table"),
            (LEFT, "red_box"),  # the wrong way round counts for nothing upstream
            ("red_box", "vx300s_left/10_right_gripper_finger"),  # nor does the other finger
        ],
    ),
    "insertion": (
        InsertionTask,
        [
            ("socket-3", LEFT),
            ("red_peg", RIGHT),
            ("red_peg", "table"),
            ("socket-2", "table"),
            ("red_peg", "socket-1"),
            ("red_peg", "pin"),
            ("pin", "red_peg"),
            ("red_peg", LEFT),
        ],
    ),
}


@pytest.mark.parametrize("task", CASES)
def test_same_reward_as_upstream_for_all_contacts(task):
    upstream, pairs = CASES[task]
    model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{task}.xml"))
    reward = make_reward(model, task)
    seen = set()
    for chosen in itertools.product((False, True), repeat=len(pairs)):
        ids = [tuple(model.geom(name).id for name in pair) for pair in itertools.compress(pairs, chosen)]
        contacts = [SimpleNamespace(geom1=first, geom2=second) for first, second in ids]
        physics = SimpleNamespace(
            data=SimpleNamespace(ncon=len(contacts), contact=contacts),
            model=SimpleNamespace(id2name=lambda geom, _kind: model.geom(geom).name),
        )
        expected = upstream().get_reward(physics)
        data = SimpleNamespace(contact=SimpleNamespace(geom=np.array(ids, int).reshape(-1, 2)))
        assert reward(data) == expected, ids
        seen.add(expected)
    assert seen == {0, 1, 2, 3, 4}


def test_every_part_of_the_socket_counts():
    model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_insertion.xml"))
    reward = make_reward(model, "insertion")
    for part in range(1, 5):
        pair = [model.geom("red_peg").id, model.geom(f"socket-{part}").id]
        assert reward(SimpleNamespace(contact=SimpleNamespace(geom=np.array([pair])))) == 3
