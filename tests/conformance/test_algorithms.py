"""What every registered algorithm must do, on every policy that has the capabilities it requires."""

import ast
import copy
import dataclasses
import inspect
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from vlarl_bench import registry
from vlarl_bench.checkpoint import load_latest, save_checkpoint
from vlarl_bench.config import check_settings

from .narrow import SAME

ALGORITHMS = registry.names("algorithm")
WARM = 3
"""Updates after which a policy has moved at the latest: critics may learn alone first."""
SHORT = {
    "critic_steps": 3,
    "utd": 0.25,
    "epochs": 1,
    "gradient_steps": 2,
    "minibatch": 5,
    "draws": 2,
    "critic_width": 16,
}
"""Settings that only cost time here, for those methods that have them; all others are at their defaults."""
METHODS = Path(__file__).parents[2] / "docs" / "methods"
PAIRS = [(a, p) for a in ALGORITHMS for p in registry.names("policy") if registry.runs_on(a, p) and p not in SAME]


def clips(name):
    """Whether the method has a ratio and a range that it is held in."""
    return any("clip" in field.name for field in dataclasses.fields(registry.get("algorithm", name).Settings))


def ours(name):
    """Whether the method is this project's: a plug-in's page is elsewhere."""
    return registry.get("algorithm", name).__module__.startswith("vlarl_bench.")


def documented(settings):
    """Names of the fields that are followed by a docstring."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    return {
        field.target.id
        for field, after in zip(cls.body, cls.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
        and after.value.value.strip()
    }


@pytest.mark.parametrize("name", ALGORITHMS)
class TestDescription:
    def test_settings_are_frozen_and_documented_and_have_defaults(self, name):
        settings = registry.get("algorithm", name).Settings
        check_settings(settings())
        for field in dataclasses.fields(settings):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(settings(), field.name, None)
        assert {field.name for field in dataclasses.fields(settings)} == documented(settings)

    def test_what_tune_searches_is_around_the_defaults(self, name):
        algorithm = registry.get("algorithm", name)
        default = algorithm.Settings()
        assert bool(algorithm.search) == (algorithm.learns_from == "rollouts")
        for setting, values in algorithm.search.items():
            assert getattr(default, setting) in values
            for value in values:
                check_settings(dataclasses.replace(default, **{setting: value}))
        assert not algorithm.search or math.prod(map(len, algorithm.search.values())) >= 8  # trials by default

    def test_summary_is_one_line(self, name):
        algorithm = registry.get("algorithm", name)
        assert algorithm.summary.strip() == algorithm.summary != ""
        assert "\n" not in algorithm.summary
        assert algorithm.learns_from in ("rollouts", "demonstrations")

    def test_some_policy_has_what_it_requires(self, name):
        known = set().union(*(registry.get("policy", policy).capabilities for policy in registry.names("policy")))
        assert registry.get("algorithm", name).requires <= known
        assert any(algorithm == name for algorithm, _ in PAIRS)

    def test_naming_it_imports_nothing_heavy(self, name, imported):
        assert imported("algorithm")[name] == []


def start(name, stage, budget, seed=0, **changed):
    """A fresh algorithm and its own copy of the policy."""
    policy = copy.deepcopy(stage.policy)
    cls = registry.get("algorithm", name)
    known = {field.name for field in dataclasses.fields(cls.Settings)}
    settings = cls.Settings(**{name: value for name, value in (SHORT | changed).items() if name in known})
    return cls(settings, policy, budget, seed), policy


def assert_equal(a, b, where="state"):
    """Bitwise equality of nested dicts, lists, tensors and numbers."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert type(a) is type(b), where
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert type(a) is type(b), where
        assert a == b, where


def moved(policy, before):
    """Names of what is no longer as it was."""
    return {key for key, tensor in policy.state_dict().items() if not torch.equal(tensor, before[key])}


@pytest.fixture(scope="module")
def budget(budget):
    """Of ten rounds: in the second of one the learning rate is 0, whatever there was before."""
    return dataclasses.replace(budget, iterations=10, gradient_steps=10 * budget.gradient_steps)


@dataclasses.dataclass
class Updated:
    """Updates done until the policy moved, and what it started from."""

    name: str
    stage: Any
    before: dict
    trainable: set
    algorithm: Any
    policy: Any
    metrics: list
    data: Any


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def updated(request, bench, budget):
    name, policy_name = request.param
    stage = bench(policy_name)
    algorithm, policy = start(name, stage, budget)
    trainable = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
    data, before, metrics = stage.data(algorithm, policy), copy.deepcopy(policy.state_dict()), []
    assert not moved(stage.policy, before), "making an algorithm changes the policy"
    while not moved(policy, before) and len(metrics) < WARM:
        metrics.append(algorithm.update(policy, data))
    return Updated(name, stage, before, trainable, algorithm, policy, metrics, data)


def test_update_trains_and_returns_finite_metrics(updated):
    for metrics in updated.metrics:
        assert metrics
        for name, value in metrics.items():
            assert type(value) is float, name
            assert math.isfinite(value), name
    after = updated.policy.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
    assert moved(updated.policy, updated.before) & updated.trainable


