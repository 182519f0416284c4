"""Durations and sizes mean what people mean by them."""

import pytest

from deltatok.extract.config import parse_duration_s, parse_size_bytes
from deltatok.shards import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800), ("45", 45)],
)
def test_duration(text: str, seconds: float) -> None:
    assert parse_duration_s(text, name="time_limit") == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500MB", 500_000_000), ("10 GB", 10**10), ("1.5TiB", 3 * 2**39), ("1kB", 1000)],
)
def test_size(text: str, size: int) -> None:
    assert parse_size_bytes(text, name="min_free") == size


@pytest.mark.parametrize("text", ["", "soon", "10x", "-5s", "1h later", "m"])
def test_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="time_limit: got"):
        parse_duration_s(text, name="time_limit")


@pytest.mark.parametrize("text", ["", "much", "10 potatoes", "-1GB", "GB"])
def test_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="min_free: got"):
        parse_size_bytes(text, name="min_free")
