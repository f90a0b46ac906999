from types import SimpleNamespace

import pytest

from vlarl_bench.report.methods import Method


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
