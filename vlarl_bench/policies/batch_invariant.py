"""Acting that repeats to the bit."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

LARGE = 10**8
"""Numbers of a policy from which it keeps its threads."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def batch_invariant(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a row's result the same to the bit wherever it stands in a batch of a given size, and beside whatever.

    BLAS cuts a matrix between threads at rows of its choice, and rows at a cut round differently, so whatever needs no
    gradients is done by one thread. With a million numbers a second one gains little there. With billions one alone
    would take most of a minute to look once, so `LARGE` policies keep theirs, and may round by a row's place.
    """

    @functools.wraps(method)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        threads = torch.get_num_threads()
        if torch.is_grad_enabled() or threads == 1 or large(args[0]):
            return method(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return method(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return alone


def large(policy: object) -> bool:
    """Whether it has at least `LARGE` numbers."""
    assert isinstance(policy, torch.nn.Module)
    return sum(parameter.numel() for parameter in policy.parameters()) >= LARGE
