"""Published OpenVLA folders: what is in them is what is loaded, or one line says what is wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarl_bench import registry
from vlarl_bench.errors import BenchError
from vlarl_bench.policies.openvla_checkpoint import load_published
from vlarl_bench.policies.shards import pick_statistics
from vlarl_bench.policies.store import content_hash, save_policy
from vlarl_bench.suite import Observation

from .conftest import nothing_planted_runs, told_in_one_line
from .openvla_tiny import AUTOREGRESSIVE, OFT, SMALL, small, tokenizer

SIZES = {k: SMALL[k] for k in ("layers", "width", "heads", "mlp", "max_words", "image_size", "dino", "siglip")}
SIZES |= {"vocabulary_size": 32064}
STATS = {
    "libero_object_no_noops": {
        "action": {"q01": [-0.5] * 6 + [0.0], "q99": [1.5] * 6 + [1.0], "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [3.0] * 8},
    }
}


def publish(folder, form, shards=1, ddp=False):
    """Writes a small policy as a published folder, with remote code that must never run; returns the policy."""
    policy = small(**{**form, "dtype": "bfloat16", "crop_area": 0.9, "gripper": "inverted"})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": STATS}))
    (folder / "tokenizer.json").write_text(tokenizer())
    for name in ("modeling_prismatic.py", "configuration_prismatic.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')\n")
    tensors = {k: v.contiguous() for k, v in policy.network.state_dict().items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        where = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
        for name in names:
            save_file({k: v for k, v in tensors.items() if where[k] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for part in ("action_head", "proprio_projector"):
        if hasattr(policy, part):
            prefix = "module." if ddp else ""
            stored = {prefix + k: v.contiguous() for k, v in getattr(policy, part).state_dict().items()}
            if part == "proprio_projector":  # as OFT's training leaves it; what it holds is exact in both types
                stored = {key: tensor.float() for key, tensor in stored.items()}
            save_file(stored, folder / f"{part}--150000_checkpoint.safetensors")
    policy.action_low.copy_(torch.tensor([-0.5] * 6 + [0]))
    policy.action_high.copy_(torch.tensor([1.5] * 6 + [1]))
    policy.action_scaled[6] = False
    if policy.architecture.proprio_token:
        policy.proprio_low.fill_(-1)
        policy.proprio_high.fill_(3)
    return policy


def observe(cameras, seed=0):
    draw = np.random.default_rng(seed)
    images = {camera: draw.integers(0, 256, (28, 28, 3), dtype=np.uint8) for camera in cameras}
    return Observation("Pick up the MILK", draw.normal(size=8).astype(np.float32), images=images)


FORMS = {
    "openvla": AUTOREGRESSIVE,
    "oft": {**OFT, "head": "l1"},
    "oft by tokens": OFT,
    "simplevla": {**OFT, "cameras": ("agentview",), "proprio_token": False},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_gives_the_policy_it_was_made_from(form, shards, tmp_path):
    made = publish(tmp_path / "published", form, shards, ddp=shards == 1)
    loaded = load_published(tmp_path / "published", made.name, unnorm_key="libero_object", **SIZES)
    assert type(loaded) is type(made)
    assert loaded.config == made.config
    assert content_hash(loaded) == content_hash(made)
    seen = [observe(made.architecture.cameras)]
    with torch.no_grad():
        a, b = (p.sample(p.encode(p.preprocess(seen)), None).actions for p in (made, loaded))
    assert torch.equal(a, b)
    assert set(a[..., 6].flatten().tolist()) <= {-1, 1}
    # And on, through a folder of our own: bitwise, twice.
    for name in ("one", "two"):
        save_policy(tmp_path / name, loaded, {})
        loaded = registry.get("policy", made.name).load(tmp_path / name)
    assert content_hash(loaded) == content_hash(made)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert loaded.checkpointed


def test_the_name_says_how_a_folder_decodes(tmp_path):
    """OFT by tokens and OpenVLA have the same files."""
    publish(tmp_path / "published", FORMS["simplevla"])
    for name, decoding, chunk in (("openvla-7b", "autoregressive", 1), ("openvla-oft-7b", "parallel", 8)):
        policy = load_published(tmp_path / "published", name, **SIZES)
        assert policy.capabilities == registry.get("policy", name).capabilities
        assert (policy.architecture.decoding, policy.chunk, policy.cameras) == (decoding, chunk, ("agentview",))
    publish(tmp_path / "oft", FORMS["oft by tokens"])
    line = "oft has proprio_projector--150000_checkpoint.safetensors, so it is OFT's; take 'openvla-oft-7b'"
    refused(tmp_path / "oft", line, name="openvla-7b")


def test_float32_on_request(tmp_path):
    made = publish(tmp_path / "published", {**OFT, "head": "l1"})
    loaded = load_published(tmp_path / "published", made.name, dtype="float32", **SIZES)
    own = dict(made.named_parameters())
    for key, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, own[key].float()), key
    assert loaded.config["architecture"]["dtype"] == "float32"
    refused(tmp_path / "published", "dtype: 'int8'; it must be 'float32' or 'bfloat16'", dtype="int8")


def refused(folder, *needles, **arguments):
    told_in_one_line(lambda: load_published(folder, **{"name": "openvla-oft-7b", **SIZES, **arguments}), *needles)


@pytest.fixture
def folder(tmp_path):
    publish(tmp_path / "published", {**OFT, "head": "l1"})
    return tmp_path / "published"


def test_every_wrong_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["projector.fc3.bias"], tensors["vision_backbone.featurizer.norm.weight"]
    tensors["language_model.lora"] = torch.zeros(2)
    tensors["projector.fc1.bias"] = torch.zeros(3, dtype=torch.bfloat16)
    tensors["projector.fc2.bias"] = tensors["projector.fc2.bias"].int()
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        "model.safetensors in",
        "lacks projector.fc3.bias; lacks vision_backbone.featurizer.norm.weight",
        "has unknown language_model.lora",
        "projector.fc1.bias is BF16 [3], should be BF16 [160]",
        "projector.fc2.bias is I32 [32], should be BF16 [32]",
    )


def test_a_tensor_that_is_there_twice(folder):
    key, tensors = "projector.fc1.bias", load_file(folder / "model.safetensors")
    save_file(tensors | {f"module.{key}": tensors[key] + 1}, folder / "model.safetensors")
    refused(folder, f"has {key} twice, as module.{key} and as {key}")


def test_wrong_heads(folder):
    file = folder / "action_head--150000_checkpoint.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "model.fc2.bias"}, file)
    refused(folder, "action_head--150000", "lacks model.fc2.bias")
    file.rename(folder / "action_head--150000_checkpoint.pt")
    refused(folder, "action_head--150000_checkpoint.pt is a pickle", "never read", "weights_only=True")


def test_missing_and_broken_files(folder):
    refused(folder / "nowhere", "config.json", "no such file or folder")
    refused(folder, "norm_stats: action_low has shape [7]; this robot needs [14]", action_dim=14)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    refused(folder, "model_type 'llava'", "must be 'openvla'")
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    refused(folder, "norm_stats: neither")
    (folder / "dataset_statistics.json").write_text(json.dumps({"x": {"action": {"q01": [0] * 7}}}))
    refused(folder, "norm_stats:", "q99")
    (folder / "dataset_statistics.json").write_text(json.dumps(STATS))
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json: not a tokenizer")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json: cannot read it")
    (folder / "tokenizer.json").write_text(tokenizer())
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    refused(folder, "model.safetensors")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_never_leaves_its_folder(where, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": where}}))
    refused(folder, "index.json", "beside it")


def test_an_index_names_something(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    refused(folder, "index.json has no weight_map")


@pytest.mark.parametrize(
    ("stats", "needle"),
    [
        ({"q01": 1.0, "q99": [1.0] * 7}, "norm_stats: action_low has shape []; this robot needs [7]"),
        ({"q01": None, "q99": [1.0] * 7}, "norm_stats: TypeError"),
        ({"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": True}, "norm_stats: action_scaled has shape []"),
    ],
)
def test_statistics_of_another_form(stats, needle, folder):
    whole = {"x": {**STATS["libero_object_no_noops"], "action": stats}}
    (folder / "dataset_statistics.json").write_text(json.dumps(whole))
    refused(folder, needle)


def test_nothing_of_a_folder_runs(folder):
    nothing_planted_runs(folder, lambda folder: load_published(folder, "openvla-oft-7b", **SIZES))


def test_a_missing_shard(tmp_path):
    publish(tmp_path / "published", AUTOREGRESSIVE, shards=3)
    (tmp_path / "published" / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path / "published", "model-00002-of-00003.safetensors")


def test_statistics_by_key():
    stats = {"bridge_orig": {"a": 1}, "libero_goal_no_noops": {"b": 2}}
    assert pick_statistics(stats, "bridge_orig") == {"a": 1}
    assert pick_statistics(stats, "libero_goal") == {"b": 2}
    assert pick_statistics({"only": {"c": 3}}, None) == {"c": 3}
    with pytest.raises(BenchError, match="choose one of bridge_orig, libero_goal_no_noops"):
        pick_statistics(stats, None)
    with pytest.raises(BenchError, match="'libero_10'; the checkpoint has bridge_orig, libero_goal_no_noops"):
        pick_statistics(stats, "libero_10")
