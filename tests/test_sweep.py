"""Sweep files: what they mean, and what is said of those that mean nothing."""

import copy
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import toml
from torture import count

from vlarl_bench import registry
from vlarl_bench.cli import run_config
from vlarl_bench.config import RunConfig
from vlarl_bench.errors import BenchError
from vlarl_bench.options import parse_run, to_arguments
from vlarl_bench.sweep import Resources, plan_sweep, read_sweep

EXAMPLES = count(60, 1000)  # of each of two tests
FILE = Path("somewhere/mine.toml")
SMALL = {"algorithms": ["fpo"], "policies": ["pi0-tiny"], "suites": ["libero_object"], "seeds": [0]}


def plan(**changes):
    return plan_sweep({**SMALL, **changes}, FILE)


def test_a_sweep_is_the_product_of_its_axes_less_what_is_excluded():
    sweep = plan(
        algorithms=["fpo", "dppo"],
        policies=["pi0-tiny", "octo-tiny"],
        seeds=[0, 1, 2],
        ablations={
            "gentle": {"settings": {"lr": 1e-5}},
            "one-critic": {"algorithms": ["fpo"], "settings": {"critics": 1}},
        },
        exclude=[{"policies": ["octo-tiny"], "seeds": [2]}, {"algorithms": ["fpo"], "ablations": ["default"]}],
    )
    axes = [(c.row.algorithm, c.row.policy, c.row.ablation, c.seed) for c in sweep.cells]
    kinds = [("fpo", "gentle"), ("fpo", "one-critic"), ("dppo", "default"), ("dppo", "gentle")]
    assert sorted(axes) == sorted(
        (algorithm, policy, ablation, seed)
        for algorithm, ablation in kinds
        for policy, seeds in (("pi0-tiny", (0, 1, 2)), ("octo-tiny", (0, 1)))
        for seed in seeds
    )
    assert len({cell.name for cell in sweep.cells}) == len(axes)
    assert [cell.config.settings.critics for cell in sweep.cells if cell.row.ablation == "one-critic"] == [1] * 5


def test_an_ablation_may_change_how_it_is_run():
    sweep = plan(ablations={"control": {"run": {"rewards": "shuffled"}}})
    found = {cell.row.ablation: cell.config.rewards for cell in sweep.cells}
    assert found == {"default": "success", "control": "shuffled"}


def test_later_overrides_win_over_ablations_settings_and_presets():
    sweep = plan(
        seeds=[0, 1],
        budget={"preset": "smoke", "iterations": 3},
        settings={"fpo": {"lr": 1e-3, "epochs": 2}},
        ablations={"gentle": {"settings": {"lr": 1e-5}}},
        resources={"cpus": 4},
        override=[
            {"seeds": [1], "settings": {"epochs": 7}, "budget": {"episodes": 9}, "resources": {"gpus": 1}},
            {"seeds": [1], "ablations": ["gentle"], "settings": {"epochs": 8}, "run": {"slots": 5}},
        ],
    )
    found = [
        (c.config.settings.lr, c.config.settings.epochs, c.config.budget.episodes, c.config.slots, c.row.resources.gpus)
        for c in sweep.cells
    ]
    assert found == [(1e-3, 2, 4, 16, 0), (1e-3, 7, 9, 16, 1), (1e-5, 2, 4, 16, 0), (1e-5, 8, 9, 5, 1)]
    assert all(cell.config.budget.iterations == 3 for cell in sweep.cells)
    assert sweep.cells[0].row.resources == Resources(cpus=4)


def test_names_change_with_whatever_changes_rows_and_with_nothing_else():
    name = plan().cells[0].name
    assert name.startswith("fpo-pi0_tiny-libero_object-seed0-")
    for same in ({"run": {"workers": 7}}, {"run": {"video": True}}, {"resources": {"cpus": 9}}, {"seeds": [0, 1]}):
        assert plan(**same).cells[0].name == name
    for other in ({"budget": "smoke"}, {"run": {"slots": 3}}, {"settings": {"fpo": {"lr": 2e-4}}}):
        assert plan(**other).cells[0].name != name
    assert plan_sweep(SMALL, Path("elsewhere/mine.toml")).cells[0].name == name


def test_paths_are_relative_to_the_file(tmp_path):
    file = tmp_path / "deep" / "mine.toml"
    sweep = plan_sweep({**SMALL, "run": {"base": "../weights", "demos": "shown"}}, file)
    assert sweep.out == tmp_path / "deep" / "mine"
    config = sweep.cells[0].config
    assert Path(config.base).resolve() == tmp_path / "weights"
    assert Path(config.demos) == tmp_path / "deep" / "shown"
    assert Path(config.out) == tmp_path / "deep" / "mine" / "runs" / sweep.cells[0].name
    assert "there is no policy" in sweep.cells[0].row.impossible


