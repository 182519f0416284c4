"""Pixels made ahead are those made in time, in order, bounded, and never in the way of an end."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.features import PixelPrefetcher
from deltatok.shards.records import Quarantined
from deltatok.shards.sampling import WindowDraw

CPU = torch.device("cpu")
S = 16


def _clip(key: str, num_windows: int, *, crop: int = 12) -> DecodedClip:
    rng = np.random.default_rng(num_windows)
    frames = rng.integers(0, 256, (num_windows + 1, 20, 24, 3), dtype=np.uint8)
    draws = [
        WindowDraw((i, i + 1), (0.0, 0.04), (1, 2, crop, 13), True) for i in range(num_windows)
    ]
    return DecodedClip(key, "pyav", draws, dict(enumerate(frames)))


CLIPS: list[DecodedClip | Quarantined] = [
    _clip("a", 3),
    Quarantined(clip="b", stage="decode", reason="bad", attempts=2),
    _clip("c", 9),
    _clip("d", 1),
]


def _all(num_ahead: int) -> tuple[list[str], list[torch.Tensor]]:
    keys, pixels = [], []
    with PixelPrefetcher(frame_size=S, device=CPU, num_ahead=num_ahead) as prefetcher:
        for clip, takes in prefetcher.clips(iter(CLIPS)):
            keys.append(clip.key if isinstance(clip, DecodedClip) else clip.clip)
            pixels += [take() for take in takes]
    return keys, pixels


@pytest.mark.parametrize("num_ahead", [1, 2, 5, 100])
def test_pixels_made_ahead_are_those_made_in_time(num_ahead: int) -> None:
    keys, pixels = _all(num_ahead)
    wanted_keys, wanted = _all(0)
    assert keys == wanted_keys == ["a", "b", "c", "d"]
    assert len(pixels) == len(wanted) == 13
    assert all(torch.equal(*pair) for pair in zip(pixels, wanted, strict=True))


@pytest.mark.parametrize(("num_ahead", "num_read"), [(0, 1), (1, 3), (9, 3), (10, 4)])
def test_no_more_clips_are_read_than_pixels_are_wanted(num_ahead: int, num_read: int) -> None:
    read = []

    def source() -> Iterator[DecodedClip | Quarantined]:
        for clip in CLIPS:
            read.append(clip)
            yield clip

    with PixelPrefetcher(frame_size=S, device=CPU, num_ahead=num_ahead) as prefetcher:
        next(prefetcher.clips(source()))
        assert len(read) == num_read


def test_only_so_many_windows_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    third = threading.Event()

    def make(*_: object, **__: object) -> torch.Tensor:
        made.append(1)
        if len(made) == 3:
            third.set()
        return torch.zeros(1)

    monkeypatch.setattr("deltatok.extract.features.window_pixels", make)
    with PixelPrefetcher(frame_size=S, device=CPU, num_ahead=2) as prefetcher:
        _, pixels = next(prefetcher.clips(iter([_clip("a", 50)])))
        assert not third.wait(0.2)
        pixels.popleft()()
        assert third.wait(10)


def test_leaving_early_ends_the_thread() -> None:
    with PixelPrefetcher(frame_size=S, device=CPU, num_ahead=1) as prefetcher:
        next(prefetcher.clips(iter([_clip("a", 50)])))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pixels")]


def test_what_goes_wrong_ahead_is_raised_where_the_pixels_are_taken() -> None:
    with PixelPrefetcher(frame_size=S, device=CPU, num_ahead=1) as prefetcher:
        _, pixels = next(prefetcher.clips(iter([_clip("a", 1, crop=100)])))
        with pytest.raises(ValueError, match="leaves the frame"):
            pixels.popleft()()
