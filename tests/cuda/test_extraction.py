"""Extraction on the pretended device: the CPU's bytes, no race, host waits where it must."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pretended import PretendedDevice

from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.pipeline.commands.extract import VideosConfig
from deltatok.pipeline.fused import run_fused
from deltatok.shards import DeltaShards, PatchShards
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


def test_the_loop_waits_for_nothing_but_the_rows(cuda: PretendedDevice, make_config: Make) -> None:
    run_extraction(make_config(device="cuda", autocast="bfloat16"))
    assert PatchShards(make_config().out).num_windows == 15
    print(cuda.counts.table())
    assert not cuda.counts.waits_in("extract/pixels.py")


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
