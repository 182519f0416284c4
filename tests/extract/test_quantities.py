"""Durations and sizes mean what people mean by them."""

import pytest

from deltatok.extract.config import ExtractConfig
from deltatok.shards import UsageError


def _config(**fields: str) -> ExtractConfig:
    return ExtractConfig(videos=("clips",), out="cache", **fields)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800), ("45", 45)],
)
def test_duration(text: str, seconds: float) -> None:
    assert _config(time_limit=text).time_limit_s == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500MB", 500_000_000), ("10 GB", 10**10), ("1.5TiB", 3 * 2**39), ("1kB", 1000)],
)
def test_size(text: str, size: int) -> None:
    assert _config(min_free=text).min_free_bytes == size


@pytest.mark.parametrize("text", ["", "soon", "10x", "-5s", "1h later", "m", "1h30", "0"])
def test_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="time_limit: got"):
        _config(time_limit=text)


@pytest.mark.parametrize("text", ["", "much", "10 potatoes", "-1GB", "GB"])
def test_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="min_free: got"):
        _config(min_free=text)
