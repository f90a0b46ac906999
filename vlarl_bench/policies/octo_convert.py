"""Turns a published Octo checkpoint (JAX, orbax) into a policy folder:

    pip install -c constraints.txt -e '.[octo]'
    python -m vlarl_bench.policies.octo_convert --checkpoint octo-small-1.5 --out priors/octo-small \
        --tokenizer t5-base/tokenizer.json --statistics-key bridge_dataset

Reads `config.json`, `dataset_statistics.json` and the newest step, `<step>/default` or `<step>`. Orbax and JAX are
needed only here. T5's tokenizer is not in the checkpoint: take `tokenizer.json` from where T5-base is published.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from ..errors import BenchError, install
from ..files import read_json_object
from .octo import FULL_SIZE, Octo, Subwords
from .octo_model import VIEWS, OctoArchitecture
from .presets import OCTO_SMALL
from .shards import wrong_keys
from .store import save_policy

TRUNK = "octo_transformer/"
STEM = TRUNK + r"observation_tokenizers_(\w+)/SmallStem16_0/"
T5 = TRUNK + "task_tokenizers_language/hf_model/"
BLOCK = TRUNK + r"BlockTransformer_0/Transformer_0/encoderblock_(\d+)/"
HEAD = "heads_action/diffusion_model/"
RESIDUAL = HEAD + r"reverse_network/MLPResNetBlock_(\d+)/"
MODULES = {
    T5 + "shared": "language.embed_tokens",
    T5 + "encoder/(.+)": r"language.\1",
    TRUNK + r"(?:task|obs)_(\w+)_projection": r"projections.\1",
    STEM + r"StdConv_(\d+)": r"stems.\1.convs.\2",
    STEM + r"GroupNorm_(\d+)": r"stems.\1.norms.\2",
    STEM + "embedding": r"stems.\1.embedding",
    BLOCK + "LayerNorm_0": r"blocks.\1.norm1",
    BLOCK + "LayerNorm_1": r"blocks.\1.norm2",
    BLOCK + "MultiHeadDotProductAttention_0/(query|key|value|out)": r"blocks.\1.\2",
    BLOCK + "MlpBlock_0/Dense_0": r"blocks.\1.up",
    BLOCK + "MlpBlock_0/Dense_1": r"blocks.\1.down",
    TRUNK + "BlockTransformer_0/Transformer_0/encoder_norm": "norm",
    HEAD + "cond_encoder/Dense_0": "head.time_in",
    HEAD + "cond_encoder/Dense_1": "head.time_out",
    HEAD + "reverse_network/Dense_0": "head.input",
    HEAD + "reverse_network/Dense_1": "head.output",
    RESIDUAL + "LayerNorm_0": r"head.blocks.\1.norm",
    RESIDUAL + "Dense_0": r"head.blocks.\1.up",
    RESIDUAL + "Dense_1": r"head.blocks.\1.down",
}
"""Pattern of a module's path in the checkpoint -> its name here; parameters are handled by `torch_key`."""
SCALING = "action_proprio_normalization_type"
"""What the authors' data code is told: `normal` (unless it is told), or `bounds` for quantiles that become -1 and 1."""
PARAMETERS = {"kernel": "weight", "scale": "weight", "weight": "weight", "embedding": "weight", "bias": "bias"}


def torch_key(path: str) -> str | None:
    """The name in `OctoNetwork` of a parameter's path in the checkpoint; None where the network has none."""
    position = re.fullmatch(TRUNK + r"(?:task|obs|readout)_(\w+)_pos_embedding", path)
    if position:
        return f"positions.{position[1]}"
    if path == HEAD + "time_preprocess/kernel":
        return "head.frequencies"
    module, _, parameter = path.rpartition("/")
    for pattern, name in MODULES.items():
        found = re.fullmatch(pattern, module)
        if found and parameter in PARAMETERS:
            return f"{found.expand(name).replace('/', '.')}.{PARAMETERS[parameter]}"
    return None


