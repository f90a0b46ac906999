"""Policies small enough to differentiate by hand, and worlds for them: the oracle's side of algorithm tests."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vlarl_bench.policies.adapt import learning
from vlarl_bench.policies.base import FlowPolicy, LikelihoodPolicy, LogProb, NoisePolicy, Sample
from vlarl_bench.policies.stochastic_flow import StochasticFlow
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


class ToyFlow(FlowPolicy, NoisePolicy):
    """velocity = x W + t u + b + proprio V, on H = 2 steps of A = 2 actions."""

    capabilities = frozenset({"denoising", "flow", "sft", "noise"})
    chunk, action_dim, euler_steps = 2, 2, 10

    def __init__(self, seed=0, dtype=torch.float32, inputs=1):
        super().__init__()
        self.feature_dim = inputs
        generator = torch.Generator().manual_seed(seed)
        size = self.chunk * self.action_dim
        self.w = nn.Parameter(0.3 * torch.randn(size, size, generator=generator, dtype=dtype))
        self.u = nn.Parameter(0.3 * torch.randn(size, generator=generator, dtype=dtype))
        self.b = nn.Parameter(0.3 * torch.randn(size, generator=generator, dtype=dtype))
        self.v = nn.Parameter(0.3 * torch.randn(inputs, size, generator=generator, dtype=dtype))
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
    def decode(self, context, noise):
        x = noise.to(self.w.dtype)
        for step in range(self.euler_steps):
            t = torch.full((len(x), 1), 1 - step / self.euler_steps, dtype=x.dtype)
            x = x - self.velocity(context, x[:, None], t)[:, 0] / self.euler_steps
        return Sample(actions=x, latent=x)

    def sft_loss(self, context, actions, mask, generator):
        raise AssertionError("not asked for here")

    def fit_normalisation(self, actions, proprio): ...

    def normalise(self, actions):
        return actions

    def unnormalise(self, latent):
        return latent

    def actor_parameters(self):
        return learning(self, [self.w, self.u, self.b, self.v])


class PaddedFlow(ToyFlow):
    """The same behind a network that pads an action's two numbers to five: the noise that pads them stays as it is, and
    its loss is `wrong` times the sum of `b`."""

    latent_dim, wrong = 5, 0.0

    def draw_loss(self, context, latent, t, noise):
        own = super().draw_loss(context, latent[..., :2], t, noise[..., :2])
        return torch.cat((own, (self.wrong * self.b.sum()).expand(*own.shape[:3], 3)), 3)

    @torch.no_grad()
    def decode(self, context, noise):
        own = super().decode(context, noise[..., :2])
        return Sample(actions=own.actions, latent=torch.cat((own.latent, noise[..., 2:]), 2))

    def unnormalise(self, latent):
        return latent[..., :2]


class ToyStochasticFlow(ToyFlow, StochasticFlow):
    """The same, with Euler steps that can draw."""

    capabilities = frozenset({"denoising", "flow", "likelihood", "chain"})
    euler_steps = 4


class ToyLikelihood(LikelihoodPolicy):
    """What the two below share: a latent is a chunk of H = 2 steps of A = 2 actions in environment units."""

    chunk, action_dim, size = 2, 2, 4
    config = {"policy": "toy"}  # noqa: RUF012
    preprocess, encode, features = ToyFlow.preprocess, ToyFlow.encode, ToyFlow.features
    sft_loss, fit_normalisation = ToyFlow.sft_loss, ToyFlow.fit_normalisation
    normalise, unnormalise = ToyFlow.normalise, ToyFlow.unnormalise

    def actor_parameters(self):
        return [self.w, self.b]


class ToyTokens(ToyLikelihood):
    """Each number of a chunk is one of `bins` values from -1 to 1; logits = proprio w + b."""

    capabilities = frozenset({"likelihood", "tokens"})

    def __init__(self, seed=0, dtype=torch.float32, inputs=1, bins=5, scale=0.3):
        super().__init__()
        self.feature_dim, self.bins = inputs, bins
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(scale * torch.randn(inputs, self.size * bins, generator=generator, dtype=dtype))
        self.b = nn.Parameter(scale * torch.randn(self.size * bins, generator=generator, dtype=dtype))
        self.prefix = nn.Parameter(torch.ones(1, dtype=dtype))

    def logits(self, context):
        return self.prefix * (context.proprio @ self.w + self.b).view(len(context), self.size, self.bins)

    @torch.no_grad()
    def explore(self, context, generators, noise):
        chances = (self.logits(context) / noise).softmax(-1)
        drawn = torch.stack([torch.multinomial(c, 1, generator=g) for c, g in zip(chances, generators, strict=True)])
        latent = torch.linspace(-1, 1, self.bins)[drawn[..., 0]].view(-1, self.chunk, self.action_dim)
        return Sample(actions=latent, latent=latent, trace=drawn)

    def sample(self, context, generators):
        return self.explore(context, generators, 1.0)

    def log_prob(self, context, trace, mask, noise):
        everything = (self.logits(context) / noise).log_softmax(-1)
        counted = mask.bool().repeat_interleave(self.action_dim, 1)[..., None]
        entropy = -(everything.exp() * everything).sum(-1, keepdim=True)
        return LogProb(everything.gather(-1, trace) * counted, entropy * counted, counted)


class ToyChain(ToyLikelihood):
    """A chain of S = 4 Gaussian steps: x <- N(0.5 x + proprio w_s + b_s, deviation^2), from N(0, I)."""

    capabilities = frozenset({"likelihood", "chain"})

    def __init__(self, seed=0, dtype=torch.float32, inputs=1, steps=4, scale=0.3):
        super().__init__()
        self.feature_dim, self.steps = inputs, steps
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(scale * torch.randn(steps, inputs, self.size, generator=generator, dtype=dtype))
        self.b = nn.Parameter(scale * torch.randn(steps, 1, self.size, generator=generator, dtype=dtype))
        self.prefix = nn.Parameter(torch.ones(1, dtype=dtype))

    def means(self, context, x):
        """[B, S, 4] from x [B, S, 4]."""
        return self.prefix * (0.5 * x + (context.proprio @ self.w + self.b).transpose(0, 1))

    @torch.no_grad()
    def explore(self, context, generators, noise):
        draws = torch.stack(
            [torch.randn(self.steps + 1, self.size, generator=g, dtype=self.w.dtype) for g in generators]
        )
        trace = [draws[:, 0]]
        for step in range(self.steps):
            mean = self.means(context, trace[-1][:, None].expand(-1, self.steps, -1))[:, step]
            trace.append(mean + noise * draws[:, step + 1])
        latent = trace[-1].view(-1, self.chunk, self.action_dim)
        return Sample(latent, latent, torch.stack(trace, 1).view(len(latent), -1, self.chunk, self.action_dim))

    def sample(self, context, generators):
        return self.explore(context, generators, 0.1)

    def log_prob(self, context, trace, mask, noise):
        x = trace.flatten(2)
        error = (x[:, 1:] - self.means(context, x[:, :-1])) / noise
        counted = mask.bool().repeat_interleave(self.action_dim, 1)[:, None].expand_as(error)
        logp = -0.5 * error**2 - math.log(noise) - 0.5 * math.log(2 * math.pi)
        entropy = torch.full_like(error, math.log(noise) + 0.5 * math.log(2 * math.pi * math.e))
        return LogProb(logp * counted, entropy * counted, counted)


def sampled(policy, context, generators):
    """How a policy acts that no algorithm explores with."""
    return policy.sample(context, generators)


@torch.no_grad()
def rollout(policy, reward, episodes, seed, length=1, act=None, see=None):
    """`reward(first latent [H, A]) -> bool` decides each episode of `length` decisions; `see(i)` is what is seen at the
    i-th one, and after the last."""
    see = see or (lambda i: Observation("do it", np.array([i / 10], np.float32)))
    made = [Episode(Job(TASK, 0, number, number)) for number in range(episodes)]
    generators = [torch.Generator().manual_seed(seed * 100_000 + number) for number in range(episodes)]
    for i in range(length + 1):
        seen = [see(i) for _ in made]
        for episode, observation in zip(made, seen, strict=True):
            episode.observations.append(observation)
        if i == length:
            break
        sample = (act or sampled)(policy, policy.encode(policy.preprocess(seen)), generators)
        for row, episode in enumerate(made):
            episode.latents.append(sample.latent[row].float().numpy())
            if sample.trace is not None:
                episode.traces.append(sample.trace[row].numpy())
            episode.actions.append(sample.actions[row].float().numpy())
    for episode in made:
        episode.success = bool(reward(episode.latents[0]))
    return Rollout(made, {"toy": length})


SIDES = {-1.0: Task("toy", "left", "go left"), 1.0: Task("toy", "right", "go right")}
TRIES = 3
"""Decisions that fit into an episode of the two-stage world."""


@torch.no_grad()
def two_stages(policy, episodes, seed, act=None, shuffled=False, group=1):
    """A world whose best success rate is 1: two tasks, two stages each. A stage is passed if both numbers of the first
    action are within 0.6 of (side / 2, stage - 1/2); the second action of a chunk is never executed. Three tries for
    the two stages. `shuffled` deals the outcomes out among the episodes anew: nothing is left to be learned. Each
    `group` episodes in a row share their task and initial state.
    """
    sides = [(-1.0, 1.0)[number // group % 2] for number in range(episodes)]
    made = [Episode(Job(SIDES[side], number // group, number, number)) for number, side in enumerate(sides)]
    generators = [torch.Generator().manual_seed(seed * 100_000 + number) for number in range(episodes)]
    stage = [0] * episodes

    def look(number):
        made[number].observations.append(Observation("go", np.array([sides[number], stage[number]], np.float32)))

    flying = list(range(episodes))
    for number in flying:
        look(number)
    for _ in range(TRIES):
        context = policy.encode(policy.preprocess([made[number].observations[-1] for number in flying]))
        sample = (act or sampled)(policy, context, [generators[number] for number in flying])
        for row, number in enumerate(flying):
            made[number].latents.append(sample.latent[row].numpy())
            made[number].actions.append(sample.actions[row, :1].numpy())
            if sample.trace is not None:
                made[number].traces.append(sample.trace[row].numpy())
            goal = np.array([sides[number] / 2, stage[number] - 0.5])
            stage[number] += bool((np.abs(made[number].actions[-1][0] - goal) < 0.6).all())
            made[number].success = stage[number] == 2
            look(number)
        flying = [number for number in flying if not made[number].success]
        if not flying:
            break
    if shuffled:
        outcomes = np.random.default_rng(seed).permutation([episode.success for episode in made])
        for episode, outcome in zip(made, outcomes, strict=True):
            episode.success = bool(outcome)
    return Rollout(made, {"toy": TRIES})


def train(algorithm, policy, rounds, episodes=64, shuffled=False):
    """Success rate of the policy's own samples after so many rounds."""
    for number in range(rounds):
        algorithm.update(policy, two_stages(policy, episodes, number, algorithm.act, shuffled, algorithm.group))
    return rate(policy)


def rate(policy):
    """Share of 400 fresh episodes that succeed."""
    return float(np.mean([episode.success for episode in two_stages(policy, 400, 999_999).episodes]))


def asked_of_epochs(monkeypatch):
    """What a method hands to `ascend`, which then does nothing, by name; filled by its next update."""
    given = {}

    def keep(score, advantage, clip_eps, optimizer, generator, epochs, minibatch, **more):
        given.update(clip_eps=clip_eps, epochs=epochs, minibatch=minibatch, **more)
        return {"entropy": 0.0}

    monkeypatch.setattr("vlarl_bench.policy_gradient.ascend", keep)
    return given
