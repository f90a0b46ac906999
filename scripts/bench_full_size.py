"""Times pi0 and OpenVLA at their published sizes, with random weights, against transformers' own decoding.

    python scripts/bench_full_size.py [--device cuda] [--policies pi0-base openvla-7b]

For each: memory of its weights, a chunk of one and of eight observations beside transformers' (PI0's `sample_actions`;
Llama's `generate` from the same embeddings), and a training step of all weights (loss, backward, Adam), with peak
memory and the share of what a large product of matrices reaches on the same device. bfloat16, fastest of the rounds, in
turn. `--narrow` is a rehearsal at small widths, for any machine.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from vlarl_bench.metering import Meter
from vlarl_bench.policies.inputs import Batch
from vlarl_bench.policies.openvla import OpenVLA, assemble
from vlarl_bench.policies.openvla_checkpoint import ONE_IMAGE, PUBLISHED
from vlarl_bench.policies.openvla_model import OpenVLAArchitecture, Tower
from vlarl_bench.policies.pi0_published import PublishedPi0, PublishedPi0Architecture

CAMERAS, WORDS = ("agentview", "robot0_eye_in_hand"), 32
NARROW: dict[str, dict[str, Any]] = {
    "pi0-base": {
        "layers": 2,
        "head_dim": 16,
        "prefix_width": 32,
        "prefix_mlp": 48,
        "expert_width": 24,
        "expert_mlp": 40,
        "vision_layers": 2,
        "vision_width": 32,
        "vision_mlp": 40,
        "vision_heads": 4,
        "vocabulary_size": 320,
        "image_size": 28,
    },
    "openvla-7b": {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "mlp": 48,
        "image_size": 28,
        "dino": Tower(16, 3, 2, 64),
        "siglip": Tower(24, 4, 2, 40),
    },
}


def main() -> None:
    """Prints a block for each policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--policies", nargs="+", choices=list(NARROW), default=list(NARROW))
    parser.add_argument("--batch", type=int, default=32, help="observations of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--narrow", action="store_true")
    options = parser.parse_args()
    bench = Bench(torch.device(options.device), options.rounds)
    reached = bench.product(512 if options.narrow else 8192)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {bench.name}; ", end="")
    print(f"a product of matrices reaches {reached / 1e12:.3g} TFLOP/s in bfloat16")
    for name in options.policies:
        make, theirs = MAKERS[name]
        with bench.device:
            policy = make(NARROW[name] if options.narrow else {})
        size = sum(p.numel() for p in policy.parameters())
        held = sum(p.numel() * p.element_size() for p in policy.parameters())
        print(f"{name}: {size / 1e9:.3g} B parameters, {held / 2**30:.3g} GiB")
        for count in (1, 8):
            bench.chunks(policy, theirs, batch_of(policy, count))
        bench.training(policy, batch_of(policy, options.batch), reached)
        del policy


class Bench:
    """A device, and how often each thing is timed on it."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def seconds(self, *functions: Callable[[], object]) -> list[float]:
        """Of the fastest round of each, in turn, after a first that is not counted."""
        fastest = [math.inf] * len(functions)
        for turn in range(self.rounds + 1):
            for i, function in enumerate(functions):
                self._wait()
                begin = time.perf_counter()
                function()
                self._wait()
                if turn:
                    fastest[i] = min(fastest[i], time.perf_counter() - begin)
        return fastest

    def product(self, n: int) -> float:
        """Operations a second of a product of two matrices [n, n]."""
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b)[0]

    def chunks(self, policy: Any, theirs: Callable[[Any, Batch], Callable[[], Tensor]], batch: Batch) -> None:
        """Prints the time of a batch of chunks, ours and transformers'."""

        def ours() -> Tensor:
            with torch.no_grad():
                chunk: Tensor = policy.sample(policy.encode(batch), generators(len(batch))).latent
                return chunk

        with torch.no_grad():
            fast, slow = self.seconds(ours, theirs(policy, batch))
        print(f"  {len(batch)} chunks: ours {fast * 1e3:.4g} ms, transformers {slow * 1e3:.4g} ms, {slow / fast:.2f}x")

    def training(self, policy: Any, batch: Batch, reached: float) -> None:
        """Prints the time of a training step of all weights, with recomputed activations."""
        policy.checkpointed = True
        policy.requires_grad_(True)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5, fused=True)
        actions, mask = torch.zeros(len(batch), policy.chunk, policy.action_dim), torch.ones(len(batch), policy.chunk)

        def step() -> None:
            optimizer.zero_grad()
            policy.sft_loss(policy.encode(batch), actions, mask, torch.Generator().manual_seed(0)).backward()
            optimizer.step()

        with Meter(policy) as meter:
            step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        (taken,) = self.seconds(step)
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else math.nan
        share = f"{meter.flops / taken / reached:.0%} of that product's rate"
        print(f"  training step of {len(batch)}: {taken:.4g} s, peak {peak:.3g} GiB, {share}")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def batch_of(policy: Any, count: int) -> Batch:
    """Made-up observations; their tensors are on the CPU, as those of a run are."""
    a = policy.architecture
    images = torch.randint(0, 256, (count, len(a.cameras), 3, a.image_size, a.image_size), dtype=torch.uint8)
    none = torch.zeros(count, 0, 0)
    return Batch(torch.randn(count, a.proprio_dim), torch.randint(10, 300, (count, WORDS)), none, none.long(), images)


