"""OpenVLA's network (Kim et al., 2024, arXiv:2406.09246) with the keys of the published checkpoints, at any size.

Two vision towers (DINOv2 and SigLIP) see each image; their features, side by side, are projected to the width of a
Llama, which reads them between the beginning-of-sequence token and the prompt. OFT (Kim et al., 2025,
arXiv:2502.19645) adds a token of proprioception, placeholders that all actions of a chunk are read from in one pass,
and a head that regresses them.

Shapes: B observations, C images an observation, N patches an image, S tokens, D width of the language model, H actions
a chunk, A action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from .patches import embed_patches


@dataclass(frozen=True)
class Tower:
    """Size of one vision transformer."""

    width: int
    depth: int
    """Blocks; features are what leaves the last but one."""
    heads: int
    mlp: int


@dataclass(frozen=True)
class OpenVLAArchitecture:
    """Everything that decides the network's shape and how it decodes; stored in the policy folder's config.json."""

    observation: str
    """`state` or `pixels`."""
    action_dim: int
    proprio_dim: int
    vocabulary_size: int
    action_end: int
    """One more than the last action token; the bins' tokens lie below it, the lowest bin's highest."""
    begin: int
    """Token before the images."""
    separator: int
    """Token after the prompt; what is read there decides the first action number."""
    stop: int
    """Token after the placeholders (parallel decoding)."""
    chunk: int = 8
    bins: int = 256
    decoding: str = "parallel"
    """`autoregressive` (OpenVLA), or `parallel`: all numbers of a chunk in one pass that sees both ways (OFT)."""
    head: str = "tokens"
    """`tokens`: a distribution over bins. `l1`: regression (OFT), which has no likelihood."""
    placeholders: str = "learned"
    """What stands where actions are read in parallel decoding: `zero` (OFT), or `learned` embeddings. Zeros look the
    same to the first layer wherever they stand; a small model has no layer to spare for telling them apart."""
    proprio_token: bool = True
    """Whether the language model sees proprioception (OFT does)."""
    layers: int = 4
    frozen_layers: int = 2
    """Lowest layers of the language model, which belong to `encode`: RL trains the layers above them."""
    width: int = 128
    heads: int = 4
    mlp: int = 256
    max_objects: int = 10
    max_name_words: int = 6
    max_words: int = 20
    """Tokens of a prompt."""
    hands: tuple[str, ...] = ()
    """See `suite.Embodiment`."""
    cameras: tuple[str, ...] = ()
    image_size: int = 0
    patch: int = 16
    dino: Tower = Tower(64, 4, 4, 128)
    siglip: Tower = Tower(64, 4, 4, 128)
    whole_towers: bool = False
    """Whether the towers have what the published files hold and features never pass: last block, norms, pooling."""
    crop_area: float = 1.0
    """Part of an image that the policy looks at, its middle; published LIBERO checkpoints look at 0.9."""
    gripper: str = "as is"
    """`as is`, or `inverted`: the last number is 0 (closed) to 1 (open), and the environment wants 1 or -1."""
    dtype: str = "float32"

    @property
    def numbers(self) -> int:
        """Numbers in a chunk, H A."""
        return self.chunk * self.action_dim


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] to the same."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))


class MLP(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al., 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return x * self.scale_factor


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, size: Tower, scaled: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=1e-6)
        self.attn = Attention(size.width, size.heads)
        self.norm2 = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = MLP(size.width, size.mlp)
        self.ls1, self.ls2 = (LayerScale(size.width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] to the same."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling. Only its parameters: the published files hold them, and nothing is pooled."""

    def __init__(self, size: Tower) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, size.width))
        self.q = nn.Linear(size.width, size.width)
        self.kv = nn.Linear(size.width, 2 * size.width)
        self.proj = nn.Linear(size.width, size.width)
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = MLP(size.width, size.mlp)


