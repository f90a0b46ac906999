import gym_aloha  # noqa: F401  (registers the environments)
import gymnasium
import pytest
from gym_aloha.constants import DT, FPS

from vlarl_bench import registry
from vlarl_bench.errors import BenchError

MEMBERS = {"aloha_transfer_cube": "AlohaTransferCube-v0", "aloha_insertion": "AlohaInsertion-v0"}


@pytest.mark.parametrize("name", MEMBERS)
def test_each_suite_is_one_task_of_gym_aloha(name):
    (task,) = registry.get("suite", name).tasks
    assert gymnasium.spec(f"gym_aloha/{MEMBERS[name]}").kwargs["task"] == task.name
    assert registry.get("suite", name).fps == FPS == round(1 / DT)


def test_the_group_is_its_members():
    assert registry.get("suite", "aloha").tasks == tuple(registry.get("suite", name).tasks[0] for name in MEMBERS)


def test_protocols_split_the_states_and_differ_by_hash():
    suite = registry.get("suite", "aloha")
    protocols = [suite.protocol("state"), *(suite.protocol("pixels", name) for name in ("tiny", "openpi", "lerobot"))]
    assert len({protocol.hash for protocol in protocols}) == 4
    for protocol in protocols:
        assert set(protocol.train_states).isdisjoint(protocol.eval_states)
        assert protocol.horizon.keys() == MEMBERS.keys()
    assert [len(protocol.eval_states) for protocol in protocols] == [25, 25, 50, 50]


def test_openpi_plays_as_long_as_gym_aloha_lets_it():
    """Its example makes the environments without a limit of its own."""
    protocol = registry.get("suite", "aloha").protocol("pixels", "openpi")
    for name, environment in MEMBERS.items():
        assert protocol.horizon[name] == gymnasium.spec(f"gym_aloha/{environment}").max_episode_steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("depth",), "observation: 'depth'; ALOHA has 'state' and 'pixels'"),
        (("pixels", "opnpi"), "protocol: 'opnpi' is not one of ALOHA's; did you mean 'openpi'?"),
        (("state", "openpi"), "protocol: 'openpi' shows camera images; "),
    ],
)
def test_what_it_does_not_have_is_named(arguments, message):
    with pytest.raises(BenchError) as error:
        registry.get("suite", "aloha").protocol(*arguments)
    assert str(error.value).startswith(message)
