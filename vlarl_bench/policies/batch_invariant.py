"""Acting that repeats to the bit."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def batch_invariant(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a row's result the same to the bit wherever it stands in a batch of a given size, and beside whatever.

    BLAS cuts a matrix between threads at rows of its choice, and rows at a cut round differently, so acting (anything
    without gradients) is done by one thread. At these sizes a second one gains little; training keeps them all.
    """

    @functools.wraps(method)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        threads = torch.get_num_threads()
        if torch.is_grad_enabled() or threads == 1:
            return method(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return method(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return alone
