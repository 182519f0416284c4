"""Pixels of a window: crop, then resize, then flip, and nothing read twice or written to."""

import numpy as np
import pytest
import torch

from deltatok.extract.pixels import resize_bilinear, window_pixels
from deltatok.shards.sampling import WindowDraw

CPU = torch.device("cpu")


def _draw(crop: tuple[int, int, int, int], *, flipped: bool = False) -> WindowDraw:
    return WindowDraw(frame_index=(0, 1), timestamps_s=(0.0, 0.04), crop=crop, flipped=flipped)


@pytest.fixture
def frames() -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    frames.flags.writeable = False
    return frames


@pytest.mark.parametrize("flipped", [False, True])
def test_pixels_are_crop_then_resize_then_flip(frames: np.ndarray, flipped: bool) -> None:
    pixels = window_pixels(
        frames, _draw((3, 5, 30, 41), flipped=flipped), frame_size=16, device=CPU
    )
    crop = torch.from_numpy(frames[:, 3:33, 5:46].copy()).permute(0, 3, 1, 2)
    expected = resize_bilinear(crop, (16, 16))
    assert torch.equal(pixels, expected.flip(-1) if flipped else expected)


def test_whole_frame_at_its_own_size_is_untouched(frames: np.ndarray) -> None:
    square = frames[:, :, :40]
    pixels = window_pixels(square, _draw((0, 0, 40, 40)), frame_size=40, device=CPU)
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), square)


@pytest.mark.parametrize("crop", [(-1, 0, 10, 10), (0, 51, 10, 10), (31, 0, 10, 10)])
def test_a_crop_outside_of_the_frame_is_refused(
    frames: np.ndarray, crop: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ValueError, match="leaves the frame of 40x60"):
        window_pixels(frames, _draw(crop), frame_size=16, device=CPU)
