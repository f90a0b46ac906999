import contextlib
import io
import os
import re

import numpy as np
import pytest
from vlarl_bench.tasks.libero.suite import BASES, PUBLISHED, upstream_name

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.images import as_shown

CONCRETE = [name for name in registry.names("suite") if name.startswith("libero_")]


def upstream(name):
    from libero.libero import benchmark

    with contextlib.redirect_stdout(io.StringIO()):
        return benchmark.get_benchmark(upstream_name(name))()


def bddl_language(task):
    from libero.libero import get_libero_path

    path = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    with open(path) as file:
        return " ".join(re.search(r"\(:language\s*(.*?)\)", file.read(), re.DOTALL)[1].split())


@pytest.mark.parametrize("name", CONCRETE)
def test_tasks_are_upstream_s_own(name):
    theirs = upstream(name).tasks
    own_words = name.endswith(("_task", "_language"))  # upstream's task map repeats the unperturbed instruction there
    words = [bddl_language(task) if own_words else task.language for task in theirs]
    assert [(task.name, task.instruction) for task in registry.get("suite", name).tasks] == [
        (task.name, text) for task, text in zip(theirs, words, strict=True)
    ]


@pytest.mark.parametrize("name", CONCRETE)
def test_every_task_has_its_50_initial_states(name):
    suite = upstream(name)
    assert all(len(suite.get_task_init_states(index)) == 50 for index in range(suite.n_tasks))


def test_the_group_is_its_members():
    members = ("libero_object", "libero_spatial", "libero_goal", "libero_10")
    tasks = [task for name in members for task in registry.get("suite", name).tasks]
    assert list(registry.get("suite", "libero").tasks) == tasks


def test_tiny_protocols_split_the_states_and_differ_by_hash():
    suite = registry.get("suite", "libero")
    state, pixels = suite.protocol("state"), suite.protocol("pixels")
    assert set(state.train_states).isdisjoint(state.eval_states)
    assert len(state.train_states) == len(state.eval_states) == 25
    assert state.hash != pixels.hash
    assert "privileged state" in state.label
    assert "privileged" not in pixels.label
    with pytest.raises(BenchError, match="observation: 'depth'"):
        suite.protocol("depth")


def test_one_task_has_the_same_protocol_in_every_suite_that_holds_it():
    for name in ("tiny", *PUBLISHED):
        assert len({registry.get("suite", suite).protocol("pixels", name).hash for suite in ("libero", *BASES)}) == 1


def test_openpi_s_horizons():
    protocol = registry.get("suite", "libero").protocol("pixels", "openpi")
    assert [protocol.horizon[base] for base in BASES] == [220, 280, 300, 520, 400]
    assert protocol.horizon["libero_pro_10_swap"] == 520
    assert (protocol.settle_steps, protocol.eval_states, protocol.train_states) == (10, tuple(range(50)), ())


def test_protocols_that_train_on_what_they_evaluate_say_so():
    suite = registry.get("suite", "libero")
    assert "evaluates on training states" in suite.protocol("pixels", "simplevla").label
    assert "evaluates" not in suite.protocol("pixels", "openpi").label
    assert "evaluates" not in suite.protocol("pixels").label


def test_published_protocols_are_about_pixels():
    with pytest.raises(BenchError, match=r"protocol: 'openpi' shows camera images"):
        registry.get("suite", "libero").protocol("state", "openpi")
    with pytest.raises(BenchError, match=r"protocol: 'openvl' is not one of LIBERO's; did you mean"):
        registry.get("suite", "libero").protocol("pixels", "openvl")


def test_openpi_s_images_are_the_raw_frames_turned_by_180_degrees():
    protocol = registry.get("suite", "libero").protocol("pixels", "openpi")
    raw = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)  # upside down, as the renderer gives it
    turned = raw[::-1, ::-1]
    from PIL import Image

    small = np.asarray(Image.fromarray(turned).resize((224, 224), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(as_shown(raw[::-1], protocol), small)
