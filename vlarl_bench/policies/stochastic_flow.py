"""Likelihoods for flow policies: Euler steps that draw, and the exact density of the flow.

Convention as in `base.FlowPolicy`: x_t = t noise + (1 - t) latent, t = 1 is noise, and decoding takes S Euler steps of
length d = 1/S at t = 1, 1 - d, ..., d. Each step becomes x_{t-d} ~ N(mean, std^2), with v = velocity(x, t):

**SDE** (a level `a`; Flow-GRPO, Liu et al., 2025, arXiv:2505.05470; pi_RL, arXiv:2510.25889). From the ODE
dx = v dt the Fokker-Planck equation gives the equations that have the same marginals p_t and any noise sigma_t; towards
smaller t they read x_{t-d} = x - d v + d sigma^2/2 grad log p_t(x) + sigma sqrt(d) eps. The score follows from v:
E[noise | x] = x + (1 - t) v, and x given the latent is N((1 - t) latent, t^2), so grad log p_t = -(x + (1 - t) v) / t.

    mean = x - d v - d sigma^2 / (2 t) (x + (1 - t) v),   std = sigma sqrt(d),   sigma^2 = a^2 t / (1 - t)

At t = 1 sigma is infinite; as in both methods' code, 1 - t is there replaced by d, so that the first step draws with
deviation a. The last one (t = d) draws with a d / sqrt(1 - d): the marginals are those of the flow only as d -> 0.

**Learned noise** (ReinFlow, arXiv:2505.22094; pi_RL's Flow-Noise): mean = x - d v, and a `LearnedNoise` says the
deviation. The marginals are not those of the flow.

**Exact density** (Chen et al., 2018, eq. 8): with the ODE itself, d log p / dt = -div v along a path, so
log p(latent) = log N(x_1; 0, I) + integral_0^1 div v dt, where x_1 is where the path from x_0 = latent ends.

Shapes: B observations, K points, S Euler steps, H actions a chunk, A action dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BenchError
from .base import FlowPolicy, LikelihoodPolicy, LogProb, Sample
from .batch_invariant import batch_invariant
from .noise import LearnedNoise

Noise = float | Tensor | LearnedNoise
"""A level of the SDE; one for each step [B, S], where 0 is a step of the ODE and draws nothing; or a network."""


class StochasticFlow(FlowPolicy, LikelihoodPolicy):
    """A flow policy that can draw at each of its Euler steps. D = H A, and a trace is [B, S + 1, H, A]: the noise that
    decoding starts from, then what each step drew."""

    euler_steps: int
    """S."""

    @torch.no_grad()
    @batch_invariant
    def explore(self, context: Any, generators: Sequence[torch.Generator], noise: Noise) -> Sample:
        """Draws every step. The first noise is the one that `sample` would start from."""
        shape = (self.chunk, self.latent_dim)
        starts = [torch.randn(shape, generator=g, device=g.device) for g in generators]
        draws = [torch.randn(self.euler_steps, *shape, generator=g, device=g.device) for g in generators]
        x, draw = torch.stack(starts).to(self.device), torch.stack(draws).to(self.device)
        trace = [x]
        for step in range(self.euler_steps):
            mean, std = self.transitions(context, x[:, None], step, noise)
            x = (mean + std * draw[:, step : step + 1])[:, 0]
            trace.append(x)
        return Sample(self.unnormalise(x), x, torch.stack(trace, 1))

    def log_prob(self, context: Any, trace: Tensor, mask: Tensor, noise: Noise) -> LogProb:
        """[B, S, H A] log-densities of what each step drew, given what the step before it drew; all in one pass.

        As for diffusion, all steps of an action that was not executed are masked; so are steps that draw nothing. The
        first noise is not scored: its density does not depend on any weight.
        """
        drawn = trace[:, 1:]
        mean, std = self.transitions(context, trace[:, :-1], 0, noise)
        std = std.expand_as(drawn)
        counted = mask.bool()[:, None, :, None].expand_as(drawn) & (std > 0)
        std = torch.where(counted, std, torch.ones_like(std))
        logp = -0.5 * ((drawn - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        entropy = std.log() + 0.5 * math.log(2 * math.pi * math.e)
        zero = torch.zeros_like(logp)
        logp, entropy = torch.where(counted, logp, zero), torch.where(counted, entropy, zero)
        own = slice(self.action_dim)  # numbers that only pad a latent are left out of the ratio
        return LogProb(logp[..., own].flatten(2), entropy[..., own].flatten(2), counted[..., own].flatten(2))

    def transitions(self, context: Any, x: Tensor, first: int, noise: Noise) -> tuple[Tensor, Tensor]:
        """Means [B, K, H, A] and deviations (broadcasting) of the K steps from number `first`, begun at x."""
        k, d = x.shape[1], 1 / self.euler_steps
        t = torch.tensor([1 - step / self.euler_steps for step in range(first, first + k)], device=x.device)
        velocity = self.velocity(context, x, t.expand(len(x), k))
        mean = x - velocity / self.euler_steps
        if isinstance(noise, LearnedNoise):
            return mean, noise(self.features(context), x, t.expand(len(x), k))
        level = self._levels(noise, len(x), x.device)[:, first : first + k, None, None]
        t = t[:, None, None]
        variance = level**2 * d * t / (1 - t).clamp_min(d)
        return mean - variance / (2 * t) * (x + (1 - t) * velocity), variance.sqrt()

    def _levels(self, noise: float | Tensor, n: int, device: torch.device) -> Tensor:
        if isinstance(noise, Tensor):
            if noise.shape != (n, self.euler_steps) or not (noise.isfinite() & (noise >= 0)).all():
                raise BenchError(
                    f"noise: levels of shape {tuple(noise.shape)} from {noise.min():g} to {noise.max():g}; "
                    f"one for each step is [{n}, {self.euler_steps}], finite and at least 0"
                )
            return noise.to(device)
        if not 0 < noise < math.inf:
            raise BenchError(f"noise: {noise}; the level of the SDE must be above 0, for example 0.5")
        return torch.full((n, self.euler_steps), noise, device=device)

    def ode_log_prob(self, context: Any, latent: Tensor, steps: int = 32) -> Tensor:
        """[B] log-densities (float64) of latents [B, H, A] under the flow itself: a diagnostic, without gradients.

        Of the ODE that the velocity field defines, solved by `steps` Runge-Kutta steps (fourth order), and not of the
        S Euler steps that `sample` takes. The divergence is exact. The state is kept in float64, the network stays in
        its own precision.
        """
        if steps < 1:
            raise BenchError(f"steps: {steps}; the solver needs at least 1")
        x, change, h = latent.double(), torch.zeros(len(latent), dtype=torch.float64, device=latent.device), 1 / steps
        for step in range(steps):
            t = step * h
            v1, d1 = self._flow(context, x, t)
            v2, d2 = self._flow(context, x + h / 2 * v1, t + h / 2)
            v3, d3 = self._flow(context, x + h / 2 * v2, t + h / 2)
            v4, d4 = self._flow(context, x + h * v3, t + h)
            x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
            change = change + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        base = (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum((1, 2))
        return base + change

    def _flow(self, context: Any, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocities [B, H, A] and their divergences [B], float64. A row is repeated for each derivative."""
        n, size = len(x), self.chunk * self.latent_dim
        copies = context.index(torch.arange(n, device=x.device).repeat_interleave(size))
        with torch.enable_grad():
            points = x.to(next(self.parameters()).dtype).repeat_interleave(size, 0)[:, None].requires_grad_()
            velocity = self.velocity(copies, points, points.new_full((n * size, 1), t)).view(n, size, size)
            (slope,) = torch.autograd.grad(velocity.diagonal(dim1=1, dim2=2).sum(), points)
        divergence = slope.view(n, size, size).diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        return velocity[:, 0].detach().view(x.shape).double(), divergence
