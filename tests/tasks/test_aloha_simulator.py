"""Our loop against gym-aloha itself, and snapshots against themselves."""

import dataclasses
import pickle

import gym_aloha  # noqa: F401  (registers the environments)
import gymnasium
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE
from vlarl_bench.tasks.aloha.expert import plan
from vlarl_bench.tasks.aloha.simulator import object_poses

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.images import as_shown
from vlarl_bench.suite import Outcome

CASES = {"aloha_transfer_cube": "AlohaTransferCube-v0", "aloha_insertion": "AlohaInsertion-v0"}
POSTURE = np.array([*START_ARM_POSE[:6], 0.5, *START_ARM_POSE[8:14], 0.5])


def ours(suite_name, protocol=None, **options):
    suite = registry.get("suite", suite_name)
    return suite.open(suite.tasks[0], protocol or suite.protocol("state"), **options)


def stock(suite_name, blind=True):
    """gym-aloha's environment. `blind`: its three cameras hand out black frames, which saves 0.2 s a step."""
    env = gymnasium.make(f"gym_aloha/{CASES[suite_name]}", obs_type="pixels_agent_pos", disable_env_checker=True)
    env = env.unwrapped
    if blind:
        env._env.physics.render = lambda height, width, camera_id: np.zeros((height, width, 3), np.uint8)
    return env


def random_actions(steps, dtype):
    """[steps, 14] around the start posture; far outside [-1, 1], and now and then beyond the joints' limits."""
    rng = np.random.default_rng(0)
    actions = POSTURE + np.repeat(rng.normal(size=(steps // 10, 14)), 10, axis=0) * 0.5
    return (actions + rng.normal(size=actions.shape) * 0.05).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("suite_name", CASES)
def test_same_states_and_reward_as_stock_for_200_random_steps(suite_name, dtype):
    simulator, env = ours(suite_name), stock(suite_name)
    # Another episode first, to show that resets leave nothing behind.
    simulator.reset(7)
    simulator.step(random_actions(10, dtype))
    simulator.reset(3)
    seen, _ = env.reset(seed=3)
    np.testing.assert_array_equal(simulator.observe().proprio, seen["agent_pos"].astype(np.float32))
    actions = random_actions(200, dtype)
    assert np.abs(actions).max() > 1.8
    for step, action in enumerate(actions):
        seen, reward, *_ = env.step(action)
        simulator.step(action[None])
        theirs, mine = env._env.physics.data, simulator.data
        for field in ("qpos", "qvel", "qacc_warmstart", "ctrl", "xpos", "cam_xpos"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field), field)
        assert mine.time == theirs.time
        assert simulator.reward() == reward
        np.testing.assert_array_equal(simulator.observe().proprio, seen["agent_pos"].astype(np.float32))
        if step % 23 == 0:  # a snapshot and back, which stock knows nothing of
            simulator.restore(simulator.save())


@pytest.mark.parametrize("suite_name", CASES)
def test_same_reward_as_stock_on_expert_episodes(suite_name):
    """Every stage of the reward, and success at the same step, with grasps and all."""
    suite = registry.get("suite", suite_name)
    simulator, env = ours(suite_name), stock(suite_name)
    for state in (0, 31, 1000):
        simulator.reset(state)
        env.reset(seed=state)
        rewards = set()
        for action in plan(suite.tasks[0], object_poses(suite.tasks[0], state)):
            _, reward, terminated, *_ = env.step(action)
            outcome = simulator.step(action[None])
            assert (simulator.reward(), outcome.success) == (reward, terminated)
            np.testing.assert_array_equal(simulator.data.qpos, env._env.physics.data.qpos)
            rewards.add(reward)
            if terminated:
                break
        assert terminated
        assert rewards >= {0, 1, 2, 4}


@pytest.mark.parametrize("suite_name", CASES)
def test_same_frames_as_stock_whenever_one_is_taken(suite_name):
    suite = registry.get("suite", suite_name)
    protocol = suite.protocol("pixels", "openpi")
    simulator, env = ours(suite_name, protocol), stock(suite_name, blind=False)
    simulator.reset(3)
    seen, _ = env.reset(seed=3)
    np.testing.assert_array_equal(simulator.frame("top", 480, 640), seen["pixels"]["top"])
    for chunk in random_actions(20, np.float32).reshape(2, 10, 14)[:, :3]:
        for action in chunk:
            seen, *_ = env.step(action)
        simulator.step(chunk)
        snapshot = simulator.save()
        for _ in range(2):
            np.testing.assert_array_equal(simulator.frame("top", 480, 640), seen["pixels"]["top"])
            shown = simulator.observe().images["top"]
            np.testing.assert_array_equal(shown, as_shown(seen["pixels"]["top"], protocol))
            simulator.reset(5)  # somebody else's episode
            simulator.restore(snapshot)
        assert shown.shape == (224, 224, 3)
        assert not shown[:28].any() and shown[28:-28].any()  # padded, 4:3
    stock_small = env._env.physics.render(height=96, width=96, camera_id="angle")
    np.testing.assert_array_equal(simulator.render("angle", 96), stock_small)
    simulator.close()


@pytest.mark.parametrize("suite_name", CASES)
def test_branches_of_a_snapshot_replay_bitwise_while_hands_hold_something(suite_name):
    suite = registry.get("suite", suite_name)
    simulator = ours(suite_name)
    planned = plan(suite.tasks[0], object_poses(suite.tasks[0], 0))
    simulator.reset(0)
    simulator.step(planned[:215])
    assert simulator.reward() == 2  # grasped and lifted
    snapshot = pickle.loads(pickle.dumps(simulator.save()))
    branches = [planned[215:240], planned[215:240] + np.float32(0.02), planned[240:265]]
    first = []
    for branch in branches:
        simulator.restore(snapshot)
        simulator.step(branch)
        first.append(simulator.save().physics)
    for branch, before in reversed(list(zip(branches, first, strict=True))):
        simulator.reset(9)
        simulator.restore(snapshot)
        for action in branch:  # one by one, with looks and snapshots in between
            if simulator.step(action[None]).success:  # where the chunk ended, too
                break
            simulator.observe()
            simulator.restore(simulator.save())
        np.testing.assert_array_equal(simulator.save().physics, before)
    assert not np.array_equal(first[0], first[1])


def test_state_mode_shows_the_objects_and_the_hands():
    for suite_name, names in (("aloha_transfer_cube", ["cube"]), ("aloha_insertion", ["peg", "socket"])):
        suite, simulator = registry.get("suite", suite_name), ours(suite_name)
        simulator.reset(12)
        seen = simulator.observe().objects
        poses = object_poses(simulator.task, 12).reshape(-1, 7)
        assert list(seen) == [*names, *suite.hands]
        for pose, (x, y, z, *quaternion) in zip(seen.values(), poses, strict=False):
            np.testing.assert_allclose(pose[:3], [x, y, z], atol=1e-6)
            np.testing.assert_allclose(pose[3:], np.roll(quaternion, -1), atol=1e-6)
        # At the start the arms point at each other, level but for 0.1 rad; the fingertips are 0.1347 m ahead.
        left, right = (seen[hand] for hand in suite.hands)
        np.testing.assert_allclose(left[:3], [-0.183, 0.5, 0.310], atol=2e-3)
        np.testing.assert_allclose(right[:3], [0.183, 0.5, 0.310], atol=2e-3)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.full((2, 14), np.nan), "actions: nan; "),
        (np.where(np.arange(14) == 6, np.inf, np.zeros((1, 14))), "actions: inf; "),
        (np.zeros((3, 7)), "actions: float64 (3, 7); "),
        (np.zeros(14), "actions: float64 (14,); "),
        (np.zeros((1, 14), int), "actions: int64 (1, 14); "),
    ],
)
def test_a_bad_action_is_refused_and_executes_nothing(actions, message):
    simulator = ours("aloha_transfer_cube")
    simulator.reset(0)
    before = simulator.save().physics
    with pytest.raises(BenchError) as error:
        simulator.step(actions)
    assert str(error.value).startswith(message)
    np.testing.assert_array_equal(simulator.save().physics, before)