@pytest.mark.parametrize("updated", [pair for pair in PAIRS if ours(pair[0])], ids="-".join, indirect=True)
def test_its_page_says_what_its_metrics_mean(updated):
    told = (METHODS / f"{updated.name}.md").read_text() + (METHODS / "README.md").read_text()
    for metrics in updated.metrics:
        assert not [name for name in metrics if f"`{name}`" not in told]


@pytest.mark.parametrize(("name", "policy_name"), [(a, p) for a, p in PAIRS if clips(a) and p.endswith("-tiny")])
def test_the_first_ratio_is_one(name, policy_name, bench, budget):
    """Of all decisions, to rounding; what a run refuses is a hundred times as far from it."""
    stage = bench(policy_name)
    algorithm, policy = start(name, stage, budget, minibatch=10_000)
    assert algorithm.update(policy, stage.data(algorithm, policy))["ratio_off_one"] < 1e-5


@pytest.mark.parametrize(("name", "policy_name"), [pair for pair in PAIRS if pair[1].endswith("-tiny")])
def test_what_was_drawn_is_scored_as_it_was_drawn(name, policy_name, bench, budget):
    """A first ratio of 1 says that an update scores a decision alike twice. That it does so with the noise, temperature
    or level that it was drawn with, it does not say. Methods without a likelihood draw none and score none."""
    stage = bench(policy_name)
    algorithm, policy = start(name, stage, budget)
    drawn, scored = {}, set()

    def rows(trace, noise):
        for i, row in enumerate(trace):
            yield row.numpy().tobytes(), (noise[i].tolist() if isinstance(noise, torch.Tensor) else noise)

    def explore(context, generators, noise):
        sample = explored(context, generators, noise)
        drawn.update(rows(sample.trace, noise))
        return sample

    def log_prob(context, trace, mask, noise):
        for row, level in rows(trace, noise):
            assert drawn[row] == level
            scored.add(row)
        return scores(context, trace, mask, noise)

    if "likelihood" in policy.capabilities:
        explored, scores = policy.explore, policy.log_prob
        policy.explore, policy.log_prob = explore, log_prob
    data = stage.data(algorithm, policy)
    for _ in range(WARM):
        if not scored:
            algorithm.update(policy, data)
    assert scored == drawn.keys()


def test_update_leaves_the_frozen_part_alone(updated):
    """Buffers, and every parameter that the algorithm does not train; from rollouts that is all but the actor. A
    steering module, where the method gave the policy one, is the actor, with its scales."""
    actor = {id(parameter) for parameter in updated.policy.actor_parameters()}
    for key, parameter in updated.policy.named_parameters():
        if updated.algorithm.learns_from == "rollouts" and id(parameter) not in actor:
            assert key not in updated.trainable
    steering = {key for key in updated.before if key.startswith("steering.")}
    assert moved(updated.policy, updated.before) <= updated.trainable | steering


@pytest.mark.parametrize("updated", [pair for pair in PAIRS if "pixels" not in pair[1]], ids="-".join, indirect=True)
def test_seed_and_checkpoint_decide_what_follows(updated, budget, tmp_path):
    """The same seed repeats an update bitwise, another gives another, and a stored run goes on as if never stopped."""
    torch.manual_seed(123)  # an algorithm that used the global generator would now differ
    straight, policy = start(updated.name, updated.stage, budget)
    assert [straight.update(policy, updated.data) for _ in updated.metrics] == updated.metrics
    assert_equal(dict(policy.state_dict()), dict(updated.policy.state_dict()))

    other, other_policy = start(updated.name, updated.stage, budget, seed=1)
    assert other.update(other_policy, updated.data) != updated.metrics[0]

    save_checkpoint(tmp_path, 1, {"policy": dict(policy.state_dict()), "algorithm": straight.state_dict()})
    found = load_latest(tmp_path)
    assert found is not None
    assert_equal(found.state["algorithm"], straight.state_dict())
    expected = straight.update(policy, updated.data)
    # Into one that has learned nothing yet, and into one with a history, which loading must overwrite, whatever it is.
    for again, again_policy in (start(updated.name, updated.stage, budget, seed=1), (other, other_policy)):
        found = load_latest(tmp_path)  # anew: an optimiser goes on in the very tensors that it was given
        again_policy.load_state_dict(found.state["policy"])
        again.load_state_dict(found.state["algorithm"])
        assert again.update(again_policy, updated.data) == expected
        assert_equal(dict(again_policy.state_dict()), dict(policy.state_dict()))


def test_act_decodes_like_sample(updated):
    """Whatever an algorithm explores: shapes, units, and a row that depends on its own generator only."""
    policy, stage = updated.policy, updated.stage
    with torch.no_grad():
        context = policy.encode(policy.preprocess(stage.observations))
        first, again, others = (
            updated.algorithm.act(policy, context, [torch.Generator().manual_seed(seed) for seed in seeds])
            for seeds in ((0, 1, 2, 3), (0, 1, 2, 3), (0, 7, 8, 9))
        )
    assert first.latent.shape == (4, policy.chunk, policy.latent_dim)
    assert torch.equal(first.latent, again.latent)
    assert torch.equal(first.latent[0], others.latent[0])
    torch.testing.assert_close(policy.unnormalise(first.latent), first.actions)
