"""Times pi0's chunks against lerobot's PI0 with the same weights, noise, images and prompt, and compares the chunks.

    PYTHONPATH=. python scripts/bench_lerobot_pi0.py

To be run by the Python of an environment that has lerobot 0.6 and its transformers beside vlarl-bench's own packages.
The network is the published one at narrow widths: lerobot reads its widths from two names, which are given others here.
Its vocabulary (257,152) and 8 heads are fixed, so they are ours too. CPU seconds of the fastest round, run in turn.
"""

import argparse
import time
from typing import Any

import torch
import transformers
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from vlarl_bench.policies.inputs import Batch
from vlarl_bench.policies.pi0_checkpoint import published_key
from vlarl_bench.policies.pi0_published import PublishedPi0, PublishedPi0Architecture

CAMERAS, WORDS = ("agentview", "robot0_eye_in_hand"), 16
SIZES = {"layers": 3, "head_dim": 32, "prefix_width": 128, "prefix_mlp": 256, "expert_width": 96, "expert_mlp": 192}


def main() -> None:
    """Both at batch 1 and 8."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = lerobot_pi0()
    ours = same_weights(theirs)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one thread, CPU ms of a chunk")
    for size in (1, 8):
        compare(ours, theirs, size, options.rounds)


def lerobot_pi0() -> Any:
    """Their network at our widths, with three layers of SigLIP, whose MLP has its fixed width."""
    widths = {"gemma_2b": ("prefix_width", "prefix_mlp"), "gemma_300m": ("expert_width", "expert_mlp")}

    def narrow(variant: str) -> Any:
        width, mlp = (SIZES[name] for name in widths[variant])
        return modeling_pi0.GemmaConfig(width, SIZES["layers"], mlp, 8, 1, SIZES["head_dim"])

    modeling_pi0.get_gemma_config = narrow
    mapping = modeling_pi0.CONFIG_MAPPING

    class Narrow(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return paligemma if name == "paligemma" else mapping[name]

    def paligemma() -> Any:
        config = mapping["paligemma"]()
        config.vision_config.num_hidden_layers = 3
        config.vision_config.hidden_size, config.vision_config.num_attention_heads = 128, 4
        return config

    modeling_pi0.CONFIG_MAPPING = Narrow()
    config = PI0Config(chunk_size=8, n_action_steps=8, image_resolution=(56, 56), dtype="float32", device="cpu")
    made = modeling_pi0.PI0Pytorch(config)
    projector = made.paligemma_with_expert.paligemma.model.multi_modal_projector  # 2048 is fixed there
    projector.linear = torch.nn.Linear(128, SIZES["prefix_width"])
    return made.eval()


def same_weights(theirs: Any) -> PublishedPi0:
    """Our network with their parameters."""
    vision = {"vision_layers": 3, "vision_width": 128, "vision_mlp": 4304, "vision_heads": 4}
    shape: dict[str, Any] = {"chunk": 8, "image_size": 56, "max_words": WORDS, "cameras": CAMERAS, **SIZES, **vision}
    nothing: Any = None  # no text is read here
    policy = PublishedPi0("pi0-base", PublishedPi0Architecture("pixels", 7, 8, **shape), nothing)
    vlm = policy.model.model.vlm
    vlm.vision_tower = getattr(vlm.vision_tower, "vision_model", vlm.vision_tower)  # older transformers nest it
    state = theirs.state_dict()
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if key != "model.dit.embed_tokens.weight":  # never read
                name = published_key(key)
                parameter.copy_(state[name])
        tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
        vlm.get_input_embeddings().weight.copy_(state[tied])
    return policy.eval()


def compare(ours: PublishedPi0, theirs: Any, size: int, rounds: int) -> None:
    """Prints times and the largest difference between chunks."""
    images = torch.randint(0, 256, (size, 2, 3, 56, 56), dtype=torch.uint8)
    words = torch.randint(10, 1000, (size, WORDS))
    none = torch.zeros(size, 0, 0)
    batch = Batch(torch.randn(size, 8), words, none, none.long(), images)
    state = ours.normalise_proprio(batch.proprio)
    noise = torch.stack([torch.randn(8, 32, generator=g) for g in generators(size)])
    seen = torch.ones(size, dtype=torch.bool)

    def mine() -> torch.Tensor:
        with torch.no_grad():
            return ours.sample(ours.encode(batch), generators(size)).latent

    def lerobot() -> torch.Tensor:
        pixels = list((images.float() / 127.5 - 1).unbind(1))
        chunk: torch.Tensor = theirs.sample_actions(pixels, [seen, seen], words, words != 0, state, noise, 10)
        return chunk

    error = (mine() - lerobot()).abs().max().item()
    assert error < 1e-4, f"the chunks differ by {error:.1e}"
    fastest = [float("inf")] * 2
    for _ in range(rounds):
        for i, function in enumerate((mine, lerobot)):
            begin = time.process_time()
            function()
            fastest[i] = min(fastest[i], time.process_time() - begin)
    fast, slow = (1e3 * seconds for seconds in fastest)
    print(f"batch {size}: ours {fast:.2f}, lerobot {slow:.2f}, {slow / fast:.2f}x; chunks within {error:.1e}")


def generators(size: int) -> list[torch.Generator]:
    """One a row."""
    return [torch.Generator().manual_seed(i) for i in range(size)]


if __name__ == "__main__":
    main()
