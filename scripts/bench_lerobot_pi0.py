"""Times pi0's chunks, and loss and backward, against lerobot's PI0, and compares chunks, losses and gradients.

    PYTHONPATH=. python scripts/bench_lerobot_pi0.py

To be run by the Python of an environment that has lerobot 0.6 and its transformers beside vlarl-bench's own packages.
Both have the same weights, noise, images and prompt. The network is the published one at narrow widths: lerobot reads
its widths from two names, which are given others here. Its vocabulary (257,152), its 8 heads and the width of SigLIP's
MLP (4,304) are fixed, so they are ours too. CPU seconds of the fastest round, run in turn.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from vlarl_bench.policies.inputs import Batch
from vlarl_bench.policies.pi0_checkpoint import TIED, published_key
from vlarl_bench.policies.pi0_published import PublishedPi0, PublishedPi0Architecture

CAMERAS, WORDS = ("agentview", "robot0_eye_in_hand"), 16
SIZES = {"layers": 3, "head_dim": 32, "prefix_width": 128, "prefix_mlp": 256, "expert_width": 96, "expert_mlp": 192}


def main() -> None:
    """Chunks at batch 1 and 8, loss and backward at batch 32."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = lerobot_pi0()
    ours = same_weights(theirs)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one thread, CPU ms")
    for size in (1, 8):
        compare_chunks(ours, theirs, size, options.rounds)
    compare_learning(ours, theirs, 32, options.rounds)


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
    with torch.no_grad():
        for _, mine, lerobots in pairs(policy, theirs):
            mine.copy_(lerobots)
    return policy.eval()


def pairs(ours: PublishedPi0, theirs: Any) -> Iterator[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
    """Each parameter's name at lerobot, ours and theirs; without the expert's embeddings, which nobody reads."""
    named = dict(theirs.named_parameters(remove_duplicate=False))
    for key, parameter in ours.model.named_parameters():
        if key != "model.dit.embed_tokens.weight":
            # Files may have the embeddings as the output layer, which here is another parameter, and unread.
            name = TIED if key == "model.vlm.language_model.embed_tokens.weight" else published_key(key)
            yield name, parameter, named[name]


def compare_chunks(ours: PublishedPi0, theirs: Any, size: int, rounds: int) -> None:
    """Prints times and the largest difference between chunks."""
    batch = observations(size)
    noise = torch.stack([torch.randn(8, 32, generator=g) for g in generators(size)])

    def mine() -> torch.Tensor:
        with torch.no_grad():
            return ours.sample(ours.encode(batch), generators(size)).latent

    def lerobot() -> torch.Tensor:
        chunk: torch.Tensor = theirs.sample_actions(*as_lerobot(ours, batch), noise, 10)
        return chunk

    error = difference(mine(), lerobot())
    assert error < 1e-4, f"the chunks differ by {error:.1e}"
    print(f"chunk, batch {size}: {in_turn(mine, lerobot, rounds)}; chunks within {error:.1e}")


def compare_learning(ours: PublishedPi0, theirs: Any, size: int, rounds: int) -> None:
    """Prints times of the loss, of one draw an observation, and its backward, and the largest differences.

    All weights learn on both sides. The mode stays `eval`: neither has dropout, and neither computes anything again.
    """
    batch, noise, t = observations(size), torch.randn(size, 8, 32), torch.rand(size)
    latent = ours.normalise(torch.randn(size, 8, 7))  # padded with zeros

    def mine() -> torch.Tensor:
        ours.zero_grad()
        loss = ours.draw_loss(ours.encode(batch), latent, t[:, None], noise[:, None]).mean()
        loss.backward()
        return loss.detach()

    def lerobot() -> torch.Tensor:
        theirs.zero_grad()
        loss: torch.Tensor = theirs(*as_lerobot(ours, batch), latent, noise, t).mean()
        loss.backward()
        return loss.detach()

    error = difference(mine(), lerobot())
    assert error < 1e-4, f"the losses differ by {error:.1e}"
    apart = {name: difference(gradient(own), gradient(other)) for name, own, other in pairs(ours, theirs)}
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < 1e-6, f"the gradients of {worst} differ by {apart[worst]:.1e}"
    largest = max(gradient(other).abs().max().item() for _, _, other in pairs(ours, theirs))
    print(f"loss + backward, batch {size}: {in_turn(mine, lerobot, rounds)}; losses within {error:.1e}, ", end="")
    print(f"gradients (up to {largest:.1e}) within {apart[worst]:.1e}")


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Zeros where there is none: of the prefix's last layer only keys and values matter; theirs has zeros for more."""
    assert parameter.requires_grad
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def observations(size: int) -> Batch:
    """Made up."""
    images = torch.randint(0, 256, (size, 2, 3, 56, 56), dtype=torch.uint8)
    words = torch.randint(10, 1000, (size, WORDS))
    none = torch.zeros(size, 0, 0)
    return Batch(torch.randn(size, 8), words, none, none.long(), images)


def as_lerobot(ours: PublishedPi0, batch: Batch) -> tuple[Any, ...]:
    """What theirs takes of a batch: images and which are there, words and which are there, state. Ours makes the same
    of it in `encode`, so this is timed."""
    pixels = (batch.images.float() / 127.5 - 1).unbind(1)
    seen = torch.ones(len(batch.words), dtype=torch.bool)
    return list(pixels), [seen, seen], batch.words, batch.words != 0, ours.normalise_proprio(batch.proprio)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest."""
    return (a - b).abs().max().item()


def in_turn(mine: Callable[[], Any], lerobot: Callable[[], Any], rounds: int) -> str:
    """CPU ms of the fastest round of each, and their ratio."""
    fastest = [float("inf")] * 2
    for _ in range(rounds):
        for i, function in enumerate((mine, lerobot)):
            begin = time.process_time()
            function()
            fastest[i] = min(fastest[i], time.process_time() - begin)
    fast, slow = (1e3 * seconds for seconds in fastest)
    return f"ours {fast:.2f}, lerobot {slow:.2f}, {slow / fast:.2f}x"


def generators(size: int) -> list[torch.Generator]:
    """One a row."""
    return [torch.Generator().manual_seed(i) for i in range(size)]


if __name__ == "__main__":
    main()