def test_what_cannot_run_says_why():
    rows = plan(policies=["pi0-tiny", "openvla-tiny"], suites=["libero_object", "libero_90"]).rows
    reasons = {(row.policy, row.suite): row.impossible for row in rows}
    assert reasons[("pi0-tiny", "libero_object")] == ""
    assert "lacks denoising" in reasons[("openvla-tiny", "libero_object")]
    assert "was trained on no task of 'libero_90'" in reasons[("pi0-tiny", "libero_90")]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"algorithm": ["fpo"]}, "sweep.algorithm: unknown field; did you mean 'algorithms'?"),
        ({"algorithms": []}, "algorithms: []; name at least one"),
        ({"algorithms": ["fpoo"]}, "algorithms[0]: algorithm: 'fpoo' is not registered; did you mean 'fpo'?"),
        ({"policies": "pi0-tiny"}, "sweep.policies: 'pi0-tiny'; it must be a list"),
        ({"suites": ["aloha", "aloha"]}, "suites[1]: 'aloha'; it is there twice"),
        ({"seeds": [-1]}, "seeds[0]: -1; it must be in [0, 2147483647]"),
        ({"seeds": [True]}, "sweep.seeds[0]: True; it must be an integer"),
        ({"budget": "smok"}, "budget.preset: 'smok' is no preset; did you mean 'smoke'?"),
        ({"budget": {"iterations": 0}}, "cell fpo pi0-tiny libero_object: budget.iterations: 0; it must be at least 1"),
        ({"settings": {"fpo": {"lrr": 1.0}}}, "settings.fpo.lrr: unknown field; did you mean 'lr'?"),
        ({"settings": {"fpo": {"lr": "1"}}}, "settings.fpo.lr: '1'; it must be a number"),
        ({"settings": {"fpo": {"lr": -1}}}, "cell fpo pi0-tiny libero_object: algo.lr: -1.0;"),
        ({"settings": {"dppo": {}}}, "settings.dppo: not in algorithms; did you mean 'fpo'?"),
        ({"ablations": {"default": {"settings": {}}}}, "ablations.default: the name 'default' is taken"),
        ({"ablations": {"a": {"settings": {}}}}, "ablations.a: it changes nothing; give settings, or options of run"),
        ({"ablations": {"a": {"run": {"reward": "shuffled"}}}}, "ablations.a.run.reward: unknown field;"),
        ({"ablations": {"a": {"settings": {"x": 1}}}}, "ablations.a.settings.x: unknown field;"),
        ({"exclude": [{}]}, "exclude[0]: {}; it would leave out every cell"),
        ({"exclude": [{"seeds": [0]}]}, "exclude: no cell is left"),
        ({"exclude": [{"seeds": [7]}]}, "exclude[0].seeds: 7 is not in seeds; known: 0"),
        ({"override": [{"run": {"slots": 0}}]}, "cell fpo pi0-tiny libero_object: slots: 0; it must be in [1, 4096]"),
        ({"run": {"seed": 3}}, "run.seed: unknown field;"),
        ({"resources": {"minutes": 0}}, "resources.minutes: 0; it must be at least 1"),
        ({"resources": {"memory_gib": float("nan")}}, "resources.memory_gib: nan; it must be finite"),
        ({"resources": {"memory_gib": 10**400}}, "resources.memory_gib: 1000"),
        ({"parallel": 0}, "parallel: 0; it must be at least 1"),
        ({"tracker": "wandbb"}, "tracker: 'wandbb'; did you mean 'wandb'?"),
        ({"out": "mine.toml"}, "out: 'mine.toml'; the file itself has that name"),
        ({"packed": "mine"}, "sweep.packed: 'mine'; it must be a list"),
        ({"packed": ["mine", ""]}, "packed[1]: ''; it must be the name of a folder"),
    ],
)
def test_mistakes_are_told_in_one_line_with_the_field(changes, line):
    with pytest.raises(BenchError) as error:
        plan(**changes)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_files_are_read_and_their_faults_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(toml(SMALL))
    assert [c.name for c in read_sweep(file).cells] == [c.name for c in plan().cells]
    file.write_text("\nseeds = [0}\n")
    with pytest.raises(BenchError, match=r"mine\.toml: not valid TOML; .*line 2"):
        read_sweep(file)
    file.write_bytes(b"\xff")
    with pytest.raises(BenchError, match=r"mine\.toml: not valid TOML"):
        read_sweep(file)
    with pytest.raises(BenchError, match=r"none\.toml: no such file"):
        read_sweep(tmp_path / "none.toml")


@pytest.mark.torture
def test_10000_cells_are_planned_in_seconds(record_property):
    begun = time.process_time()
    sweep = plan(
        algorithms=["fpo", "dppo", "sft"],
        policies=["pi0-tiny", "octo-tiny"],
        suites=["libero_object", "libero_goal"],
        seeds=list(range(210)),
        ablations={f"lr{i}": {"settings": {"lr": 1e-5 * (i + 1)}} for i in range(3)},
    )
    assert len(sweep.cells) == 10080
    assert len({cell.name for cell in sweep.cells}) == 10080
    seconds = time.process_time() - begun
    assert seconds < 10
    record_property("torture", f"10080 cells planned in {seconds:.1f} s of CPU")


# ---- generated files

