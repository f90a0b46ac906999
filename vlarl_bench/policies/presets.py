"""The shipped policies by name. Light: `list` imports this, so torch stays out until a policy is made."""

from .spec import PolicySpec, PublishedSpec

TOKENS = frozenset({"sft", "likelihood", "tokens"})
FLOW = frozenset({"sft", "denoising", "flow", "likelihood", "chain", "noise"})
FAST = frozenset({"sft", "likelihood", "tokens", "fast"})
DIFFUSION = frozenset({"sft", "likelihood", "chain", "denoising", "noise"})
"""What each family offers (`policies/base.py`)."""

OPENVLA = "vlarl_bench.policies.openvla"
OPENVLA_TINY = PolicySpec(
    name="openvla-tiny",
    summary="OpenVLA-OFT scaled down to 0.8 M parameters: instruction, object poses (privileged state), proprioception",
    capabilities=TOKENS,
    observation="state",
    family=OPENVLA,
)
OPENVLA_TINY_PIXELS = PolicySpec(
    name="openvla-tiny-pixels",
    summary="OpenVLA-OFT scaled down to 1.2 M parameters: instruction, cameras (64 x 64) and proprioception",
    capabilities=TOKENS,
    observation="pixels",
    image_size=64,
    family=OPENVLA,
)
OPENVLA_AR_TINY = PolicySpec(
    name="openvla-ar-tiny",
    summary="OpenVLA scaled down to 0.8 M parameters, one token after another; sees what openvla-tiny does; no prior",
    capabilities=TOKENS,
    observation="state",
    family="vlarl_bench.policies.openvla_autoregressive",
)
OPENVLA_7B = PublishedSpec(
    name="openvla-7b",
    summary="OpenVLA (7.5 B parameters) from a published folder: instruction and one camera (224 x 224)",
    capabilities=TOKENS,
    observation="pixels",
    cameras=("agentview",),
    image_size=224,
    family=OPENVLA,
    source="openvla/openvla-7b or its LIBERO fine-tunes",
    checkpoint="vlarl_bench.policies.openvla_checkpoint",
)
OPENVLA_OFT_7B = PublishedSpec(
    name="openvla-oft-7b",
    summary="OpenVLA-OFT (7.5 B parameters) from a published folder, by tokens or by regression: one or two cameras",
    capabilities=TOKENS,
    observation="pixels",
    cameras=("agentview",),
    image_size=224,
    family=OPENVLA,
    source="an OpenVLA-OFT or SimpleVLA-RL checkpoint for LIBERO",
    checkpoint="vlarl_bench.policies.openvla_checkpoint",
)
PI0_TINY = PolicySpec(
    name="pi0-tiny",
    summary="pi0 scaled down to 0.9 M parameters: instruction, object poses (privileged state) and proprioception",
    capabilities=FLOW,
    observation="state",
)
PI0_TINY_PIXELS = PolicySpec(
    name="pi0-tiny-pixels",
    summary="pi0 scaled down to 1.4 M parameters: instruction, cameras (64 x 64) and proprioception",
    capabilities=FLOW,
    observation="pixels",
    image_size=64,
)
PI0_FAST = "vlarl_bench.policies.pi0_fast"
PI0_FAST_TINY = PolicySpec(
    name="pi0-fast-tiny",
    summary="pi0-FAST scaled down to 0.7 M parameters: instruction, object poses (privileged state), proprioception",
    capabilities=FAST,
    observation="state",
    family=PI0_FAST,
)
PI0_FAST_TINY_PIXELS = PolicySpec(
    name="pi0-fast-tiny-pixels",
    summary="pi0-FAST scaled down to 1.2 M parameters: instruction, cameras (64 x 64) and proprioception",
    capabilities=FAST,
    observation="pixels",
    image_size=64,
    family=PI0_FAST,
)
PI0_FAST_BASE = PublishedSpec(
    name="pi0-fast-base",
    summary="pi0-FAST (2.9 B parameters) from a published folder: instruction, two cameras (224 x 224), proprioception",
    capabilities=FAST,
    observation="pixels",
    cameras=("agentview", "robot0_eye_in_hand"),
    image_size=224,
    resizes=True,
    family="vlarl_bench.policies.pi0_fast_published",
    source="lerobot/pi0fast-base or what was fine-tuned from it, with PaliGemma's tokenizer.json and FAST's in it",
    checkpoint="vlarl_bench.policies.pi0_fast_checkpoint",
)
OCTO = "vlarl_bench.policies.octo"
OCTO_TINY = PolicySpec(
    name="octo-tiny",
    summary="Octo scaled down to 1.3 M parameters: instruction, object poses (privileged state) and proprioception",
    capabilities=DIFFUSION,
    observation="state",
    family=OCTO,
)
OCTO_TINY_PIXELS = PolicySpec(
    name="octo-tiny-pixels",
    summary="Octo scaled down to 1.7 M parameters: instruction, cameras (64 x 64) and proprioception",
    capabilities=DIFFUSION,
    observation="pixels",
    image_size=64,
    family=OCTO,
)
OCTO_SMALL = PublishedSpec(
    name="octo-small-1.5",
    summary="Octo-Small 1.5 (27 M parameters and T5-base), from the published checkpoint: two cameras at 256 x 256",
    capabilities=DIFFUSION,
    observation="pixels",
    cameras=("agentview", "robot0_eye_in_hand"),
    image_size=256,
    family=OCTO,
    source="rail-berkeley/octo-small-1.5, after `python -m vlarl_bench.policies.octo_convert`",
)
OCTO_BASE = PublishedSpec(
    name="octo-base-1.5",
    summary="Octo-Base 1.5 (93 M parameters and T5-base), from the published checkpoint: two cameras at 256 x 256",
    capabilities=DIFFUSION,
    observation="pixels",
    cameras=("agentview", "robot0_eye_in_hand"),
    image_size=256,
    family=OCTO,
    source="rail-berkeley/octo-base-1.5, after `python -m vlarl_bench.policies.octo_convert`",
)
PI0_BASE = PublishedSpec(
    name="pi0-base",
    summary="pi0 (3.5 B parameters) from a published folder: instruction, two cameras (224 x 224) and proprioception",
    capabilities=FLOW,
    observation="pixels",
    cameras=("agentview", "robot0_eye_in_hand"),
    image_size=224,
    resizes=True,
    family="vlarl_bench.policies.pi0_published",
    source="lerobot/pi0_base or what was fine-tuned from it, with PaliGemma's tokenizer.json in it",
    checkpoint="vlarl_bench.policies.pi0_checkpoint",
)
