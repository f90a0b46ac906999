"""Published pi0 folders: what is in them is what is loaded, or one line says what is wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.pi0_checkpoint import load_published
from vlarl_bench.policies.presets import PI0_BASE
from vlarl_bench.policies.store import content_hash, save_policy
from vlarl_bench.suite import Observation

from .conftest import nothing_planted_runs, told_in_one_line
from .pi0_small import CAMERAS, SIZES, STATS, publish


def observe(size=28, seed=0):
    draw = np.random.default_rng(seed)
    images = {camera: draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in CAMERAS}
    return Observation("pick up the milk", draw.normal(size=8).astype(np.float32), images=images)


def act(policy, seen):
    with torch.no_grad():
        context = policy.encode(policy.preprocess([seen]))
        return policy.sample(context, [torch.Generator().manual_seed(0)]).actions


FORMS = {"lerobot": {}, "base": {"prefix": "", "shards": 3}, "retrained": {"tied": True}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_gives_the_policy_it_was_made_from(form, dtype, tmp_path):
    made = publish(tmp_path / "published", dtype=dtype, **form)
    loaded = load_published(tmp_path / "published", **SIZES)
    assert loaded.config == made.config
    assert content_hash(loaded) == content_hash(made)
    for seen in (observe(), observe(40)):
        assert torch.equal(act(made, seen), act(loaded, seen))
    # And on, through a folder of our own: bitwise, twice.
    for name in ("one", "two"):
        save_policy(tmp_path / name, loaded, {})
        loaded = PI0_BASE.load(tmp_path / name)
    assert content_hash(loaded) == content_hash(made)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert loaded.checkpointed


def test_another_precision_on_request(tmp_path):
    made = publish(tmp_path / "published")
    half = load_published(tmp_path / "published", dtype="bfloat16", **SIZES)
    own, cast = dict(made.model.named_parameters()), dict(half.model.named_parameters())
    kinds = {key: tensor.dtype for key, tensor in cast.items()}
    assert kinds["model.vlm.language_model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert kinds["model.vlm.vision_tower.post_layernorm.weight"] == torch.float32
    for key, tensor in cast.items():
        assert torch.equal(tensor, own[key].to(tensor.dtype))
    with pytest.raises(BenchError, match="dtype: 'int8'; it must be 'float32' or 'bfloat16'"):
        load_published(tmp_path / "published", dtype="int8", **SIZES)


@pytest.fixture
def folder(tmp_path):
    publish(tmp_path / "published")
    return tmp_path / "published"


def refused(folder, *needles, **arguments):
    told_in_one_line(lambda: load_published(folder, **{**SIZES, **arguments}), *needles)


def test_every_wrong_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.state_proj.bias"], tensors["model.paligemma_with_expert.paligemma.lm_head.weight"]
    tensors["model.time_mlp_in.weight"] = torch.zeros(2)
    tensors["model.action_out_proj.bias"] = torch.zeros(3)
    tensors["model.action_in_proj.bias"] = torch.zeros(24, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        "lacks paligemma_with_expert.paligemma.lm_head.weight; lacks state_proj.bias; has unknown time_mlp_in.weight",
        "action_out_proj.bias is F32 [3], should be F32 [32]",
        "action_in_proj.bias is I32 [24], should be F32 [24]",
    )


def test_a_tensor_that_is_there_twice(folder):
    """With the prefix and without, one of the two would win unseen."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"state_proj.bias": tensors["model.state_proj.bias"] + 1}, folder / "model.safetensors")
    refused(folder, "has state_proj.bias twice, as model.state_proj.bias and as state_proj.bias")


