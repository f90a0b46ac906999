"""The converter, from mapped parameters on; with orbax installed, from a checkpoint on disk."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies import octo, octo_convert
from vlarl_bench.policies.octo_convert import architecture_of, convert, convert_parameters, torch_array, torch_key
from vlarl_bench.policies.presets import OCTO_BASE, OCTO_SMALL
from vlarl_bench.policies.store import content_hash, save_policy
from vlarl_bench.suite import Observation

from .conftest import told_in_one_line
from .octo_golden import MODEL, parameters, pixels, tokenizer_json

SMALL = {"width": 32, "layers": 2, "heads": 4, "mlp": 48}
STATISTICS = {
    "bridge_dataset": {"action": {"mean": [0.5] * 7, "std": [2.0] * 7, "mask": [True] * 6 + [False]}},
    "other": {"action": {"mean": [0.0] * 7, "std": [1.0] * 7}},
    "short": {"action": {"mean": [0.0] * 7, "std": [1.0] * 6}},
}


def checkpoint(folder, **model):
    """What lies beside the steps of a published checkpoint, and a tokenizer."""
    (folder / "config.json").write_text(json.dumps({"model": {**MODEL, **model}, "window_size": 2}))
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(parameters)`: converts the small golden network, as if it were Octo-Small."""
    monkeypatch.setitem(octo.FULL_SIZE, "octo-small-1.5", SMALL)
    checkpoint(tmp_path)

    def convert_these(arrays, key="bridge_dataset"):
        monkeypatch.setattr(octo_convert, "read_checkpoint", lambda folder, step: arrays)
        statistics, tokenizer = tmp_path / "dataset_statistics.json", tmp_path / "tokenizer.json"
        return convert(tmp_path, tmp_path / "out", tokenizer, key, statistics)

    return convert_these


def observation(seed=0):
    images = {name: pixels(1, 32 + seed, 32, 3)[0][-32:] for name in OCTO_SMALL.cameras}
    images = {name: np.resize(image, (32, 32, 3)).astype(np.uint8) for name, image in images.items()}
    return Observation("pick up the milk", np.zeros(8, np.float32), images=images)


def act(policy):
    with torch.no_grad():
        context = policy.encode(policy.preprocess([observation(), observation(3)]))
    return policy.sample(context, [torch.Generator().manual_seed(i) for i in range(2)]).actions


def test_a_converted_checkpoint_loads_and_acts_and_is_stored_again_the_same(run, tmp_path):
    policy = run(parameters())
    loaded = OCTO_SMALL.load(tmp_path / "out")
    assert content_hash(loaded) == content_hash(policy)
    assert loaded.model.checkpointed and not policy.model.checkpointed
    assert torch.equal(act(loaded), act(policy))
    assert act(loaded).shape == (2, 4, 7)
    save_policy(tmp_path / "again", loaded, {})
    again = OCTO_SMALL.load(tmp_path / "again")
    for key, tensor in policy.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    with pytest.raises(BenchError, match=r"holds 'octo-small-1.5', not 'octo-base-1.5'"):
        OCTO_BASE.load(tmp_path / "out")


def test_each_parameter_is_where_it_was_put(run):
    """A dense kernel is transposed, a convolution's axes are turned, and heads are laid side by side."""
    arrays = parameters()
    own = run(arrays).model.state_dict()
    block = "octo_transformer/BlockTransformer_0/Transformer_0/encoderblock_1/MultiHeadDotProductAttention_0/"
    query, out = arrays[block + "query/kernel"], arrays[block + "out/kernel"]
    assert own["blocks.1.query.weight"][3 * 8 + 5, 7] == query[7, 3, 5]
    assert own["blocks.1.out.weight"][7, 3 * 8 + 5] == out[3, 5, 7]
    assert own["blocks.1.key.bias"][3 * 8 + 5] == arrays[block + "key/bias"][3, 5]
    stem = arrays["octo_transformer/observation_tokenizers_wrist/SmallStem16_0/StdConv_1/kernel"]
    assert own["stems.wrist.convs.1.weight"][9, 8, 2, 1] == stem[2, 1, 8, 9]
    head = arrays["heads_action/diffusion_model/reverse_network/Dense_0/kernel"]
    assert own["head.input.weight"][3, 4] == head[4, 3]
    assert own["positions.primary"][1, 2, 3] == arrays["octo_transformer/obs_primary_pos_embedding"][0, 1, 2, 3]
    assert own["positions.language"][2, 3] == arrays["octo_transformer/task_language_pos_embedding"][0, 2, 3]


