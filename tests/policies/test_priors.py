"""The weights that ship: together they are small, and each card says where they come from and what they are not for."""

import re
import shlex

import pytest
from safetensors import safe_open

from vlarl_bench import registry
from vlarl_bench.policies.spec import PRIORS
from vlarl_bench.policies.store import read_policy

SHIPPED = sorted(path.parent.relative_to(PRIORS).as_posix() for path in PRIORS.glob("*/*/config.json"))

WANTED = [f"{policy}-tiny/{on}" for policy in ("pi0", "pi0-fast", "openvla", "octo") for on in ("libero", "aloha")]
WANTED += ["pi0-tiny-pixels/libero", "openvla-tiny-pixels/libero", "pi0-tiny-pixels/aloha"]
MISSING = dict.fromkeys(
    ("openvla-tiny/aloha",),
    pytest.mark.xfail(strict=True, reason="not trained yet"),
)


def commands(card):
    """Of the card's block of shell commands, each as its words."""
    (block,) = re.findall(r"^```sh\n(.*?)^```$", card, re.M | re.S)
    return [shlex.split(line) for line in block.splitlines()]


def said(command, option):
    """What a command says after an option."""
    return command[command.index(option) + 1]


def test_all_together_are_small():
    assert SHIPPED
    assert sum(path.stat().st_size for path in PRIORS.rglob("*") if path.is_file()) < 25e6


@pytest.mark.parametrize("name", [pytest.param(name, marks=MISSING.get(name, ())) for name in WANTED])
def test_every_family_ships(name):
    assert name in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_it_leaves_room_to_learn_and_is_stored_in_half_precision(name):
    """Between 20% and 70% of the held-out episodes, over all its tasks."""
    card = (PRIORS / name / "README.md").read_text()
    ((successes, episodes),) = re.findall(r"^\| \*\*all \d+ tasks\*\* \| .*?(\d+)/(\d+) ", card, re.M)
    assert 0.2 <= int(successes) / int(episodes) <= 0.7
    with safe_open(PRIORS / name / "model.safetensors", framework="pt") as weights:
        dtypes = {key: weights.get_slice(key).get_dtype() for key in list(weights.keys())}
    assert {dtype for key, dtype in dtypes.items() if not key.startswith(("action_", "proprio_"))} == {"F16"}


@pytest.mark.parametrize(
    ("suites", "policies"),
    [
        ("libero", ("pi0-tiny", "octo-tiny")),  # the first of each task
        ("libero", ("pi0-fast-tiny", "openvla-tiny")),  # all three; tokens need more (docs/policies.md)
        ("aloha", ("pi0-tiny", "octo-tiny")),  # from 25 states; pi0-fast-tiny from 100
    ],
)
def test_families_have_learned_from_the_same_demonstrations(suites, policies):
    """In `state` mode, of one set."""
    configs = [read_policy(PRIORS / policy / suites)[0] for policy in policies]
    (digest,) = {config["trained"]["settings"]["demonstrations"] for config in configs}
    assert re.fullmatch("[0-9a-f]{12}", digest)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_says_what_the_prior_is(name):
    policy, benchmark = name.split("/")
    config, _ = read_policy(PRIORS / name)
    card = (PRIORS / name / "README.md").read_text()
    assert config["policy"] == policy
    # Data and command: the demonstrations, then the run that learned from them.
    demos, run, ship = commands(card)
    assert demos[:2] == ["vlarl-bench", "demos"]
    assert said(demos, "--mode") == registry.get("policy", policy).observation
    assert registry.get("suite", said(demos, "--suite")).benchmark == benchmark
    assert int(said(demos, "--episodes")) > 0
    assert run[:2] == ["vlarl-bench", "run"] and run == shlex.split(config["made_by"])
    assert (said(run, "--policy"), said(run, "--suite")) == (policy, said(demos, "--suite"))
    assert ship[:2] == ["python", "scripts/ship_prior.py"] and ship[3] == policy
    # What it scored, on what, with which seed, and how sure that is.
    assert re.search(r"Held-out initial states [\d, -]+, \d+ episode\(s\) each; seed \d+; .* scored episodes\.", card)
    suites = {task.split("/")[0] for task in config["tasks"]}
    for task in config["tasks"]:
        shown = task if len(suites) > 1 else task.split("/")[1]
        assert re.search(rf"^\| {shown.replace('_', ' ')} \| .* \d+/\d+ \d+% \[", card, re.M), task
    for suite in suites:
        assert re.search(rf"^\| {suite} \| \d+/\d+ \d+% \[\d+%, \d+%\] \|", card, re.M), suite
    assert re.search(r"^\| \*\*all \d+ tasks\*\* \| .*\d+/\d+ \d+% \[\d+, \d+\]", card, re.M)
    # What it must not be used for.
    text = " ".join(card.split())
    assert "for comparing fine-tuning methods in simulation and good for nothing else" in text
    assert "must not drive a robot" in text
    assert "Its scores are no scores of the published models" in text
