"""What an update costs and whether it stays sound, seen from outside and so the same way for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .algorithm import counted
from .distributed import sharing, total
from .errors import Diverged


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,  # torch's own, in which the CPU's attention kernels are missing
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def cpu_seconds() -> float:
    """CPU seconds that this process, its workers and the processes that it has outlived have used, all cores together:
    what hardly depends on what else the machine does."""
    me = psutil.Process()
    seconds = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


class Meter(TorchDispatchMode):
    """Counts, inside `with Meter(policy, algorithm) as meter:`, optimiser steps and floating-point operations.

    Operations are those of matrix products, convolutions and attention, forward and backward, a multiplication and its
    addition being two; element-wise work is not counted, nor what is done `uncounted`. Every optimiser's steps count, a
    critic's like an actor's.
    Raises Diverged before a step whose gradient is not finite, naming the step and the tensor, the policy's or one of
    the algorithm's own networks (`critic.members.0.weight`). Where a run has several processes, what each does its
    share of is summed when the block ends, and what all of them do counts once: so the numbers are those of one
    process.
    """

    def __init__(self, policy: nn.Module, algorithm: object = None) -> None:
        super().__init__()
        self.flops = 0
        self._shared = 0
        self.gradient_steps = 0
        self._names = {id(parameter): name for name, parameter in policy.named_parameters()}
        self._algorithm = algorithm
        self._hooks: list[Any] = []

    def __enter__(self) -> Meter:
        self._hooks = [register_optimizer_step_pre_hook(self._check), register_optimizer_step_post_hook(self._count)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        if error[0] in (None, Diverged):  # of which all processes have the same
            self.flops += int(total(self._shared))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled() and func.namespace == "aten":
            with _within(self):  # linear layers and attention come here whole
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if formula is not None and counted():
            found = formula(*args, **(kwargs or {}), out_val=out)
            if sharing():
                self._shared += found
            else:
                self.flops += found
        return out

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        learned = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not learned:
            return
        norms = torch.stack(torch._foreach_norm([p.grad for p in learned]))
        if norms.isfinite().all():
            return
        first = learned[int((~norms.isfinite()).nonzero()[0])]
        names = dict(_parameters(self._algorithm)) | self._names  # looked for only now: critics may be made late
        name = names.get(id(first), f"a tensor of shape {tuple(first.shape)} outside the policy")
        raise Diverged(f"the gradient of {name} is not finite at gradient step {self.gradient_steps + 1}")

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.gradient_steps += 1


def _parameters(holder: object, where: str = "", depth: int = 3) -> Iterator[tuple[int, str]]:
    """Id and dotted name of what is learned in an object's networks, and in those of what it has."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, nn.Module):
            yield from ((id(found), f"{where}{name}.{inner}") for inner, found in value.named_parameters())
        elif isinstance(value, Tensor):
            yield id(value), f"{where}{name}"
        elif depth:
            yield from _parameters(value, f"{where}{name}.", depth - 1)


@contextmanager
def _within(meter: Meter) -> Iterator[None]:
    """Counts what an operation is made of: a mode is off while it looks at one."""
    TorchDispatchMode.__enter__(meter)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(meter, None, None, None)


def check_finite(policy: nn.Module, steps: int) -> None:
    """Raises Diverged if a number of the policy is not finite after an update of so many steps, naming the tensor."""
    for name, tensor in policy.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Diverged(f"{name} is not finite after gradient step {steps}")
