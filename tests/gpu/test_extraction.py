"""Pixels and features made on the device: the CPU's integers, a cache that equals its videos."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neighbours import load

from deltatok.extract.pixels import resize_bilinear, window_pixels
from deltatok.shards import PatchShards
from deltatok.shards.sampling import WindowDraw

CPU = torch.device("cpu")
SIZES = [  # height and width before and after
    ((240, 320), (256, 256)),
    ((720, 1280), (512, 512)),
    ((512, 1024), (256, 512)),  # halved
    ((721, 1283), (256, 256)),
    ((37, 1), (16, 16)),
    ((256, 256), (256, 256)),
]

Record = Callable[[str, object], None]
Need = Callable[..., None]


def video(num_frames: int, height: int, width: int) -> np.ndarray:
    """uint8 (num_frames, height, width, 3), read-only, of extremes and noise."""
    rng = np.random.default_rng([num_frames, height, width])
    frames = rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    frames[0, ::2], frames[-1, :, ::2] = 255, 0
    frames.flags.writeable = False
    return frames


def work_for(device: torch.device) -> torch.Tensor:
    """A matrix whose products keep the device busy."""
    size = 2048 if device.type == "cuda" and torch.version.cuda else 16
    return torch.ones(size, size, device=device)


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
def test_resized_pixels_are_the_cpus(
    device: torch.device, before: tuple[int, int], after: tuple[int, int]
) -> None:
    frames = torch.from_numpy(video(3, *before).copy()).permute(0, 3, 1, 2)
    there = resize_bilinear(frames.to(device), after)
    assert torch.equal(there.cpu(), resize_bilinear(frames, after))


@pytest.mark.parametrize("flipped", [False, True])
def test_staged_pixels_are_the_cpus_while_the_device_is_busy(
    device: torch.device, flipped: bool
) -> None:
    """Pinned memory is used again and again: none may be written over before it was copied."""
    frames = video(4, 120, 160)
    draws = [
        WindowDraw((0, 1, 2, 3), (0.0, 0.1, 0.2, 0.3), (at % 20, at % 30, 100, 129), flipped)
        for at in range(200)
    ]
    busy = work_for(device)
    found = []
    for draw in draws:
        busy = busy @ busy / len(busy)
        found.append(window_pixels(frames, draw, frame_size=64, device=device))
    for draw, pixels in zip(draws, found, strict=True):
        wanted = window_pixels(frames, draw, frame_size=64, device=CPU)
        assert torch.equal(pixels.cpu(), wanted)


def test_pixels_made_ahead_are_those_made_in_time(device: torch.device, need: Need) -> None:
    """On a stream and a thread of their own."""
    need("av")
    from deltatok.extract.decoding.clip import DecodedClip
    from deltatok.extract.features import PixelPrefetcher

    frames = dict(enumerate(video(32, 120, 160)))
    draws = [
        WindowDraw((at % 30, at % 30 + 1), (0.0, 0.1), (at % 20, at % 30, 100, 129), at % 2 == 0)
        for at in range(100)
    ]
    clips = [DecodedClip(str(number), "pyav", draws, frames) for number in range(3)]
    busy = work_for(device)
    with PixelPrefetcher(frame_size=64, device=device, num_ahead=8) as prefetcher:
        found = []
        for _, takes in prefetcher.clips(iter(clips)):
            for take in takes:
                busy = busy @ busy / len(busy)
                found.append(take().clone())
    assert len(found) == 300
    for draw, pixels in zip(draws * 3, found, strict=True):
        wanted = window_pixels(
            [frames[i] for i in draw.frame_index], draw, frame_size=64, device=CPU
        )
        assert torch.equal(pixels.cpu(), wanted)


Extract = Callable[..., Path]


@pytest.fixture(scope="module")
def extract(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Extract:
    """extract(device, field=value): a cache of five little clips, by a little backbone."""
    need("av", "zarr", "google_crc32c")
    from deltatok.extract.config import ExtractConfig
    from deltatok.extract.run import run_extraction
    from deltatok.pipeline.little_world.files import write_mp4

    folder = tmp_path_factory.mktemp("extraction")
    for number in range(5):
        write_mp4(folder / "clips" / f"{number}.mp4", video(40, 96, 128), 25)
    load("benchmarks/backbone_rate.py").make_backbone(folder / "backbone", "small")

    def made(device: str, **changed: Any) -> Path:
        out = folder / "-".join([device, *changed.values()])
        fields: dict[str, Any] = {
            "videos": (str(folder / "clips"),),
            "backbone": str(folder / "backbone"),
            "frame_size": 64,
            "num_windows": 3,
            "num_frames": 4,
            "frames_per_shard": 24,
            "batch_frames": 16,
            "workers": 1,
            "device": device,
            "out": str(out),
        }
        run_extraction(ExtractConfig(**fields, **changed))
        return out

    return made


@pytest.fixture(scope="module")
def on_the_cpu(extract: Extract) -> np.ndarray:
    """The tokens, float32 (W, T, N, D)."""
    return tokens(extract("cpu", autocast="float32"))


def tokens(cache: Path) -> np.ndarray:
    shards = PatchShards(cache)
    return shards.tokens(np.arange(len(shards))).astype(np.float32)


@pytest.mark.parametrize(
    ("autocast", "dtype", "most"), [("float32", "float16", 2e-3), ("bfloat16", "int8", 6e-2)]
)
def test_cached_features_are_those_made_anew(
    device: torch.device,
    extract: Extract,
    on_the_cpu: np.ndarray,
    record_property: Record,
    autocast: str,
    dtype: str,
    most: float,
) -> None:
    """By the audit, which extracts them again; and they are the CPU's but for rounding."""
    from deltatok.pipeline.audit import audit_cache
    from deltatok.pipeline.commands.shards import VerifyConfig

    cache = extract(str(device), autocast=autocast, dtype=dtype)
    videos, backbone = (str(cache.with_name(name)) for name in ("clips", "backbone"))
    report = audit_cache(
        VerifyConfig(
            dir=str(cache), audit=5, videos=(videos,), backbone=backbone, device=str(device)
        )
    )
    record_property("largest_error_made_anew", report.largest_error)
    assert not report.differing
    assert report.windows == 15
    error = float(np.linalg.norm(tokens(cache) - on_the_cpu) / np.linalg.norm(on_the_cpu))
    record_property("error_to_the_cpus_float32", error)
    assert error < most