@pytest.mark.parametrize("state", [-1, 2**32])
def test_unknown_initial_state_is_refused(state):
    with pytest.raises(BenchError, match=rf"init state: {state} of aloha_insertion/insertion; it has 0 to 4294967295"):
        ours("aloha_insertion").reset(state)


def test_an_exploded_state_ends_the_episode_and_a_reset_mends_it():
    simulator = ours("aloha_transfer_cube")
    simulator.reset(0)
    simulator.data.qvel[16] = 1e12
    assert simulator.step(np.stack([POSTURE] * 3)) == Outcome(1, False, broken=True)
    assert np.isfinite(simulator.observe().objects["cube"]).all()
    simulator.reset(0)
    assert simulator.step(POSTURE[None]) == Outcome(1, False)


def test_an_action_beyond_all_bounds_is_the_bound():
    """The actuators' own; a policy that diverged so far has failed, and does not end the run."""
    simulator = ours("aloha_transfer_cube")
    seen = []
    for size in (1e20, 1e3):
        simulator.reset(0)
        assert simulator.step(np.full((3, 14), size, np.float32)) == Outcome(3, False)
        seen.append(simulator.observe().proprio)
    np.testing.assert_array_equal(*seen)


def test_rendering_options_are_what_the_protocol_says():
    protocol = registry.get("suite", "aloha_insertion").protocol("pixels", "lerobot")
    plain = {option: dataclasses.replace(protocol, **{option: False}) for option in ("msaa", "shadows")}
    frames = []
    for variant in (protocol, *plain.values()):
        simulator = ours("aloha_insertion", variant)
        simulator.reset(0)
        frames.append(simulator.observe().images["top"])
        simulator.close()
    assert frames[0].shape == (640, 640, 3)
    assert not np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])
    assert len({variant.hash for variant in (protocol, *plain.values())}) == 3


def test_frames_that_cannot_be_had_are_refused():
    blind = ours("aloha_transfer_cube")
    with pytest.raises(BenchError, match="opened without a renderer"):
        blind.render("top", 64)
    simulator = ours("aloha_transfer_cube", video=True)
    with pytest.raises(BenchError, match="frame: 481 x 481; ALOHA renders at most 480 x 640"):
        simulator.render("top", 481)
    with pytest.raises(BenchError, match="camera: 'bottom'; ALOHA has left_pillar, right_pillar, top, "):
        simulator.render("bottom", 64)


def test_a_scene_is_compiled_once_a_process():
    assert ours("aloha_insertion").model is ours("aloha_insertion").model
