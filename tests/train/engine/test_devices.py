"""Which device and how many ranks a command gets."""

import pytest
import torch

from deltatok.shards import UsageError
from deltatok.train.engine.devices import make_accelerator


def test_processes_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch for GPUs where there are none: accelerate makes each process a world of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UsageError, match=r"one of 8 processes, .* alone: .* --device cpu"):
        make_accelerator("auto", "float32")
