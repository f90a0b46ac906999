"""A small pi0 in the published format, with weights from a formula, so that no test needs a checkpoint."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from vlarl_bench.policies.paligemma import PaliGemmaPrompts
from vlarl_bench.policies.pi0_checkpoint import published_key
from vlarl_bench.policies.pi0_published import PublishedPi0, PublishedPi0Architecture

from .openvla_tiny import weight

SIZES = {
    "layers": 3,
    "head_dim": 16,
    "prefix_width": 32,
    "prefix_mlp": 48,
    "expert_width": 24,
    "expert_mlp": 40,
    "vision_layers": 3,
    "vision_width": 32,
    "vision_mlp": 40,
    "vision_heads": 4,
    "vocabulary_size": 320,
}
"""The published network's form, with the widths that the golden numbers were made at."""
CAMERAS = ("agentview", "robot0_eye_in_hand")
WORDS = ("pick", "up", "the", "milk", "and", "place", "it", "in", "basket", "alphabet", "soup", "cream", "cheese")
STATS = {
    "observation.state.mean": torch.linspace(-1, 1, 8),
    "observation.state.std": torch.linspace(0.5, 2, 8),
    "action.mean": torch.linspace(0, 0.3, 7),
    "action.std": torch.linspace(0.2, 1, 7),
}


def tokenizer(extra=()):
    """The text of a tokenizer.json that knows LIBERO's words and the line feed."""
    ids = {"<pad>": 0, "<unk>": 1, "<bos>": 2} | {word: 10 + i for i, word in enumerate((*WORDS, *extra))}
    made = Tokenizer(models.WordLevel({**ids, "\n": 108}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return made.to_str()


def small(**changes):
    """A small policy of the published form; every parameter has the weights of its published key."""
    shape = {"chunk": 6, "image_size": 28, "max_words": 16, "cameras": CAMERAS, **SIZES, **changes}
    architecture = PublishedPi0Architecture("pixels", 7, 8, **shape)
    policy = PublishedPi0("pi0-base", architecture, PaliGemmaPrompts(tokenizer()))
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            parameter.copy_(weight(published_key(key), tuple(parameter.shape)))
    return policy


def publish(folder, prefix="model.", shards=1, tied=False, **changes):
    """Writes a small policy as lerobot publishes it; returns the policy."""
    policy = small(**changes)
    a = policy.architecture
    config = {
        "type": "pi0",
        "chunk_size": a.chunk,
        "image_resolution": [a.image_size, a.image_size],
        "tokenizer_max_length": a.max_words,
        "num_inference_steps": a.euler_steps,
        "dtype": a.dtype,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    }
    tensors = {prefix + published_key(key): p.detach().clone() for key, p in policy.model.named_parameters()}
    if tied:
        head = f"{prefix}paligemma_with_expert.paligemma.lm_head.weight"
        tensors[f"{prefix}paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = tensors[head]
        tensors[head] = tensors[head] + 1  # what lerobot's trainer left there; nothing reads it
    lay_out(folder, config, policy.vocabulary.json, STATS, tensors, shards)
    for kind, feature in (("action", "action"), ("proprio", "observation.state")):
        getattr(policy, f"{kind}_mean").copy_(STATS[f"{feature}.mean"])
        getattr(policy, f"{kind}_std").copy_(STATS[f"{feature}.std"] + 1e-8)
    return policy


def lay_out(folder, config, tokenizer, stats, tensors, shards):
    """Writes a folder as lerobot does, for LIBERO's robot: configuration, processors with their statistics, weights."""
    images = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    features = {
        "input_features": {
            **{
                f"observation.images.{i}": {"type": "VISUAL", "shape": [3, *config["image_resolution"]]} for i in images
            },
            "observation.state": {"type": "STATE", "shape": [8]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
        "max_state_dim": 32,
        "max_action_dim": 32,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**features, **config}))
    (folder / "tokenizer.json").write_text(tokenizer)
    for pipeline, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        state = f"policy_{pipeline}processor_step_1_{step}.safetensors"
        steps = [{"registry_name": "device_processor"}, {"registry_name": step, "state_file": state}]
        (folder / f"policy_{pipeline}processor.json").write_text(json.dumps({"name": pipeline, "steps": steps}))
        save_file(stats, folder / state)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        where = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
        for name in names:
            save_file({k: v for k, v in tensors.items() if where[k] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def image_inputs(policy, batch):
    """What transformers calls the inputs of a pixel batch."""
    tokens = policy.model.model.vlm.config.image_token_id * torch.ones(
        len(batch), policy.architecture.image_tokens, dtype=torch.long
    )
    ids = torch.cat((tokens, batch.words), 1)
    return {
        "input_ids": ids,
        "attention_mask": ids != 0,
        "pixel_values": batch.images.float() / 127.5 - 1,
        "pixel_attention_mask": torch.ones(batch.images.shape[:2], dtype=torch.bool),
    }
