import contextlib
import io

import pytest

from vlarl_bench import registry
from vlarl_bench.errors import BenchError


@pytest.mark.parametrize("name", ["libero_object", "libero_spatial"])
def test_tasks_are_upstream_s_own(name):
    from libero.libero import benchmark

    with contextlib.redirect_stdout(io.StringIO()):
        upstream = benchmark.get_benchmark(name)()
    assert [(task.name, task.instruction) for task in registry.get("suite", name).tasks] == [
        (task.name, task.language) for task in upstream.tasks
    ]


def test_the_group_is_its_members():
    members = [registry.get("suite", name).tasks for name in ("libero_object", "libero_spatial")]
    assert registry.get("suite", "libero").tasks == members[0] + members[1]


def test_protocols_split_the_states_and_differ_by_hash():
    suite = registry.get("suite", "libero")
    state, pixels = suite.protocol("state"), suite.protocol("pixels")
    assert set(state.train_states).isdisjoint(state.eval_states)
    assert len(state.train_states) == len(state.eval_states) == 25
    assert state.hash != pixels.hash
    assert "privileged state" in state.label
    assert "privileged" not in pixels.label
    with pytest.raises(BenchError, match="observation: 'depth'"):
        suite.protocol("depth")
