"""Times DPPO's update against its public implementation's: same network, decisions, epochs and minibatches.

    PYTHONPATH=. python scripts/bench_dppo.py CHECKOUT

CHECKOUT is a clone of irom-princeton/dppo; its networks need `einops` beside vlarl-bench's own packages. The network is
that of its Gym tasks (hopper: 512 x 3, residual, 20 denoising steps, the last 10 fine-tuned). Both updates begin at
collected chains: old log-densities, advantages, epochs of actor and critic. CPU seconds of one thread, in turn; the
fastest round counts.
"""

import argparse
import copy
import ctypes
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vlarl_bench.algorithms.dppo import DPPO, DPPOSettings

from vlarl_bench.config import BUDGETS
from vlarl_bench.decisions import decisions
from vlarl_bench.policies.base import LikelihoodPolicy, LogProb
from vlarl_bench.policy_gradient import gae
from vlarl_bench.rollout import Episode, Job, Rollout
from vlarl_bench.suite import Observation, Task

STATE, HORIZON, ACTION, STEPS, TUNED = 11, 4, 3, 20, 10
NOISE, GAMMA, LAMBDA, GAMMA_DENOISING, CLIP = 0.1, 0.99, 0.95, 0.99, 0.01


def main() -> None:
    """Holds the gradients against each other, then times both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout")
    parser.add_argument("--decisions", type=int, default=500)
    parser.add_argument("--minibatch", type=int, default=250, help="decisions, each with its chain")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, options.checkout)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = public()
    data = collect(theirs, options.decisions)
    ours = Chain(theirs)  # type: ignore[abstract]  # it has what an update asks for
    compare_gradients(theirs, ours, data)
    settings = DPPOSettings(
        epochs=options.epochs,
        minibatch=options.minibatch,
        noise=NOISE,
        clip_base=CLIP,
        warmup=0,
        critic_steps=options.epochs * math.ceil(options.decisions / options.minibatch),
        critic_batch=options.minibatch,
    )
    algorithm = DPPO(settings, ours, BUDGETS["smoke"], 0)
    actor = torch.optim.AdamW(theirs.actor_ft.parameters(), lr=settings.lr, weight_decay=0.0)
    critic = torch.optim.AdamW(theirs.critic.parameters(), lr=settings.critic_lr, weight_decay=0.0)

    def mine() -> None:
        algorithm.update(ours, data)

    def public_update() -> None:
        update(theirs, data, actor, critic, options.epochs, options.minibatch)

    fastest = [float("inf")] * 2
    for _ in range(options.rounds):
        for i, function in enumerate((mine, public_update)):
            begin = time.process_time()
            function()
            fastest[i] = min(fastest[i], time.process_time() - begin)
    memory = [peak(function) for function in (mine, public_update)]
    print(f"torch {torch.__version__}, one thread; {options.decisions} decisions of {TUNED} steps")
    print(f"ours {fastest[0]:.2f} CPU s, public {fastest[1]:.2f}, {fastest[1] / fastest[0]:.2f}x; ", end="")
    print(f"peak {memory[0]:.0f} and {memory[1]:.0f} MiB above what they hold")


def public() -> Any:
    """Their model with their hopper settings."""
    from model.common.critic import CriticObs
    from model.diffusion.diffusion_ppo import PPODiffusion
    from model.diffusion.mlp_diffusion import DiffusionMLP

    width = [512] * 3
    actor = DiffusionMLP(ACTION, HORIZON, STATE, 16, width, activation_type="ReLU", residual_style=True)
    return PPODiffusion(
        gamma_denoising=GAMMA_DENOISING,
        clip_ploss_coef=CLIP,
        clip_ploss_coef_base=CLIP,
        norm_adv=False,
        actor=actor,
        critic=CriticObs(STATE, [256] * 3, residual_style=True),
        ft_denoising_steps=TUNED,
        denoising_steps=STEPS,
        horizon_steps=HORIZON,
        obs_dim=STATE,
        action_dim=ACTION,
        randn_clip_value=3,
        min_sampling_denoising_std=NOISE,
        min_logprob_denoising_std=NOISE,
        device="cpu",
    )


def collect(theirs: Any, n: int) -> Rollout:
    """Episodes of ten decisions with their chains; every other one succeeds."""
    states = torch.randn(n, STATE)
    chains = theirs(cond={"state": states[:, None]}).chains.numpy()
    episodes = []
    for number, first in enumerate(range(0, n, 10)):
        seen = [*states[first : first + 10].numpy(), states[first].numpy()]
        episode = Episode(Job(Task("made-up", "hopper", "hop"), 0, number, number))
        episode.observations = [Observation("hop", x) for x in seen]
        episode.traces = list(chains[first : first + 10])
        episode.latents = [chain[-1] for chain in episode.traces]
        episode.actions, episode.success = episode.latents, number % 2 == 0
        episodes.append(episode)
    return Rollout(episodes, {"made-up": 10})


@dataclass(frozen=True)
class States:
    """A context that is the state itself."""

    state: Tensor

    def __len__(self) -> int:
        return len(self.state)

    def index(self, i: Tensor) -> "States":
        """Rows i."""
        return States(self.state[i])


class Chain(LikelihoodPolicy):
    """Their network behind the seam: the last steps of its chain."""

    capabilities = frozenset({"likelihood", "chain"})
    chunk, action_dim, feature_dim = HORIZON, ACTION, STATE

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.net = copy.deepcopy(theirs.actor_ft)
        names = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "ddpm_mu_coef1", "ddpm_mu_coef2")
        schedules = [getattr(theirs, name)[:TUNED].flip(0)[:, None] for name in names]
        self.clean, self.noisy, self.to_latent, self.to_x = schedules
        self.deviation = (0.5 * theirs.ddpm_logvar_clipped[:TUNED].flip(0)).exp()[:, None]

    def preprocess(self, observations: Any) -> States:
        return States(torch.from_numpy(np.stack([seen.proprio for seen in observations])))

    def encode(self, batch: States) -> States:
        return batch

    def features(self, context: States) -> Tensor:
        return context.state

    def actor_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.net.parameters())

    def log_prob(self, context: States, trace: Tensor, mask: Tensor, noise: float) -> LogProb:
        """[B, 10, 12] log-densities; times are embedded once for all rows."""
        flat = trace.flatten(2)
        x, drawn = flat[:, :-1], flat[:, 1:]
        t = torch.arange(TUNED - 1, -1, -1)
        times = self.net.time_embedding(t.view(-1, 1)).view(1, TUNED, -1).expand(len(x), -1, -1)
        seen = context.state[:, None].expand(-1, TUNED, -1)
        predicted = self.net.mlp_mean(torch.cat((x, times, seen), -1))
        latent = (self.clean * x - self.noisy * predicted).clamp(-1, 1)
        mean, std = self.to_latent * latent + self.to_x * x, self.deviation.clamp_min(noise)
        logp = -0.5 * ((drawn - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        executed = mask.bool().repeat_interleave(ACTION, 1)[:, None].expand_as(logp)
        entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).expand_as(logp)
        return LogProb(logp, entropy, executed)


Chain.__abstractmethods__ = frozenset()  # it only scores: nothing here samples or normalises


def lined_up(data: Rollout) -> tuple[Tensor, Tensor]:
    """[N, 1, 11] states and [N, 11, 4, 3] chains, as theirs takes them."""
    states = np.stack([seen.proprio for episode in data.episodes for seen in episode.observations[:-1]])
    chains = np.stack([chain for episode in data.episodes for chain in episode.traces])
    return torch.from_numpy(states)[:, None], torch.from_numpy(chains)


def compare_gradients(theirs: Any, ours: Chain, data: Rollout) -> None:
    """Of the surrogate where the ratio is 1, with the same advantages: also what the densities are is the same then."""
    states, chains = lined_up(data)
    n, gain = len(states), torch.randn(len(states))
    rows, steps = torch.arange(n).repeat_interleave(TUNED), torch.arange(TUNED).repeat(n)
    with torch.no_grad():
        old = theirs.get_logprobs({"state": states}, chains).view(n, TUNED, HORIZON, ACTION)
    nothing = torch.zeros(n * TUNED)
    pairs = (chains[rows, steps], chains[rows, steps + 1], steps)
    public_loss = theirs.loss({"state": states[rows]}, *pairs, nothing, nothing, gain[rows].clone(), old[rows, steps])[
        0
    ]
    parameters = list(theirs.actor_ft.parameters())
    expected = torch.autograd.grad(public_loss, parameters)
    algorithm = DPPO(DPPOSettings(noise=NOISE), copy.deepcopy(ours), BUDGETS["smoke"], 0)
    taken = decisions(ours, data)
    now = algorithm.score(ours, taken, torch.arange(n), TUNED).logp
    weight = gain[:, None] * GAMMA_DENOISING ** torch.arange(TUNED - 1, -1, -1)
    found = torch.autograd.grad(-((now - now.detach()).exp() * weight).mean(), list(ours.net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def update(theirs: Any, data: Rollout, actor: Any, critic: Any, epochs: int, minibatch: int) -> None:
    """What their agent does with a round: values, old log-densities, advantages, then epochs over single steps."""
    states, chains = lined_up(data)
    n = len(states)
    with torch.no_grad():
        values = theirs.critic({"state": states})[:, 0].numpy()
        old = theirs.get_logprobs({"state": states}, chains).view(n, TUNED, HORIZON, ACTION)
    reward = np.array([float(e.success and i == 9) for e in data.episodes for i in range(10)], np.float32)
    ended = np.arange(n) % 10 == 9
    found = gae(reward, values, np.append(values[1:], 0.0), ended, ended, GAMMA, LAMBDA)
    advantage = torch.from_numpy(((found - found.mean()) / found.std()).astype(np.float32))
    returns = torch.from_numpy((found + values).astype(np.float32))
    for _ in range(epochs):
        for both in torch.randperm(n * TUNED).split(minibatch * TUNED):
            row, step = both // TUNED, both % TUNED
            pairs = (chains[row, step], chains[row, step + 1], step)
            judged = (returns[row], torch.from_numpy(values)[row], advantage[row], old[row, step])
            policy_loss, _, value_loss, *_ = theirs.loss({"state": states[row]}, *pairs, *judged)
            actor.zero_grad()
            critic.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            torch.nn.utils.clip_grad_norm_(theirs.actor_ft.parameters(), 1.0)
            actor.step()
            critic.step()


def peak(function: Callable[[], None]) -> float:
    """MiB that the process grew by, at most, while the function ran."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is asked for now
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(name: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


if __name__ == "__main__":
    main()
