"""Demonstrations on disk, whoever made them, and the worker processes that make ours."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from vlarl_bench.tasks.libero.suite import LIBERO_OBJECT, LiberoSuite

from vlarl_bench.demo_store import RECORD, writing
from vlarl_bench.demonstrations import describe_demonstrations, load_demonstrations, make_demonstrations
from vlarl_bench.errors import BenchError
from vlarl_bench.lerobot_writer import encode
from vlarl_bench.suite import Demonstration, Observation, Suite, Task

SUITE = LIBERO_OBJECT
STATE, PIXELS = SUITE.protocol("state"), SUITE.protocol("pixels")
TASK, OTHER = SUITE.tasks[6], SUITE.tasks[8]
NAMES = {TASK: ("butter_1", "basket_1"), OTHER: ("basket_1", "milk_1", "ketchup_1")}


def episode(init_state: int, steps: int, pixels: bool = False, task: Task = TASK) -> Demonstration:
    rng = np.random.default_rng([init_state, steps])
    observations = tuple(
        Observation(
            task.instruction,
            rng.normal(size=8).astype(np.float32),
            {} if pixels else {name: rng.normal(size=7).astype(np.float32) for name in NAMES[task]},
            {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in PIXELS.cameras} if pixels else {},
        )
        for _ in range(steps)
    )
    return Demonstration(task, init_state, True, observations, rng.uniform(-1, 1, (steps, 7)).astype(np.float32))


def write(folder: Path, episodes, protocol=STATE, seed: int = 0) -> Path:
    """One batch; attempt j began in the episode's init state."""
    root = folder / SUITE.name
    with writing(root, SUITE, SUITE.name, protocol, seed) as writer:
        writer.append(episodes[0].task, [e.init_state for e in episodes], episodes)
    return root


def load(folder: Path, tasks=(TASK,), protocol=STATE, limit=None):
    return load_demonstrations(SUITE, folder, tasks, protocol, limit)


def foreign(root: Path) -> Path:
    """The same dataset as somebody else's: without our record."""
    (root / RECORD).unlink()
    return root


def same(first: Demonstration, second: Demonstration, init_state: bool = True) -> bool:
    def parts(demonstration: Demonstration) -> list[np.ndarray]:
        seen = [
            array
            for observation in demonstration.observations
            for shown in ({"": observation.proprio}, observation.objects, observation.images)
            for _, array in sorted(shown.items())
        ]
        return [demonstration.actions, *seen]

    def names(demonstration: Demonstration) -> list[object]:
        return [(o.instruction, sorted(o.objects), sorted(o.images)) for o in demonstration.observations]

    return (
        (first.task, first.success) == (second.task, second.success)
        and (not init_state or first.init_state == second.init_state)
        and names(first) == names(second)
        and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def one_line(error: BenchError) -> str:
    assert "\n" not in str(error)
    return str(error)


# Ours


@pytest.mark.parametrize("pixels", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, pixels: bool) -> None:
    """Also of pixels (random ones, the hardest for a codec), and of tasks with different objects."""
    protocol = PIXELS if pixels else STATE
    episodes = [episode(3, 5, pixels), episode(1, 2, pixels)]
    others = [episode(0, 3, pixels, OTHER)]
    write(tmp_path, episodes, protocol)
    write(tmp_path, others, protocol)
    read = load(tmp_path, (TASK, OTHER), protocol)
    assert len(read) == 3
    assert all(same(a, b) for a, b in zip(episodes + others, read, strict=True))
    assert same(load(tmp_path, (TASK,), protocol, limit=1)[0], episodes[0])
    assert same(load(tmp_path / SUITE.name, (OTHER,), protocol)[0], others[0])
    described = describe_demonstrations(tmp_path, [TASK, OTHER], protocol, read)
    assert described["episodes"] == 3
    assert described["held_out"] == "from training states only"
    fewer = describe_demonstrations(tmp_path, [TASK], protocol, read[:2])
    assert fewer["digest"] != described["digest"]
    assert describe_demonstrations(tmp_path, [TASK, OTHER], protocol, episodes + others) == described


def test_equal_episodes_are_equal_files(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, [episode(3, 5, True)], PIXELS) for name in ("a", "b"))
    assert files(first) == files(second)


