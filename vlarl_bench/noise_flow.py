"""A flow over the noise that a frozen policy decodes from: an actor for methods that learn a flow by its own loss.

It takes N(0, I) to N(m(s), d(s)^2), number by number, so its velocity is known, and it draws without being integrated.
m and d are those of the policy's steering module (`policies/steering.py`), which the policy carries from then on: what
is judged and stored is the steered policy. The module squashes its noise, b tanh(x / b); the latent x is what it
squashes.

Shapes: B observations, K draws, H actions a chunk, A numbers of a latent action.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .policies.base import AT_ONCE, Sample
from .policies.batch_invariant import batch_invariant
from .policies.steering import steer

if TYPE_CHECKING:
    from .decisions import Decisions
    from .policies.base import NoisePolicy

BOUND = 30.0
"""b: it takes 0.3% off a noise of 3, and less off smaller ones, so that the base policy's own noise stays as it is."""
WIDTH = 128


class NoiseFlow:
    """What `FlowPolicy` is to chunks, to the noise x [B, H, A] that becomes them; t = 1 is its own noise."""

    capabilities = frozenset({"flow"})

    def __init__(self, policy: NoisePolicy, seed: int) -> None:
        """Has the policy carry a steering module that begins as N(0, I). Raises BenchError if it has one."""
        self.policy, self.action_dim = policy, policy.latent_dim
        self.steering = steer(policy, {"bound": BOUND, "width": WIDTH}, seed)
        torch.nn.init.constant_(self.steering.log_deviation.bias, -math.log(BOUND))

    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, H, A] E[eps - x_0 | x_t = x] for x_0 ~ N(m, d^2) at x [B, K, H, A] and t [B, K]. At the start, where m
        is 0 and d is 1, it is (2t - 1) / (t^2 + (1 - t)^2) x."""
        mean, deviation = (value[:, None] for value in _moments(self.policy, context))
        t, variance = t[..., None, None], deviation**2
        slope = (t - (1 - t) * variance) / (t**2 + (1 - t) ** 2 * variance)
        return slope * (x - (1 - t) * mean) - mean

    def draw_loss(self, context: Any, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B, K, H, A] squared errors of the velocity, as `FlowPolicy.draw_loss`."""
        target = noise - latent[:, None]
        return (self.velocity(context, latent[:, None] + t[..., None, None] * target, t) - target) ** 2

    def judged(self, taken: Decisions) -> Decisions:
        """Decisions whose latent is their noise, and all of it counts: each number has its part in every action. The
        first round that is shown sets the scale of the features."""
        assert taken.trace is not None
        self.steering.standardise(taken.features[:, :-1])
        return dataclasses.replace(taken, latent=taken.trace, mask=torch.ones_like(taken.mask))

    def sample(self, context: Any, generators: Sequence[torch.Generator] | None) -> Tensor:
        """[B, H, A] latents, from the draws from which `policy.sample` would decode."""
        return BOUND * torch.atanh(self.policy.start(context, generators) / BOUND)

    @torch.no_grad()
    def sample_round(self, context: Any, generators: Sequence[torch.Generator]) -> Tensor:
        """[B, H, A] latents for all rows of a round's context, of which a GPU holds but a few at a time."""
        rows = torch.arange(len(context)).split(AT_ONCE)
        return torch.cat([self.sample(context.index(i), [generators[n] for n in i.tolist()]) for i in rows])

    def decode(self, context: Any, x: Tensor) -> Sample:
        """The chunks that latents x [B, H, A] become, with x as their trace."""
        found = self.policy.decode(context, BOUND * torch.tanh(x / BOUND))
        return Sample(found.actions, found.latent, trace=x)


@batch_invariant
def _moments(policy: NoisePolicy, context: Any) -> tuple[Tensor, Tensor]:
    """m and d, [B, H, A] each; those of N(0, I) until the steering module has seen features."""
    steering = policy.steering
    assert steering is not None
    with torch.no_grad():
        features = policy.features(context)
    shape = (len(features), steering.chunk, steering.latent_dim)
    if not steering.ready:
        return features.new_zeros(shape), features.new_ones(shape)
    hidden = steering.layers((features.to(steering.mean) - steering.mean) / steering.std)
    mean, log_deviation = BOUND * steering.centre(hidden), steering.log_deviation(hidden).clamp(-20, 2)
    return mean.view(shape).to(features.device), (BOUND * log_deviation.exp()).view(shape).to(features.device)
