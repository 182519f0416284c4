"""Compressed shards: the same numbers, standard for other readers, and no trust in their sizes."""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs import Zstd
from zarr.storage import ZipStore

from deltatok.shards import DamagedShard, PatchShards, UsageError
from deltatok.shards.files import sha256_file
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.patches.zarr_arrays import compress, decompress
from deltatok.shards.tools.verify import verify_cache

DTYPES = ["float16", "bfloat16", "int8"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_shards_hold_the_same_numbers(little: Any, tmp_path: Path, dtype: str) -> None:
    plain = little.make_patches(tmp_path / "plain", dtype=dtype)
    zipped = little.make_patches(tmp_path / "zipped", dtype=dtype, compression="zstd")
    assert zipped.info.fingerprint == plain.info.fingerprint
    np.testing.assert_array_equal(
        PatchShards(zipped.folder).tokens(np.arange(11)),
        PatchShards(plain.folder).tokens(np.arange(11)),
    )
    assert verify_cache(zipped.folder, deep=True).problems == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_readers_read_compressed_shards(little: Any, tmp_path: Path, dtype: str) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="another reader, not a dependency")
    cache = little.make_patches(tmp_path / "cache", dtype=dtype, compression="zstd")
    path = cache.folder / "shards/000000.zarr.zip"
    base = {"driver": "file", "path": str(path)}
    spec = {"driver": "zarr3", "kvstore": {"driver": "zip", "base": base, "path": "tokens/"}}
    wanted = PatchShards(cache.folder).stored_tokens(np.arange(5))
    np.testing.assert_array_equal(
        tensorstore.open(spec, open=True).result().read().result(), wanted
    )
    np.testing.assert_array_equal(zarr.open_group(ZipStore(path), mode="r")["tokens"][...], wanted)


def test_reader_reads_a_compressed_shard_that_zarr_encoded_itself(
    little: Any, tmp_path: Path
) -> None:
    cache = little.make_patches(tmp_path / "cache", compression="zstd")
    before = PatchShards(cache.folder).load()
    little.encode_by_zarr(cache.folder / "shards/000000.zarr.zip")
    cache.reseal()
    np.testing.assert_array_equal(PatchShards(cache.folder).load(), before)


def test_features_that_repeat_take_less_space(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache")
    rows = cache.rows[0]
    rows.tokens[:] = 1.5
    sizes = []
    for compression in ("none", "zstd"):
        write_patch_shard(cache.folder, 0, rows, dtype="float16", seed=7, compression=compression)
        path = cache.folder / "shards/000000.zarr.zip"
        sizes.append((path.stat().st_size, sha256_file(path)))
    assert sizes[1][0] < sizes[0][0]
    write_patch_shard(cache.folder, 0, rows, dtype="float16", seed=7, compression="zstd")
    assert sha256_file(path) == sizes[1][1]


def test_unknown_compression_is_refused(patches: Any) -> None:
    with pytest.raises(UsageError, match="compression 'gzip', wanted one of none, zstd"):
        write_patch_shard(
            patches.folder, 0, patches.rows[0], dtype="float16", seed=7, compression="gzip"
        )


@pytest.mark.parametrize("size", [1, 47, 49, 255, 256, 300, 70_000])
def test_a_frame_of_another_size_is_refused_before_it_is_decompressed(size: int) -> None:
    data = np.frombuffer(Zstd().encode(b"\1" * size), np.uint8)
    with pytest.raises(DamagedShard, match=f"here: a zstd frame of {size} bytes, wanted 48"):
        decompress(data, out=np.empty(48, np.uint8), where="here")


@pytest.mark.parametrize("size", [1, 48, 255, 256, 257, 65_791, 65_792, 200_000])
def test_any_size_comes_back(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 99, size, dtype=np.uint8)
    out = np.empty_like(data)
    decompress(compress(data), out=out, where="here")
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("seed", range(50))
def test_damaged_frames_are_refused_or_give_a_full_frame(seed: int) -> None:
    """zstd frames have no checksum of their own: crc32c comes before."""
    rng = np.random.default_rng(seed)
    data = compress(rng.integers(0, 4, 300, dtype=np.uint8)).copy()
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    data = data[: len(data) - int(rng.integers(2)) * 5]
    try:
        decompress(data, out=np.empty(300, np.uint8), where="here")
    except DamagedShard as error:
        assert "here" in str(error)


def test_a_flipped_byte_of_a_compressed_frame_raises(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", compression="zstd")
    path = cache.folder / "shards/000000.zarr.zip"
    little.flip_byte(path, 5, member="tokens/c/0/0/0/0")
    with pytest.raises(DamagedShard, match=r"window 0, frame 0: wrong checksum"):
        PatchShards(cache.folder).tokens([0])


def test_an_index_with_gaps_or_overlaps_is_refused(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", compression="zstd")
    name = "shards/000000.zarr.zip/tokens/c/0/0/0/0"
    data = cache.read(name)
    index = np.frombuffer(data[-15 * 16 - 4 : -4], "<u8").reshape(15, 2).copy()
    for change in ((0, 1, -1), (3, 0, 1), (5, 1, 2**63), (14, 0, 2**64 - 8)):
        changed = index.copy()
        with np.errstate(over="ignore"):
            changed[change[0], change[1]] += np.uint64(change[2] % 2**64)
        crc = google_crc32c.value(changed.tobytes()).to_bytes(4, "little")
        cache.write(name, data[: -15 * 16 - 4] + changed.tobytes() + crc)
        cache.reseal()
        with pytest.raises(DamagedShard, match="index does not cover"):
            PatchShards(cache.folder).tokens([0])
