"""run_extraction: the cache holds the features of the pixels, and what it could not read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.extract import ledger, run
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.features import PixelPrefetcher
from deltatok.extract.pixels import resize_bilinear
from deltatok.extract.run import ExtractionSummary, clips_per_shard, run_extraction
from deltatok.shards import PatchShards, TooManyQuarantined, read_cache_info
from deltatok.shards.records import read_done

FPS = 25


def _frames(write_clip: Callable[..., np.ndarray], folder: Path, key: str) -> np.ndarray:
    return write_clip(folder / key, seed=int(key[1]))


def test_cached_features_equal_features_computed_online(
    finished: Path, backbone: Backbone, write_clip: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    patches = PatchShards(finished)
    assert len(patches) == 15
    stored = patches.tokens(range(15))
    for window in range(15):
        frames = _frames(write_clip, tmp_path, patches.keys[patches.clip_index[window]])
        top, left, height, width = patches.crop[window].astype(int)
        chosen = frames[patches.frame_index([window])[0]]
        crop = chosen[:, top : top + height, left : left + width]
        pixels = resize_bilinear(torch.tensor(crop).permute(0, 3, 1, 2), (32, 32))
        if patches.flipped[window]:
            pixels = pixels.flip(-1)
        online = backbone.tokens(pixels).numpy()
        # float16 keeps 11 bits; the last digits of float32 differ with the batch shape.
        assert np.abs(stored[window] - online).max() <= 2**-11 * np.abs(online).max()


def test_crops_and_flips_of_both_kinds_are_in_the_cache(finished: Path) -> None:
    patches = PatchShards(finished)
    assert {True, False} == set(patches.flipped.tolist())
    assert len(np.unique(patches.crop, axis=0)) > 1


def test_timestamps_are_those_of_the_frames(finished: Path) -> None:
    patches = PatchShards(finished)
    expected = patches.frame_index(range(15)) / np.float32(FPS)
    assert np.allclose(patches.timestamps_s(range(15)), expected, atol=1e-4)


def test_black_tokens_are_stored(finished: Path, backbone: Backbone) -> None:
    assert np.array_equal(PatchShards(finished).black, backbone.black_tokens(32).numpy())


def test_quarantine_names_the_broken_clip(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "quarantine.jsonl").read_text().splitlines()]
    assert [line["clip"] for line in lines] == ["broken.mp4"]


def test_cache_json_holds_the_identity_and_the_totals(finished: Path, backbone: Backbone) -> None:
    info = read_cache_info(finished)
    assert info.complete
    assert info.counts == {"clips": 6, "quarantined": 1, "windows": 15, "frames": 60, "shards": 3}
    assert info.identity["backbone"]["weights_sha256"] == backbone.identity()["weights_sha256"]
    assert info.identity["sampling"]["policy"] == "windows"
    assert "DINOv3 License" in info.licence
    assert info.backbone["name"] == "backbone"  # the folder's name, no path of this machine


def test_second_run_does_nothing(
    finished: Path, make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    summary = run_extraction(make_config(out=str(finished)), backbone=backbone)
    assert summary.shards_done_now == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_summary_counts_what_the_cache_holds(
    make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config()
    summary = run_extraction(config, backbone=backbone)
    assert isinstance(summary, ExtractionSummary)
    assert (summary.clips, summary.quarantined, summary.windows, summary.frames) == (6, 1, 15, 60)
    files = list(Path(config.out).rglob("*.zarr.zip"))
    assert summary.bytes == sum(path.stat().st_size for path in files)
    assert summary.shards_done_now == summary.shards == 3
    assert summary.slowest_stage is not None
    assert summary.slowest_stage.endswith("%")


def test_worker_count_changes_no_byte(
    finished: Path,
    make_config: Callable[..., ExtractConfig],
    backbone: Backbone,
    digests: Callable[[Path], dict[str, str]],
) -> None:
    config = make_config(workers=3)
    run_extraction(config, backbone=backbone)
    assert digests(Path(config.out)) == digests(finished)


def test_backbone_sees_one_batch_shape_only(
    make_config: Callable[..., ExtractConfig], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    original = Backbone.tokens

    def spy(self: Backbone, frames: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(frames.shape))
        return original(self, frames)

    monkeypatch.setattr(Backbone, "tokens", spy)
    run_extraction(make_config(num_windows=1, frames_per_shard=4), backbone=backbone)
    assert shapes[0] == (1, 3, 32, 32)  # the black frame
    assert set(shapes[1:]) == {(8, 3, 32, 32)}
    assert len(shapes[1:]) == 6  # six shards of one window or none: no batch spans two


def test_uniform_sampling_takes_whole_frames_at_a_fixed_rate(
    make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config(sampling="uniform", fps=5.0, num_frames=3)
    run_extraction(config, backbone=backbone)
    patches = PatchShards(config.out)
    assert len(patches) == 10  # 1.56 s of 5 frames a second: two windows a clip
    assert not patches.flipped.any()
    assert np.array_equal(np.unique(patches.crop, axis=0), [[0, 0, 48, 80]])
    order = np.lexsort((patches.frame_index(range(10))[:, 0], patches.clip_index))
    assert np.array_equal(patches.frame_index(order[:2]), [[0, 5, 10], [15, 20, 25]])


def test_pixels_made_ahead_change_no_byte(
    finished: Path,
    make_config: Callable[..., ExtractConfig],
    backbone: Backbone,
    digests: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: a thread makes them, five windows ahead, across the ends of shards."""

    def make_stage(**options: Any) -> PixelPrefetcher:
        return PixelPrefetcher(**(options | {"num_ahead": 5}))

    monkeypatch.setattr(run, "PixelPrefetcher", make_stage)
    config = make_config()
    run_extraction(config, backbone=backbone)
    assert digests(Path(config.out)) == digests(finished)


