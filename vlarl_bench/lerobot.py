"""LeRobotDataset v3, the data format of Hugging Face's lerobot: what its fields are called here, and reading it.

    meta/info.json, meta/stats.json, meta/tasks.parquet
    meta/episodes/chunk-000/file-000.parquet    one row an episode: its files, its place in them, statistics
    data/chunk-000/file-000.parquet             one row a frame: action, state, indices
    videos/<feature>/chunk-000/file-000.mp4     the frames of several episodes, one after another

`lerobot_writer.py` writes it. Nothing here trusts a dataset: whatever is missing, damaged or of another shape is one
line that names the file or the feature.
"""

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import BenchError
from .files import explained
from .protocol import Protocol
from .suite import Demonstration, Observation, Suite, Task

VERSION = "v3.0"
ACTION, STATE, OBJECTS, IMAGES = "action", "observation.state", "observation.environment_state", "observation.images."
POSE = ("x", "y", "z", "qx", "qy", "qz", "qw")
"""An object's seven entries in `observation.environment_state`. One that is not in the scene has zeros, whose
quaternion has length 0 and so is no pose."""
INDICES = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
INDICES |= {"task_index": "int64"}
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OSError, ArithmeticError, SyntaxError)
"""What Arrow's, Pillow's and Python's readers raise for damaged content; Pillow calls a broken PNG a SyntaxError."""


def features(suite: Suite, protocol: Protocol, objects: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a frame of a suite's demonstrations holds, as `features` of info.json has it. `objects` names all objects
    of the suite's tasks, in `state` mode."""
    found: dict[str, dict[str, Any]] = {
        ACTION: _vector(suite.action_dim, suite.action_names),
        STATE: _vector(suite.proprio_dim, suite.proprio_names),
    }
    if protocol.observation == "state":
        names = [f"{name}.{axis}" for name in objects for axis in POSE]
        found[OBJECTS] = _vector(len(names), names)
    size = protocol.image_size
    for camera in protocol.cameras:
        image = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
        found[IMAGES + camera] = image
    return found | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDICES.items()}


def _vector(length: int, names: Sequence[str]) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [length], "names": list(names) or None}


@dataclass(frozen=True)
class Entry:
    """One row of meta/episodes."""

    index: int
    instructions: tuple[str, ...]
    length: int
    row: Mapping[str, Any]
    """All columns but the statistics."""