def test_a_tensor_that_two_shards_have(tmp_path):
    folder = tmp_path / "published"
    publish(folder, prefix="", shards=3)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor + 1}, second)
    refused(folder, f"{first.name} and {second.name} both have {key}")


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("fields", "needles"),
    [
        ({"type": "pi05"}, ["type 'pi05'", "must be 'pi0'"]),
        ({"use_relative_actions": True}, ["use_relative_actions True"]),
        ({"max_state_dim": 14}, ["max_state_dim and max_action_dim"]),
        ({"output_features": {}}, ["KeyError('action')"]),
        ({"num_inference_steps": "ten"}, ["num_inference_steps 'ten'", "a whole number above 0"]),
        ({"normalization_mapping": {"ACTION": "QUANTILE10"}}, ["ACTION 'QUANTILE10'", "known are MEAN_STD"]),
        ({"normalization_mapping": {"ACTION": "MIN_MAX", "STATE": "MEAN_STD"}}, ["KeyError('min')", "min and max"]),
        ({"normalization_mapping": {"ACTION": "QUANTILES", "STATE": "MEAN_STD"}}, ["KeyError('q01')", "q01 and q99"]),
        ({"output_features": {"action": {"type": "ACTION", "shape": [14]}}}, ["action has shape [7]", "needs [14]"]),
    ],
)
def test_a_configuration_that_is_not_this_network_s(folder, fields, needles):
    change(folder, **fields)
    refused(folder, *needles)


def index_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))


def restate_as(statistic):
    """Puts `statistic` in the place of all statistics of actions."""

    def put(folder):
        state = load_file(folder / "policy_postprocessor_step_1_unnormalizer_processor.safetensors")
        restate(folder, {**state, **{key: statistic.clone() for key in state if key.startswith("action.")}})

    return put


def openpi_with_numbers(folder):
    for pipeline in ("pre", "post"):
        (folder / f"policy_{pipeline}processor.json").unlink()
    one = dict.fromkeys(("mean", "std", "q01", "q99"), 1.0)
    (folder / "assets" / "libero").mkdir(parents=True)
    (folder / "assets" / "libero" / "norm_stats.json").write_text(json.dumps({"state": one, "actions": one}))


MODES = "normalization_mapping"
BROKEN = {
    "an empty index": (index_nothing, ["model.safetensors.index.json has no weight_map from tensors to files"]),
    "modes in a list": (
        lambda folder: change(folder, **{MODES: ["MEAN_STD"]}),
        ["normalization_mapping: ['MEAN_STD'] in", "it must be an object"],
    ),
    "a list for a mode": (
        lambda folder: change(folder, **{MODES: {"ACTION": ["MEAN_STD"], "STATE": "MEAN_STD"}}),
        ["normalization_mapping: ACTION ['MEAN_STD'] in", "known are MEAN_STD, QUANTILES, MIN_MAX"],
    ),
    "a scalar": (restate_as(torch.tensor(1.0)), ["statistics: action has shape [] in", "this robot needs [7]"]),
    "a matrix": (restate_as(torch.ones(7, 7)), ["statistics: action has shape [7, 7] in"]),
    "a number in JSON": (openpi_with_numbers, ["statistics: action has shape [] in", "this robot needs [7]"]),
}
"""What pi0's and pi0-FAST's folders share: how to break one, and what is said of it."""


def test_images_that_no_camera_gives(folder):
    refused(folder, "no camera is known for left_wrist_0_rgb", "has base_0_rgb", cameras={"base_0_rgb": "top"})
    one = load_published(folder, cameras={"base_0_rgb": "top", "left_wrist_0_rgb": "left"}, **SIZES)
    assert one.architecture.cameras == ("top", "left")


