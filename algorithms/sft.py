"""SFT: supervised fine-tuning on demonstrations, with the policy's own imitation loss.

For flow policies that loss is conditional flow matching (Lipman et al., 2023; Black et al., 2024, eq. 1). Every
environment step of a demonstration is a training example: what was seen there, and the expert's next H actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.distributed import descend, own, shared, total
from vlarl_bench.errors import BenchError
from vlarl_bench.lazy import lazy_import
from vlarl_bench.suite import windows

if TYPE_CHECKING:
    import torch

    from vlarl_bench.config import Budget
    from vlarl_bench.policies.base import Policy
    from vlarl_bench.suite import Demonstration
else:
    torch = lazy_import("torch")


@dataclass(frozen=True)
class SFTSettings:
    """Settings of supervised fine-tuning."""

    lr: float = 1e-3
    """Peak learning rate (AdamW); from there it falls linearly to 0 at the budget's last gradient step."""
    warmup: int = 30
    """Gradient steps over which the learning rate rises from 0."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    grad_norm: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it."""

    def check(self) -> None:
        """Raises BenchError on a value out of range."""
        for name in ("lr", "grad_norm"):
            if getattr(self, name) <= 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be above 0")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise BenchError(f"algo.{name}: {getattr(self, name)}; it must be at least 0")


class SFT(Algorithm):
    """Supervised fine-tuning on demonstrations."""

    name = "sft"
    summary = "Supervised fine-tuning on demonstrations, with the policy's own imitation loss"
    requires = frozenset({"sft"})
    learns_from = "demonstrations"
    Settings = SFTSettings

    def __init__(self, settings: SFTSettings, policy: Policy, budget: Budget, seed: int) -> None:
        self.settings, self.budget = settings, budget
        self.generator = torch.Generator().manual_seed(seed)
        policy.check_trainable()
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]  # frozen parts stay so
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.steps = self.rounds = 0
        self._examples: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def update(self, policy: Policy, data: Sequence[Demonstration]) -> dict[str, float]:
        """One of the budget's iterations: its share of the gradient steps, on minibatches over all tasks."""
        s, budget = self.settings, self.budget
        if self._examples is None:
            seen = [seen for demonstration in data for seen in demonstration.observations]
            chunks, masks = zip(*(windows(demonstration.actions, policy.chunk) for demonstration in data), strict=True)
            self._examples = (
                policy.preprocess(seen),
                torch.from_numpy(np.concatenate(chunks)),
                torch.from_numpy(np.concatenate(masks)),
            )
        batch, actions, mask = self._examples
        losses = []
        self.rounds += 1
        for _ in range(round(budget.gradient_steps * self.rounds / budget.iterations) - self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = s.lr * min((self.steps + 1) / (s.warmup + 1), 1 - self.steps / budget.gradient_steps)
            i = torch.randint(len(actions), (budget.batch_size,), generator=self.generator)
            mine = own(len(i))
            with shared():
                context = policy.encode(batch.index(i[mine]))
                loss = policy.sft_loss(context, actions[i], mask[i], self.generator, mine)
            descend(self.optimizer, loss, s.grad_norm)
            self.steps += 1
            losses.append(total(loss.item()))
        return {"sft_loss": float(np.mean(losses))} if losses else {}

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, step counter and generator."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "rounds": self.rounds,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.rounds = state["steps"], state["rounds"]
        self.generator.set_state(state["generator"])
