"""The device, the ranks and the precision of one command.

accelerate keeps one state a process: the ranks and the device they were launched for. Here the
stages of a pipeline may run in one process on different devices and in different precisions, so
both belong to the `Accelerator` of a command, and accelerate is left with the ranks.
"""

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import accelerate  # type: ignore[import-untyped]
import torch
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    broadcast_object_list,
)
from torch import Tensor

from ...shards.errors import DeltatokError, UsageError
from ...shards.running.devices import DEVICES, choose_device, precision_name
from ..config import Device, Precision

# accelerate publishes no type information; imported here and in logs.py only.

__all__ = [
    "Accelerator",
    "check_compiler",
    "from_main",
    "leave_group",
    "make_accelerator",
    "on_main",
    "to_device",
]

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""One process, or plain data parallel ones: every rank holds all weights."""


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """accelerate's, with the device and the precision of one command."""

    def __init__(self, device: torch.device, precision: str) -> None:
        """precision: "float32" or "bfloat16"."""
        self._device, self._precision = device, precision
        super().__init__(cpu=accelerate.PartialState().device.type == "cpu", mixed_precision="no")

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._device

    def autocast(self) -> AbstractContextManager[object]:
        """Forward passes inside are in the command's precision."""
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


def make_accelerator(device: Device, precision: Precision) -> Accelerator:
    """An Accelerator on that device. UsageError if there is none such, for a launch that shards
    weights, or for one whose processes would each train alone."""
    state = accelerate.PartialState(cpu=device == "cpu")
    found: torch.device = state.device
    launched = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    if launched == 1 and state.num_processes == 1:  # no ranks that have to agree on one
        found = choose_device(device, automatic=DEVICES)
    if device not in ("auto", found.type):
        raise UsageError(
            f"device {device}: this process can compute on {found.type} only; "
            f"use auto or {found.type}"
        )
    if state.distributed_type not in SUPPORTED:
        raise UsageError(
            f"launched for {state.distributed_type.value}: wanted plain data parallel processes; "
            "launch with torchrun --nproc-per-node N"
        )
    if launched > 1 and state.num_processes == 1:
        raise UsageError(
            f"launched as one of {launched} processes, but on {state.device.type} each would train "
            "alone: use as many GPUs as processes (is a GPU seen here?), or, to train on CPUs, "
            f"torchrun --nproc-per-node {launched} with --device cpu"
        )
    return Accelerator(found, precision_name(precision, found))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; from pinned memory to cuda, where a copy else waits for all that
    the device has yet to do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def leave_group() -> None:
    """End this process's part in a group of CPU processes, if it is in one.

    Its threads else abort a process that ends while they run, and the exit code is lost. Models
    that were wrapped hold the group, too, some of them in reference cycles: those go first.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        gc.collect()
        group.destroy_process_group()


def on_main(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """What the main process does for all; they wait for it.

    Where it fails all fail, so that none waits for one that is gone: the main process with its own
    error, the others with a DeltatokError of the same exit code.
    """
    if accelerator.num_processes == 1:
        action()
        return
    error: DeltatokError | None = None
    if accelerator.is_main_process:
        try:
            action()
        except DeltatokError as caught:
            error = caught
    mine = torch.tensor(float(error.exit_code if error else 0), device=accelerator.device)
    code = int(accelerator.reduce(mine, reduction="sum").item())
    if error is not None:
        raise error
    if code:
        other = DeltatokError("the main process could not go on: its error says why")
        other.exit_code = code
        raise other


def from_main(values: Mapping[str, float]) -> dict[str, float]:
    """The main process's values, of the same names: what all decide by, should theirs differ."""
    return dict(zip(values, broadcast_object_list([*values.values()]), strict=True))


def check_compiler(device: torch.device) -> None:
    """UsageError if torch.compile cannot compile for `device`: found before the first step."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"compile: nothing can be compiled here ({' '.join(lines[:2])}): leave compile out, or "
            "install a C++ compiler (CPU) or Triton (GPU)"
        ) from error