def test_every_kind_of_damage_is_one_clear_line(tmp_path: Path) -> None:
    root = write(tmp_path, [episode(0, 4, True)], PIXELS)
    read = {
        name: content for name, content in files(root).items() if name not in ("meta/stats.json", "meta/tasks.parquet")
    }
    assert len(read) == 6  # info, record, episodes, data and two videos
    for name, good in read.items():
        damaged = [None, good[:-2], good[:100], b"", b"not ours" * 100]
        for position in range(0, len(good), max(1, len(good) // 20)):
            damaged.append(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        for content in damaged:
            if content is None:
                (root / name).unlink()
            else:
                (root / name).write_bytes(content)
            if name == RECORD and content is None:
                continue  # then it is somebody else's dataset
            with pytest.raises(BenchError) as caught:
                load(tmp_path, protocol=PIXELS)
            assert str(root / name) in one_line(caught.value)
            assert "run `vlarl-bench demos --suite libero_object --mode pixels`" in str(caught.value)
        (root / name).write_bytes(good)
    assert len(load(tmp_path, protocol=PIXELS)) == 1


def test_missing_and_too_few_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"run `vlarl-bench demos --suite libero_object"):
        load(tmp_path)
    write(tmp_path, [episode(0, 4)])
    with pytest.raises(BenchError, match=r"holds 1 .* 2 are wanted.*--episodes 2"):
        load(tmp_path, limit=2)
    with pytest.raises(BenchError, match=rf"holds 0 demonstrations of {OTHER.key}, 1 are wanted"):
        load(tmp_path, (OTHER,))


def test_states_kept_for_evaluation_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [episode(0, 2), episode(25, 2)])
    with pytest.raises(BenchError, match=r"\[25\] are not train states"):
        load(tmp_path)


def test_another_protocol_seed_or_expert_is_refused_and_never_replaced(tmp_path: Path, monkeypatch) -> None:
    root = write(tmp_path, [episode(0, 2)])
    before = files(root)
    with pytest.raises(BenchError, match="protocol"):
        load(tmp_path, protocol=PIXELS)
    with pytest.raises(BenchError, match="protocol"):
        make_demonstrations(SUITE, [TASK], PIXELS, 1, tmp_path)
    with pytest.raises(BenchError, match="made with seed 0, not 1"):
        make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path, seed=1)
    monkeypatch.setattr(SUITE, "expert_version", SUITE.expert_version + 1)
    with pytest.raises(BenchError, match="made with expert version"):
        make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path)
    assert files(root) == before
    assert len(load(tmp_path)) == 1  # to learn from it is the user's choice


def test_another_suites_dataset_and_a_folder_of_other_things_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, [episode(0, 2)])
    root.rename(tmp_path / "moved")
    with pytest.raises(BenchError, match="holds demonstrations of libero_object, not of libero_spatial"):
        load(tmp_path / "moved", (dataclasses.replace(TASK, suite="libero_spatial"),))
    root.mkdir()
    (root / "precious.txt").write_text("mine")
    with pytest.raises(BenchError, match="not demonstrations of ours"):
        make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path)
    assert files(root) == {"precious.txt": b"mine"}


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    root = tmp_path / SUITE.name
    with (
        writing(root, SUITE, SUITE.name, STATE, 0),
        pytest.raises(BenchError, match="another process is writing here"),
        writing(root, SUITE, SUITE.name, STATE, 0),
    ):
        pass


def test_who_may_wait_for_another_writer_finds_what_it_made(tmp_path: Path) -> None:
    waits, made = threading.Event(), []

    def second() -> None:
        made.extend(make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path, on_wait=waits.set))

    root = tmp_path / SUITE.name
    with writing(root, SUITE, SUITE.name, STATE, 0) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
        first.append(TASK, [0], [episode(0, 3)])
        before = files(root)
        assert not made
    thread.join(60)
    assert made == [root]
    assert files(root) == before


