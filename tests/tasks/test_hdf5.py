"""LIBERO's HDF5 demonstrations, from a file that stock LIBERO makes here as its scripts/create_dataset.py does."""

import dataclasses
import gc
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import robosuite
import robosuite.utils.transform_utils as T
from libero.libero.envs import TASK_MAPPING
from vlarl_bench.tasks.libero.simulator import LiberoSimulator, bddl_file, bddl_utils, benchmark
from vlarl_bench.tasks.libero.suite import LIBERO_SPATIAL

from vlarl_bench.demonstrations import describe_demonstrations, load_demonstrations
from vlarl_bench.errors import BenchError

SUITE = LIBERO_SPATIAL
TASK = SUITE.tasks[0]
CAP = 5
"""Steps at the beginning that upstream's script leaves out."""
KEPT = 5


@pytest.fixture(scope="module")
def stock():
    """Stock LIBERO with cameras, at a placement of the fixtures that our simulator does not have."""
    suite = benchmark.get_benchmark(TASK.suite)()
    bddl = bddl_file(suite.get_task(0))
    env = TASK_MAPPING[bddl_utils.get_problem_info(bddl)["problem_name"]](
        bddl,
        robots=["Panda"],
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        initialization_noise=None,
        use_camera_obs=True,
        camera_names=["robot0_eye_in_hand", "agentview"],
        camera_heights=128,
        camera_widths=128,
        has_renderer=False,
        has_offscreen_renderer=True,
        control_freq=20,
        ignore_done=True,
    )
    env.seed(7)
    env.reset()
    yield env, bddl
    env.sim._render_context_offscreen.gl_ctx.make_current()  # robosuite frees from whichever context is current
    env.close()
    gc.collect()


