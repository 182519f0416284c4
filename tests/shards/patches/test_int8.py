"""int8 tokens: the formula, its error, what it cannot hold, the scales in the identity."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import ZipStore

from deltatok.shards import (
    CacheMismatch,
    DamagedShard,
    DeltatokError,
    PatchShards,
    UsageError,
)
from deltatok.shards.cache import open_cache
from deltatok.shards.patches.int8 import (
    MAX_NORMALISED,
    MIN_TOKEN_SCALE,
    UNSTORABLE,
    channel_scale_of,
    dequantise,
    quantise,
    scale_sha256,
    write_channel_scale,
)
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.records import read_done
from deltatok.shards.tools.verify import verify_cache


@pytest.fixture
def int8(little: Any, tmp_path: Path) -> Any:
    """The standard little cache, stored as int8."""
    return little.make_patches(tmp_path / "int8", dtype="int8")


@settings(deadline=None, max_examples=200)
@given(
    tokens=st.integers(1, 5),
    channels=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    exponents=st.tuples(st.integers(-6, 6), st.integers(-6, 6)),
)
def test_dequantised_values_are_within_half_a_step(
    tokens: int, channels: int, seed: int, exponents: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    channel_scale = (10.0 ** rng.uniform(-4, 4, channels)).astype(np.float32)
    spread = 10.0 ** rng.uniform(min(exponents), max(exponents), (tokens, 1))
    values = (rng.standard_normal((tokens, channels)) * spread * channel_scale).astype(np.float32)
    codes, scale = quantise(values, channel_scale)
    assert codes.min() > UNSTORABLE
    step = scale[:, None].astype(np.float64) * channel_scale
    error = np.abs(dequantise(codes, scale, channel_scale).astype(np.float64) - values)
    rounding = 1e-5 * step + 1e-6 * np.abs(values)  # of float32, and where a code was cut to 127
    assert (error <= 0.5 * step + rounding).all()


def test_token_scale_follows_the_largest_channel_and_stays_a_normal_float16() -> None:
    channel_scale = np.array([1.0, 10.0], np.float32)
    values = np.array([[127.0, 0.0], [0.0, -1270.0], [0.0, 0.0], [1e-9, 0.0]], np.float32)
    codes, scale = quantise(values, channel_scale)
    np.testing.assert_array_equal(scale, np.array([1, 1, MIN_TOKEN_SCALE, MIN_TOKEN_SCALE]))
    np.testing.assert_array_equal(codes, [[127, 0], [0, -127], [0, 0], [0, 0]])


def test_reader_gives_what_the_documented_formula_gives_of_plain_zarr(int8: Any) -> None:
    parts = []
    for shard in (0, 1):
        group = zarr.open_group(ZipStore(int8.folder / f"shards/00000{shard}.zarr.zip"), mode="r")
        codes = np.asarray(group["tokens"][...]).astype(np.float32)
        token_scale = np.asarray(group["token_scale"][...]).astype(np.float32)
        parts.append(codes * token_scale[..., None] * np.asarray(group["channel_scale"][...]))
    reader = PatchShards(int8.folder)
    np.testing.assert_array_equal(reader.tokens(np.arange(11)), np.concatenate(parts))
    np.testing.assert_array_equal(reader.load(), np.concatenate(parts))
    assert reader.load().nbytes == reader.size_bytes


def test_int8_tokens_come_back_within_half_a_step(int8: Any, little: Any) -> None:
    reader = PatchShards(int8.folder)
    windows = np.array([10, 0, 3, 3])
    step = reader.token_scale(windows)[..., None].astype(np.float64) * little.CHANNEL_SCALE
    error = np.abs(reader.tokens(windows) - int8.expected["tokens"][windows])
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0


def test_codes_and_scales_can_be_read_as_they_are(int8: Any) -> None:
    reader = PatchShards(int8.folder)
    codes, scale = reader.stored_tokens([7, 2]), reader.token_scale([7, 2])
    assert (codes.dtype, codes.shape) == (np.dtype(np.int8), (2, 3, 4, 6))
    assert (scale.dtype, scale.shape) == (np.dtype(np.float16), (2, 3, 4))
    values = dequantise(codes, scale, reader.channel_scale)
    np.testing.assert_array_equal(values, reader.tokens([7, 2]))


def test_a_cache_without_int8_has_no_scales(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    with pytest.raises(UsageError, match="stores float16, only int8 has scales"):
        reader.token_scale([0])


def test_int8_shard_reads_with_plain_zarr_alone(int8: Any, run_script: Callable[..., str]) -> None:
    run_script(
        """
