"""One run in several processes: each plays its share of the episodes and takes its share of every gradient.

torch.distributed over gloo. A launcher starts N processes with the same command and tells each its number: `torchrun`
on any number of machines, or `launch` on this one. All of them execute the same code on the same data with the same
generators. What differs is which episodes a process plays (`rollout.run_shared`), and which rows of a batch it puts
through the policy (`spread`); only the first one writes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import BenchError
from .lazy import lazy_import
from .workers import end_with

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

Value = TypeVar("Value")
Rows = TypeVar("Rows", bound="Tensor | tuple[Tensor, ...]")

TIMEOUT = timedelta(minutes=30)
"""For how long the processes wait for one that is alive and says nothing. One that ends is noticed at once."""
MOMENT = 5.0
"""Seconds in which a launcher may end a process that lost another: it knows better what happened."""
BUCKET = 2**26
"""Bytes of gradients that are summed at a time."""
_sharing = False


class ProcessLost(BenchError):
    """Another process of the run ended, or fell silent."""


# ---- joining


def started() -> int:
    """As how many processes a launcher has started this run; 1 where none has. Raises BenchError if it says nonsense.

    These are torchrun's variables, which other launchers set, too.
    """
    words = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    if words["WORLD_SIZE"] in ("", "1"):
        return 1
    for name, word in words.items():
        if not (word and (word.isdigit() or name == "MASTER_ADDR")):
            raise BenchError(f"{name}: {word!r}; beside WORLD_SIZE it must be as torchrun sets it")
    return int(words["WORLD_SIZE"])


@contextmanager
def joined() -> Iterator[None]:
    """Makes this process one of those that the launcher has started; nothing where there is but one.

    An error that several of them have is told by one of them.
    """
    if started() == 1:
        yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())  # a run does not outlive its launcher, as long as that is there by now
    with _together():
        store, number, count = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
        torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=TIMEOUT)
    if number:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first one tells of Ctrl-C
    try:
        yield
    except BenchError as error:
        if isinstance(error, ProcessLost):
            time.sleep(MOMENT)
        try:
            told = store.add(f"told {error}", 1) > 1
        except RuntimeError:
            told = False  # whoever kept the store is gone
        if told:
            raise SystemExit(2) from None
        raise
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"processes: another process of this run ended, or said nothing for {TIMEOUT.seconds // 60} minutes; what "
            "it printed tells why; go on with --resume"
        ) from error


def world_size() -> int:
    """Processes of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0: the one that writes."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


# ---- exchanging


def gathered(value: Value) -> list[Value]:
    """What each process has, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _together():
        torch.distributed.all_gather_object(found, value)
    return found


def from_first(value: Value) -> Value:
    """What the first process has."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    with _together():
        torch.distributed.broadcast_object_list(box, 0)
    return cast("Value", box[0])


def total(number: float) -> float:
    """Sum over the processes."""
    return sum(gathered(number))


def check_same(what: str, value: str) -> None:
    """Raises BenchError unless all processes have the same."""
    found = gathered(value)
    for number, other in enumerate(found):
        if other != found[0]:
            raise BenchError(
                f"processes: {what} is {other} in number {number} and {found[0]} in number 0; "
                "use machines of one kind, with the same files and packages"
            )


# ---- sharing work


def own(rows: int) -> Tensor:
    """[b] those of `rows` rows that this process works on."""
    return torch.arange(rank(), rows, world_size())


def spread(compute: Callable[[Tensor], Rows], owner: Tensor) -> Rows:
    """`compute(arange(B))`, where each process computes only the rows whose `owner` [B], modulo `world_size()`, it is.

    compute(i [b]) gives a tensor, or a named tuple of tensors, of b rows. All processes get the values of all rows, but
    a gradient flows into a process's own rows only. So whatever a loss makes of the rows, `descend` finds the gradient
    that one process would: what depends on the whole batch (means, clipping, pairs) needs no second thought.
    """
    if world_size() == 1:
        return compute(torch.arange(len(owner)))
    owner = owner % world_size()
    mine = (owner == rank()).nonzero()[:, 0]
    with shared():
        rows = compute(mine) if len(mine) else None
    parts: list[Any] = gathered(None if rows is None else _each(_plain, rows))
    parts[rank()] = rows
    order = torch.cat([(owner == number).nonzero()[:, 0] for number in range(world_size())]).argsort()
    whole: Rows = _each(lambda *columns: torch.cat(columns)[order], *(part for part in parts if part is not None))
    return whole


def _each(function: Callable[..., Tensor], *parts: Any) -> Any:
    """`function` of tensors, or of each field of named tuples of them."""
    if isinstance(parts[0], torch.Tensor):
        return function(*parts)
    return type(parts[0])(*(function(*columns) for columns in zip(*parts, strict=True)))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()  # as a view it would be sent with all that it is a view of


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: float) -> None:
    """One step down the gradient of `loss`, summed over the processes, which is scaled down to the norm `grad_norm`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad()
    with shared():
        if world_size() == 1 or loss.requires_grad:  # it does not where a minibatch has no row of this process
            loss.backward()
    if world_size() > 1:
        _sum_gradients(parameters)
    learned = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(learned)
    if norm.isfinite():  # else scaling would spread that to all of them, and the Meter is to name the one
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_norm, norm)
    optimizer.step()


def _sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Puts the sum over the processes in the place of each gradient; what has none anywhere keeps none."""
    reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    with _together():
        torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX)
    learned = [parameter for parameter, any_has in zip(parameters, reached.tolist(), strict=True) if any_has]
    for parameter in learned:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([cast("Tensor", parameter.grad) for parameter in learned]):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).cpu()  # where gloo sums
        with _together():
            torch.distributed.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of one type and about `BUCKET` bytes."""
    group: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.nbytes for other in group) >= BUCKET
        if group and (full or tensor.dtype != group[0].dtype):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


@contextmanager
def shared() -> Iterator[None]:
    """Marks work of which each process does its share, so that `metering` can tell it from what all of them do."""
    global _sharing
    before, _sharing = _sharing, True
    try:
        yield
    finally:
        _sharing = before


def sharing() -> bool:
    """Whether this is `shared` work."""
    return _sharing


# ---- launching


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs this program with `arguments` in so many processes of this machine; returns its exit status.

    Where one fails the others are ended within seconds. Raises BenchError if one was killed, KeyboardInterrupt on
    Ctrl-C, and ends on a signal as a program does; whatever happens, none of them stays behind.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # what torch logs is told here, in one line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "vlarl_bench", *arguments)
    except ChildFailedError as error:
        # Those that were ended because another failed have SIGTERM for an exit code.
        codes = {number: failure.exitcode for number, failure in error.failures.items()}
        killed = [number for number, code in codes.items() if code < 0 and code != -signal.SIGTERM]
        if killed:
            name = signal.Signals(-codes[killed[0]]).name
            memory = " (out of memory?)" if name == "SIGKILL" else ""
            told = f"processes: number {killed[0]} was killed by {name}{memory}; go on with --resume"
            raise BenchError(told) from None
        return next((code for code in codes.values() if code > 0), 1)
    except SignalException as stop:
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + int(stop.sigval)
    return 0
