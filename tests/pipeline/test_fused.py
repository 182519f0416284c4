"""Delta tokens straight from videos are those that float16 patch shards would have given."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.pipeline import fused
from deltatok.pipeline.commands.extract import VideosConfig
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.fused import DeltaShardWriter
from deltatok.shards import DeltaShards, DeltatokError, read_cache_info
from deltatok.shards.records import done_shards
from deltatok.shards.running.interrupts import StopRequest
from deltatok.shards.tools.verify import verify_cache
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok

Fails = Callable[..., None]
Words = Callable[..., list[str]]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("timings.jsonl", ".lock")
    }


@pytest.fixture
def videos_words(tiny_inputs: Path) -> list[str]:
    """Flags of the extraction of which every test here makes some cache; three small shards."""
    words = ["--videos", str(tiny_inputs / "world" / "train"), "--frame-size", "32"]
    words += ["--backbone", str(tiny_inputs / "backbone"), "--workers", "1"]
    return [*words, "--frames-per-shard", "32", "--seed", "3"]


@pytest.fixture
def fused_words(tiny_run: Path, tmp_path: Path, videos_words: list[str]) -> list[str]:
    """Flags of the fused run into tmp_path/fused."""
    words = ["--tokenizer", str(tiny_run / "tokenizer"), "--out", str(tmp_path / "fused")]
    return [*videos_words, *words]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fused_cache_is_that_of_float16_patch_shards(
    tiny_run: Path,
    tmp_path: Path,
    videos_words: list[str],
    fused_words: list[str],
    precision: str,
) -> None:
    patches, deltas = tmp_path / "patches", tmp_path / "deltas"
    assert extract([*videos_words, "--out", str(patches)]) == 0
    tokenizer = str(tiny_run / "tokenizer")
    words = ["--patches", str(patches), "--tokenizer", tokenizer, "--out", str(deltas)]
    assert extract([*words, "--autocast", precision]) == 0
    assert extract([*fused_words, "--tokenizer-autocast", precision]) == 0
    assert len(done_shards(tmp_path / "fused")) == 3
    assert digests(tmp_path / "fused") == digests(deltas)
    assert not list((tmp_path / "fused").rglob("*.zarr.zip"))
    assert verify_cache(tmp_path / "fused", deep=True).problems == []


def test_another_batch_shape_changes_a_token_by_rounding_at_most(
    tmp_path: Path, fused_words: list[str]
) -> None:
    assert extract(fused_words) == 0
    words = [*fused_words, "--batch-frames", "24", "--out", str(tmp_path / "other")]
    assert extract(words) == 0
    one, other = (DeltaShards(tmp_path / name).load()[0] for name in ("fused", "other"))
    assert np.abs(one.astype(np.float32) - other.astype(np.float32)).max() < 4e-3


def test_fused_identity_names_the_patch_tokens_as_float16(
    tmp_path: Path, fused_words: list[str]
) -> None:
    assert extract(fused_words) == 0
    info = read_cache_info(tmp_path / "fused")
    assert info.identity["patches"]["storage"] == {"dtype": "float16"}
    assert info.parent_fingerprint is not None


def test_stopped_fused_run_goes_on_to_the_same_bytes(
    tmp_path: Path, fused_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract(fused_words) == 0
    whole = digests(tmp_path / "fused")
    words = [*fused_words, "--out", str(tmp_path / "cut")]
    checks: list[None] = []

    def check(self: StopRequest) -> None:
        checks.append(None)
        if len(checks) == 16:
            self.ask("by a test")
            original(self)

    original = StopRequest.check
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", check)
        assert extract(words) == 75
    assert len(done_shards(tmp_path / "cut")) < 3
    assert extract(words) == 0
    assert digests(tmp_path / "cut") == whole


def test_second_fused_run_encodes_nothing(
    tmp_path: Path, fused_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract(fused_words) == 0
    monkeypatch.setattr(fused, "write_delta_shard", None)
    assert extract(fused_words) == 0


def test_too_many_broken_clips_end_with_code_3(
    tiny_inputs: Path, tmp_path: Path, fused_words: list[str], fails: Fails
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    clip = next((tiny_inputs / "world" / "train").glob("*.mp4"))
    (tmp_path / "in" / "sound.mp4").write_bytes(clip.read_bytes())
    words = [*fused_words, "--videos", str(tmp_path / "in")]
    fails(extract, words, 3, "1 of 2 clips")
    assert DeltaShards(tmp_path / "fused").num_windows == 4


def test_tokenizer_of_another_width_is_refused_before_anything_is_written(
    tmp_path: Path, fused_words: list[str], fails: Fails
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DeltaTok(DeltaTokConfig(**sizes, intermediate_size=16))
    model.save_pretrained(tmp_path / "other", {})
    words = [*fused_words, "--tokenizer", str(tmp_path / "other")]
    fails(extract, words, 4, "hidden_size is 8")
    assert not (tmp_path / "fused").exists()


def test_videos_and_patches_together_are_refused(fused_words: list[str], fails: Fails) -> None:
    fails(extract, [*fused_words, "--patches", "cache"], 2, "--videos and --patches", "one of them")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--sampling", "uniform", "--fps", "5"], "--patches and --tokenizer"),
        (["--dtype", "bfloat16"], "rounded to float16"),
    ],
)
def test_what_the_fused_mode_cannot_do_is_refused(
    fused_words: list[str], words: list[str], text: str, fails: Fails
) -> None:
    fails(extract, [*fused_words, *words], 2, text)


def test_tokenizer_autocast_without_tokenizer_is_refused(
    videos_words: list[str], tmp_path: Path, fails: Fails
) -> None:
    words = [*videos_words, "--out", str(tmp_path / "o"), "--tokenizer-autocast", "bfloat16"]
    fails(extract, words, 2, "without a tokenizer")


def test_patch_tokens_beyond_float16_are_named(tiny_run: Path, tmp_path: Path) -> None:
    config = VideosConfig(
        videos=("v",), out=str(tmp_path / "o"), tokenizer=str(tiny_run / "tokenizer"), device="cpu"
    )
    writer = DeltaShardWriter.from_config(config)
    patches = read_cache_info(tiny_run / "patches")
    writer.describe(patches)
    writer.begin(tmp_path, torch.zeros(4, 16))
    z = writer.convert(torch.full((1, 8, 4, 16), 1e6))
    assert not z.isfinite().all()
    with pytest.raises(DeltatokError, match=r"512 patch token values .* beyond the range"):
        raise writer.explained(DeltatokError("not finite"))