def test_actions_come_in_the_units_of_the_dataset(run, tmp_path):
    policy = run(parameters())
    latent = torch.ones(1, 4, 7)
    # The gripper is not scaled: 1 is open, which is LIBERO's -1, and 0 is shut.
    assert policy.unnormalise(latent)[0, 0].tolist() == [2.5] * 6 + [-1.0]
    latent[..., 6] = 0
    actions = policy.unnormalise(latent)
    assert actions[0, 0].tolist() == [2.5] * 6 + [1.0]
    assert torch.equal(policy.normalise(actions), latent)
    assert torch.equal(OCTO_SMALL.load(tmp_path / "out").unnormalise(latent), actions)
    # Of a number that is scaled nothing is known.
    other = run(parameters(), "other")
    assert torch.equal(other.unnormalise(latent), latent)
    assert torch.equal(other.normalise(latent), latent)
    with pytest.raises(BenchError, match="no 'brigde'; it has bridge_dataset, other, short"):
        run(parameters(), "brigde")
    with pytest.raises(BenchError, match="'short' has 6 actions, the checkpoint 7"):
        run(parameters(), "short")


def test_nothing_trains_the_text_encoder(run):
    policy = run(parameters()).requires_grad_(True)
    context = policy.encode(policy.preprocess([observation()]))
    policy.sft_loss(context, torch.zeros(1, 4, 7), torch.ones(1, 4), torch.Generator().manual_seed(0)).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == name.startswith("model.language."), name


def test_missing_surplus_and_misshapen_parameters_are_named(run):
    arrays = parameters()
    bias = "octo_transformer/obs_primary_projection/bias"
    with pytest.raises(BenchError, match=r"lacks projections\.primary\.bias"):
        run({path: array for path, array in arrays.items() if path != bias})
    with pytest.raises(BenchError, match=r"projections\.primary\.bias is \[31\], should be \[32\]"):
        run({**arrays, bias: np.zeros(31, np.float32)})
    with pytest.raises(BenchError, match="has unknown octo_transformer/obs_depth_projection/kernel2"):
        run({**arrays, "octo_transformer/obs_depth_projection/kernel2": arrays[bias]})
    with pytest.raises(BenchError, match=r"has unknown projections\.depth\.bias"):
        run({**arrays, "octo_transformer/obs_depth_projection/bias": arrays[bias]})
    six = [f"octo_transformer/obs_depth{i}_projection/kernel2" for i in range(6)]
    with pytest.raises(BenchError, match=re.escape("; ".join(f"has unknown {path}" for path in six))):
        run({**arrays, **dict.fromkeys(six, arrays[bias])})
    tells = ("LayerNorm_0/", "MlpBlock_0/Dense_0/")  # where the sizes are read from
    few = [path for path in arrays if "encoderblock_1/" in path and path.endswith("/bias")]
    few = [path for path in few if not any(part in path for part in tells)]
    assert len(few) == 6
    surplus = {path.replace("encoderblock_1", "encoderblock_9"): arrays[path] for path in few}
    wrong = {path.replace("encoderblock_1", "encoderblock_0"): np.zeros((2, 2), np.float32) for path in few}
    with pytest.raises(BenchError) as error:
        run({**{path: array for path, array in arrays.items() if path not in few}, **surplus, **wrong})
    for path in few:
        key = torch_key(path)
        other, misshapen = (key.replace("blocks.1", f"blocks.{i}") for i in (9, 0))
        for phrase in (f"lacks {key}; ", f"has unknown {other}; ", f"{misshapen} is ["):
            assert phrase in str(error.value)