def torch_array(path: str, array: np.ndarray) -> np.ndarray:
    """A parameter of the checkpoint in torch's layout."""
    if path.endswith("_pos_embedding"):
        return array[0]
    if "/MultiHeadDotProductAttention_0/" in path:  # kernels [D, heads, d] and, of `out`, [heads, d, D]
        if path.endswith("bias"):
            return array.reshape(-1)
        return array.reshape(-1, array.shape[-1]).T if "/out/" in path else array.reshape(len(array), -1).T
    if path.endswith("/kernel") and "time_preprocess" not in path:
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def convert_parameters(parameters: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The network's state dict, from the checkpoint's parameters by path. Those that no network has keep their path."""
    tensors = {}
    for path, array in parameters.items():
        key = torch_key(path)
        turned = torch_array(path, array) if key and array.ndim else array
        tensors[key or path] = torch.from_numpy(np.array(turned, np.float32, order="C"))
    return tensors


def architecture_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> OctoArchitecture:
    """Architecture of a checkpoint, from its config.json and its parameters' shapes by path.

    Raises BenchError if it is not one that `OctoNetwork` can be, or if parameters are missing that tell its sizes: then
    it names all of these, and those that no network here has. What else is wrong can be told only of a known network.
    """
    problems: dict[str, None] = {}

    def size(path: str, axis: int) -> int:
        shape = shapes.get(path)
        if shape is None or not -len(shape) <= axis < len(shape):
            problems[f"lacks {path}" if shape is None else f"{path} is {list(shape)}, should have more axes"] = None
            return 1
        return shape[axis]

    first = TRUNK + "BlockTransformer_0/Transformer_0/encoderblock_0/"
    stem = TRUNK + "observation_tokenizers_primary/SmallStem16_0/"
    text = T5 + "encoder/block/0/layer/"
    sides = [16 * isqrt(size(f"{TRUNK}obs_{view}_pos_embedding", 2)) for view in VIEWS]
    convolutions = range(_count(shapes, stem + r"StdConv_(\d+)/"))
    try:
        model = config["model"]
        head = model["heads"]["action"]
        options = head["kwargs"]
        wanted = {
            "model.heads.action.name": (head["name"], "DiffusionActionHead"),
            "model.heads.action.kwargs.use_map": (options.get("use_map", False), False),
            "model.heads.action.kwargs.use_layer_norm": (options.get("use_layer_norm", True), True),
            "model.readouts": (model["readouts"], {"action": 1}),
            "model.repeat_task_tokens": (model.get("repeat_task_tokens", False), True),
            "model.observation_tokenizers": (sorted(model["observation_tokenizers"]), sorted(VIEWS)),
            "model.task_tokenizers": (sorted(model["task_tokenizers"]), ["language"]),
        }
        for field, (found, right) in wanted.items():
            if found != right:
                raise BenchError(f"config.json: {field} is {found!r}; this converter takes {right!r}")
        architecture = OctoArchitecture(
            observation="pixels",
            action_dim=options["action_dim"],
            proprio_dim=0,
            chunk=options["action_horizon"] if "action_horizon" in options else options["pred_horizon"],
            width=size(first + "MultiHeadDotProductAttention_0/query/kernel", 0),
            layers=_count(shapes, BLOCK),
            heads=size(first + "MultiHeadDotProductAttention_0/query/kernel", 1),
            mlp=size(first + "MlpBlock_0/Dense_0/bias", 0),
            window=size(TRUNK + "readout_action_pos_embedding", 1),
            max_words=size(TRUNK + "task_language_pos_embedding", 1),
            word_width=size(TRUNK + "task_language_projection/kernel", 0),
            text_layers=_count(shapes, T5 + r"encoder/block/(\d+)/"),
            text_heads=size(text + "0/SelfAttention/relative_attention_bias/embedding", 1),
            text_mlp=size(text + "1/DenseReluDense/wi/kernel", 1),
            text_vocabulary=size(T5 + "shared/embedding", 0),
            mask_padding=False,
            correct_attention=model.get("use_correct_attention", False),
            cameras=OCTO_SMALL.cameras,
            image_size=max(sides),
            camera_sizes=tuple(sides),
            goal=size(stem + "StdConv_0/kernel", 2) == 6,
            stem_widths=tuple(size(f"{stem}StdConv_{i}/kernel", -1) for i in convolutions),
            stem_out=size(stem + "embedding/bias", 0),
            head_width=size(HEAD + "reverse_network/Dense_0/bias", 0),
            head_blocks=_count(shapes, RESIDUAL),
            time_dim=2 * size(HEAD + "time_preprocess/kernel", 0),
            denoising_steps=options.get("diffusion_steps", 20),
            posterior=False,
            max_latent=options.get("max_action", 5.0),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BenchError(f"config.json: lacks {error}, which every Octo 1.5 checkpoint has") from None
    if problems:
        unknown = [f"has unknown {path}" for path in sorted(shapes) if torch_key(path) is None]
        raise BenchError(f"checkpoint: {'; '.join([*sorted(problems), *unknown])}")
    return architecture


def read_checkpoint(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Parameters by path, of `step` or the newest. Raises BenchError if there is none, or orbax is not installed."""
    try:
        import orbax.checkpoint as orbax
    except ImportError:
        raise BenchError(
            f"orbax-checkpoint, which reads JAX checkpoints, is not installed; {install('octo')}"
        ) from None
    steps = {int(path.name): path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()}
    if not steps or (step is not None and step not in steps):
        raise BenchError(
            f"checkpoint: {folder} has no step{'s' if step is None else f' {step}'}; it has {sorted(steps) or 'none'}"
        )
    at = steps[max(steps) if step is None else step]
    at = at / "default" if (at / "default").is_dir() else at
    try:
        tree = orbax.PyTreeCheckpointer().restore(at.resolve())
    except Exception as error:  # orbax raises whatever its storage layers raise
        raise BenchError(f"checkpoint: orbax cannot read {at}: {str(error).splitlines()[0]:.200}") from None
    return dict(_leaves(tree.get("params", tree)))


def convert(
    checkpoint: Path, out: Path, tokenizer: Path, statistics_key: str, statistics: Path, step: int | None = None
) -> Octo:
    """Writes the policy folder `out` and returns the policy. Raises BenchError naming what is wrong."""
    config = read_json_object(checkpoint / "config.json")
    parameters = read_checkpoint(checkpoint, step)
    architecture = architecture_of(config, {path: array.shape for path, array in parameters.items()})
    _check_scaling(checkpoint, config)
    scales = _scales(statistics, statistics_key, architecture.action_dim)
    policy = Octo(_name(architecture), architecture, _subwords(tokenizer, architecture.max_words))
    tensors, own = convert_parameters(parameters), policy.model.state_dict()
    problems = wrong_keys(own, tensors)
    for key in sorted(own.keys() & tensors.keys()):
        if tensors[key].shape != own[key].shape:
            problems.append(f"{key} is {list(tensors[key].shape)}, should be {list(own[key].shape)}")
    if problems:
        raise BenchError(f"checkpoint: {checkpoint}: {'; '.join(problems)}")
    policy.model.load_state_dict(tensors)
    for scale, values in zip((policy.action_mean, policy.action_std), scales, strict=True):
        scale.copy_(torch.from_numpy(values))
    card = {"made_by": "python -m vlarl_bench.policies.octo_convert", "statistics": statistics_key}
    save_policy(out, policy, card)
    return policy


def _check_scaling(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Raises BenchError unless actions were scaled by mean and deviation, in what the checkpoint was trained on last:
    fine-tuning writes finetune_config.json, and leaves in config.json what it started from."""
    last = checkpoint / "finetune_config.json"
    said = read_json_object(last) if last.exists() else config
    file = last.name if last.exists() else "config.json"
    for field, found in _entries(said.get("dataset_kwargs"), "dataset_kwargs"):
        if field.endswith(f".{SCALING}") and found != "normal":
            raise BenchError(f"{file}: {field} is {found!r}; this converter takes 'normal', by mean and deviation")


def _entries(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    """Every value within a JSON document, and where it stands."""
    yield field, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in inner:
        yield from _entries(entry, f"{field}.{name}")


def _scales(statistics: Path, key: str, action_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """[A] mean and deviation of actions. Numbers whose `mask` is false are left as they are, as in the authors' code,
    but for a gripper, the last one: Octo's data turn it to 0 (closed) to 1 (open), where LIBERO's robot takes 1 and -1.
    """
    known = read_json_object(statistics)
    if key not in known:
        raise BenchError(f"statistics: {statistics} has no {key!r}; it has {', '.join(sorted(known))}")
    try:
        action = known[key]["action"]
        mean, std = np.asarray(action["mean"], np.float32), np.asarray(action["std"], np.float32)
        mask = np.asarray(action.get("mask", np.ones(mean.shape)), bool)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchError(f"statistics: {key!r} in {statistics} lacks a valid action mean and std: {error}") from None
    for values in (mean, std, mask):
        if values.shape != (action_dim,):
            raise BenchError(f"statistics: {key!r} has {values.size} actions, the checkpoint {action_dim}")
    mean, std = np.where(mask, mean, 0), np.where(mask, std, 1)
    if not mask[-1]:
        mean[-1], std[-1] = 1, -2  # 1 - 2 x; the robot heeds the sign alone
    return mean, std


def _name(a: OctoArchitecture) -> str:
    for name, size in FULL_SIZE.items():
        if all(getattr(a, field) == value for field, value in size.items()):
            return name
    sizes = "; ".join(f"{name}: {dict(size)}" for name, size in FULL_SIZE.items())
    raise BenchError(
        f"checkpoint: width {a.width}, {a.layers} layers of {a.heads} heads is no published size ({sizes})"
    )


def _subwords(file: Path, longest: int) -> Subwords:
    try:
        return Subwords(file.read_text(), longest)
    except OSError as error:
        raise BenchError(f"tokenizer: cannot read {file}: {error.strerror}; give T5-base's tokenizer.json") from None
    except Exception as error:  # tokenizers raises a bare Exception
        raise BenchError(f"tokenizer: {file} is not a tokenizer.json: {error!s:.100}") from None


def _leaves(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, np.ndarray]]:
    found = []
    for key, value in tree.items():
        path = f"{above}{key}"
        found += _leaves(value, f"{path}/") if isinstance(value, Mapping) else [(path, np.asarray(value))]
    return found


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many of 0, 1, ... in a row begin a path by `pattern`: one parameter that is missing makes none fewer."""
    there = {int(found[1]) for path in shapes if (found := re.match(pattern, path))}
    return next(i for i in itertools.count() if i not in there)


@dataclass(frozen=True)
class Arguments:
    """Converts a published Octo checkpoint to a policy folder."""

    checkpoint: Path
    """Folder with config.json and the orbax steps."""
    out: Path
    """Policy folder to write."""
    tokenizer: Path
    """tokenizer.json of T5-base."""
    statistics_key: str
    """Dataset whose mean and deviation of actions the policy speaks in: upstream's key to un-normalise with."""
    statistics: Path | None = None
    """JSON of these datasets; the checkpoint's own dataset_statistics.json unless given."""
    step: int | None = None
    """Which step; the newest unless given."""


def main() -> None:
    """Runs the converter from the command line."""
    a = tyro.cli(Arguments)
    try:
        statistics = a.statistics or a.checkpoint / "dataset_statistics.json"
        convert(a.checkpoint, a.out, a.tokenizer, a.statistics_key, statistics, a.step)
    except BenchError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
