"""Extraction on the pretended device: the CPU's bytes, no race, host waits where it must."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pretended import PretendedDevice

from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.pipeline.commands.extract import VideosConfig
from deltatok.pipeline.fused import run_fused
from deltatok.shards import DeltaShards
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok

Digests = Callable[[Path], dict[str, str]]
Make = Callable[..., ExtractConfig]

MODEL = DeltaTokConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_cache_is_the_cpus_byte_for_byte(
    cuda: PretendedDevice, make_config: Make, digests: Digests, tmp_path: Path, dtype: str
) -> None:
    made = {}
    for device in ("cpu", "cuda"):
        config = make_config(
            device=device, dtype=dtype, autocast="float32", out=str(tmp_path / device)
        )
        run_extraction(config)
        made[device] = digests(tmp_path / device)
    assert made["cuda"] == made["cpu"]


def test_batches_are_made_without_waiting(cuda: PretendedDevice, make_config: Make) -> None:
    """But for the rows, which a thread of their own waits for, waits are those of beginning."""
    counts = []
    for limit in (2, 6):
        cuda.counts.clear()
        out = make_config().out + str(limit)
        run_extraction(make_config(device="cuda", autocast="bfloat16", limit=limit, out=out))
        counts.append(Counter(cuda.counts.waits))
    more = counts[1] - counts[0]
    assert {why for why, _ in more} <= {"event", "event, with work behind it"}
    assert {line.partition(":")[0] for _, line in more} == {"extract/features.py"}


def test_decoders_are_not_forked(
    cuda: PretendedDevice, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork of a process that uses CUDA cannot use it; they are programs of their own."""

    def refused() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", refused)
    run_extraction(make_config(device="cuda", workers=2, limit=2))


def test_the_fused_mode_writes_the_cpus_delta_tokens(
    cuda: PretendedDevice, make_config: Make, tmp_path: Path
) -> None:
    DeltaTok(MODEL).save_pretrained(tmp_path / "tokenizer", {})
    found = {}
    for device in ("cpu", "cuda"):
        config = make_config(device=device, autocast="float32", out=str(tmp_path / device))
        fused = VideosConfig(**vars(config), tokenizer=str(tmp_path / "tokenizer"))
        run_fused(fused)
        found[device] = DeltaShards(tmp_path / device).load()[0]
    np.testing.assert_allclose(found["cuda"], found["cpu"], atol=2e-3)