@pytest.fixture(scope="module")
def made(stock, tmp_path_factory):
    """The file, and what was in the scene before each of its actions."""
    env, bddl = stock
    folder = tmp_path_factory.mktemp("libero_spatial")
    truth = []
    with h5py.File(folder / f"{TASK.name}_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Tabletop_Manipulation"
        data.attrs["problem_info"] = json.dumps(bddl_utils.get_problem_info(bddl))
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["bddl_file_name"] = bddl
        data.attrs["bddl_file_content"] = Path(bddl).read_text()
        data.attrs["env_args"] = json.dumps({"type": 1})
        rng = np.random.default_rng(0)
        for number in range(2):
            model, actions, states, seen, poses = env.sim.model.get_xml(), [], [], [], []
            for step in range(CAP + KEPT):
                action = np.append(rng.uniform(-1, 1, 6), -1.0)
                state = env.sim.get_state().flatten()
                pose = {
                    name: np.append(env.sim.data.body_xpos[body], np.roll(env.sim.data.body_xquat[body], -1))
                    for name, body in env.obj_body_id.items()
                }
                observation = env.step(action)[0]
                if step >= CAP:
                    actions.append(action)
                    states.append(state)
                    poses.append(pose)
                    seen.append(observation)
            write(data.create_group(f"demo_{number}"), model, np.array(actions), np.array(states), seen)
            truth.append((np.array(actions), poses, seen))
        data.attrs["num_demos"] = 2
        data.attrs["total"] = 2 * KEPT
    return folder, truth


def write(group, model, actions, states, seen):
    obs = group.create_group("obs")
    hand = np.stack([np.append(o["robot0_eef_pos"], T.quat2axisangle(o["robot0_eef_quat"])) for o in seen])
    obs["gripper_states"] = np.stack([o["robot0_gripper_qpos"] for o in seen])
    obs["joint_states"] = np.stack([o["robot0_joint_pos"] for o in seen])
    obs["ee_states"], obs["ee_pos"], obs["ee_ori"] = hand, hand[:, :3], hand[:, 3:]
    obs["agentview_rgb"] = np.stack([o["agentview_image"] for o in seen])
    obs["eye_in_hand_rgb"] = np.stack([o["robot0_eye_in_hand_image"] for o in seen])
    group["actions"], group["states"] = actions, states
    group["robot_states"] = np.zeros((len(actions), 9))
    ends = np.zeros(len(actions), np.uint8)
    ends[-1] = 1
    group["rewards"], group["dones"] = ends, ends
    group.attrs["num_samples"] = len(actions)
    group.attrs["model_file"] = model
    group.attrs["init_state"] = states[0]


def test_state_demonstrations_show_what_was_there_before_each_action(made):
    folder, truth = made
    protocol = SUITE.protocol("state")
    read = load_demonstrations(SUITE, folder, [TASK], protocol)
    assert [episode.init_state for episode in read] == [-1, -1]
    for episode, (actions, poses, seen) in zip(read, truth, strict=True):
        assert np.array_equal(episode.actions, actions.astype(np.float32))
        for observation, there in zip(episode.observations, poses, strict=True):
            assert observation.objects.keys() == there.keys()
            for name, pose in there.items():  # stock's poses lag the state by one physics step
                np.testing.assert_allclose(observation.objects[name], pose, atol=2e-3, err_msg=name)
        for after, observation in zip(seen[:-1], episode.observations[1:], strict=True):
            np.testing.assert_allclose(observation.proprio[:3], after["robot0_eef_pos"], atol=3e-3)
            np.testing.assert_allclose(observation.proprio[6:], after["robot0_gripper_qpos"], atol=1e-3)
    described = describe_demonstrations(folder, [TASK], protocol, read)
    assert described["source"] == "HDF5"
    assert "cannot be checked" in described["held_out"]
    assert (
        len(load_demonstrations(SUITE, folder.parent, [TASK], protocol, limit=1)) == 1
        if folder.name == TASK.suite
        else 1
    )


def test_the_fixtures_of_the_file_differ_from_those_of_our_simulator(made):
    """Or the test above would not show that they are put where the file has them."""
    simulator = LiberoSimulator(TASK, SUITE.protocol("state"), render=False)
    try:
        simulator.reset(0)
        here = simulator.observe().objects
    finally:
        simulator.close()
    there = made[1][0][1][0]
    assert max(np.abs(here[name][:3] - there[name][:3]).max() for name in ("wooden_cabinet_1", "flat_stove_1")) > 5e-3


def test_pictures_are_those_of_the_file_in_the_size_of_the_protocol(made):
    folder, truth = made
    protocol = dataclasses.replace(SUITE.protocol("pixels"), image_size=128)
    (episode,) = load_demonstrations(SUITE, folder, [TASK], protocol, limit=1)
    for after, observation in zip(truth[0][2][:-1], episode.observations[1:], strict=True):
        for camera in protocol.cameras:
            stored = after[f"{camera}_image"][::-1].astype(float)  # upside down in the file
            assert np.abs(observation.images[camera] - stored).mean() < 3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda f: f["data"].attrs.update(bddl_file_name="a/b/fly.bddl"), "data.bddl_file_name: 'fly'"),
        (lambda f: f["data"].attrs.pop("bddl_file_name"), "bddl_file_name"),
        (lambda f: f.pop("data/demo_0/actions"), "actions"),
        (lambda f: replace(f, "actions", lambda a: a[:, :6]), r"demo_0/actions: shape \(5, 6\); wanted: \(5, 7\)"),
        (lambda f: replace(f, "actions", lambda a: a * np.nan), "demo_0/actions: not finite"),
        (lambda f: replace(f, "states", lambda a: a[:-1]), "demo_0/states: shape"),
        (lambda f: replace(f, "states", lambda a: a[:, :-1]), "demo_0/states: shape .* numbers a state"),
        (lambda f: replace(f, "obs/ee_pos", lambda a: a + 0.05), "demo_0/obs/ee_pos: 0.05"),
        (lambda f: f["data/demo_0"].attrs.pop("model_file"), "model_file"),
        (lambda f: f["data/demo_0"].attrs.update(model_file="<oh"), "damaged"),
    ],
)
def test_what_is_wrong_is_named(made, tmp_path, change, line):
    name = f"{TASK.name}_demo.hdf5"
    (tmp_path / name).write_bytes((made[0] / name).read_bytes())
    with h5py.File(tmp_path / name, "r+") as file:
        change(file)
    with pytest.raises(BenchError, match=line) as caught:
        load_demonstrations(SUITE, tmp_path, [TASK], SUITE.protocol("state"), limit=1)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_and_a_missing_file(made, tmp_path):
    name = f"{TASK.name}_demo.hdf5"
    (tmp_path / name).write_bytes((made[0] / name).read_bytes()[:5000])
    with pytest.raises(BenchError, match="damaged"):
        load_demonstrations(SUITE, tmp_path, [TASK], SUITE.protocol("state"))
    with pytest.raises(BenchError, match=f"{SUITE.tasks[1].name}_demo.hdf5: missing"):
        load_demonstrations(SUITE, tmp_path, [SUITE.tasks[1]], SUITE.protocol("state"))


def replace(file, field, function):
    path = f"data/demo_0/{field}"
    values = function(file[path][()])
    del file[path]
    file[path] = values
