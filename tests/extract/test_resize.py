"""The resize gives OpenCV's integers: golden files made by OpenCV, and its rule written plainly."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deltatok.extract import pixels as resize
from deltatok.extract.pixels import resize_bilinear

GOLDEN = Path(__file__).parents[1] / "golden" / "08_eval"
CASES = json.loads((GOLDEN / "cv2_resize.json").read_text())["cases"]


def _opencv_rule(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """One plane, one pixel at a time, as OpenCV's fixed-point code does it."""
    old_height, old_width = image.shape
    resized = np.zeros((height, width), np.uint8)
    if (old_height, old_width) == (2 * height, 2 * width):
        for y, x in np.ndindex(height, width):
            resized[y, x] = (int(image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum()) + 2) >> 2
        return resized

    def place(index: int, old: int, new: int) -> tuple[int, float]:
        position = np.float32((index + 0.5) * (1.0 / (new / old)) - 0.5)
        first = math.floor(position)
        return first, np.float32(position - np.float32(first))

    def weights(fraction: float) -> tuple[int, int]:
        pair = (np.float32(1) - np.float32(fraction), np.float32(fraction))
        return round(float(pair[0] * 2048)), round(float(pair[1] * 2048))

    def columns(y: int, x: int) -> int:
        first, fraction = place(x, old_width, width)
        if first < 0 or first >= old_width - 1:
            return 2048 * int(image[y, min(max(first, 0), old_width - 1)])
        left, right = weights(fraction)
        return left * int(image[y, first]) + right * int(image[y, first + 1])

    for y, x in np.ndindex(height, width):
        first, fraction = place(y, old_height, height)
        above, below = (min(max(first + tap, 0), old_height - 1) for tap in (0, 1))
        top, bottom = weights(fraction)
        total = (top * (columns(above, x) >> 4) >> 16) + (bottom * (columns(below, x) >> 4) >> 16)
        resized[y, x] = (total + 2) >> 2
    return resized


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_resize_equals_opencv_in_every_integer(case: dict) -> None:
    image = load_file(GOLDEN / "cv2_resize_inputs.safetensors")[case["name"]]
    wanted = load_file(GOLDEN / "cv2_resize_outputs.safetensors")[case["name"]]
    resized = resize_bilinear(image.permute(2, 0, 1), (case["out_h"], case["out_w"]))
    assert torch.equal(resized.permute(1, 2, 0), wanted)


@settings(max_examples=60, deadline=None)
@given(
    old=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    new=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 2**32 - 1),
)
def test_vectorised_resize_equals_the_rule_pixel_by_pixel(
    old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    image = np.random.default_rng(seed).choice(np.array([0, 1, 127, 254, 255], np.uint8), old)
    resized = resize_bilinear(torch.from_numpy(image), new)
    assert np.array_equal(resized.numpy(), _opencv_rule(image, *new))


def test_exact_halving_is_the_mean_of_four_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 18), dtype=np.uint8)
    resized = resize_bilinear(torch.from_numpy(image), (6, 9))
    assert np.array_equal(resized.numpy(), _opencv_rule(image, 6, 9))


def test_a_window_is_resized_as_its_frames_are_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(0, 256, (3, 20, 30, 3), generator=generator, dtype=torch.uint8)
    planes = window.permute(0, 3, 1, 2)  # not contiguous, as a decoded window is
    together = resize_bilinear(planes, (16, 48))
    alone = [resize_bilinear(plane.contiguous(), (16, 48)) for plane in planes.flatten(0, 1)]
    assert torch.equal(together.flatten(0, 1), torch.stack(alone))


@pytest.mark.parametrize("size", [(10, 15), (8, 40), (64, 20)])
def test_a_window_at_once_as_on_a_gpu_equals_frame_by_frame(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(0, 256, (2, 3, 20, 30), generator=generator, dtype=torch.uint8)
    assert torch.equal(resize._resize(window, size), resize_bilinear(window, size))


def test_same_size_changes_nothing() -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(resize_bilinear(image, (16, 16)), image)


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (torch.zeros(4, 4), (2, 2), "uint8"),
        (torch.zeros((4, 0), dtype=torch.uint8), (2, 2), "4x0"),
        (torch.zeros((4, 4), dtype=torch.uint8), (0, 2), "0x2"),
    ],
)
def test_resize_refuses_what_it_cannot_do(
    image: torch.Tensor, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resize_bilinear(image, size)
