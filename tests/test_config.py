import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlarl_bench import registry
from vlarl_bench.config import (
    BUDGETS,
    MOST_SLOTS,
    MOST_WORKERS,
    Budget,
    RunConfig,
    check_settings,
    select_tasks,
    settings_before,
)
from vlarl_bench.errors import BenchError
from vlarl_bench.protocol import Protocol
from vlarl_bench.sealed import write_sealed
from vlarl_bench.sweep import plan_sweep
from vlarl_bench.sweep_cell import begun

FPO = registry.get("algorithm", "fpo").Settings


def config(**changes):
    fields = {
        "algorithm": "fpo",
        "suite": "libero",
        "policy": "pi0-tiny",
        "budget": BUDGETS["quick"],
        "settings": FPO(),
    }
    return RunConfig(**{**fields, "out": "run", **changes})


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    steps: int = 3
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    layers: tuple[int, ...] = (1, 2)
    cap: float | None = None

    def check(self):
        if self.rate <= 0:
            raise BenchError(f"algo.rate: {self.rate}; it must be positive")


positive = st.integers(1, 10**6)


@given(
    budget=st.builds(Budget, *[positive] * 8),
    out=st.text(min_size=1),
    tasks=st.lists(st.text(min_size=1), unique=True).map(tuple),
    seed=st.integers(0, 2**31 - 1),
    workers=st.integers(1, MOST_WORKERS),
    slots=st.integers(1, MOST_SLOTS),
    demos=st.text(),
    video=st.booleans(),
)
def test_what_is_written_is_what_is_read(**fields):
    written = config(**fields)
    assert RunConfig.from_dict(json.loads(json.dumps(written.to_dict()))) == written


def test_runs_of_before_a_device_could_be_chosen_are_read_and_their_cells_go_on(tmp_path):
    wanted = config(out=str(tmp_path), device="cuda")
    stored = {name: value for name, value in wanted.to_dict().items() if name != "device"}
    assert RunConfig.from_dict(stored) == replace(wanted, device="cpu")
    assert not begun(wanted)
    tmp_path.mkdir()
    (tmp_path / "manifest.json").touch()
    write_sealed(tmp_path / "config.json", stored)
    assert begun(wanted)
    with pytest.raises(BenchError, match=r"config\.json: seed is 0, but the sweep's cell has 1"):
        begun(replace(wanted, seed=1))


@pytest.mark.parametrize("name", [name for name in registry.names("algorithm") if settings_before(name)])
def test_runs_of_before_a_setting_was_added_are_read_and_their_cells_go_on(name, tmp_path):
    before = settings_before(name)
    data = {"algorithms": [name], "policies": ["pi0-tiny"], "suites": ["libero"], "seeds": [0], "budget": "smoke"}
    cell = plan_sweep({**data, "settings": {name: before}}, tmp_path / "sweep.toml").cells[0]
    written = cell.config.to_dict()
    stored = {**written, "settings": {k: v for k, v in written["settings"].items() if k not in before}}
    assert stored != written and RunConfig.from_dict(stored) == cell.config
    fields = get_type_hints(registry.get("algorithm", name).Settings)

    def another(key, value):
        if isinstance(value, str):
            return next(word for word in get_args(fields[key]) if word != value)
        return not value if isinstance(value, bool) else value + 0.5

    other = {key: another(key, value) for key, value in before.items()}
    changed = plan_sweep({**data, "settings": {name: other}}, tmp_path / "sweep.toml").cells[0]
    assert changed.name != cell.name
    run = Path(cell.config.out)
    run.mkdir(parents=True)
    (run / "manifest.json").touch()
    write_sealed(run / "config.json", stored)
    assert begun(cell.config)


