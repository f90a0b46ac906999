"""Demonstration files, and the worker processes that make them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from vlarl_bench.tasks.libero.suite import LIBERO_OBJECT

from vlarl_bench.demonstrations import (
    demonstration_path,
    load_demonstrations,
    make_demonstrations,
    write_demonstrations,
)
from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Demonstration, Observation

SUITE = LIBERO_OBJECT
STATE, PIXELS = SUITE.protocol("state"), SUITE.protocol("pixels")
TASK, OTHER = SUITE.tasks[6], SUITE.tasks[8]


def episode(init_state: int, steps: int, pixels: bool = False) -> Demonstration:
    rng = np.random.default_rng(init_state)
    observations = tuple(
        Observation(
            TASK.instruction,
            rng.normal(size=8).astype(np.float32),
            {} if pixels else {name: rng.normal(size=7).astype(np.float32) for name in ("butter_1", "basket_1")},
            {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in PIXELS.cameras} if pixels else {},
        )
        for _ in range(steps)
    )
    return Demonstration(TASK, init_state, True, observations, rng.uniform(-1, 1, (steps, 7)).astype(np.float32))


def same(first: Demonstration, second: Demonstration) -> bool:
    def parts(demonstration: Demonstration) -> list[np.ndarray]:
        seen = [
            array
            for observation in demonstration.observations
            for array in (observation.proprio, *observation.objects.values(), *observation.images.values())
        ]
        return [demonstration.actions, *seen]

    def names(demonstration: Demonstration) -> list[object]:
        return [(o.instruction, list(o.objects), list(o.images)) for o in demonstration.observations]

    return (
        (first.task, first.init_state, first.success) == (second.task, second.init_state, second.success)
        and names(first) == names(second)
        and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))
    )


@pytest.mark.parametrize("pixels", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, pixels: bool) -> None:
    protocol = PIXELS if pixels else STATE
    episodes = [episode(3, 5, pixels), episode(1, 2, pixels)]
    write_demonstrations(tmp_path, TASK, protocol, 0, 1, episodes)
    read = load_demonstrations(tmp_path, [TASK], protocol)
    assert len(read) == 2
    assert all(same(a, b) for a, b in zip(episodes, read, strict=True))
    assert same(load_demonstrations(tmp_path, [TASK], protocol, limit=1)[0], episodes[0])


def test_every_kind_of_damage_is_one_clear_line(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path, TASK, STATE, 0, 1, [episode(0, 4)])
    good = path.read_bytes()
    damaged = [good[:-1], good[:100], good[:4], b"", b"not ours" * 100]
    for position in range(0, len(good), 37):
        damaged.append(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(BenchError) as caught:
            load_demonstrations(tmp_path, [TASK], STATE)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(good)
    assert len(load_demonstrations(tmp_path, [TASK], STATE)) == 1


def test_missing_and_too_few_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"run `vlarl-bench demos --suite libero_object"):
        load_demonstrations(tmp_path, [TASK], STATE)
    write_demonstrations(tmp_path, TASK, STATE, 0, 1, [episode(0, 4)])
    with pytest.raises(BenchError, match=r"holds 1 .* 2 are wanted.*--episodes 2"):
        load_demonstrations(tmp_path, [TASK], STATE, limit=2)


def test_states_kept_for_evaluation_are_refused(tmp_path: Path) -> None:
    write_demonstrations(tmp_path, TASK, STATE, 0, 1, [episode(0, 2), episode(25, 2)])
    with pytest.raises(BenchError, match=r"\[25\] are not train states"):
        load_demonstrations(tmp_path, [TASK], STATE)


def test_another_protocol_is_refused_and_never_replaced(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path, TASK, STATE, 0, 1, [episode(0, 2)])
    before = path.read_bytes()
    with pytest.raises(BenchError, match="protocol"):
        load_demonstrations(tmp_path, [TASK], PIXELS)
    with pytest.raises(BenchError, match="protocol"):
        make_demonstrations(SUITE, [TASK], PIXELS, 1, tmp_path)
    assert path.read_bytes() == before


def test_another_tasks_file_is_refused(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path, TASK, STATE, 0, 1, [episode(0, 2)])
    path.rename(demonstration_path(tmp_path, OTHER))
    with pytest.raises(BenchError, match=OTHER.name):
        load_demonstrations(tmp_path, [OTHER], STATE)


def test_workers_make_only_what_is_missing_and_their_number_changes_nothing(tmp_path: Path) -> None:
    protocol = dataclasses.replace(STATE, train_states=(3, 5))
    made: list[int] = []
    paths = make_demonstrations(SUITE, [TASK, OTHER], protocol, 1, tmp_path, workers=2, on_progress=made.append)
    assert made == [1, 1]
    assert {episode.init_state for episode in load_demonstrations(tmp_path, [TASK, OTHER], protocol)} <= {3, 5}
    kept, good = paths[0].stat().st_mtime_ns, paths[1].read_bytes()
    paths[1].write_bytes(b"damaged")
    make_demonstrations(SUITE, [TASK, OTHER], protocol, 1, tmp_path, workers=1, on_progress=made.append)
    assert made == [1, 1, 1, 1]
    assert paths[0].stat().st_mtime_ns == kept
    assert paths[1].read_bytes() == good
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        write_demonstrations(tmp_path / "file", TASK, STATE, 0, 1, [episode(0, 2)])