def test_what_an_interrupted_command_left_is_removed_and_a_damaged_batch_with_those_after_it(tmp_path: Path) -> None:
    root = write(tmp_path, [episode(0, 3)])
    one = files(root)
    write(tmp_path, [episode(0, 2, task=OTHER)])
    two = files(root)
    for name in two.keys() - one.keys():  # all of a batch was written, but the record was not replaced
        (root / name).write_bytes(two[name])
    for name in ("meta/info.json", "meta/stats.json", "meta/tasks.parquet"):
        (root / name).write_bytes(two[name])
    (root / RECORD).write_bytes(one[RECORD])
    (root / "meta/.info.123.tmp.json").write_text("half")
    with pytest.raises(BenchError, match=r"info.json: its content does not match its hash; run `vlarl-bench demos"):
        load(tmp_path)
    with writing(root, SUITE, SUITE.name, STATE, 0) as writer:
        assert [writer.record.count(task.name) for task in (TASK, OTHER)] == [1, 0]
        assert [writer.next_attempt(task) for task in (TASK, OTHER)] == [1, 0]
    assert files(root) == one
    write(tmp_path, [episode(0, 2, task=OTHER)])
    assert files(root) == two
    (root / "data/chunk-000/file-000.parquet").write_bytes(b"damaged")
    with writing(root, SUITE, SUITE.name, STATE, 0) as writer:
        assert [writer.record.count(task.name) for task in (TASK, OTHER)] == [0, 0]
    assert files(root).keys() == {RECORD}


def test_workers_make_only_what_is_missing_and_their_number_changes_nothing(tmp_path: Path) -> None:
    protocol = dataclasses.replace(STATE, train_states=(3, 5))
    made: list[int] = []
    (root,) = make_demonstrations(SUITE, [TASK, OTHER], protocol, 1, tmp_path, workers=2, on_progress=made.append)
    assert made == [0, 0, 1, 1]
    assert {episode.init_state for episode in load(tmp_path, (TASK, OTHER), protocol)} <= {3, 5}
    good = files(root)
    (root / "data/chunk-000/file-001.parquet").write_bytes(b"damaged")
    kept = (root / "data/chunk-000/file-000.parquet").stat().st_mtime_ns
    made.clear()
    make_demonstrations(SUITE, [TASK, OTHER], protocol, 1, tmp_path, workers=1, on_progress=made.append)
    assert made == [1, 0, 1]
    assert (root / "data/chunk-000/file-000.parquet").stat().st_mtime_ns == kept
    assert files(root) == good
    first = load(tmp_path, (TASK,), protocol)
    make_demonstrations(SUITE, [TASK], protocol, 2, tmp_path, workers=1)  # more of a task: only those that are missing
    more = load(tmp_path, (TASK,), protocol)
    assert len(more) == 2
    assert same(more[0], first[0])
    make_demonstrations(SUITE, [TASK], protocol, 2, tmp_path / "at once", workers=1)
    assert all(same(a, b) for a, b in zip(more, load(tmp_path / "at once", (TASK,), protocol), strict=True))


def test_object_names_are_those_that_a_simulator_shows() -> None:
    names = SUITE.object_names(SUITE.name)
    simulator = SUITE.open(TASK, STATE)
    try:
        simulator.reset(0)
        assert simulator.observe().objects.keys() < set(names)
    finally:
        simulator.close()
    one = OneTask(SUITE.name, "one task")
    assert set(Suite.object_names(one, SUITE.name)) == set(simulator.observe().objects)
    assert "floor" not in names


class OneTask(LiberoSuite):
    tasks = (TASK,)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="a file is where a folder should be"):
        write(tmp_path / "file", [episode(0, 2)])


# Of others


