"""Which device this process uses, alone or as one of several that a launcher started.

torchrun and accelerate tell each process which one it is on its machine by LOCAL_RANK (srun by
SLURM_LOCALID), and how many there are by LOCAL_WORLD_SIZE; srun binds its processes to CPU cores.
"""

import os

import torch

from ..shards.errors import UsageError
from .backbone import Autocast, Backbone
from .config import ExtractConfig
from .pool import default_num_workers


def load_backbone(config: ExtractConfig) -> Backbone:
    """The backbone of `config` on its device; UsageError if it cannot be had there."""
    device = choose_device(config.device)
    default: Autocast = "bfloat16" if device.type == "cuda" else "float32"
    autocast = default if config.autocast == "auto" else config.autocast
    return Backbone.load(config.backbone, device=device, autocast=autocast, compile=config.compile)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; UsageError if it is not there.

    `auto` and `cuda`: the GPU of this process's rank on its machine, the first one without a
    launcher.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count():
        rank = _launched("LOCAL_RANK", default=_launched("SLURM_LOCALID", default=0))
        name = f"cuda:{rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"device {name}: cannot be used here ({reason}): wanted auto, cpu, cuda or cuda:N"
        ) from error
    return device


def choose_num_workers(config: ExtractConfig) -> int:
    """Decoding processes: as given, else this process's share of the CPU cores, at least one."""
    if config.workers is not None:
        return config.workers
    return max(1, default_num_workers() // max(1, _launched("LOCAL_WORLD_SIZE", default=1)))


def _launched(name: str, *, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