class Reader:
    """A dataset at `root` with what a suite and a protocol show. With `hashes`, {file name: SHA-256}, only those files
    are read, and each is verified."""

    def __init__(self, root: Path, suite: Suite, protocol: Protocol, hashes: Mapping[str, str] | None = None) -> None:
        self.root, self.protocol, self.hashes = root, protocol, hashes
        # The episodes of a file are read one after another: a file once, whatever their number.
        self._content = functools.lru_cache(maxsize=4)(self._read)
        self._frames = functools.lru_cache(maxsize=1)(self._read_frames)
        self.info = self._read_info()
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self._check(suite, protocol)

    def _check(self, suite: Suite, protocol: Protocol) -> None:
        """Raises BenchError for the first feature that is not as the suite and the protocol have it."""
        if self.info["fps"] != suite.fps:
            raise self._wrong("fps", repr(self.info["fps"]), f"{suite.fps}, as {suite.name} has")
        for name, wanted in features(suite, protocol, ()).items():
            found = self.features.get(name)
            if name in INDICES and found is None:
                raise self._wrong(f"feature {name!r}", "missing", wanted["dtype"])
            if name in INDICES:
                continue
            dtypes = ("video", "image") if wanted["dtype"] == "video" else ("float32", "float64")
            shape = None if name == OBJECTS else wanted["shape"]
            want = f"{dtypes[0]} of shape {shape or '[7 for each object]'} for {protocol.label} of {suite.name}"
            if found is None:
                raise self._wrong(f"feature {name!r}", f"missing (there is {', '.join(self.features)})", want)
            if found["dtype"] not in dtypes:
                raise self._wrong(f"feature {name!r}", f"dtype {found['dtype']!r}", want)
            if shape is not None and _upright(found) != shape:
                raise self._wrong(f"feature {name!r}", f"shape {found['shape']}", want)
        if protocol.observation == "state":
            self.object_names()

    def object_names(self) -> list[str]:
        """Names in `observation.environment_state`, which come as `<object>.x`, ..., `<object>.qw`."""
        feature = self.features[OBJECTS]
        names = feature.get("names")
        if isinstance(names, dict):  # lerobot also allows groups: {"motors": [...]}
            names = [name for group in names.values() for name in group]
        objects = [str(name).removesuffix(".x") for name in (names or [])[::7]]
        if not objects or names != [f"{name}.{axis}" for name in objects for axis in POSE]:
            wanted = f"'<object>.{POSE[0]}' to '<object>.{POSE[-1]}' of each object"
            raise self._wrong(f"feature {OBJECTS!r}", f"names {str(names)[:80]}", wanted)
        if feature["shape"] != [len(names)]:
            raise self._wrong(f"feature {OBJECTS!r}", f"shape {feature['shape']}", f"[{len(names)}], one a name")
        return objects

    def entries(self, files: Sequence[str] | None = None) -> list[Entry]:
        """The episodes, of `files` of meta/episodes or of all."""
        if files is None:
            files = sorted(str(path.relative_to(self.root)) for path in self.root.glob("meta/episodes/*/*.parquet"))
            if not files:
                raise BenchError(f"{self.root / 'meta/episodes'}: missing; the dataset is incomplete")
        found = []
        for file in files:
            with self._explained(file):
                table = read_table(self._content(file))
                table = table.select([name for name in table.column_names if not name.startswith("stats/")])
                for row in table.to_pylist():
                    words = tuple(str(words) for words in row["tasks"])
                    found.append(Entry(int(row["episode_index"]), words, int(row["length"]), row))
        return found

    def demonstration(self, entry: Entry, task: Task, init_state: int) -> Demonstration:
        """Reads one episode."""
        where = f"{self.root}: episode {entry.index}"
        place = {part: entry.row.get(f"data/{part}") for part in ("chunk_index", "file_index")}
        if None in place.values():
            raise BenchError(f"{self.root}: meta/episodes: data/chunk_index or data/file_index is missing")
        frames = self._frames(self._file("data_path", **place))
        rows = np.flatnonzero(frames["episode_index"] == entry.index)
        if len(rows) != entry.length or not np.array_equal(frames["frame_index"][rows], np.arange(len(rows))):
            raise BenchError(f"{where}: frame_index does not count its {entry.length} frames; the file is damaged")
        if entry.length < 1:
            raise BenchError(f"{where}: length: {entry.length}; it must be at least 1")
        for name in (ACTION, STATE, OBJECTS):
            if name in frames and not np.isfinite(frames[name][rows]).all():
                raise BenchError(f"{where}: feature {name!r}: not finite")
        poses = self._poses(frames[OBJECTS][rows]) if OBJECTS in frames else {}
        images = {camera: self._images(entry, camera, frames, rows) for camera in self.protocol.cameras}
        observations = tuple(
            Observation(
                task.instruction,
                frames[STATE][row],
                {name: pose[t] for name, pose in poses.items()},
                {camera: pictures[t] for camera, pictures in images.items()},
            )
            for t, row in enumerate(rows)
        )
        return Demonstration(task, init_state, True, observations, frames[ACTION][rows])

    def _poses(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """[T, 7 M] of an episode as {name: [T, 7]} of the objects that are in its scene."""
        names = self.object_names()
        poses = zip(names, np.split(values, len(names), axis=1), strict=True)
        return {name: pose for name, pose in poses if pose[0, 3:].any()}

    def _images(self, entry: Entry, camera: str, frames: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
        """[T, S, S, 3] uint8 of one camera."""
        name, size = IMAGES + camera, self.protocol.image_size
        if self.features[name]["dtype"] == "video":
            place = {part: entry.row.get(f"videos/{name}/{part}") for part in ("chunk_index", "file_index")}
            start = entry.row.get(f"videos/{name}/from_timestamp")
            if start is None or None in place.values():
                raise BenchError(f"{self.root}: meta/episodes: videos/{name}/* is missing for episode {entry.index}")
            file = self._file("video_path", video_key=name, **place)
            with self._explained(file):
                found = decode(self._content(file), float(start), entry.length, self.info["fps"])
            what = f"{self.root / file}: {name}"
        else:
            what = f"{self.root}: {name}"
            with self._explained(name):
                found = [_picture(frames[name][row]) for row in rows]
        present = [frame for frame in found if frame is not None]
        if len(present) < entry.length:
            missing = next(t for t, frame in enumerate(found) if frame is None)
            raise BenchError(f"{what}: frame {missing} of episode {entry.index} is missing; the video is damaged")
        for t, frame in enumerate(present):
            if frame.shape != (size, size, 3):
                raise BenchError(f"{what}: frame {t} of episode {entry.index} is {frame.shape}, not {(size, size, 3)}")
        return np.stack(present)

    def _read_frames(self, file: str) -> dict[str, Any]:
        """Columns of a data file: vectors as [N, D] float32, indices as [N] int64, pictures as lists of bytes."""
        wanted = [ACTION, STATE, *([OBJECTS] if self.protocol.observation == "state" else [])]
        cameras = [IMAGES + camera for camera in self.protocol.cameras]
        pictures = [name for name in cameras if self.features[name]["dtype"] == "image"]
        columns: dict[str, Any] = {}
        with self._explained(file):
            table = read_table(self._content(file))
            for name in ("episode_index", "frame_index", *wanted, *pictures):
                if name not in table.column_names:
                    raise ValueError(f"it has no column {name!r}")
                column = table.column(name).combine_chunks()
                if column.null_count:
                    raise ValueError(f"column {name!r} has gaps")
                if name in pictures:
                    columns[name] = column.to_pylist()
                elif name in INDICES:
                    columns[name] = column.to_numpy(zero_copy_only=False)
                else:
                    flat = column if pa.types.is_floating(column.type) else column.flatten()
                    (length,) = self.features[name]["shape"]
                    if len(flat) != len(table) * length:
                        raise ValueError(f"column {name!r} does not have {length} numbers a row, as {INFO} says")
                    values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
                    columns[name] = values.reshape(len(table), length)
        return columns

    def _read_info(self) -> dict[str, Any]:
        with self._explained(INFO):
            info = json.loads(self._content(INFO))
            if not isinstance(info, dict):
                raise ValueError("it is not a table of fields")
            version = str(info.get("codebase_version"))
            if version.split(".")[0] != VERSION.split(".")[0]:
                wanted = f"{VERSION}; lerobot has a script that converts older ones"
                raise self._wrong("codebase_version", repr(info.get("codebase_version")), wanted)
            for name in ("fps", "data_path", "features"):
                if name not in info:
                    raise ValueError(f"{name} is missing")
            for name, feature in info["features"].items():
                if not isinstance(feature["shape"], list) or not isinstance(feature["dtype"], str):
                    raise ValueError(f"feature {name!r} has no shape or dtype")
        return info

    def _file(self, template: str, **place: Any) -> str:
        """A file's name by `data_path` or `video_path` of info.json."""
        text, wanted = self.info.get(template), DATA_PATH if template == "data_path" else VIDEO_PATH
        try:
            file = str(text).format(**place)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError):
            raise self._wrong(f"{INFO}: {template}", repr(text), wanted) from None
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise self._wrong(f"{INFO}: {template}", f"{text!r}, which leads out of the folder", wanted)
        return file

    def _read(self, file: str) -> bytes:
        path = self.root / file
        with explained(path):
            content = path.read_bytes()
        if self.hashes is not None and hashlib.sha256(content).hexdigest() != self.hashes.get(file):
            raise BenchError(f"{path}: its content does not match its hash")
        return content

    def _wrong(self, field: str, found: str, wanted: str) -> BenchError:
        return BenchError(f"{self.root}: {field}: {found}; wanted: {wanted}")

    @contextlib.contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        """Whatever a damaged file leads its reader to raise, as one line that names the file."""
        try:
            yield
        except (pa.ArrowException, av.FFmpegError, *_DAMAGE) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else (str(error).splitlines() or [""])[0]
            raise BenchError(f"{self.root / file}: unreadable ({reason})") from error


def read_table(content: bytes) -> pa.Table:
    """The table of a parquet file; read without Arrow's threads, which small files do not need."""
    return pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)


