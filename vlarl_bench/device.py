"""Where a policy computes: on the CPU, or on a GPU of this machine. Simulators and all else stay on the CPU."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from .distributed import world_size
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
        compute_on("")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BenchError(
            f"device: {name!r}; torch {torch.version.__version__} finds no GPU here; see `vlarl-bench doctor`"
        )
    there, process = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "0" if world_size() == 1 else "")
    if name == "cuda" and not process.isdecimal():
        raise BenchError(f"LOCAL_RANK: {process!r}; it must say which process of its machine this is, as torchrun does")
    number = int(process) % there if name == "cuda" else int(name.partition(":")[2])
    if number >= there:
        raise BenchError(f"device: {name!r}; the GPUs here are cuda:0 to cuda:{there - 1}")
    try:
        torch.cuda.set_device(number)
        compute_on(f"{torch.cuda.get_device_name(number)}, CUDA {torch.version.cuda}")
    except RuntimeError as error:
        raise BenchError(f"device: {name!r}; torch cannot use it: {' '.join(str(error).split())[:200]}") from None
    torch.backends.cudnn.allow_tf32 = False  # else convolutions keep 10 bits, and images would be seen otherwise
    return torch.device("cuda", number)
