"""Frames that are no squares: what is stored of them, how they are drawn; sizes as typed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.datasets.windows import EvaluationPolicy
from deltatok.extract.identity import cache_identity
from deltatok.extract.pixels import window_pixels
from deltatok.extract.run import run_extraction
from deltatok.shards.errors import UsageError
from deltatok.shards.patches.reader import PatchShards
from deltatok.shards.sampling import draw_windows
from deltatok.shards.schema import load

ConfigMaker = Callable[..., ExtractConfig]
CPU = torch.device("cpu")


def test_a_cache_of_rectangles_holds_their_tokens_row_by_row(
    make_config: ConfigMaker, backbone: Backbone, clips: Path, write_clip: Callable[..., np.ndarray]
) -> None:
    config = make_config(frame_size=(32, 64))
    run_extraction(config, backbone=backbone)
    cache = PatchShards(config.out)
    assert cache.grid == (2, 4)
    assert cache.info.identity["preprocessing"]["frame_size"] == [32, 64]
    assert cache.black.shape == (8, backbone.hidden_size)
    window = int(np.flatnonzero(cache.clip_index == cache.keys.index("c1.mp4"))[0])
    frames = write_clip(clips.parent / "again.mp4", seed=1)
    draws = draw_windows(config.sampling_policy(), "c1.mp4", np.arange(40) / 25, *frames.shape[1:3])
    stored = tuple(cache.crop[window].tolist())
    (draw,) = [d for d in draws if tuple(map(float, d.crop)) == stored]
    seen = [frames[index] for index in draw.frame_index]
    pixels = window_pixels(seen, draw, frame_size=(32, 64), device=CPU)
    assert pixels.shape == (4, 3, 32, 64)
    wanted = backbone.tokens(pixels).to(torch.float16).numpy()
    np.testing.assert_allclose(cache.tokens([window])[0], wanted, rtol=2e-3, atol=2e-3)


def test_crops_are_as_wide_as_the_frames(make_config: ConfigMaker) -> None:
    def ratios(frame_size: object) -> np.ndarray:
        config = make_config(frame_size=frame_size, num_windows=200, crop_scale=(0.1, 0.3))
        draws = draw_windows(config.sampling_policy(), "c", np.arange(9) / 25, 1000, 2000)
        return np.array([draw.crop[3] / draw.crop[2] for draw in draws])

    square, wide = ratios(32), ratios((32, 64))
    assert np.all((square > 0.74) & (square < 1.35))
    np.testing.assert_allclose(wide, 2 * square, rtol=0.02)


def test_a_square_typed_as_a_rectangle_is_the_same_cache(
    make_config: ConfigMaker, backbone: Backbone
) -> None:
    fingerprints = set()
    for size in (32, (32, 32)):
        config = make_config(frame_size=size)
        fingerprints.add(cache_identity(config, config.sampling_policy(), backbone).fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("typed", "size"),
    [("448x896", (448, 896)), ("448,896", (448, 896)), ([448, 896], (448, 896)), ("512", 512)],
)
def test_sizes_as_they_are_typed(typed: object, size: object) -> None:
    config = load(ExtractConfig, {"videos": "v", "out": "o", "frame_size": typed}, where="test")
    assert config.frame_size == size


@pytest.mark.parametrize("typed", ["3,6,9", ["3,6,9"], ["3", "6", "9"], [3, 6, 9]])
def test_layers_as_they_are_typed(typed: object) -> None:
    config = load(ExtractConfig, {"videos": "v", "out": "o", "layers": typed}, where="test")
    assert config.layers == (3, 6, 9)


@pytest.mark.parametrize("typed", ["448x", "x", "1x2x3", "448.5x896", "0x16", "-16", "0"])
def test_sizes_that_are_none_are_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="frame_size"):
        load(ExtractConfig, {"videos": "v", "out": "o", "frame_size": typed}, where="test")


@pytest.mark.parametrize("size", [(40, 64), (32, 60)])
def test_a_side_off_the_patch_grid_is_refused(backbone: Backbone, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"frame size (40|60): wanted a multiple"):
        backbone.grid(size)


def test_targets_are_seen_whole_in_rectangles_and_in_squares_otherwise() -> None:
    wide = EvaluationPolicy(
        dataset="d", num_frames=2, num_context=1, stride_s=0.5, fps=2, frame_size=(32, 64)
    )
    times_s = np.arange(4) / 2
    (whole,) = wide.draw((1, 3), times_s, 100, 200)
    assert whole.source_crop == (0, 0, 100, 200)
    assert whole.square is None
    assert "max_aspect_ratio" not in wide.identity()
    assert len(replace(wide, frame_size=32).draw((1, 3), times_s, 100, 200)) == 2
    kitti = replace(wide, region="kb")
    (part,) = kitti.draw((1, 3), times_s, 375, 1242)
    assert part.source_crop == (23, 13, 352, 1216)