class VisionTower(nn.Module):
    """One vision transformer: patches to the features that leave its last block but one.

    With `registers` it is DINOv2 (Darcet et al., 2024): a class token, register tokens and scaled branches; without
    them SigLIP (Zhai et al., 2023).
    """

    def __init__(self, size: Tower, patches: int, patch: int, registers: int, whole: bool) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.width, patch, stride=patch)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, patches, size.width))
        self.extra = 1 + registers if registers else 0
        if registers:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, size.width))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, registers, size.width))
        self.blocks = nn.ModuleList(
            Block(size, bool(registers)) for _ in range(size.depth if whole else size.depth - 1)
        )
        self.used_blocks = size.depth - 1
        if whole:
            self.norm = nn.LayerNorm(size.width, eps=1e-6)
            if not registers:
                self.attn_pool = AttentionPool(size)

    def forward(self, pixels: Tensor, checkpointed: bool = False) -> Tensor:
        """[B, 3, size, size] to [B, N, width]."""
        projection: Any = self.patch_embed["proj"]
        x = embed_patches(projection, pixels) + self.pos_embed
        if self.extra:
            x = torch.cat((*(token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token)), x), 1)
        for block in self.blocks[: self.used_blocks]:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x[:, self.extra :]


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP, channels side by side."""

    registers: ClassVar[int] = 4

    def __init__(self, a: OpenVLAArchitecture) -> None:
        super().__init__()
        patches = (a.image_size // a.patch) ** 2
        self.featurizer = VisionTower(a.dino, patches, a.patch, self.registers, a.whole_towers)
        self.fused_featurizer = VisionTower(a.siglip, patches, a.patch, 0, a.whole_towers)

    def forward(self, pixels: Tensor, checkpointed: bool = False) -> Tensor:
        """[B, 6, size, size], each tower's own normalisation of the same image, to [B, N, both widths]."""
        first, second = pixels.split(3, 1)
        return torch.cat((self.featurizer(first, checkpointed), self.fused_featurizer(second, checkpointed)), 2)


class Projector(nn.Module):
    """Image features to the language model's width."""

    def __init__(self, vision: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision, 4 * vision)
        self.fc2 = nn.Linear(4 * vision, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., vision] to [..., width]."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ProprioProjector(nn.Module):
    """Proprioception to one token (OFT)."""

    def __init__(self, proprio: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., P] to [..., width]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(nn.Module):
    """Adds what a network makes of its input."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """What OFT regresses with: two residual blocks between two linear layers."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(
            Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())) for _ in range(2)
        )
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """OFT's regression head: the hidden states of an action's A tokens to its A numbers."""

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = MLPResNet(action_dim * width, width, action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, H A, D] to [B, H, A]."""
        return self.model(hidden.unflatten(1, (-1, self.action_dim)).flatten(2))


class OpenVLANetwork(nn.Module):
    """Towers, projector and language model: exactly the parameters of a published checkpoint.

    In `state` mode there are no towers and no projector: object tokens, made elsewhere, take the patches' place.
    """

    def __init__(self, a: OpenVLAArchitecture) -> None:
        super().__init__()
        if a.observation == "pixels":
            self.vision_backbone = VisionBackbone(a)
            self.projector = Projector(a.dino.width + a.siglip.width, a.width)
        self.language_model = LlamaForCausalLM(_llama_config(a))
        self.first_action = a.action_end - a.bins
        self.bins = a.bins
        self.checkpointed = False
        """Whether gradients recompute each block instead of keeping what it computed."""

    def see(self, pixels: Tensor) -> Tensor:
        """[B, C, 6, size, size] to [B, C N, D], image after image."""
        features = self.vision_backbone(pixels.flatten(0, 1), self.checkpointed and torch.is_grad_enabled())
        return self.projector(features).unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids [...]."""
        return self.language_model.model.embed_tokens(tokens)

    def run(
        self, x: Tensor, mask: Tensor, positions: Tensor, layers: slice, cache: DynamicCache | None = None
    ) -> Tensor:
        """Some layers of the language model on hidden states [B, S, D] at positions [B, S]; mask [B, 1, S, all keys]
        is true where a token may look."""
        model = self.language_model.model
        rotary = model.rotary_emb(x, positions)
        for layer in model.layers[layers]:
            inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(layer, x, **inputs, use_reentrant=False)
            else:
                x = layer(x, **inputs, past_key_values=cache)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """The norm after the last layer."""
        return self.language_model.model.norm(x)

    def bin_logits(self, x: Tensor) -> Tensor:
        """[..., bins] float32 logits of each bin, lowest first, of normed hidden states [..., D]. The lowest bin's
        token is the highest."""
        weight = self.language_model.lm_head.weight[self.first_action : self.first_action + self.bins]
        return F.linear(x, weight).float().flip(-1)


def _llama_config(a: OpenVLAArchitecture) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=a.vocabulary_size,
        hidden_size=a.width,
        intermediate_size=a.mlp,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
