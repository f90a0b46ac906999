"""Reads a LeRobotDataset v3 with Hugging Face's own lerobot and compares what it gives to what is in the files.

    python scripts/check_lerobot.py DATASET [--decoder torchcodec|pyav] [--copy FOLDER]

--copy writes the episodes again, with lerobot's own writer. To be run by the Python of an environment that has
lerobot; docs/demonstrations.md says how to make one. It needs nothing of vlarl-bench.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import torch

try:
    import torchvision  # noqa: F401 (lerobot imports it)
except RuntimeError as error:
    hint = "its compiled part does not fit this torch; start Python with the stub that docs/demonstrations.md shows"
    raise SystemExit(f"torchvision: {error}; {hint}") from None
import lerobot
from lerobot.datasets.compute_stats import aggregate_feature_stats, compute_episode_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset

CHUNK = 8
"""Actions a chunk, asked for by `delta_timestamps`."""


def main() -> None:
    """Every frame, the statistics, and shuffled batches of action chunks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--decoder", default="pyav", choices=("pyav", "torchcodec"))
    parser.add_argument("--copy", type=Path)
    options = parser.parse_args()
    features, written = read_files(options.dataset)
    dataset = LeRobotDataset("local/check", root=options.dataset, video_backend=options.decoder)
    check_frames(dataset, written)
    off = check_statistics(dataset, written)
    check_chunks(options.dataset, options.decoder, dataset, written["action"])
    if options.copy:
        copy(dataset, features, written, options.copy)
    print(
        f"lerobot {lerobot.__version__}, torch {torch.__version__}, {options.decoder}: {len(dataset)} frames of "
        f"{dataset.num_episodes} episodes as written ({', '.join(written)}); action chunks of {CHUNK} by a DataLoader; "
        f"statistics within {off:.1e} of lerobot's"
    )


def read_files(root: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Features, and the values of each over all frames, read without lerobot."""
    features = json.loads((root / "meta/info.json").read_text())["features"]
    tables = [pq.read_table(path) for path in sorted(root.glob("data/*/*.parquet"))]
    written = {}
    for name, feature in features.items():
        if feature["dtype"] == "video":
            videos = [decoded(path) for path in sorted((root / "videos" / name).glob("*/*.mp4"))]
            written[name] = np.concatenate(videos)
        elif name == "action" or name.startswith("observation."):
            written[name] = np.concatenate([np.array(table[name].to_pylist(), np.float32) for table in tables])
    return features, written


def decoded(path: Path) -> np.ndarray:
    """[N, S, S, 3] uint8: all frames of a video."""
    with av.open(io.BytesIO(path.read_bytes()), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def check_frames(dataset: Any, written: dict[str, np.ndarray]) -> None:
    """Indexes every frame."""
    assert len(dataset) == dataset.meta.total_frames == len(written["action"])
    assert dataset.num_episodes == dataset.meta.total_episodes == len(dataset.meta.episodes)
    for i in range(len(dataset)):
        item = dataset[i]
        episode = dataset.meta.episodes[int(item["episode_index"])]
        assert episode["dataset_from_index"] + int(item["frame_index"]) == int(item["index"]) == i
        assert episode["tasks"] == [item["task"]]
        assert abs(float(item["timestamp"]) - int(item["frame_index"]) / dataset.fps) < 1e-4
        for name, values in written.items():
            found = item[name].numpy()
            if values.dtype == np.uint8:
                found = np.rint(found.transpose(1, 2, 0) * 255).astype(np.uint8)
            assert np.array_equal(found, values[i]), (i, name)


def check_statistics(dataset: Any, written: dict[str, np.ndarray]) -> float:
    """The largest difference of meta/stats.json from what lerobot computes, or NumPy for images. Lerobot's deviations
    come from float32 sums of squares and are the less exact ones."""
    worst = 0.0
    for name, values in written.items():
        if values.dtype == np.uint8:
            pixels = values.reshape(-1, 3) / 255
            theirs = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
        else:
            spans = [slice(e["dataset_from_index"], e["dataset_to_index"]) for e in dataset.meta.episodes]
            each = [compute_episode_stats({name: values[span]}, dataset.meta.features)[name] for span in spans]
            theirs = aggregate_feature_stats(each)
        for key in ("min", "max", "mean", "std"):
            worst = max(worst, float(np.abs(theirs[key] - np.squeeze(dataset.meta.stats[name][key])).max()))
    assert worst < 2e-3, worst
    return worst


def check_chunks(root: Path, decoder: str, dataset: Any, actions: np.ndarray) -> None:
    """Batches of action chunks; past an episode's end its last action is repeated and marked as padding."""
    deltas = {"action": [step / dataset.fps for step in range(CHUNK)]}
    chunked = LeRobotDataset("local/check", root=root, video_backend=decoder, delta_timestamps=deltas)
    ends = [episode["dataset_to_index"] for episode in dataset.meta.episodes]
    seen = 0
    for batch in torch.utils.data.DataLoader(chunked, batch_size=32, shuffle=True):
        for row, start in enumerate(batch["index"].tolist()):
            index, end = np.arange(start, start + CHUNK), ends[int(batch["episode_index"][row])]
            assert np.array_equal(batch["action"][row].numpy(), actions[np.minimum(index, end - 1)]), start
            assert batch["action_is_pad"][row].tolist() == (index >= end).tolist()
            seen += 1
    assert seen == len(dataset)


def copy(dataset: Any, features: dict[str, Any], written: dict[str, np.ndarray], folder: Path) -> None:
    """The same episodes by lerobot's own writer."""
    kept = {name: {**features[name], "shape": tuple(features[name]["shape"])} for name in written}
    target = LeRobotDataset.create("local/copy", dataset.fps, kept, root=folder, vcodec="h264")
    for episode in dataset.meta.episodes:
        for i in range(episode["dataset_from_index"], episode["dataset_to_index"]):
            target.add_frame({name: values[i] for name, values in written.items()} | {"task": episode["tasks"][0]})
        target.save_episode()
    target.finalize()


if __name__ == "__main__":
    main()