import sys, zarr
group = zarr.open_group(zarr.storage.ZipStore(sys.argv[1]), mode="r")
tokens, scale = group["tokens"], group["token_scale"]
assert tokens.dtype == "int8" and tokens.chunks == (1, 1, 4, 6), tokens
assert scale.dtype == "float16" and scale.chunks == (1, 1, 4), scale
assert scale.shards == scale.shape == (5, 3, 4)
assert group["channel_scale"].shape == (6,)
assert tokens.attrs["logical_dtype"] == "int8"
assert (tokens[3, 1] == tokens[...][3, 1]).all() and abs(tokens[...]).max() == 127
assert "deltatok" not in sys.modules
""",
        int8.folder / "shards/000000.zarr.zip",
    )


def test_rows_quantised_before_give_the_same_bytes(int8: Any, little: Any) -> None:
    """What the device makes is stored as it is."""
    before = (int8.folder / "shards/000000.json").read_bytes()
    rows = int8.rows[0]
    codes, scale = quantise(rows.tokens, little.CHANNEL_SCALE)
    rows = replace(rows, tokens=codes, token_scale=scale)
    write_patch_shard(int8.folder, 0, rows, dtype="int8", seed=7)
    assert (int8.folder / "shards/000000.json").read_bytes() == before


def test_largest_value_is_that_of_the_stored_values(int8: Any) -> None:
    record = read_done(int8.folder, 1)
    assert record is not None
    stored = PatchShards(int8.folder).tokens(np.arange(5, 11))
    assert (record.abs_max, record.beyond_float16) == (np.abs(stored).max(), 0)


def test_values_that_float16_could_not_hold_are_counted_where_they_are_stored(
    int8: Any,
) -> None:
    rows = copy.deepcopy(int8.rows[0])
    rows.tokens[:, 0, 0, 2] = 1e5
    record = write_patch_shard(int8.folder, 0, rows, dtype="int8", seed=7)
    assert record.beyond_float16 == 5


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.1 * MAX_NORMALISED])
def test_writer_refuses_what_int8_cannot_hold(
    int8: Any, little: Any, value: float, quantised: bool
) -> None:
    rows = copy.deepcopy(int8.rows[0])
    rows.tokens[1:3, 1, 2, 3] = value
    clips = {rows.keys[clip] for clip in rows.clip[1:3]}
    if quantised:
        codes, scale = quantise(rows.tokens, little.CHANNEL_SCALE)
        assert np.count_nonzero(codes == UNSTORABLE) == 2
        rows = replace(rows, tokens=codes, token_scale=scale)
    with pytest.raises(DeltatokError, match=f"shard 000000: clip '({'|'.join(clips)})'"):
        write_patch_shard(int8.folder, 0, rows, dtype="int8", seed=7)
    assert verify_cache(int8.folder, deep=True).problems == []


def test_scales_are_part_of_the_identity(int8: Any, little: Any, tmp_path: Path) -> None:
    other_scale = little.CHANNEL_SCALE * 2
    info = little.patch_info("int8")
    storage = {"dtype": "int8", "scale_sha256": scale_sha256(other_scale)}
    other = replace(info, identity={**info.identity, "storage": storage})
    assert other.fingerprint != int8.info.fingerprint
    with pytest.raises(CacheMismatch, match=r"storage\.scale_sha256 is"):
        open_cache(int8.folder, other)


def test_scales_other_than_those_of_the_identity_are_not_written(int8: Any, little: Any) -> None:
    with pytest.raises(CacheMismatch, match=r"wanted \(6,\) positive ones with"):
        write_channel_scale(int8.folder, little.CHANNEL_SCALE * 2)


def test_dtype_differs_before_scales_do(patches: Any, little: Any) -> None:
    with pytest.raises(CacheMismatch, match=r"storage\.dtype is 'float16', but 'int8'"):
        open_cache(patches.folder, little.patch_info("int8"))


@pytest.mark.parametrize(
    "name",
    ["tokens/c/0/0/0/0", "token_scale/c/0/0/0", "channel_scale/c/0", "token_scale/zarr.json"],
)
def test_a_flipped_byte_of_codes_or_scales_raises(int8: Any, little: Any, name: str) -> None:
    little.flip_byte(int8.folder / "shards/000000.zarr.zip", 3, member=name)
    with pytest.raises(DamagedShard, match=r"000000\.zarr"):
        PatchShards(int8.folder).tokens([0])


def test_verify_finds_a_changed_channel_scale_file(int8: Any, little: Any) -> None:
    assert verify_cache(int8.folder, deep=True).problems == []
    little.flip_byte(int8.folder / "channel_scale.npy", -2)
    problems = verify_cache(int8.folder, deep=True).problems
    assert len(problems) == 1
    assert "channel_scale.npy" in problems[0].text
    with pytest.raises(DamagedShard, match="restore channel_scale"):
        _ = PatchShards(int8.folder).channel_scale


def test_reader_needs_the_scales_of_the_shard_alone(int8: Any) -> None:
    (int8.folder / "channel_scale.npy").unlink()
    assert PatchShards(int8.folder).tokens([0]).shape == (1, 3, 4, 6)
    assert "channel_scale.npy" in verify_cache(int8.folder, deep=True).problems[0].text


def test_channel_scale_is_the_root_mean_square_with_a_floor() -> None:
    scale = channel_scale_of(np.array([1.0, 4.0, 9.0, 0.0, 1e-12]))
    np.testing.assert_allclose(scale, [1.0, 2.0, 3.0, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_array_equal(channel_scale_of(np.zeros(2)), [1.0, 1.0])
    np.testing.assert_array_equal(channel_scale_of(np.array([0.0, 0.0, 4.0])), [2.0, 2.0, 2.0])
    with pytest.raises(DeltatokError, match="1 of 2 channels are not finite"):
        channel_scale_of(np.array([1.0, np.nan]))


def test_int8_is_nearer_than_a_scale_a_token_alone_where_channels_differ() -> None:
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-1, 1, 64)
    values = (rng.standard_normal((100, 64)) * size).astype(np.float32)
    errors = []
    for scale in (channel_scale_of((values.astype(np.float64) ** 2).mean(axis=0)), np.ones(64)):
        scale = scale.astype(np.float32)
        codes, token_scale = quantise(values, scale)
        difference = (dequantise(codes, token_scale, scale) - values) / size
        errors.append(float(np.sqrt((difference**2).mean())))
    assert errors[0] < 0.02 < 2 * errors[0] + 0.02 < errors[1]
