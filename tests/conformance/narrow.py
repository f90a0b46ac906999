"""Published policies at widths that a test can run: the same architecture, narrow layers, random weights."""

import torch
from torch import nn

from vlarl_bench.policies.fast_tokens import FastTokenizer
from vlarl_bench.policies.octo import Octo, Subwords
from vlarl_bench.policies.octo_model import OctoArchitecture
from vlarl_bench.policies.openvla import assemble
from vlarl_bench.policies.openvla_checkpoint import OFT_TOKENS, ONE_IMAGE, PUBLISHED
from vlarl_bench.policies.openvla_inputs import Prompts
from vlarl_bench.policies.openvla_model import OpenVLAArchitecture, Tower
from vlarl_bench.policies.paligemma import PaliGemmaPrompts
from vlarl_bench.policies.pi0_fast_published import FastPrompts, PublishedPi0Fast, PublishedPi0FastArchitecture
from vlarl_bench.policies.pi0_published import PublishedPi0, PublishedPi0Architecture
from vlarl_bench.policies.vocabulary import words

from ..policies import octo_golden, openvla_tiny, pi0_fast_small, pi0_small


def narrow(spec, embodiment, texts, seed):
    """The policy; `texts` are what its tokenizer knows. A new published policy says here what it is made of."""
    known = sorted({word for text in texts for word in words(text)})
    made = MAKERS[spec.name](spec, embodiment, known)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # at a scale where every input matters, as in a trained network
        for module in made.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim > 1:
                deviation = 1.0 if isinstance(module, nn.Embedding) else weight[0].numel() ** -0.5
                weight.copy_(deviation * torch.randn(weight.shape, generator=generator))
    return made


def _pi0(spec, e, known):
    shape = {"chunk": e.chunk, "image_size": 28, "cameras": spec.cameras, **pi0_small.SIZES}
    architecture = PublishedPi0Architecture("pixels", e.action_dim, e.proprio_dim, **shape)
    return PublishedPi0(spec.name, architecture, PaliGemmaPrompts(pi0_small.tokenizer(known)))


def _pi0_fast(spec, e, known):
    shape = {"chunk": e.chunk, "image_size": 28, "cameras": spec.cameras, "skip_tokens": 8, **pi0_fast_small.SIZES}
    shape |= {"layers": 2, "max_words": 96, "longest": 24}  # shorter, which is quicker
    architecture = PublishedPi0FastArchitecture("pixels", e.action_dim, e.proprio_dim, **shape)
    prompts = FastPrompts(pi0_fast_small.tokenizer(known), 8)
    return PublishedPi0Fast(spec.name, architecture, prompts, FastTokenizer.plain(e.chunk, 10.0))


def _openvla(spec, e, known):
    sizes = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "mlp": 48,
        "dino": Tower(16, 2, 2, 32),
        "siglip": Tower(24, 2, 2, 40),
    }
    robot = {"action_dim": e.action_dim, "proprio_dim": e.proprio_dim, "chunk": e.chunk}
    form = ONE_IMAGE if spec.name == "openvla-7b" else {**OFT_TOKENS, "proprio_token": False}
    shape = {**PUBLISHED, **form, **sizes, **robot, "image_size": 64, "patch": 16, "dtype": "float32"}
    return assemble(spec.name, OpenVLAArchitecture(**shape), Prompts(openvla_tiny.tokenizer(known)))


def _octo(spec, e, known):
    architecture = OctoArchitecture(
        observation="pixels",
        action_dim=e.action_dim,
        proprio_dim=0,
        chunk=e.chunk,
        width=32,
        layers=2,
        heads=4,
        mlp=48,
        window=2,
        max_words=16,
        word_width=16,
        text_layers=1,
        text_heads=2,
        text_mlp=24,
        text_vocabulary=200,
        mask_padding=False,
        cameras=spec.cameras,
        image_size=64,
        camera_sizes=(64, 32),
        goal=True,
        stem_widths=(32, 32, 32, 32),
        stem_out=16,
        head_width=32,
        denoising_steps=20,
        posterior=False,
    )
    return Octo(spec.name, architecture, Subwords(octo_golden.tokenizer_json(known), 16))


SAME = {"octo-base-1.5": "octo-small-1.5"}
"""Policies that differ in width alone, so that the tests would see the same twice."""
MAKERS = {
    "pi0-base": _pi0,
    "pi0-fast-base": _pi0_fast,
    "openvla-7b": _openvla,
    "openvla-oft-7b": _openvla,
    "octo-small-1.5": _octo,
    "octo-base-1.5": _octo,
}