@pytest.mark.parametrize("pixels", [False, True])
def test_any_lerobot_dataset_with_our_features_is_read(tmp_path: Path, pixels: bool) -> None:
    protocol = PIXELS if pixels else STATE
    episodes = [episode(3, 12, pixels), episode(1, 2, pixels)]
    others = [episode(0, 3, pixels, OTHER)]
    write(tmp_path, episodes, protocol)
    root = foreign(write(tmp_path, others, protocol))
    for folder in (tmp_path, root):
        read = load(folder, (TASK, OTHER), protocol)
        assert all(same(a, b, init_state=False) for a, b in zip(episodes + others, read, strict=True))
        assert {episode.init_state for episode in read} == {-1}
    described = describe_demonstrations(tmp_path, [TASK, OTHER], protocol, read)
    assert described["source"] == "LeRobotDataset"
    assert "cannot be checked" in described["held_out"]


def test_pictures_inside_of_the_parquet_file_are_read(tmp_path: Path) -> None:
    shown = episode(3, 4, True)
    root = foreign(write(tmp_path, [shown], PIXELS))
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for camera in PIXELS.cameras:
        name = f"observation.images.{camera}"
        table = table.append_column(name, pa.array([{"bytes": png(o.images[camera])} for o in shown.observations]))
        edit(
            root, "features", {name: {"dtype": "image", "shape": [3, 64, 64], "names": ["channels", "height", "width"]}}
        )
    pq.write_table(table, path)
    assert same(load(tmp_path, protocol=PIXELS)[0], shown, init_state=False)


def png(frame: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "PNG")
    return target.getvalue()


def edit(root: Path, field: str, value) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    if isinstance(value, dict):
        for name, entries in value.items():
            if entries is None:
                del info[field][name]
            else:
                info[field][name] |= entries
    else:
        info[field] = value
    path.write_text(json.dumps(info))


CAMERA = "observation.images.agentview"


@pytest.mark.parametrize(
    ("pixels", "field", "value", "line"),
    [
        (False, "codebase_version", "v2.1", "codebase_version: 'v2.1'; wanted: v3.0"),
        (False, "fps", 10, "fps: 10; wanted: 20"),
        (False, "features", {"action": None}, "feature 'action': missing"),
        (
            False,
            "features",
            {"action": {"shape": [14]}},
            r"feature 'action': shape \[14\]; wanted: float32 of shape \[7\]",
        ),
        (False, "features", {"action": {"dtype": "int64"}}, "feature 'action': dtype 'int64'; wanted: float32"),
        (False, "features", {"observation.state": {"shape": [9]}}, r"feature 'observation.state': shape \[9\]"),
        (
            False,
            "features",
            {"observation.environment_state": None},
            "feature 'observation.environment_state': missing",
        ),
        (False, "features", {"observation.environment_state": {"names": None}}, "names None; wanted: '<object>.x'"),
        (False, "features", {"frame_index": None}, "feature 'frame_index': missing"),
        (True, "features", {CAMERA: None}, f"feature '{CAMERA}': missing .*; wanted: video of shape"),
        (
            True,
            "features",
            {CAMERA: {"shape": [256, 256, 3]}},
            r"shape \[256, 256, 3\]; wanted: video of shape \[64, 64, 3\]",
        ),
        (True, "video_path", "videos/{nothing}.mp4", "info.json: video_path: 'videos/{nothing}.mp4'; wanted: videos/"),
        (False, "data_path", "data/{nothing}.parquet", "info.json: data_path: 'data/{nothing}.parquet'; wanted: data/"),
        (False, "data_path", 3, "3: no such file"),
    ],
)
def test_a_feature_that_is_wrong_is_named(tmp_path: Path, pixels: bool, field: str, value, line: str) -> None:
    protocol = PIXELS if pixels else STATE
    root = foreign(write(tmp_path, [episode(3, 4, pixels)], protocol))
    edit(root, field, value)
    with pytest.raises(BenchError, match=line) as caught:
        load(tmp_path, protocol=protocol)
    assert str(root) in one_line(caught.value)


def test_the_mode_that_is_not_there_is_named(tmp_path: Path) -> None:
    foreign(write(tmp_path, [episode(3, 4)]))
    with pytest.raises(BenchError, match=f"feature '{CAMERA}': missing"):
        load(tmp_path, protocol=PIXELS)


