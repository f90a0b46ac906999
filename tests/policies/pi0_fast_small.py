"""A small pi0-FAST in the published format, with weights drawn by key, so that no test needs a checkpoint."""

import json
import zlib

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from vlarl_bench.policies.fast_tokens import FastTokenizer
from vlarl_bench.policies.pi0_checkpoint import published_key
from vlarl_bench.policies.pi0_fast_checkpoint import HEAD, NAMES
from vlarl_bench.policies.pi0_fast_published import FastPrompts, PublishedPi0Fast, PublishedPi0FastArchitecture

from .pi0_small import CAMERAS, WORDS, lay_out
from .test_fast_tokens import GOLDEN
from .test_fast_tokens import publish as publish_fast

SIZES = {
    "words": 320,
    "layers": 3,
    "head_dim": 16,
    "width": 32,
    "mlp": 48,
    "vision_layers": 3,
    "vision_width": 32,
    "vision_mlp": 40,
    "vision_heads": 4,
}
"""The published network's form, with the widths that the golden numbers were made at."""
STATS = {
    "observation.state.q01": torch.linspace(-1, 0, 8),
    "observation.state.q99": torch.linspace(0.5, 2, 8),
    "action.q01": torch.linspace(-1, -0.5, 7),
    "action.q99": torch.linspace(0.2, 1, 7),
}


def tokenizer(extra=()):
    """The text of a tokenizer.json with 320 tokens: like PaliGemma's it knows spaces and single digits."""
    known = ["<pad>", "<unk>", "<bos>", "<eos>", "Task", "State", "Action", *"\u2581:,;|-\n0123456789", *WORDS, *extra]
    known += [f"<{i}>" for i in range(len(known), SIZES["words"])]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[A-Za-z]+|[^A-Za-z]"), "isolated")
    return made.to_str()


def fast():
    """The tokenizer of the golden numbers, which the authors' code fitted."""
    return FastTokenizer(json.dumps(GOLDEN["published"]["tokenizer"]), 10, GOLDEN["published"]["min_token"])


def weight(key, shape):
    """[shape] float32 that depends on the key alone, at about the scale of a trained network; images matter with it."""
    drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) < 2:
        drawn = 0.1 * drawn if key.endswith("bias") else 1 + 0.3 * drawn
    else:
        drawn = drawn / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(drawn.astype(np.float32))


def small(**changes):
    """A small policy of the published form; every parameter has the weights of its published key."""
    shape = {
        "chunk": 8,
        "image_size": 28,
        "max_words": 200,
        "cameras": CAMERAS,
        "action_tokens": 200,
        "skip_tokens": 8,
        **SIZES,
        **changes,
    }
    architecture = PublishedPi0FastArchitecture("pixels", 7, 8, **shape)
    policy = PublishedPi0Fast("pi0-fast-base", architecture, FastPrompts(tokenizer(), 8), fast())
    with torch.no_grad():
        for key, parameter in policy.named_parameters():
            parameter.copy_(weight(published_key(key, NAMES), tuple(parameter.shape)))
    return policy


def publish(folder, prefix="model.", shards=1, tied=False, **changes):
    """Writes a small policy as lerobot publishes it; returns the policy. With `tied` the file has one matrix for
    embedding and output layer, as a base checkpoint's."""
    policy = small(**changes)
    a = policy.architecture
    if tied:
        with torch.no_grad():
            policy.network.model.language_model.embed_tokens.weight.copy_(policy.network.lm_head.weight)
    tensors = {published_key(key, NAMES): p.detach().clone() for key, p in policy.named_parameters()}
    if tied:
        del tensors[HEAD.replace("lm_head", "model.language_model.embed_tokens")]
    config = {
        "type": "pi0_fast",
        "chunk_size": a.chunk,
        "image_resolution": [a.image_size, a.image_size],
        "tokenizer_max_length": a.max_words,
        "max_action_tokens": 256,
        "fast_skip_tokens": a.skip_tokens,
        "action_tokenizer_name": "physical-intelligence/fast",
        "dtype": a.dtype,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    }
    lay_out(folder, config, policy.vocabulary.json, STATS, {prefix + key: t for key, t in tensors.items()}, shards)
    (folder / "action_tokenizer").mkdir()
    publish_fast(folder / "action_tokenizer")
    for kind, feature in (("action", "action"), ("proprio", "observation.state")):
        for side, quantile in (("low", "q01"), ("high", "q99")):
            getattr(policy, f"{kind}_{side}").copy_(STATS[f"{feature}.{quantile}"])
    return policy
