"""Where a policy computes: on the CPU, or on a GPU of this machine. Simulators and all else stay on the CPU."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from .errors import BenchError
from .lazy import lazy_import
from .provenance import compute_on

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_import("torch")


def check_device(name: str) -> None:
    """Raises BenchError unless `name` is `cpu`, `cuda` or one GPU such as `cuda:1`, whether there is one or not."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BenchError(f"device: {name!r}; it must be cpu, cuda, or one GPU such as cuda:1")


def find_device(name: str) -> torch.device:
    """The device that is called `name`; of several processes on a machine, `cuda` gives each the next GPU. Fingerprints
    name the GPU from then on.

    Raises BenchError where there is no such GPU, or torch cannot use it.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BenchError(
            f"device: {name!r}; torch {torch.version.__version__} finds no GPU here; `vlarl-bench doctor` tells more"
        )
    there = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", "0")) % there if name == "cuda" else int(name.partition(":")[2])
    if number >= there:
        raise BenchError(f"device: {name!r}; the GPUs here are cuda:0 to cuda:{there - 1}")
    compute_on(f"{torch.cuda.get_device_name(number)}, CUDA {torch.version.cuda}")
    return torch.device("cuda", number)
