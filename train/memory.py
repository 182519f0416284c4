"""How much memory a cache may take. Used by sources.py for `residency: auto`."""

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

LARGEST_SHARE = 0.5
"""Of what is free, at most this much for a cache (a guess: the rest is page cache, batches and
everybody else)."""


def fits_in_memory(size_bytes: int) -> bool:
    """Whether every process of this machine may load `size_bytes` at the same time."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return size_bytes * processes <= LARGEST_SHARE * available_bytes()


def device_bytes(device: torch.device) -> int:
    """What a cache may take of a cuda device's memory: the model comes after it."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(LARGEST_SHARE * free)


def available_bytes() -> int:
    """Memory that can be taken without swapping; 0 where the system does not say."""
    limits = [value for value in (_system_bytes(), _container_bytes()) if value is not None]
    return min(limits, default=0)


def _system_bytes() -> int | None:
    if not MEMINFO.is_file():
        return None
    for line in MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_bytes() -> int | None:
    """What is left under the control group's limit; None without one."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not (limit.is_file() and used.is_file()):
        return None
    text = limit.read_text(encoding="ascii").strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text(encoding="ascii")))
