"""Which device a command computes on, in which precision, and what is said when its memory is full.
torch is imported when it is asked.

torchrun and accelerate tell each process which one it is on its machine by LOCAL_RANK, srun by
SLURM_LOCALID, and how many there are by LOCAL_WORLD_SIZE.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import DeltatokError, UsageError

if TYPE_CHECKING:
    import torch

DEVICES = ("cuda", "mps", "cpu")
"""What training and evaluation take by `auto`, the first that is there; extraction, whose bytes the
device decides, takes no mps of itself."""


def choose_device(name: str, *, automatic: Sequence[str] = ("cuda", "cpu")) -> "torch.device":
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N` as a device; UsageError if it is not there.

    `auto`: the first of `automatic` that is there. `cuda`: the GPU of this process's rank on its
    machine, the first one without a launcher.
    """
    import torch

    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next(kind for kind in automatic if there.get(kind, True))
    if name == "cuda" and torch.cuda.device_count():
        rank = launched("LOCAL_RANK", default=launched("SLURM_LOCALID", default=0))
        name = f"cuda:{rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"device {name}: cannot be used here ({reason}): wanted auto, cpu, mps, cuda or cuda:N"
        ) from error
    return device


@contextmanager
def memory_errors(doing: str, advice: Callable[[], str]) -> Iterator[None]:
    """What is within and finds no more memory on the device raises a DeltatokError.

    doing: what, with its sizes. advice: asked for then; which settings to lower, with their values.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise DeltatokError(
            f"{doing}: out of memory ({reason}): {advice()}, and run again"
        ) from error


def precision_name(precision: str, device: "torch.device") -> str:
    """ "float32" or "bfloat16": what `precision`, which may be "auto", means on `device`."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def launched(name: str, *, default: int) -> int:
    """What a launcher says in an environment variable of whole numbers."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def num_cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