def test_batch_size_is_no_part_of_the_identity(
    finished: Path, make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config(batch_frames=None)
    run_extraction(config, backbone=backbone)
    assert read_cache_info(config.out).fingerprint == read_cache_info(finished).fingerprint


def test_bfloat16_is_stored_rounded(
    finished: Path, make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config(dtype="bfloat16")
    run_extraction(config, backbone=backbone)
    coarse, fine = (PatchShards(path).tokens(range(15)) for path in (config.out, finished))
    assert 0 < np.abs(coarse - fine).max() <= 2**-7 * np.abs(fine).max()
    assert not np.any(coarse.view(np.uint32) & 0xFFFF)


def test_too_many_quarantined_finishes_the_cache_and_says_so(
    make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config(max_quarantined=0.05)
    with pytest.raises(TooManyQuarantined, match=r"1 of 6 clips .*quarantine\.jsonl"):
        run_extraction(config, backbone=backbone)
    assert len(PatchShards(config.out)) == 15
    with pytest.raises(TooManyQuarantined):  # again, although there is nothing left to do
        run_extraction(config, backbone=backbone)


def test_all_clips_broken_leaves_a_sound_empty_cache(
    make_config: Callable[..., ExtractConfig], backbone: Backbone, tmp_path: Path
) -> None:
    for name in ("a.mp4", "b.mkv"):
        (tmp_path / "bad" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(b"nothing")
    config = make_config(videos=(str(tmp_path / "bad"),))
    with pytest.raises(TooManyQuarantined, match="2 of 2 clips"):
        run_extraction(config, backbone=backbone)
    assert len(PatchShards(config.out)) == 0
    assert sorted(path.name for path in (Path(config.out) / "shards").iterdir()) == ["000000.json"]


def test_a_large_run_stops_early_once_too_many_are_certain(
    make_config: Callable[..., ExtractConfig], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "EARLY_STOP_CLIPS", 1)
    config = make_config(max_quarantined=0.05, frames_per_shard=1)
    with pytest.raises(TooManyQuarantined, match="stopped early"):
        run_extraction(config, backbone=backbone)
    assert (Path(config.out) / "quarantine.jsonl").read_text().count("\n") == 1
    assert not read_cache_info(config.out).complete


def test_retry_quarantined_makes_the_shard_again(
    make_config: Callable[..., ExtractConfig],
    backbone: Backbone,
    write_clip: Callable[..., np.ndarray],
    digests: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    video = tmp_path / "videos" / "late.mp4"
    write_clip(tmp_path / "videos" / "c0.mp4", seed=0)
    write_clip(video, seed=9)
    good = video.read_bytes()
    whole = make_config(videos=(str(video.parent),), out=str(tmp_path / "whole"))
    run_extraction(whole, backbone=backbone)

    video.write_bytes(bytes(len(good)))
    config = replace(whole, out=str(tmp_path / "out"), max_quarantined=0.5)
    assert run_extraction(config, backbone=backbone).quarantined == 1
    video.write_bytes(good)
    assert run_extraction(config, backbone=backbone).shards_done_now == 0
    summary = run_extraction(replace(config, retry_quarantined=True), backbone=backbone)
    assert (summary.quarantined, summary.shards_done_now) == (0, 1)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, 2),
        ({"frames_per_shard": 1}, 1),
        ({"sampling": "uniform", "fps": 5.0, "frames_per_shard": 512}, 32),
    ],
)
def test_shards_hold_whole_clips(
    make_config: Callable[..., ExtractConfig], change: dict, wanted: int
) -> None:
    assert clips_per_shard(make_config(**change)) == wanted


def test_every_clip_has_one_done_record(finished: Path) -> None:
    records = [read_done(finished, shard) for shard in range(3)]
    assert sum(record.clips for record in records if record is not None) == 5
    keys = PatchShards(finished).keys
    assert sorted(keys) == [f"c{number}.mp4" for number in range(5)]
