"""A flow policy small enough to differentiate by hand, and rollouts for it: the oracle's side of algorithm tests."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vlarl_bench.policies.base import FlowPolicy, Sample
from vlarl_bench.rollout import Episode, Job, Rollout
from vlarl_bench.suite import Observation, Task

TASK = Task("toy", "toy", "do it")


@dataclass
class ToyContext:
    proprio: torch.Tensor

    def __len__(self):
        return len(self.proprio)

    def index(self, i):
        return ToyContext(self.proprio[i])

    def detach(self):
        return self


class ToyFlow(FlowPolicy):
    """velocity = x W + t u + b + proprio V, on H = 2 steps of A = 2 actions."""

    capabilities = frozenset({"flow", "sft"})
    chunk, action_dim, feature_dim = 2, 2, 1

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = self.chunk * self.action_dim
        self.w = nn.Parameter(0.3 * torch.randn(size, size, generator=generator, dtype=dtype))
        self.u = nn.Parameter(0.3 * torch.randn(size, generator=generator, dtype=dtype))
        self.b = nn.Parameter(0.3 * torch.randn(size, generator=generator, dtype=dtype))
        self.v = nn.Parameter(0.3 * torch.randn(1, size, generator=generator, dtype=dtype))
        self.prefix = nn.Parameter(torch.ones(1, dtype=dtype))

    @property
    def config(self):
        return {"policy": "toy"}

    def preprocess(self, observations):
        return ToyContext(torch.from_numpy(np.stack([seen.proprio for seen in observations])).to(self.w.dtype))

    def encode(self, batch):
        return batch

    def features(self, context):
        return context.proprio.float()

    def velocity(self, context, x, t):
        flat = x.flatten(2)
        out = flat @ self.w + t[..., None] * self.u + self.b + (context.proprio @ self.v)[:, None]
        return (self.prefix * out).view_as(x)

    @torch.no_grad()
    def sample(self, context, generators):
        shape = (self.chunk, self.action_dim)
        x = torch.stack([torch.randn(shape, generator=g, dtype=self.w.dtype) for g in generators])
        for step in range(10):
            x = (
                x
                - 0.1 * self.velocity(context, x[:, None], torch.full((len(x), 1), 1 - 0.1 * step, dtype=x.dtype))[:, 0]
            )
        return Sample(actions=x, latent=x)

    def sft_loss(self, context, actions, mask, generator):
        raise AssertionError("not asked for here")

    def fit_normalisation(self, actions, proprio): ...

    def normalise(self, actions):
        return actions

    def unnormalise(self, latent):
        return latent

    def actor_parameters(self):
        return [self.w, self.u, self.b, self.v]


@torch.no_grad()
def rollout(policy, reward, episodes, seed, length=1, act=None):
    """`reward(first latent [H, A]) -> bool` decides each episode of `length` decisions."""
    made = []
    for number in range(episodes):
        generator = torch.Generator().manual_seed(seed * 100_000 + number)
        episode = Episode(Job(TASK, 0, number, number))
        for i in range(length + 1):
            episode.observations.append(Observation("do it", np.array([i / 10], np.float32)))
        for seen in episode.observations[:-1]:
            context = policy.encode(policy.preprocess([seen]))
            sample = act(policy, context, [generator]) if act else policy.sample(context, [generator])
            episode.latents.append(sample.latent[0].float().numpy())
            episode.actions.append(sample.actions[0].float().numpy())
        episode.success = bool(reward(episode.latents[0]))
        made.append(episode)
    return Rollout(made, max_decisions=length)