def generators(count: int) -> list[torch.Generator]:
    """One a row."""
    return [torch.Generator().manual_seed(row) for row in range(count)]


def make_pi0(sizes: dict[str, Any]) -> PublishedPi0:
    """pi0 with random weights."""
    nothing: Any = None  # no text is read here
    architecture = PublishedPi0Architecture("pixels", 7, 8, cameras=CAMERAS, dtype="bfloat16", **sizes)
    return PublishedPi0("pi0-base", architecture, nothing)


def transformers_pi0(policy: PublishedPi0, batch: Batch) -> Callable[[], Tensor]:
    """`sample_actions` of the same network, all of it in bfloat16: it cannot mix."""
    model = copy.deepcopy(policy.model).to(torch.bfloat16)
    device, images = policy.device, batch.images.shape[1]
    patches = images * (policy.architecture.image_size // policy.architecture.patch) ** 2
    seen = torch.full((len(batch), patches), policy.model.model.vlm.config.image_token_id)
    words = torch.cat((seen, batch.words), 1).to(device)
    pixels = (batch.images.float() / 127.5 - 1).to(device, torch.bfloat16)
    noise = torch.randn(len(batch), policy.chunk, policy.latent_dim, device=device, dtype=torch.bfloat16)
    state = policy.normalise_proprio(batch.proprio.to(device)).bfloat16()

    def sample() -> Tensor:
        chunk: Tensor = model.sample_actions(
            state,
            noise=noise,
            num_steps=policy.euler_steps,
            input_ids=words,
            attention_mask=words != 0,
            pixel_values=pixels,
            pixel_attention_mask=torch.ones(pixels.shape[:2], dtype=torch.bool, device=device),
        )
        return chunk

    return sample


def make_openvla(sizes: dict[str, Any]) -> OpenVLA:
    """OpenVLA with random weights."""
    nothing: Any = None
    policy = assemble("openvla-7b", OpenVLAArchitecture(**{**PUBLISHED, **ONE_IMAGE, **sizes}), nothing)
    assert isinstance(policy, OpenVLA)
    return policy


def transformers_openvla(policy: OpenVLA, batch: Batch) -> Callable[[], Tensor]:
    """Llama's `generate` from the embeddings that the policy's own towers and projector give."""

    def generate() -> Tensor:
        context = policy.encode(batch)
        found: Tensor = policy.network.language_model.generate(
            inputs_embeds=context.hidden,
            attention_mask=context.mask.long(),
            max_new_tokens=policy.architecture.numbers,
            min_new_tokens=policy.architecture.numbers,
            do_sample=False,
            pad_token_id=0,
        )
        return found

    return generate


MAKERS: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[Any, Batch], Callable[[], Tensor]]]] = {
    "pi0-base": (make_pi0, transformers_pi0),
    "openvla-7b": (make_openvla, transformers_openvla),
}


if __name__ == "__main__":
    main()
