"""A device whose memory is full: the command says which setting to lower, and what it is now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pretended import PretendedDevice

from deltatok.evaluate.cache_fidelity import CacheFidelityConfig, run_cache_fidelity
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.extract.backbone import Backbone
from deltatok.extract.run import run_extraction
from deltatok.shards import DeltatokError
from deltatok.train.config import TokenizeConfig
from deltatok.train.dinoworld import train_dinoworld
from deltatok.train.encode import write_deltas
from deltatok.train.engine.loop import Trainer
from deltatok.train.heads.train import train_head
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.selection.search import GPU_MEMORY_MB
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]

TRAINERS: dict[str, Callable[[Any], Path]] = {
    "tokenizer": train_tokenizer,
    "world": train_world,
    "dinoworld": train_dinoworld,
    "head": train_head,
}


def full(*_: Any, **__: Any) -> NoReturn:
    """As CUDA says it."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.5 GiB"
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_training(
    cuda: PretendedDevice,
    request: pytest.FixtureRequest,
    trainer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = request.getfixturevalue(f"{trainer}_config")(device="cuda", residency="device")
    monkeypatch.setattr(Trainer, "_forward_backward", full)
    with pytest.raises(DeltatokError, match="memory, now device") as caught:
        TRAINERS[trainer](config)
    said = str(caught.value)
    assert f"lower micro_batch_size, now {config.batch_size}" in said
    assert (f"selection_memory_mb, now unset: {GPU_MEMORY_MB}" in said) == ("world" in trainer)
    assert caught.value.exit_code == 1


def test_a_cache_that_does_not_fit(
    cuda: PretendedDevice, tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltatok.train.engine.objective.window_source", full)
    with pytest.raises(DeltatokError, match="set residency memory, now device"):
        train_tokenizer(tokenizer_config(device="cuda", residency="device", micro_batch_size=1))


def test_extraction(
    cuda: PretendedDevice, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(device="cuda", batch_frames=12)
    monkeypatch.setattr(Backbone, "tokens", full)
    with pytest.raises(DeltatokError, match="lower batch_frames, now 12"):
        run_extraction(config)


def test_encoding(
    cuda: PretendedDevice, tokenizer_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tokenizer_config(device="cuda", steps=1)
    train_tokenizer(config)
    monkeypatch.setattr(DeltaTok, "encode_sequence", full)
    with pytest.raises(DeltatokError, match="lower batch_windows, now 8"):
        write_deltas(
            TokenizeConfig(
                patches=config.patches, tokenizer=config.out, out=str(tmp_path / "d"), device="cuda"
            )
        )


def test_evaluation(cuda: PretendedDevice, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatok.evaluate.forecast.run.forecast_horizon", full)
    with pytest.raises(DeltatokError, match="lower batch_windows, now 3"):
        run_forecast(tiny.config(device="cuda", batch_windows=3))


def test_cache_fidelity(
    cuda: PretendedDevice, patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltatok.evaluate.cache_fidelity.TokenErrors.add", full)
    config = CacheFidelityConfig(patches=str(patches), reference=str(patches), device="cuda")
    with pytest.raises(DeltatokError, match="lower batch_windows, now 4"):
        run_cache_fidelity(config)
