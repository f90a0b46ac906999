"""Policy folders: what is read back is what was written, or one line says what is wrong."""

import hashlib
import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load, save

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.presets import PI0_TINY, PI0_TINY_PIXELS
from vlarl_bench.policies.store import content_hash, read_policy, save_policy
from vlarl_bench.suite import Embodiment

from .conftest import make, observe, told_in_one_line

CARD = {"tasks": ["libero_object/x"], "made_by": "vlarl-bench run", "protocol": "0123456789ab"}


@pytest.fixture(scope="module")
def saved():
    return make()


@pytest.fixture
def folder(saved, tmp_path):
    save_policy(tmp_path / "policy", saved, CARD)
    return tmp_path / "policy"


def rewrite(folder, name, data):
    """Changes a file and its hash, as a careless hand would."""
    (folder / name).write_bytes(data)
    hashes = json.loads((folder / "hashes.json").read_text())
    hashes[name] = hashlib.sha256(data).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")


def refused(folder, *needles, spec=PI0_TINY):
    told_in_one_line(lambda: spec.load(folder), *needles)


def test_round_trip_is_bitwise(spec, tmp_path):
    policy = make(spec, seed=5)
    save_policy(tmp_path / "a", policy, CARD)
    loaded = spec.load(tmp_path / "a")
    save_policy(tmp_path / "b", loaded, CARD)
    assert loaded.config == policy.config
    assert content_hash(loaded) == content_hash(policy)
    assert not loaded.training
    for name in ("config.json", "model.safetensors", "hashes.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with torch.no_grad():
        a, b = (p.sample(p.encode(p.preprocess([observe(0, spec)])), None).actions for p in (policy, loaded))
    assert torch.equal(a, b)


def test_half_keeps_scales_whole_and_is_stable(saved, tmp_path):
    save_policy(tmp_path / "a", saved, CARD, half=True)
    loaded = PI0_TINY.load(tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.equal(loaded.action_std, saved.action_std)
    assert torch.equal(loaded.proprio_mean, saved.proprio_mean)
    weight, exact = loaded.model.action_out_proj.weight, saved.model.action_out_proj.weight
    assert torch.equal(weight, exact.half().float())
    assert not torch.equal(weight, exact)
    save_policy(tmp_path / "b", loaded, CARD, half=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_card(folder, saved):
    config, _ = read_policy(folder)
    assert config == json.loads(json.dumps({**saved.config, **CARD}))
    text = (folder / "README.md").read_text()
    assert text.startswith("# pi0-tiny\n")
    assert "- made_by: vlarl-bench run\n" in text
    save_policy(folder, saved, {"seed": 3, "tasks": ["x" * 99, "y" * 100], "spent": {"flops": 1}})
    assert (folder / "README.md").read_text().endswith("\n- seed: 3\n- in config.json as well: tasks, spent\n")
    with pytest.raises(BenchError, match="card: vocabulary"):
        save_policy(folder, saved, {"vocabulary": []})


def test_content_hash_sees_every_change():
    hashes = {content_hash(make()), content_hash(make(seed=1))}
    for name in ("action_mean", "proprio_std"):
        policy = make()
        getattr(policy, name)[0] += 1e-3
        hashes.add(content_hash(policy))
    policy = make()
    with torch.no_grad():
        policy.model.action_out_proj.bias[3] += 1e-6
    hashes |= {content_hash(policy), content_hash(PI0_TINY.create(Embodiment(7, 8), ["another word"]))}
    assert len(hashes) == 6
    assert all(len(h) == 12 and int(h, 16) >= 0 for h in hashes)
    assert content_hash(make()) == content_hash(make())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_files(folder, name, damage):
    data = bytearray((folder / name).read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data) if damage == "flipped" else data[: 0 if damage == "empty" else -1])
    refused(folder, str(folder / name), "damaged")


def test_every_flipped_byte_of_the_hashes_is_named(folder):
    """Also one that changes no meaning, such as a tab for a space."""
    path = folder / "hashes.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        refused(folder, str(path))
    for i in range(0, len(whole), 9):
        path.write_bytes(whole[:i])
        refused(folder, str(path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "hashes.json"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    refused(folder, name, "No such file")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_hashes_that_are_none(folder, text):
    (folder / "hashes.json").write_text(text)
    refused(folder, "hashes.json")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("model.safetensors", b"PK\x03\x04 a pickle"),
    ],
)
def test_files_of_another_kind(folder, name, data):
    rewrite(folder, name, data)
    refused(folder, name)


def test_an_incomplete_configuration_is_refused_with_its_folder_as_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["vocabulary"]
    rewrite(folder, "config.json", json.dumps(config).encode())
    refused(folder, "config.json", "vocabulary")


def test_keys_and_shapes(folder):
    whole = load((folder / "model.safetensors").read_bytes())
    key = "model.action_out_proj.bias"
    cases = {
        "lacks": {k: v for k, v in whole.items() if k != key},
        "has unknown extra.weight": {**whole, "extra.weight": torch.zeros(1)},
        "torch.float32 [8], should be torch.float32 [7]": {**whole, key: torch.zeros(8)},
        "torch.int64 [7], should be": {**whole, key: torch.zeros(7, dtype=torch.int64)},
    }
    for problem, tensors in cases.items():
        rewrite(folder, "model.safetensors", save(tensors))
        refused(folder, "model.safetensors", problem)


def test_every_wrong_tensor_is_named(folder):
    whole = load((folder / "model.safetensors").read_bytes())
    keys = sorted(whole)
    wrong = {key: torch.zeros(1, 2, 3) for key in keys[6:12]}
    surplus = {f"extra.{i}": torch.zeros(1) for i in range(6)}
    rewrite(folder, "model.safetensors", save({**{key: whole[key] for key in keys[12:]}, **wrong, **surplus}))
    lines = [f"lacks {key}; " for key in keys[:6]] + [f"has unknown {key}; " for key in surplus]
    lines += [
        f"{key} is torch.float32 [1, 2, 3], should be {whole[key].dtype} {list(whole[key].shape)}; " for key in wrong
    ]
    refused(folder, "".join(lines))


def test_foreign_checkpoints(folder, tmp_path):
    save_policy(tmp_path / "pixels", make(PI0_TINY_PIXELS), CARD)
    refused(tmp_path / "pixels", "'pi0-tiny-pixels', not 'pi0-tiny'")
    refused(folder, "'pi0-tiny', not 'pi0-tiny-pixels'", spec=PI0_TINY_PIXELS)
    rewrite(folder, "model.safetensors", (tmp_path / "pixels/model.safetensors").read_bytes())
    refused(folder, "lacks object_in.bias", "another policy's")


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "No such file")


def test_saving_again_replaces_the_whole_folder(folder):
    other = make(seed=9)
    save_policy(folder, other, {"made_by": "again"})
    assert content_hash(PI0_TINY.load(folder)) == content_hash(other)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["policy"]


def test_never_over_something_else(saved, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/draft.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(BenchError, match="is not a policy folder"):
            save_policy(tmp_path / name, saved, CARD)
    assert (tmp_path / "thesis/draft.txt").read_text() == "years of work"
    with pytest.raises(BenchError, match="cannot write"):
        save_policy(tmp_path / "file/policy", saved, CARD)


def test_a_failed_write_leaves_the_old_policy_whole(folder, saved):
    """A real full disk, as the kernel shows it: files may not grow beyond 100 kB."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BenchError, match=r"cannot write .*: File too large"):
            save_policy(folder, make(seed=9), CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert content_hash(PI0_TINY.load(folder)) == content_hash(saved)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["policy"]
