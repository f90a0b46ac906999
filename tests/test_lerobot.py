"""LeRobotDatasets that others made, and lerobot itself."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlarl_bench.demo_store import RECORD
from vlarl_bench.demonstrations import describe_demonstrations, load_demonstrations
from vlarl_bench.errors import BenchError
from vlarl_bench.lerobot_writer import encode

from .datasets import OTHER, PIXELS, STATE, SUITE, TASK, OneTask, episode, files, load, one_line, same, write


def foreign(root: Path) -> Path:
    """The same dataset as somebody else's: without our record."""
    (root / RECORD).unlink()
    return root


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
        (False, "data_path", "/etc/{chunk_index}", "data_path: '/etc/{chunk_index}', which leads out of the folder; "),
        (False, "data_path", "../{chunk_index}/x", "data_path: '../{chunk_index}/x', which leads out of the folder; "),
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
