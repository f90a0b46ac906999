"""What policies share that draw their actions as tokens.

Shapes: B observations, T tokens, V kinds of token.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BenchError
from .base import LikelihoodPolicy, LogProb, Sample


class TokenPolicy(LikelihoodPolicy):
    """A policy whose decoder draws tokens from a softmax; `noise` is its temperature."""

    @abstractmethod
    def decode(self, context: Any, generators: Sequence[torch.Generator] | None, temperature: float) -> Sample:
        """Draws each token, or takes the likeliest where there are no generators."""

    @torch.no_grad()
    def sample(self, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """Draws each token at temperature 1, or takes the likeliest; a function of its arguments alone.

        At a given batch size a row does not depend, to the bit, on its neighbours or on its place.
        """
        return self.decode(context, generators, 1.0)

    @torch.no_grad()
    def explore(self, context: Any, generators: Sequence[torch.Generator], noise: float) -> Sample:
        """Draws each token at temperature `noise`; the trace is the tokens [B, T, 1]."""
        check_temperature(noise)
        return self.decode(context, generators, noise)


def row_by_row(log_prob: Callable[..., LogProb]) -> Callable[..., LogProb]:
    """Makes `log_prob` the same to the bit in batches of any size, for a policy with weights that are not float32.

    How a product of matrices rounds depends on how many rows it has. In float32 no ratio shows that; in bfloat16 it
    moves log-probabilities by hundredths, also where the head alone is float32. So such a policy scores each row alone,
    which costs little at its size: a row is hundreds of tokens.
    """

    @functools.wraps(log_prob)
    def scored(self: TokenPolicy, context: Any, trace: Tensor, mask: Tensor, noise: float) -> LogProb:
        if all(parameter.dtype == torch.float32 for parameter in self.parameters()):
            return log_prob(self, context, trace, mask, noise)
        rows = torch.arange(len(trace)).split(1)
        parts = [log_prob(self, context.index(i), trace[i], mask[i], noise) for i in rows]
        return LogProb(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logp", "entropy", "mask")))

    return scored


def check_temperature(noise: float) -> None:
    """Raises BenchError if it is none."""
    if not noise > 0:
        raise BenchError(f"noise: {noise}; a temperature must be above 0 (`sample` without generators is greedy)")


def uniforms(generators: Sequence[torch.Generator] | None, count: int, device: torch.device) -> Tensor | None:
    """[B, count] float64 numbers between 0 and 1, a row from each generator; None without generators."""
    if generators is None:
        return None
    rows = [torch.rand(count, generator=g, device=g.device, dtype=torch.float64) for g in generators]
    return torch.stack(rows).to(device)


def choose(logits: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """[...] the likeliest token of logits [..., V], or the one drawn by numbers `uniform` [...]."""
    return logits.argmax(-1) if uniform is None else draw(logits / temperature, uniform)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """[...] tokens where the distribution function of `logits` [..., V] passes `uniform` [...]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    index = torch.searchsorted(cumulative, uniform.double()[..., None].contiguous(), right=True)
    return index[..., 0].clamp_max(logits.shape[-1] - 1)


def likelihood(logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, T, 1] log-probabilities of tokens [B, T] under logits [B, T, V], and entropies. Raises BenchError for a
    temperature that is none."""
    check_temperature(temperature)
    everything = (logits / temperature).log_softmax(-1)
    return everything.gather(-1, index[..., None]), -(everything.exp() * everything).sum(-1, keepdim=True)
