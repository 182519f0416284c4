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


def test_one_process_may_use_one_precision_after_another() -> None:
    weight = torch.ones(2, 2)
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        accelerator = make_accelerator("cpu", precision)  # type: ignore[arg-type]
        with accelerator.autocast():
            assert (weight @ weight).dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_process_may_use_one_device_after_another() -> None:
    for device in ("cpu", "cuda", "cpu", "auto"):
        accelerator = make_accelerator(device, "float32")  # type: ignore[arg-type]
        assert accelerator.device.type == ("cuda" if device == "auto" else device)
        module, _ = accelerator.prepare(torch.nn.Linear(2, 2), torch.optim.SGD([torch.ones(1)]))
        assert module.weight.device.type == accelerator.device.type
