"""The device that a setting names. Called by `forecast.py` and `api.py`."""

import torch

from ..shards.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device that a config names; UsageError where this machine has none such."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    if not has.get(name, False):
        raise UsageError(f"device {name}: this machine has none such; use cpu or auto")
    return torch.device(name)