def test_one_message_names_whatever_is_wrong(run):
    arrays = parameters()
    block = octo_convert.TRUNK + "BlockTransformer_0/Transformer_0/encoderblock_1/"
    query = block + "MultiHeadDotProductAttention_0/query/kernel"
    # Blocks are counted by any of their parameters; an unknown path, one that is missing and one of no shape at all.
    changed = {**arrays, "octo_transformer/nothing/kernel": np.zeros(()), query: np.zeros((), np.float32)}
    del changed[block + "LayerNorm_0/bias"], changed[octo_convert.HEAD + "cond_encoder/Dense_0/bias"]
    told_in_one_line(
        lambda: run(changed),
        "lacks blocks.1.norm1.bias; lacks head.time_in.bias; has unknown octo_transformer/nothing/kernel; "
        "blocks.1.query.weight is [], should be [32, 32]",
    )
    # All that tell sizes, and what no network has.
    stem = octo_convert.TRUNK + "observation_tokenizers_primary/SmallStem16_0/StdConv_1/kernel"
    lost = [stem, octo_convert.HEAD + "reverse_network/Dense_0/bias", "octo_transformer/readout_action_pos_embedding"]
    changed = {path: array for path, array in arrays.items() if path not in lost}
    changed["octo_transformer/task_language_pos_embedding"] = np.zeros(6, np.float32)
    changed["octo_transformer/nothing/kernel"] = np.zeros(3, np.float32)
    told_in_one_line(
        lambda: run(changed),
        *(f"lacks {path}; " for path in lost),
        "octo_transformer/task_language_pos_embedding is [6], should have more axes; "
        "has unknown octo_transformer/nothing/kernel",
    )


NORMAL, BOUNDS = ({"action_proprio_normalization_type": kind} for kind in ("normal", "bounds"))


