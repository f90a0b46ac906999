from types import SimpleNamespace

import pytest

from vlarl_bench.report.comparisons import change
from vlarl_bench.report.methods import Method, compared_methods
from vlarl_bench.report.runs import read_runs
from vlarl_bench.stats import difference_interval


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("", "fpo"),
        ("lr=3e-05", "fpo (lr=3e-05)"),
        ("tasks=[]", "fpo (tasks=the first)"),
        (f"tasks=[{'a' * 30}, {'b' * 30}]", "fpo (tasks=[2 named])"),
    ],
)
def test_a_label_is_short_and_says_which_tasks(settings, said):
    method = SimpleNamespace(name="fpo", is_control=False, settings=settings, submitted_by="")
    assert Method.label.fget(method) == said


def test_repeats_of_an_initial_state_are_one_cluster(make_run, outcomes):
    run = make_run(
        "a", base=outcomes["never"], final=lambda task, state, repeat: state < 6, tasks=("suite_a/pick_it_up",)
    )
    base, method = compared_methods(read_runs([run]))
    found = change(method, base, "suite_a")
    assert found["p"] == 0.5  # two states gained, both twice
    assert (found["low"], found["high"]) == difference_interval([2, 2, 0, 0], [2, 2, 2, 2])