def test_missing_and_broken_files(folder):
    refused(folder / "nowhere", "config.json", "no such file or folder")
    (folder / "policy_preprocessor_step_1_normalizer_processor.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    refused(folder, "policy_preprocessor_step_1_normalizer_processor.safetensors")
    (folder / "policy_preprocessor.json").write_text(
        json.dumps({"steps": [{"registry_name": "normalizer_processor", "state_file": "../x.safetensors"}]})
    )
    refused(folder, "'../x.safetensors', which is no file beside it")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json: cannot read", "put PaliGemma's there")


def test_a_tokenizer_from_elsewhere(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "paligemma.json")
    assert load_published(folder, tokenizer=tmp_path / "paligemma.json", **SIZES).vocabulary.encode("pick")[0] == 2
    (folder / "tokenizer").mkdir()  # as lerobot's newer releases write it
    (tmp_path / "paligemma.json").rename(folder / "tokenizer" / "tokenizer.json")
    assert load_published(folder, **SIZES).vocabulary.encode("pick")[0] == 2


def test_openpi_s_scales_by_name(folder):
    for pipeline in ("pre", "post"):
        (folder / f"policy_{pipeline}processor.json").unlink()
    refused(folder, "statistics:", "has none")
    for name, mean in (("trossen", 1.0), ("physical-intelligence/libero", 2.0)):
        one = {"mean": [mean] * 32, "std": [0.5] * 32, "q01": [-1.0] * 32, "q99": [3.0] * 32}
        (folder / "assets" / name).mkdir(parents=True)
        stats = json.dumps({"norm_stats": {"state": one, "actions": one}})
        (folder / "assets" / name / "norm_stats.json").write_text(stats)
    refused(folder, "choose one of physical-intelligence/libero, trossen")
    refused(folder, "'libero'; the checkpoint has physical-intelligence/libero, trossen", unnorm_key="libero")
    policy = load_published(folder, unnorm_key="physical-intelligence/libero", **SIZES)
    assert policy.action_mean.tolist() == [2.0] * 7 and policy.proprio_mean.tolist() == [2.0] * 8
    change(folder, normalization_mapping={"ACTION": "QUANTILES", "STATE": "QUANTILES"})
    policy = load_published(folder, unnorm_key="trossen", **SIZES)
    # -1 and 3 become -1 and 1.
    latent = policy.normalise(torch.tensor([-1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]))[:4]
    torch.testing.assert_close(latent, torch.tensor([-1.0, 1.0, 0.0, 0.0]))


def test_the_least_and_the_most_become_minus_one_and_one(folder):
    change(folder, normalization_mapping={"ACTION": "MIN_MAX", "STATE": "MIN_MAX"})
    bounds = {"min": torch.linspace(-2, 0, 8), "max": torch.linspace(2, 8, 8)}
    stats = {f"observation.state.{k}": v for k, v in bounds.items()} | {
        f"action.{k}": v[:7].clone() for k, v in bounds.items()
    }
    restate(folder, stats)
    policy = load_published(folder, **SIZES)
    # The first number goes from -2 to 2, so 1 is 0.5; what is a quarter of the way up, of any, is -0.5.
    assert policy.normalise(torch.ones(7))[0].item() == pytest.approx(0.5)
    assert policy.unnormalise(torch.full((32,), 0.5))[0].item() == pytest.approx(1)
    quarter = 0.75 * bounds["min"] + 0.25 * bounds["max"]
    torch.testing.assert_close(policy.normalise(quarter[:7])[:7], torch.full((7,), -0.5))
    torch.testing.assert_close(policy.normalise_proprio(quarter[None])[0, :8], torch.full((8,), -0.5))


def restate(folder, stats):
    """Other statistics in the folder."""
    for pipeline, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        save_file(stats, folder / f"policy_{pipeline}processor_step_1_{step}.safetensors")


def test_a_key_where_there_is_nothing_to_choose(folder):
    refused(folder, "unnorm_key: 'libero'", "has only its own", unnorm_key="libero")


def test_nothing_of_a_folder_runs(folder):
    nothing_planted_runs(folder, lambda folder: load_published(folder, **SIZES))


@pytest.mark.parametrize(("change_it", "needles"), BROKEN.values(), ids=BROKEN)
def test_what_would_end_in_a_traceback_is_refused(folder, change_it, needles):
    change_it(folder)
    refused(folder, *needles)


def test_scales_are_those_of_lerobot(folder):
    policy = load_published(folder, **SIZES)
    torch.testing.assert_close(policy.unnormalise(torch.ones(32)), STATS["action.mean"] + STATS["action.std"])
    proprio = torch.arange(8.0)
    expected = (proprio - STATS["observation.state.mean"]) / STATS["observation.state.std"]
    torch.testing.assert_close(policy.normalise_proprio(proprio[None])[0, :8], expected)
