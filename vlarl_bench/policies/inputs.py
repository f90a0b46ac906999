"""What the tiny policies see: observations as padded tensors, objects as tokens.

Shapes: B observations, P proprio, M objects, W words a name, T words an instruction, C cameras.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BenchError
from ..suite import Observation


class Sizes(Protocol):
    """What an architecture says of its inputs."""

    @property
    def observation(self) -> str: ...
    @property
    def proprio_dim(self) -> int: ...  # 0: proprio is not seen
    @property
    def hands(self) -> tuple[str, ...]: ...
    @property
    def max_objects(self) -> int: ...
    @property
    def max_name_words(self) -> int: ...
    @property
    def max_words(self) -> int: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...


class Words(Protocol):
    """What turns a text into ids."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Rows:
    """Tensors that share their first axis."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def index(self, i: Tensor) -> Self:
        """The rows `i` [N] (integers or a mask), as a new value."""
        return type(self)(**{field.name: getattr(self, field.name)[i] for field in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one after another."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def clone(self) -> Self:
        """The same rows in memory of their own."""
        return type(self)(**{field.name: getattr(self, field.name).clone() for field in fields(self)})

    def detach(self) -> Self:
        """The same rows, cut from the graph that made them."""
        return type(self)(**{field.name: getattr(self, field.name).detach() for field in fields(self)})


@dataclass(frozen=True)
class Batch(Rows):
    """Observations as tensors, padded to the architecture's own sizes so that a row never depends on its neighbours."""

    proprio: Tensor
    """[B, P] in the suite's units."""
    words: Tensor
    """[B, T] instruction ids, 0 is padding."""
    objects: Tensor
    """[B, M, `object_width`] features; M = 0 in `pixels` mode."""
    names: Tensor
    """[B, M, W] ids of each object's name; a row of zeros is padding."""
    images: Tensor
    """[B, C, 3, size, size] uint8; C = 0 in `state` mode."""


def to_batch(observations: Sequence[Observation], a: Sizes, vocabulary: Words) -> Batch:
    """Pads observations to the sizes of architecture `a`. Raises BenchError if one does not fit."""
    n, state = len(observations), a.observation == "state"
    proprio = np.zeros((n, a.proprio_dim), np.float32)
    words = np.zeros((n, a.max_words), np.int64)
    poses = np.zeros((n, a.max_objects if state else 0, 7), np.float32)
    names = np.zeros((n, poses.shape[1], a.max_name_words), np.int64)
    hands = np.zeros((n, max(len(a.hands), 1), 3), np.float32)
    images = np.zeros((n, len(a.cameras), 3, a.image_size, a.image_size), np.uint8)
    for row, observation in enumerate(observations):
        if a.proprio_dim:
            if observation.proprio.shape != (a.proprio_dim,):
                shape = observation.proprio.shape
                raise BenchError(f"proprio: shape {shape}, but this policy takes ({a.proprio_dim},)")
            proprio[row] = observation.proprio
        _put(words[row], vocabulary.encode(observation.instruction), "instruction", observation.instruction)
        if state:
            if not 0 < len(observation.objects) <= a.max_objects:
                raise BenchError(f"objects: {len(observation.objects)}, but this policy takes 1-{a.max_objects}")
            for slot, name in enumerate(sorted(observation.objects)):
                poses[row, slot] = observation.objects[name]
                _put(names[row, slot], vocabulary.encode(name), "object name", name)
            hands[row] = _hands(observation, a.hands)
        for slot, camera in enumerate(a.cameras):
            images[row, slot] = _image(observation, camera, a.image_size)
    objects = object_features(poses, hands) if state else np.zeros((n, 0, object_width(a)), np.float32)
    arrays = (proprio, words, objects, names, images)
    return Batch(*(torch.from_numpy(array) for array in arrays))


def object_tokens(
    batch: Batch, embed: Callable[[Tensor], Tensor], inward: nn.Module, outward: nn.Module
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, M, D] of the objects, by two layers and an `embed` for words, and which are real [B, M].

    An object shares its words with the instruction: that is what lets language point at it.
    """
    named = batch.names != 0
    label = (embed(batch.names) * named[..., None]).sum(2) / named.sum(2, keepdim=True).clamp_min(1)
    return outward(F.silu(inward(batch.objects))) + label, named.any(-1)


def object_width(a: Sizes) -> int:
    """Features of an object: 9, and 6 for each hand."""
    return 9 + 6 * max(len(a.hands), 1)


def object_features(poses: np.ndarray, hands: np.ndarray) -> np.ndarray:
    """[B, M, 9 + 6 E] features of poses [B, M, 7] (m, xyzw) seen from E hands [B, E, 3] (m).

    Position in the world and from each hand, coarse (reach) and fine (grasp), and the rotation matrix's first two
    columns (Zhou et al., 2019), which unlike a quaternion has no sign to choose. Scales are fixed, in metres: the
    workspace, an arm's reach, a finger's opening.
    """
    position, quaternion = poses[..., :3], poses[..., 3:]
    offsets = [position - hand[:, None] for hand in np.moveaxis(hands, 1, 0)]
    x, y, z, w = np.moveaxis(quaternion / np.maximum(np.linalg.norm(quaternion, axis=-1, keepdims=True), 1e-6), -1, 0)
    columns = (
        1 - 2 * (y * y + z * z),
        2 * (x * y + w * z),
        2 * (x * z - w * y),
        2 * (x * y - w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z + w * x),
    )
    seen = [part for offset in offsets for part in (offset / 0.15, np.tanh(offset / 0.04))]
    return np.concatenate((position / 0.3, *seen, np.stack(columns, -1)), -1).astype(np.float32)


def _hands(observation: Observation, names: tuple[str, ...]) -> np.ndarray:
    """[E, 3] positions of the hands."""
    missing = [name for name in names if name not in observation.objects]
    if missing:
        known = ", ".join(sorted(observation.objects))
        raise BenchError(f"objects: no {', '.join(missing)}, which this policy needs for its hands; there are {known}")
    return np.stack([observation.objects[name][:3] for name in names]) if names else observation.proprio[None, :3]


def _image(observation: Observation, camera: str, size: int) -> np.ndarray:
    image = observation.images.get(camera)
    if image is None or image.shape != (size, size, 3) or image.dtype != np.uint8:
        there = ", ".join(sorted(observation.images)) or "none"
        found = f"missing (there are {there})" if image is None else f"{image.shape} {image.dtype}"
        raise BenchError(f"images[{camera!r}]: {found}, but this policy takes ({size}, {size}, 3) uint8")
    return image.transpose(2, 0, 1)


def _put(slot: np.ndarray, ids: list[int], field: str, text: str) -> None:
    if not 0 < len(ids) <= len(slot):
        raise BenchError(f"{field}: {text!r} has {len(ids)} words, this policy takes 1-{len(slot)}")
    slot[: len(ids)] = ids
