"""Windows are drawn as the paper draws them, and always the same ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltatok.shards.errors import ClipError
from deltatok.shards.sampling import (
    CROP_TRIES,
    SamplingPolicy,
    draw_windows,
    middle_frame_indices,
    random_crop,
    sample_frame_indices,
    uniform_windows,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "08_eval"
SAMPLED = json.loads((GOLDEN / "sample_frame_indices.json").read_text())["sample_frame_indices"]
MIDDLE = json.loads((GOLDEN / "middle_frame_indices.json").read_text())[
    "compute_middle_frame_indices"
]
DENSE = np.arange(10_000) / 1000
"""Ten seconds at 1000 frames a second: what is drawn is hardly moved by rounding to frames."""

MakePolicy = Callable[..., SamplingPolicy]


@pytest.mark.parametrize("case", SAMPLED, ids=lambda case: f"seed{case['seed']}")
def test_sampled_frames_are_the_releases(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    low, high = case["time_stride_range"]
    gaps_s = torch.rand(case["num_frames"] - 1, generator=generator) * (high - low) + low
    indices = sample_frame_indices(
        np.array(case["timestamps"], np.float32),
        gaps_s=gaps_s.numpy(),
        start_fraction=torch.rand(1, generator=generator).item(),
    )
    assert indices.tolist() == case["result"]["indices"]


@pytest.mark.parametrize("case", MIDDLE, ids=lambda case: f"{len(case['timestamps'])}frames")
def test_middle_frames_are_the_releases(case: dict) -> None:
    indices = middle_frame_indices(
        np.array(case["timestamps"]),
        num_frames=case["num_frames"],
        time_stride_s=case["time_stride_seconds"],
    )
    assert indices.tolist() == case["result"]


def test_draws_never_change(make_policy: MakePolicy) -> None:
    # A cache made last year must be gone on with today: these numbers are part of the format.
    window = draw_windows(make_policy(seed=7), "a/clip.mp4", np.arange(250) / 25, 240, 320)[1]
    assert window.frame_index == (85, 92, 95, 100, 105, 110, 114, 117)
    assert (window.crop, window.flipped) == ((3, 21, 233, 288), True)


def test_draws_depend_on_seed_key_and_window_only(make_policy: MakePolicy) -> None:
    def draw(key: str = "k", **changes: int) -> list:
        return draw_windows(make_policy(**changes), key, DENSE, 240, 320)

    assert draw(num_windows=2) == draw(num_windows=4)[:2]
    windows = {*draw(), *draw(key="other"), *draw(seed=1)}
    assert len(windows) == 12


@given(
    gaps=st.lists(st.floats(0.001, 2), min_size=1, max_size=60),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_window_lies_inside_its_clip(
    make_policy: MakePolicy, gaps: list[float], height: int, width: int, seed: int
) -> None:
    times_s = np.concatenate([[0.0], np.cumsum(gaps)])
    for window in draw_windows(make_policy(seed=seed), "k", times_s, height, width):
        assert list(window.frame_index) == sorted(window.frame_index)
        assert list(window.timestamps_s) == times_s[list(window.frame_index)].tolist()
        top, left, crop_height, crop_width = window.crop
        assert 0 <= top <= top + crop_height <= height
        assert 0 <= left <= left + crop_width <= width
        assert crop_height > 0
        assert crop_width > 0


def test_gaps_start_and_flips_have_the_papers_distribution(make_policy: MakePolicy) -> None:
    windows = draw_windows(make_policy(num_windows=2000), "k", DENSE, 240, 320)
    times_s = np.array([window.timestamps_s for window in windows])
    gaps_s = np.diff(times_s, axis=1)
    assert 1 / 25 - 0.002 < gaps_s.min() < 0.045
    assert 0.33 < gaps_s.max() < 1 / 3 + 0.002
    assert gaps_s.mean() == pytest.approx((1 / 25 + 1 / 3) / 2, rel=0.01)
    room_s = DENSE[-1] - (times_s[:, -1] - times_s[:, 0])
    starts = np.sort(times_s[:, 0] / room_s)
    assert np.abs(starts - np.linspace(0, 1, len(starts))).max() < 0.04
    assert np.mean([window.flipped for window in windows]) == pytest.approx(0.5, abs=0.04)


def test_crops_have_the_papers_distribution(make_policy: MakePolicy) -> None:
    windows = draw_windows(make_policy(num_windows=2000), "k", DENSE, 1000, 1000)
    _, left, height, width = np.array([window.crop for window in windows]).T
    area, log_ratio = height * width / 1e6, np.log(width / height)
    assert 0.59 < area.min() < 0.61
    assert log_ratio.min() == pytest.approx(math.log(3 / 4), abs=0.02)
    assert log_ratio.max() == pytest.approx(math.log(4 / 3), abs=0.02)
    assert log_ratio.mean() == pytest.approx(0, abs=0.02)
    assert (left / np.maximum(1000 - width, 1)).mean() == pytest.approx(0.5, abs=0.03)


def test_crop_by_hand() -> None:
    draws = np.zeros((CROP_TRIES, 4))
    draws[0] = 1 - 1e-9, 1 - 1e-9, 0, 0  # the whole area at 4:3 is too wide for a square
    draws[1] = 0.5, 0.5, 0.25, 0.75  # 80 % of the area, square: 89 of 100
    assert random_crop(100, 100, scale=(0.6, 1.0), ratio=(3 / 4, 4 / 3), draws=draws) == (
        math.floor(0.25 * 12),
        math.floor(0.75 * 12),
        89,
        89,
    )


@pytest.mark.parametrize(
    ("height", "width", "crop"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))]
)
def test_crop_of_a_strip_is_central(
    height: int, width: int, crop: tuple[int, int, int, int]
) -> None:
    draws = np.full((CROP_TRIES, 4), 0.5)
    assert random_crop(height, width, scale=(0.6, 1), ratio=(3 / 4, 4 / 3), draws=draws) == crop


def test_clip_shorter_than_a_window_repeats_frames_with_true_times(make_policy: MakePolicy) -> None:
    times_s = np.array([0.0, 0.04, 0.08])
    for window in draw_windows(make_policy(), "k", times_s, 64, 64):
        assert window.frame_index[0] == 0
        assert window.frame_index[-1] == 2
        assert window.timestamps_s == tuple(times_s[list(window.frame_index)].tolist())


@pytest.mark.parametrize("times_s", [[0.0], [0.0, 0.0, 0.0]])
def test_still_is_unusable(make_policy: MakePolicy, times_s: list[float]) -> None:
    with pytest.raises(ClipError, match="shows 1 frame; a window needs at least 2"):
        draw_windows(make_policy(), "k", np.array(times_s), 64, 64)


def test_uniform_windows_are_consecutive_nearest_frames() -> None:
    times_s = np.arange(61) / 15
    rows = uniform_windows(times_s, fps=5, num_frames=7)
    assert rows.tolist() == np.arange(0, 63, 3).reshape(3, 7).tolist()


@given(
    gaps=st.lists(st.floats(0.001, 1), min_size=1, max_size=50),
    fps=st.floats(0.5, 40),
    num_frames=st.integers(1, 8),
)
def test_uniform_windows_match_the_plain_rule(
    gaps: list[float], fps: float, num_frames: int
) -> None:
    times_s = np.concatenate([[0.0], np.cumsum(gaps)])
    points = []
    while len(points) / fps <= times_s[-1] + 1e-6 / fps:
        points.append(len(points) / fps)
    nearest = [int(np.abs(times_s - point).argmin()) for point in points]
    whole = len(nearest) // num_frames * num_frames
    rows = uniform_windows(times_s, fps=fps, num_frames=num_frames)
    assert rows.ravel().tolist() == nearest[:whole]


def test_uniform_takes_the_whole_frame_unflipped(make_policy: MakePolicy) -> None:
    policy = make_policy(policy="uniform", fps=5.0, num_frames=4)
    windows = draw_windows(policy, "k", np.arange(50) / 25, 48, 64)
    assert [window.frame_index for window in windows] == [(0, 5, 10, 15), (20, 25, 30, 35)]
    assert {(window.crop, window.flipped) for window in windows} == {((0, 0, 48, 64), False)}


def test_uniform_refuses_a_clip_without_one_window(make_policy: MakePolicy) -> None:
    policy = make_policy(policy="uniform", fps=5.0, num_frames=7)
    words = r"shows 12 frames over 0\.367 s; a window of 7 frames at 5 a second needs 1\.200 s"
    with pytest.raises(ClipError, match=words):
        draw_windows(policy, "k", np.arange(12) / 30, 48, 64)


def test_uniform_refuses_times_without_frames(make_policy: MakePolicy) -> None:
    policy = make_policy(policy="uniform", fps=5.0)
    with pytest.raises(ClipError, match=r"shows 2 frames over 1e\+09 s, too few for 5 a second"):
        draw_windows(policy, "k", np.array([0.0, 1e9]), 48, 64)