def test_a_task_that_is_not_there_and_an_instruction_of_two_tasks(tmp_path: Path) -> None:
    foreign(write(tmp_path, [episode(3, 4)]))
    with pytest.raises(BenchError, match=rf"tasks: no episode of '{OTHER.instruction}'; there is '{TASK.instruction}'"):
        load(tmp_path, (OTHER,))
    twins = OneTask(SUITE.name, "twins")
    twins.tasks = (TASK, dataclasses.replace(TASK, name="again"))
    with pytest.raises(BenchError, match=r"is the instruction of libero_object/.* and of libero_object/again"):
        load_demonstrations(twins, tmp_path, [TASK], STATE)


def test_damage_of_a_foreign_dataset_is_one_line(tmp_path: Path) -> None:
    """Without hashes a changed number is not seen; that nothing worse than a clear line comes of damage is."""
    root = foreign(write(tmp_path, [episode(0, 12, True)], PIXELS))
    rng = np.random.default_rng(0)
    for name, good in files(root).items():
        for position in rng.integers(0, len(good), 30):
            length = int(rng.integers(1, 40))
            junk = rng.integers(0, 256, length, np.uint8).tobytes()
            for content in (good[:position], good[:position] + junk + good[position + length :]):
                (root / name).write_bytes(content)
                with contextlib.suppress(BenchError):
                    load(tmp_path, protocol=PIXELS)
        (root / name).write_bytes(good)


def test_values_that_are_no_numbers_lost_rows_and_lost_frames_are_named(tmp_path: Path) -> None:
    root = foreign(write(tmp_path, [episode(0, 12, True)], PIXELS))
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    actions = np.array(table["action"].to_pylist(), np.float32)
    actions[3, 2] = np.nan
    broken = table.set_column(
        table.column_names.index("action"), "action", pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 7)
    )
    for content, line in (
        (broken, "episode 0: feature 'action': not finite"),
        (table.slice(0, 11), "episode 0: frame_index does not count its 12 frames"),
        (table.drop_columns(["action"]), "it has no column 'action'"),
    ):
        pq.write_table(content, path)
        with pytest.raises(BenchError, match=line):
            load(tmp_path, protocol=PIXELS)
    pq.write_table(table, path)
    video = root / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    video.write_bytes(encode(np.zeros((5, 64, 64, 3), np.uint8), 20))
    with pytest.raises(BenchError, match="frame 5 of episode 0 is missing"):
        load(tmp_path, protocol=PIXELS)


# lerobot itself

LEROBOT = os.environ.get("LEROBOT_PYTHON", "")
needs_lerobot = pytest.mark.skipif(
    not LEROBOT, reason="LEROBOT_PYTHON: set it to the Python of an environment with lerobot (docs/demonstrations.md)"
)


@needs_lerobot
@pytest.mark.parametrize("pixels", [False, True])
def test_lerobot_reads_what_we_write_and_we_read_what_lerobot_writes(tmp_path: Path, pixels: bool) -> None:
    protocol = PIXELS if pixels else STATE
    episodes = [episode(3, 12, pixels), episode(1, 9, pixels)]
    others = [episode(0, 7, pixels, OTHER)]
    write(tmp_path / "ours", episodes, protocol)
    root = write(tmp_path / "ours", others, protocol)
    script = Path(__file__).parent.parent / "scripts/check_lerobot.py"
    copy = tmp_path / "theirs" / SUITE.name
    done = subprocess.run(
        [LEROBOT, script, root, "--copy", copy],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "28 frames of 3 episodes as written" in done.stdout
    read = load(tmp_path / "theirs", (TASK, OTHER), protocol)
    for mine, theirs in zip(episodes + others, read, strict=True):
        assert np.array_equal(mine.actions, theirs.actions)
        for a, b in zip(mine.observations, theirs.observations, strict=True):
            assert np.array_equal(a.proprio, b.proprio)
            assert a.objects.keys() == b.objects.keys()
            assert all(np.array_equal(a.objects[name], b.objects[name]) for name in a.objects)
            assert a.images.keys() == b.images.keys()
