"""Published pi0-FAST folders: what is in them is what is loaded, or one line says what is wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarl_bench.policies.pi0_fast_checkpoint import load_published
from vlarl_bench.policies.presets import PI0_FAST_BASE
from vlarl_bench.policies.store import content_hash, save_policy

from .conftest import nothing_planted_runs, told_in_one_line
from .pi0_fast_small import SIZES, STATS, publish
from .test_pi0_checkpoint import BROKEN, act, change, observe, restate

FORMS = {"lerobot": {}, "base": {"prefix": "", "shards": 3, "tied": True}}


@pytest.mark.parametrize(("form", "dtype"), [("lerobot", "float32"), ("lerobot", "bfloat16"), ("base", "float32")])
def test_a_folder_gives_the_policy_it_was_made_from(form, dtype, tmp_path):
    made = publish(tmp_path / "published", dtype=dtype, **FORMS[form])
    loaded = load_published(tmp_path / "published", **SIZES)
    assert loaded.config == made.config
    assert content_hash(loaded) == content_hash(made)
    for seen in (observe(), observe(40)):
        assert torch.equal(act(made, seen), act(loaded, seen))
    # And on, through a folder of our own: bitwise, twice.
    for name in ("one", "two"):
        save_policy(tmp_path / name, loaded, {})
        loaded = PI0_FAST_BASE.load(tmp_path / name)
    assert content_hash(loaded) == content_hash(made)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert loaded.checkpointed


@pytest.fixture
def folder(tmp_path):
    publish(tmp_path / "published")
    return tmp_path / "published"


def refused(folder, *needles, **arguments):
    told_in_one_line(lambda: load_published(folder, **{**SIZES, **arguments}), *needles)


def test_every_wrong_tensor_is_named(folder):
    network = "model.paligemma_with_expert.paligemma."
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{network}lm_head.weight"]
    tensors["model.paligemma_with_expert.gemma_expert.model.norm.weight"] = torch.zeros(2)
    tensors[f"{network}model.language_model.norm.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        "lacks paligemma_with_expert.paligemma.lm_head.weight; has unknown paligemma_with_expert.gemma_expert.",
        "paligemma.model.language_model.norm.weight is F32 [3], should be F32 [32]",
    )


def test_a_tensor_that_is_there_twice(folder):
    key, tensors = "paligemma_with_expert.paligemma.lm_head.weight", load_file(folder / "model.safetensors")
    save_file(tensors | {key: tensors[f"model.{key}"] + 1}, folder / "model.safetensors")
    refused(folder, f"has {key} twice, as model.{key} and as {key}")


@pytest.mark.parametrize(
    ("fields", "needles"),
    [
        ({"type": "pi0fast"}, ["type 'pi0fast'", "must be 'pi0_fast'"]),
        ({"use_relative_actions": True}, ["use_relative_actions True"]),
        ({"fast_skip_tokens": "many"}, ["fast_skip_tokens 'many'; it must be a whole number above 0"]),
        ({"fast_skip_tokens": 200}, ["FAST's 200 tokens would be 119 down to -80"]),
        ({"chunk_size": 0}, ["chunk_size 0; it must be a whole number above 0"]),
        ({"max_action_tokens": 5}, ["max_action_tokens", "it must be above 5"]),
        ({"normalization_mapping": {"ACTION": "QUANTILE10"}}, ["ACTION 'QUANTILE10'", "known are MEAN_STD"]),
        ({"normalization_mapping": {"ACTION": "MEAN_STD"}}, ["KeyError('mean')", "needs mean and std"]),
    ],
)
def test_a_configuration_that_is_not_this_network_s(folder, fields, needles):
    change(folder, **fields)
    refused(folder, *needles)


def test_fast_s_tokenizer_is_named_where_it_is_missing(folder, tmp_path):
    (folder / "action_tokenizer").rename(tmp_path / "fast")
    refused(folder, "there is no folder", "action_tokenizer; put the FAST tokenizer 'physical-intelligence/fast' there")
    assert len(load_published(folder, fast=tmp_path / "fast", **SIZES).fast) == 200
    (tmp_path / "fast/processor_config.json").unlink()
    refused(folder, "cannot read", "processor_config.json", fast=tmp_path / "fast")


def test_the_tokenizer_s_python_file_never_runs(folder):
    (folder / "action_tokenizer/processing_action_tokenizer.py").write_text("raise SystemExit('it ran')")
    assert len(load_published(folder, **SIZES).fast) == 200


def test_nothing_of_a_folder_runs(folder):
    nothing_planted_runs(folder, lambda folder: load_published(folder, **SIZES))


@pytest.mark.parametrize(("change_it", "needles"), BROKEN.values(), ids=BROKEN)
def test_what_would_end_in_a_traceback_is_refused(folder, change_it, needles):
    change_it(folder)
    refused(folder, *needles)


def test_scales_are_those_of_lerobot(folder):
    policy = load_published(folder, **SIZES)
    low, high = STATS["action.q01"], STATS["action.q99"]
    torch.testing.assert_close(policy.unnormalise(torch.tensor([[-1.0] * 7, [1.0] * 7])), torch.stack((low, high)))
    # A number that never moved: what it was lies in the first bin, and whatever else in the last, or below the first.
    still = STATS["observation.state.q01"].clone()
    still[0] = STATS["observation.state.q99"][0]
    restate(folder, {**STATS, "observation.state.q01": still})
    policy = load_published(folder, **SIZES)
    seen = observe()
    for moved, bin_ in ((0.0, "0"), (0.1, "255"), (-0.1, "-1")):
        seen.proprio[0] = STATS["observation.state.q99"][0] + moved
        assert f"State: {bin_} " in policy.prompt(seen)


def test_the_least_and_the_most_do_as_well(folder):
    change(folder, normalization_mapping={"ACTION": "MIN_MAX", "STATE": "MIN_MAX"})
    restate(folder, {key.replace("q01", "min").replace("q99", "max"): value for key, value in STATS.items()})
    policy = load_published(folder, **SIZES)
    ends = torch.stack((STATS["action.q01"], STATS["action.q99"]))
    torch.testing.assert_close(policy.unnormalise(torch.tensor([[-1.0] * 7, [1.0] * 7])), ends)


def test_means_and_deviations_do_as_well(folder):
    change(folder, normalization_mapping={"ACTION": "MEAN_STD", "STATE": "MEAN_STD"})
    moments = {"mean": torch.linspace(-0.5, 0.5, 8), "std": torch.linspace(0.5, 2, 8)}
    stats = {f"observation.state.{k}": v for k, v in moments.items()} | {
        f"action.{k}": v[:7].clone() for k, v in moments.items()
    }
    restate(folder, stats)
    policy = load_published(folder, **SIZES)
    latent = policy.normalise(stats["action.mean"] + torch.arange(7) / 7 * stats["action.std"])
    torch.testing.assert_close(latent, torch.arange(7) / 7, atol=1e-5, rtol=0)
