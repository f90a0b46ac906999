"""Writing LeRobotDataset v3: the files of a batch of episodes, and those in meta/ that speak of all batches.

Everything here is content: bytes for `demo_store.py` to put on disk. Equal episodes give equal bytes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from . import lerobot
from .lerobot import ACTION, IMAGES, OBJECTS, STATE
from .suite import Demonstration

CODEC = {"qp": "0", "g": "10", "bf": "0"}
"""Options of libx264rgb: lossless, so that what is trained on is what the simulator showed to the bit; a key frame
every 10, so that a random frame costs few others; no frames that refer ahead, so that the first has time 0."""
FILES_A_CHUNK = 1000
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Features = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a batch goes: its number, and how many episodes, frames and tasks came before."""

    batch: int
    episode: int
    frame: int
    tasks: tuple[str, ...]
    """Instructions in the order of their task_index; the batch's own is among them."""

    @property
    def file(self) -> dict[str, int]:
        """chunk_index and file_index."""
        return {"chunk_index": self.batch // FILES_A_CHUNK, "file_index": self.batch % FILES_A_CHUNK}


def batch_files(
    demonstrations: Sequence[Demonstration],
    attempts: Sequence[int],
    features: Features,
    fps: int,
    place: Place,
) -> tuple[dict[str, bytes], pa.Table]:
    """One task's episodes as {file name: content}: a video a camera, the frames and the rows of meta/episodes; and
    those rows as a table."""
    columns = _columns(demonstrations, features, fps, place)
    videos = {name: columns[name] for name, feature in features.items() if feature["dtype"] == "video"}
    rows = _episode_rows(demonstrations, attempts, columns, list(videos), fps, place)
    files = {
        lerobot.VIDEO_PATH.format(video_key=name, **place.file): encode(frames, fps) for name, frames in videos.items()
    }
    flat = {name: _array(columns[name]) for name in features if name not in videos}
    table = pa.Table.from_pylist(rows)
    files[lerobot.DATA_PATH.format(**place.file)] = parquet(pa.table(flat))
    files[lerobot.EPISODES_PATH.format(**place.file)] = parquet(table)
    return files, table


def meta_files(features: Features, fps: int, robot: str, tasks: Sequence[str], episodes: pa.Table) -> dict[str, bytes]:
    """tasks.parquet, stats.json and info.json of all episodes, in the order in which they are to be written."""
    count, frames = len(episodes), sum(episodes.column("length").to_pylist())
    videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
    described = {name: dict(feature) for name, feature in features.items()}
    for name in videos:
        height, width, channels = features[name]["shape"]
        described[name]["info"] = {
            "video.height": height,
            "video.width": width,
            "video.channels": channels,
            "video.codec": "h264",
            "video.pix_fmt": "gbrp",
            "video.is_depth_map": False,
            "video.fps": fps,
            "has_audio": False,
        }
    info = {
        "codebase_version": lerobot.VERSION,
        "robot_type": robot,
        "total_episodes": count,
        "total_frames": frames,
        "total_tasks": len(tasks),
        "chunks_size": FILES_A_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{count}"},
        "data_path": lerobot.DATA_PATH,
        "video_path": lerobot.VIDEO_PATH if videos else None,
        "features": described,
    }
    frame = pd.DataFrame({"task_index": np.arange(len(tasks))}, index=list(tasks))
    return {
        lerobot.TASKS: parquet(pa.Table.from_pandas(frame)),
        lerobot.STATS: _json(_all_statistics(episodes, features)),
        lerobot.INFO: _json(info),
    }


def encode(frames: np.ndarray, fps: int) -> bytes:
    """[N, S, S, 3] uint8 frames as an mp4, without loss."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps), options=CODEC)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.thread_count = 1  # with more, the bytes depend on their number
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def parquet(table: pa.Table) -> bytes:
    """A table as the content of a parquet file."""
    target = io.BytesIO()
    pq.write_table(table, target)
    return target.getvalue()


def _columns(
    demonstrations: Sequence[Demonstration], features: Features, fps: int, place: Place
) -> dict[str, np.ndarray]:
    """Each feature's values over all frames of the batch."""
    observations = [seen for episode in demonstrations for seen in episode.observations]
    lengths = [len(episode.actions) for episode in demonstrations]
    steps = np.concatenate([np.arange(length) for length in lengths])
    task = place.tasks.index(demonstrations[0].task.instruction)
    columns = {
        ACTION: np.concatenate([episode.actions for episode in demonstrations]).astype(np.float32),
        STATE: np.stack([seen.proprio for seen in observations]).astype(np.float32),
        "timestamp": (steps / fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.repeat(np.arange(len(lengths)) + place.episode, lengths),
        "index": np.arange(len(steps)) + place.frame,
        "task_index": np.full(len(steps), task),
    }
    if OBJECTS in features:
        names = [name.removesuffix(".x") for name in features[OBJECTS]["names"][::7]]
        absent = np.zeros(7, np.float32)
        columns[OBJECTS] = np.stack(
            [np.concatenate([seen.objects.get(name, absent) for name in names]) for seen in observations]
        ).astype(np.float32)
    for name in features:
        if name.startswith(IMAGES):
            columns[name] = np.stack([seen.images[name.removeprefix(IMAGES)] for seen in observations])
    return {name: columns[name] for name in features}


def _episode_rows(
    demonstrations: Sequence[Demonstration],
    attempts: Sequence[int],
    columns: Mapping[str, np.ndarray],
    videos: Sequence[str],
    fps: int,
    place: Place,
) -> list[dict[str, Any]]:
    """Rows of meta/episodes. The last three columns before the statistics are ours."""
    rows, start = [], 0
    for number, (episode, attempt) in enumerate(zip(demonstrations, attempts, strict=True)):
        end = start + len(episode.actions)
        row: dict[str, Any] = {
            "episode_index": place.episode + number,
            "tasks": [episode.task.instruction],
            "length": end - start,
            "dataset_from_index": place.frame + start,
            "dataset_to_index": place.frame + end,
        }
        for prefix in ("data", "meta/episodes", *(f"videos/{name}" for name in videos)):
            row |= {f"{prefix}/{part}": index for part, index in place.file.items()}
        for name in videos:
            row |= {f"videos/{name}/from_timestamp": start / fps, f"videos/{name}/to_timestamp": end / fps}
        row |= {"task_name": episode.task.name, "init_state": episode.init_state, "attempt": attempt}
        for name, values in columns.items():
            for key, value in statistics(values[start:end]).items():
                row[f"stats/{name}/{key}"] = value
        rows.append(row)
        start = end
    return rows


def statistics(values: np.ndarray) -> dict[str, Any]:
    """lerobot's statistics of [T] or [T, D] numbers, or of the channels of [T, S, S, 3] images on the scale 0 to 1.

    An image's are nested to [3, 1, 1]. Quantiles are exact, where lerobot's own come from a histogram.
    """
    count = [len(values)]
    if values.ndim == 4:
        channels = [_of_levels(np.bincount(values[..., c].ravel(), minlength=256)) for c in range(values.shape[-1])]
        return {key: [[[channel[key]]] for channel in channels] for key in channels[0]} | {"count": count}
    table = values.reshape(len(values), -1).astype(np.float64)
    found = {"min": table.min(0), "max": table.max(0), "mean": table.mean(0), "std": table.std(0)}
    found |= dict(zip(QUANTILES, np.quantile(table, list(QUANTILES.values()), axis=0), strict=True))
    return {key: value.tolist() for key, value in found.items()} | {"count": count}


def _of_levels(counts: np.ndarray) -> dict[str, float]:
    """Statistics of pixels from how many have each of the 256 levels."""
    levels, present = np.arange(256) / 255, np.flatnonzero(counts)
    share = counts / counts.sum()
    mean = float(levels @ share)
    found = {"min": float(levels[present[0]]), "max": float(levels[present[-1]]), "mean": mean}
    found["std"] = float(np.sqrt((levels - mean) ** 2 @ share))
    below = np.cumsum(counts)
    return found | {
        key: float(levels[np.searchsorted(below, q * (below[-1] - 1), side="right")]) for key, q in QUANTILES.items()
    }


def _all_statistics(episodes: pa.Table, features: Features) -> dict[str, Any]:
    """Statistics over all episodes from those of each, as lerobot aggregates them: quantiles are means of quantiles."""
    found: dict[str, Any] = {}
    for name in features:
        stats = {
            key: np.array(episodes.column(f"stats/{name}/{key}").to_pylist(), np.float64)
            for key in ("count", "min", "max", "mean", "std", *QUANTILES)
        }
        count = stats["count"].reshape(-1, *[1] * (stats["mean"].ndim - 1))
        total = count.sum(0)
        mean = (stats["mean"] * count).sum(0) / total
        variance = ((stats["std"] ** 2 + (stats["mean"] - mean) ** 2) * count).sum(0) / total
        found[name] = {
            "min": stats["min"].min(0).tolist(),
            "max": stats["max"].max(0).tolist(),
            "mean": mean.tolist(),
            "std": np.sqrt(variance).tolist(),
            "count": [int(stats["count"].sum())],
            **{key: ((stats[key] * count).sum(0) / total).tolist() for key in QUANTILES},
        }
    return found


def _array(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
