"""A tokenizer that ignores its delta tokens is found out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltatok.shards import DeltatokError
from deltatok.train.losses import mse
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.probes import participation_ratio, probe_tokenizer
from deltatok.train.tokenizer import train_tokenizer

Make = Callable[..., Any]
GRID = (1, 1)


class Adder(DeltaTok):
    """A perfect tokenizer of one-patch frames: z is the difference."""

    def __init__(self, strength: float) -> None:
        nn.Module.__init__(self)
        self.z_embed = nn.Embedding(1, 1)
        self.strength = strength

    def encode(self, x_prev: Any, x_cur: Any, **named: Any) -> Any:
        return (x_cur - x_prev)[:, 0]

    def decode(self, z: Any, x_prev: Any, **named: Any) -> Any:
        return x_prev + self.strength * z[:, None]


FRAMES = torch.randn(6, 4, 1, 8, generator=torch.Generator().manual_seed(0))


def probe(strength: float, windows_at_once: int = 4) -> Any:
    return probe_tokenizer(
        Adder(strength), FRAMES, grid=GRID, loss=mse, windows_at_once=windows_at_once
    )


def test_decoder_that_ignores_z_has_ratio_one() -> None:
    probes = probe(strength=0.0)
    assert probes.z_swap_ratio == pytest.approx(1)
    assert probes.zero_z_ratio == pytest.approx(1)
    assert probes.copy_last_ratio == pytest.approx(1)


def test_decoder_that_uses_z_suffers_from_a_swap() -> None:
    probes = probe(strength=0.9)
    assert probes.copy_last_ratio == pytest.approx(0.01, rel=1e-3)
    assert probes.zero_z_ratio == pytest.approx(100, rel=1e-3)
    assert probes.z_swap_ratio > 100


def test_chunks_change_no_probe() -> None:
    assert probe(0.5, windows_at_once=1) == pytest.approx(probe(0.5, windows_at_once=6))


def test_participation_ratio_counts_directions() -> None:
    z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1))
    assert participation_ratio(z) == pytest.approx(3, abs=0.05)
    assert participation_ratio(z[:, :1] * torch.ones(5)) == pytest.approx(1)
    assert participation_ratio(torch.ones(4, 3)) == 0


def ignore_z(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = DeltaTok.decode
    monkeypatch.setattr(
        DeltaTok,
        "decode",
        lambda self, z, x_prev, **named: decode(self, 0 * z, x_prev, **named),
    )


def test_stuck_decoder_stops_with_advice(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_z(monkeypatch)
    config = tokenizer_config(eval_every=2, stuck_after_steps=3)
    with pytest.raises(
        DeltatokError, match=r"step 4: the decoder ignores .*layer_scale_init 0.1.*wide_pair"
    ):
        train_tokenizer(config)


def test_stuck_decoder_goes_on_if_allowed(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_z(monkeypatch)
    config = tokenizer_config(eval_every=2, stuck_after_steps=3)
    with pytest.raises(DeltatokError):
        train_tokenizer(config)
    out = train_tokenizer(tokenizer_config(eval_every=2, stuck_after_steps=3, allow_stuck=True))
    assert isinstance(DeltaTok.from_pretrained(Path(out)).config, DeltaTokConfig)