@pytest.mark.parametrize(
    ("base", "fine_tuning", "refused"),
    [
        ({"oxe_kwargs": NORMAL}, None, None),
        ({"oxe_kwargs": BOUNDS}, None, "config.json: dataset_kwargs.oxe_kwargs."),
        ({"dataset_kwargs_list": [NORMAL, BOUNDS]}, None, "config.json: dataset_kwargs.dataset_kwargs_list.1."),
        (NORMAL, BOUNDS, "finetune_config.json: dataset_kwargs."),
        (BOUNDS, NORMAL, None),  # what it started from says nothing of what it is
        (BOUNDS, {"name": "bridge_dataset"}, None),
    ],
)
def test_actions_that_were_scaled_otherwise_are_refused(run, tmp_path, base, fine_tuning, refused):
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dataset_kwargs": base}))
    if fine_tuning is not None:
        (tmp_path / "finetune_config.json").write_text(json.dumps({"dataset_kwargs": fine_tuning}))
    if refused is None:
        run(parameters())
        return
    line = refused + "action_proprio_normalization_type is 'bounds'; this converter takes 'normal'"
    told_in_one_line(lambda: run(parameters()), line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat_task_tokens": False}, "model.repeat_task_tokens is False; this converter takes True"),
        ({"readouts": {"action": 4}}, r"model.readouts is \{'action': 4\}"),
        ({"heads": {"action": {"name": "L1ActionHead", "kwargs": {}}}}, "'L1ActionHead'.* takes 'DiffusionActionHead'"),
        ({"observation_tokenizers": {"primary": {}}}, r"model.observation_tokenizers is \['primary'\]"),
        ({"heads": {}}, "lacks 'action'"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(BenchError, match=message):
        architecture_of({"model": {**MODEL, **change}}, {path: a.shape for path, a in parameters().items()})


def test_a_size_that_was_never_published_is_refused(run, monkeypatch):
    monkeypatch.setitem(octo.FULL_SIZE, "octo-small-1.5", {**SMALL, "heads": 6})
    with pytest.raises(BenchError, match=r"width 32, 2 layers of 4 heads is no published size.*octo-base-1.5"):
        run(parameters())


def test_masks_default_to_the_first_release():
    """As in the authors' code: a config.json that does not say has the old mask."""
    shapes = {path: a.shape for path, a in parameters().items()}
    model = {key: value for key, value in MODEL.items() if key != "use_correct_attention"}
    assert not architecture_of({"model": model}, shapes).correct_attention
    assert architecture_of({"model": MODEL}, shapes).correct_attention


def test_mapping_is_one_to_one():
    arrays = parameters()
    assert len(convert_parameters(arrays)) == len(arrays)
    assert torch_key("octo_transformer/nothing/kernel") is None
    for path, array in arrays.items():
        assert torch_array(path, array).size == array.size


def command(*arguments):
    line = [sys.executable, "-m", "vlarl_bench.policies.octo_convert", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_fails_in_one_line(tmp_path, monkeypatch):
    asked = ["--checkpoint", str(tmp_path), "--out", "x", "--tokenizer", "x", "--statistics-key", "x"]
    monkeypatch.setattr(sys, "argv", ["octo_convert", *asked])
    with pytest.raises(SystemExit) as stop:
        octo_convert.main()
    assert str(stop.value) == f"error: {tmp_path}/config.json: no such file or folder"


def test_without_orbax_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(BenchError, match=r"orbax-checkpoint, .* not installed.*'\.\[octo\]'"):
        octo_convert.read_checkpoint(tmp_path)


@pytest.mark.parametrize("inner", ["default", "."])
@pytest.mark.parametrize("together", [True, False])
def test_from_an_orbax_checkpoint(inner, together, tmp_path, monkeypatch):
    """Also as older versions of orbax wrote it, with a folder for each array."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="reads JAX checkpoints: pip install -e .[octo]")
    arrays, tree = parameters(), {}
    for path, array in arrays.items():
        *above, leaf = path.split("/")
        at = tree
        for part in above:
            at = at.setdefault(part, {})
        at[leaf] = array
    checkpoint(tmp_path)
    orbax.PyTreeCheckpointer(use_ocdbt=together).save((tmp_path / "300000" / inner).resolve(), tree)
    apart = [path for path in (tmp_path / "300000").rglob("*kernel*") if path.is_dir()]
    assert bool(apart) != together
    found = octo_convert.read_checkpoint(tmp_path)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[path], array) for path, array in arrays.items())
    with pytest.raises(BenchError, match=r"has no step 7; it has \[300000\]"):
        octo_convert.read_checkpoint(tmp_path, 7)
    monkeypatch.setitem(octo.FULL_SIZE, "octo-small-1.5", SMALL)
    statistics = tmp_path / "dataset_statistics.json"
    convert(tmp_path, tmp_path / "out", tmp_path / "tokenizer.json", "other", statistics)
    assert act(OCTO_SMALL.load(tmp_path / "out")).isfinite().all()


def test_an_empty_or_broken_checkpoint_says_so(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="reads JAX checkpoints: pip install -e .[octo]")
    with pytest.raises(BenchError, match="has no steps; it has none"):
        octo_convert.read_checkpoint(tmp_path)
    (tmp_path / "10" / "default").mkdir(parents=True)
    (tmp_path / "10" / "default" / "checkpoint").write_bytes(b"\x00nothing")
    with pytest.raises(BenchError, match="orbax cannot read"):
        octo_convert.read_checkpoint(tmp_path)


def test_architectures_differ_only_in_what_is_published():
    a = architecture_of({"model": MODEL}, {path: array.shape for path, array in parameters().items()})
    assert dataclasses.asdict(a)["camera_sizes"] == (32, 16)
    assert (a.text_layers, a.text_heads, a.text_mlp, a.text_vocabulary) == (2, 3, 40, 50)
    assert (a.stem_widths, a.stem_out, a.head_width, a.head_blocks, a.time_dim) == ((32, 32, 64, 64), 40, 56, 2, 8)
    assert (a.chunk, a.action_dim, a.window, a.max_words, a.goal, a.mask_padding) == (4, 7, 3, 6, True, False)
