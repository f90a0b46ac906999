"""Loads a LeRobotDataset v3 with Hugging Face's own lerobot and compares what it gives to what is in the files.

    python scripts/check_lerobot.py DATASET [torchcodec|pyav]

To be run by the Python of an environment that has lerobot (docs/demonstrations.md says how to make one): lerobot's
requirements and ours exclude each other. It needs nothing of vlarl-bench.
"""

import io
import json
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import torch

CHUNK = 8


def without_compiled_torchvision() -> None:
    """Lets torchvision be imported beside a torch that its compiled part was not built for: it registers something for
    `nms`, an operator that datasets have no use for."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


KEPT: list[torch.library.Library] = []


def decoded(path: Path) -> np.ndarray:
    """All frames of a video, one after another, by PyAV."""
    with av.open(io.BytesIO(path.read_bytes()), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def main() -> None:
    """Reads every frame through lerobot, and batches of action chunks through a DataLoader."""
    root, backend = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "pyav"
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        without_compiled_torchvision()
    import lerobot
    from lerobot.datasets.compute_stats import compute_episode_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    info = json.loads((root / "meta/info.json").read_text())
    tables = [pq.read_table(path) for path in sorted(root.glob("data/*/*.parquet"))]
    vectors = [name for name, feature in info["features"].items() if feature["dtype"] == "float32"]
    vectors.remove("timestamp")
    videos = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    wanted = {
        name: np.concatenate([np.array(table[name].to_pylist(), np.float32) for table in tables]) for name in vectors
    }
    frames = {
        name: np.concatenate([decoded(path) for path in sorted((root / "videos" / name).glob("*/*.mp4"))])
        for name in videos
    }
    dataset = LeRobotDataset("local/check", root=root, video_backend=backend)
    assert len(dataset) == info["total_frames"] == len(wanted["action"]), len(dataset)
    assert dataset.num_episodes == info["total_episodes"]
    for i in range(len(dataset)):
        item = dataset[i]
        assert int(item["index"]) == i
        for name in vectors:
            assert np.array_equal(item[name].numpy(), wanted[name][i]), (i, name)
        for name in videos:
            shown = (item[name] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert np.array_equal(shown, frames[name][i]), (i, name)
        episode = dataset.meta.episodes[int(item["episode_index"])]
        assert episode["tasks"] == [item["task"]]
        assert episode["dataset_from_index"] <= i < episode["dataset_to_index"]

    worst = 0.0
    stats: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in vectors}
    for episode in dataset.meta.episodes:
        span = slice(episode["dataset_from_index"], episode["dataset_to_index"])
        theirs = compute_episode_stats({name: wanted[name][span] for name in vectors}, dataset.meta.features)
        for name in vectors:
            stats[name].append(theirs[name])
    from lerobot.datasets.compute_stats import aggregate_feature_stats

    for name in vectors:
        theirs = aggregate_feature_stats(stats[name])
        for key in ("min", "max", "mean", "std", "count"):
            worst = max(worst, float(np.abs(theirs[key] - dataset.meta.stats[name][key]).max()))
    for name in videos:
        shown = frames[name].reshape(-1, 3) / 255
        for key, value in {
            "mean": shown.mean(0),
            "std": shown.std(0),
            "min": shown.min(0),
            "max": shown.max(0),
        }.items():
            worst = max(worst, float(np.abs(value - dataset.meta.stats[name][key].ravel()).max()))
    assert worst < 1e-3, worst

    deltas = {"action": [step / info["fps"] for step in range(CHUNK)]}
    chunked = LeRobotDataset("local/check", root=root, video_backend=backend, delta_timestamps=deltas)
    ends = {int(e["episode_index"]): int(e["dataset_to_index"]) for e in dataset.meta.episodes}
    seen = 0
    for batch in torch.utils.data.DataLoader(chunked, batch_size=32, shuffle=True):
        for row, start in enumerate(batch["index"].tolist()):
            end = ends[int(batch["episode_index"][row])]
            index = np.minimum(np.arange(start, start + CHUNK), end - 1)
            assert np.array_equal(batch["action"][row].numpy(), wanted["action"][index]), start
            assert batch["action_is_pad"][row].tolist() == (np.arange(start, start + CHUNK) >= end).tolist()
            seen += 1
    assert seen == len(dataset)
    print(
        f"lerobot {lerobot.__version__}, torch {torch.__version__}, {backend}: {len(dataset)} frames of "
        f"{dataset.num_episodes} episodes as written ({', '.join([*vectors, *videos])}); action chunks of {CHUNK} by a "
        f"DataLoader; statistics within {worst:.1e} of lerobot's"
    )


if __name__ == "__main__":
    main()