ALGORITHMS = ["ar-ppo", "dppo", "fpo", "sft"]
POLICIES = ["pi0-tiny", "octo-tiny", "openvla-tiny", "pi0-tiny-pixels"]
SUITES = ["libero_object", "libero_goal", "aloha"]


def some(items):
    return st.lists(st.sampled_from(items), min_size=1, max_size=3, unique=True)


@st.composite
def files(draw):
    """A sweep file that is right, or nearly: its parts fit the types, but may contradict each other."""
    data = {
        "algorithms": draw(some(ALGORITHMS)),
        "policies": draw(some(POLICIES)),
        "suites": draw(some(SUITES)),
        "seeds": draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)),
    }
    axes = st.fixed_dictionaries({}, optional={axis: some(values) for axis, values in data.items()})
    rates = st.floats(1e-6, 1e-2)
    lr = st.fixed_dictionaries({"lr": rates})
    optional = {
        "budget": st.sampled_from(["smoke", "quick", {"preset": "smoke", "episodes": 2}, {"iterations": 4}]),
        "settings": st.fixed_dictionaries({draw(st.sampled_from(data["algorithms"])): lr}),
        "ablations": st.dictionaries(
            st.sampled_from(["a", "b", "no-q"]),
            st.fixed_dictionaries({"settings": lr}, optional={"algorithms": some(data["algorithms"])}),
            max_size=2,
        ),
        "run": st.fixed_dictionaries(
            {},
            optional={
                "base": st.sampled_from(["prior", "scratch", "nowhere"]),
                "slots": st.integers(1, 64),
                "lora": st.integers(0, 4),
                "freeze": st.just(["network"]),
                "video": st.booleans(),
                "rewards": st.sampled_from(["success", "shuffled"]),
            },
        ),
        "resources": st.fixed_dictionaries(
            {}, optional={"cpus": st.integers(1, 9), "memory_gib": st.floats(0.1, 99), "partition": st.text("ab")}
        ),
        "exclude": st.lists(axes, max_size=2),
        "override": st.lists(
            st.tuples(axes, st.fixed_dictionaries({}, optional={"settings": lr, "run": st.just({"threads": 1})})).map(
                lambda pair: {**pair[0], **pair[1]}
            ),
            max_size=2,
        ),
        "parallel": st.integers(1, 9),
        "tracker": st.sampled_from(["", "wandb"]),
        "out": st.text("xyz", max_size=3),
    }
    return {**data, **draw(st.fixed_dictionaries({}, optional=optional))}


def places(value, path=()):
    """Every table and every value in a table, as paths."""
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))
    else:
        yield path


WRONG = [-1, 0, 2.5, float("nan"), "", "x", "\0", [], ["x"], [[]], [3, 3], {}, {"x": {}}, True]


@pytest.mark.torture
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=files(), choice=st.data(), wrong=st.sampled_from([*WRONG, "an unknown field"]))
def test_every_generated_file_is_a_plan_or_one_line_that_names_the_field(data, choice, wrong):
    path = choice.draw(st.sampled_from(list(places(data))))
    data = copy.deepcopy(data)
    target = data
    for key in path[:-1]:
        target = target[key]
    if wrong == "an unknown field":
        inner = target[path[-1]] if path else data
        if not isinstance(inner, dict):
            return
        field = inner["fieldless"] = "fieldless"
    elif path:
        target[path[-1]] = wrong
        field = next(str(key) for key in reversed(path) if not isinstance(key, int))
    else:
        return
    sweep, line = planned(data)
    if sweep:
        assert_round_trips(sweep, data)
        return
    assert "\n" not in line
    # A changed axis may be missed by what refers to it, and an axis less may leave nothing.
    assert field in line or "exclude" in line


@pytest.mark.torture
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=files())
def test_every_accepted_file_round_trips(data):
    sweep, line = planned(data)
    if sweep:
        assert_round_trips(sweep, data)
    else:
        assert line.startswith("exclude")


def planned(data):
    """The plan, or what is said in its place."""
    try:
        return plan_sweep(data, FILE), ""
    except BenchError as error:
        return None, str(error)


def assert_round_trips(sweep, data):
    """File, cells, their configurations and their commands: each is read as what it was written from."""
    again = plan_sweep(tomllib.loads(toml(data)), FILE)
    assert again.cells == sweep.cells
    for cell in {cell.row.ablation: cell for cell in sweep.cells}.values():
        assert RunConfig.from_dict(cell.config.to_dict()) == cell.config
        assert run_config(parse_run(to_arguments(cell.config)[1:])) == cell.config


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_any_changed_setting_survives_as_a_command(name):
    config = plan(algorithms=[name], policies=list(registry.names("policy"))[:1]).cells[0].config
    kind = type(config.settings)
    for field, value in vars(kind()).items():
        changed = not value if isinstance(value, bool) else value * 0.5 if isinstance(value, float) else None
        if changed is None:
            continue
        try:
            mine = replace(config, settings=replace(config.settings, **{field: changed}))
        except BenchError:
            continue
        assert run_config(parse_run(to_arguments(mine)[1:])) == mine