def decode(content: bytes, start: float, length: int, fps: float) -> list[np.ndarray | None]:
    """[S, S, 3] uint8 frames of a video from `start` (s), `length` of them; None where the video has none."""
    frames: list[np.ndarray | None] = [None] * length
    with av.open(io.BytesIO(content), "r") as container:
        (stream,) = container.streams.video
        if stream.time_base is None:
            raise ValueError("its video has no time")
        container.seek(round(start / stream.time_base), stream=stream)  # to the key frame there or before
        for frame in container.decode(stream):
            if frame.pts is None:
                raise ValueError("a frame has no time")
            number = round((float(frame.pts * stream.time_base) - start) * fps)
            if number >= length:
                break
            if number >= 0:
                frames[number] = frame.to_ndarray(format="rgb24")
    return frames


def _picture(stored: Mapping[str, Any]) -> np.ndarray:
    from PIL import Image

    if not stored.get("bytes"):
        raise ValueError("pictures outside of the parquet file are not read")
    return np.asarray(Image.open(io.BytesIO(stored["bytes"])).convert("RGB"))


def _upright(feature: Mapping[str, Any]) -> list[int]:
    """A shape, an image's as height, width, channels."""
    shape, names = list(feature["shape"]), feature.get("names")
    first = isinstance(names, list) and len(names) == 3 and str(names[0]).startswith("channel")
    return [*shape[1:], shape[0]] if first else shape
