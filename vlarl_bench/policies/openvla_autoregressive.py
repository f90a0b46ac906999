"""OpenVLA's own form scaled down: the numbers of a chunk one after another, each drawn given those before it.

All layers see what was drawn, so none is frozen: RL trains the whole language model, and a chunk of 56 numbers takes 56
passes where `openvla-tiny` takes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite import Embodiment
from . import openvla

if TYPE_CHECKING:
    from .spec import PolicySpec


def create(
    spec: PolicySpec, embodiment: Embodiment, vocabulary: Sequence[str], seed: int
) -> openvla.OpenVLA | openvla.OpenVLARegression:
    """Random weights, at the sizes of `spec`; `vocabulary` are texts."""
    return openvla.create(spec, embodiment, vocabulary, seed, decoding="autoregressive", frozen_layers=0)


restore = openvla.restore