def test_every_changed_setting_survives():
    changed = {name: value * 2 for name, value in asdict(FPO()).items() if type(value) is int and value > 0}
    assert changed
    for name, value in changed.items():
        written = config(settings=replace(FPO(), **{name: value}))
        assert getattr(RunConfig.from_dict(json.loads(json.dumps(written.to_dict()))).settings, name) == value


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (["seed"], "3", "config.seed: '3'; it must be an integer"),
        (["seed"], True, "config.seed: True; it must be an integer"),
        (["seed"], -1, "seed: -1; it must be in [0, 2147483647]"),
        (["workers"], 0, "workers: 0; it must be in [1, 256]"),
        (["slots"], 0, "slots: 0; it must be in [1, 4096]"),
        (["video"], 1, "config.video: 1; it must be true or false"),
        (["tasks"], "milk", "config.tasks: 'milk'; it must be a list"),
        (["tasks"], ["milk", "milk"], "tasks: 'milk'; names must be distinct and not empty"),
        (["out"], "", "out: ''; it must not be empty"),
        (["budget", "iterations"], 0, "budget.iterations: 0; it must be at least 1"),
        (["budget", "iterations"], 2.0, "config.budget.iterations: 2.0; it must be an integer"),
        (["budget"], 3, "config.budget: 3; it must be a table of Budget fields"),
        (["sede"], 3, "config.sede: unknown field; did you mean 'seed'? known: "),
        (["settings", "clip_esp"], 3, "algo.clip_esp: unknown field; did you mean 'clip_eps'? known: "),
        (["settings", "clip_eps"], "x", "algo.clip_eps: 'x'; it must be a number"),
        (["settings", "clip_eps"], float("nan"), "algo.clip_eps: nan; it must be finite"),
    ],
)
def test_a_bad_field_is_named(path, value, line):
    data = config().to_dict()
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(BenchError) as error:
        RunConfig.from_dict(data)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["seed", "budget", "settings", "algorithm"])
def test_a_missing_field_is_named(field):
    data = config().to_dict()
    del data[field]
    with pytest.raises(BenchError, match=rf"^config\.{field}: missing"):
        RunConfig.from_dict(data)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Settings(rate=-1.0), "algo.rate: -1.0; it must be positive"),
        (Settings(steps=1.5), "algo.steps: 1.5; it must be an integer"),
        (Settings(mode="c"), "algo.mode: 'c'; it must be one of 'a', 'b'"),
        (Settings(flag=0), "algo.flag: 0; it must be true or false"),
        (Settings(layers=(1, "2")), "algo.layers[1]: '2'; it must be an integer"),
        (Settings(cap="x"), "algo.cap: 'x'; it must be a number"),
        (Settings, "settings: <class"),
    ],
)
def test_settings_are_checked(settings, line):
    with pytest.raises(BenchError) as error:
        check_settings(settings)
    assert str(error.value).startswith(line)


def test_good_settings_pass():
    check_settings(Settings(rate=1, cap=2.0, layers=()))


def test_budgets_grow():
    smoke, quick, standard = (list(asdict(BUDGETS[name]).values()) for name in ("smoke", "quick", "standard"))
    assert all(a <= b <= c for a, b, c in zip(smoke, quick, standard, strict=True))


def test_more_held_out_states_than_the_protocol_has():
    protocol = Protocol("t", 1, "state", {}, 10, 8, train_states=(0,), eval_states=(1, 2))
    replace(BUDGETS["smoke"], eval_states=2).check_protocol(protocol)
    with pytest.raises(BenchError, match=r"^budget.eval_states: 3; t@1 .* holds out 2$"):
        replace(BUDGETS["smoke"], eval_states=3).check_protocol(protocol)


def test_tasks_by_name_by_key_and_by_default():
    suite = registry.get("suite", "libero")
    first, second = suite.tasks[:2]
    assert select_tasks(suite, (), 2) == (first, second)
    assert select_tasks(suite, (second.key, first.name), 1) == (first, second)
    with pytest.raises(BenchError, match=f"did you mean '{first.name}'"):
        select_tasks(suite, (first.name[:-1],), 1)
