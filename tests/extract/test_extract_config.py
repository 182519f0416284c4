"""An extraction that cannot be meant is refused before anything is opened."""

import pytest

from deltatok.extract.config import ExtractConfig
from deltatok.shards.errors import UsageError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"videos": ()}, "videos: none given"),
        ({"out": ""}, "out: empty"),
        ({"num_frames": 0}, "num_frames: got 0, wanted 1 or more"),
        ({"batch_frames": 0}, "batch_frames: got 0, wanted 1 or more"),
        ({"workers": 0}, "workers: got 0, wanted 1 or more"),
        ({"decode_timeout_s": 0.0}, "decode_timeout_s: got 0.0, wanted > 0"),
        ({"decode_timeout_s": float("nan")}, "decode_timeout_s: got nan"),
        ({"flip_probability": 1.5}, r"flip_probability: got 1.5, wanted 0..1"),
        ({"max_quarantined": -0.1}, r"max_quarantined: got -0.1, wanted 0..1"),
        ({"time_stride_range": (0.3, 0.1)}, "the smaller first"),
        ({"crop_ratio": (0.0, 1.0)}, "two positive numbers"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale: got .*, wanted at most 1"),
        ({"seed": -1}, "seed: got -1"),
        ({"sampling": "uniform"}, "fps: got None, wanted frames a second"),
        ({"fps": 5.0}, "fps: got 5.0, wanted no value unless sampling is uniform"),
    ],
)
def test_config_refuses(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ExtractConfig(**({"videos": ("clips",), "out": "cache"} | changes))


def test_defaults_are_the_papers_windows() -> None:
    policy = ExtractConfig(videos=("clips",), out="cache").sampling_policy()
    assert policy.identity() == {
        "policy": "windows",
        "num_frames": 8,
        "min_frames": 2,
        "seed": 0,
        "num_windows": 4,
        "time_stride_range": [1 / 25, 1 / 3],
        "crop_scale": [0.6, 1.0],
        "crop_ratio": [3 / 4, 4 / 3],
        "flip_probability": 0.5,
    }


def test_uniform_identity_knows_the_rate_and_no_crop() -> None:
    config = ExtractConfig(videos=("clips",), out="cache", sampling="uniform", fps=5.0)
    identity = config.sampling_policy().identity()
    assert identity == {
        "policy": "uniform",
        "num_frames": 8,
        "min_frames": 2,
        "seed": 0,
        "fps": 5.0,
    }


@pytest.mark.parametrize(
    ("batch_frames", "device_type", "wanted"),
    [(None, "cpu", 32), (None, "cuda", 64), (7, "cpu", 7)],
)
def test_batch_suits_the_device_unless_it_is_given(
    batch_frames: int | None, device_type: str, wanted: int
) -> None:
    config = ExtractConfig(videos=("clips",), out="cache", batch_frames=batch_frames)
    assert config.frames_per_batch(device_type) == wanted
