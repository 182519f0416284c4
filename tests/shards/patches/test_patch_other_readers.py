"""Patch-token shards are plain Zarr v3: other readers and writers agree with ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from deltatok.shards import PatchShards


def test_reader_gives_what_plain_zarr_gives(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    stores = [ZipStore(patches.folder / f"shards/00000{n}.zarr.zip") for n in (0, 1)]
    groups = [zarr.open_group(store, mode="r") for store in stores]
    tokens = np.concatenate([np.asarray(group["tokens"][...]) for group in groups])
    np.testing.assert_array_equal(reader.load(), tokens)
    for name in ("timestamps_s", "frame_index"):
        plain = np.concatenate([np.asarray(group[name][...]) for group in groups])
        np.testing.assert_array_equal(getattr(reader, name)(np.arange(11)), plain)


def test_reader_reads_a_shard_that_zarr_encoded_itself(little: Any, patches: Any) -> None:
    """Zarr puts the chunks of a shard in another order than ours; the index says where."""
    before = PatchShards(patches.folder).load()
    little.encode_by_zarr(patches.folder / "shards/000001.zarr.zip")
    patches.reseal(1)
    np.testing.assert_array_equal(PatchShards(patches.folder).load(), before)


def test_shard_reads_with_plain_zarr_alone(
    patches: Any, run_script: Callable[..., str], tmp_path: Path
) -> None:
    np.save(tmp_path / "wanted.npy", patches.expected["tokens"][:5].astype(np.float16))
    run_script(
        """
import sys, numpy, zarr
group = zarr.open_group(zarr.storage.ZipStore(sys.argv[1]), mode="r")
tokens = group["tokens"]
assert tokens.shape == (5, 3, 4, 6) and tokens.dtype == "float16", tokens
assert tokens.chunks == (1, 1, 4, 6) and tokens.shards == tokens.shape, tokens
assert (tokens[...] == numpy.load(sys.argv[2])).all()
assert (tokens[3, 1] == numpy.load(sys.argv[2])[3, 1]).all()
assert group["timestamps_s"].attrs["unit"] == "s"
assert group["crop"].shape == (5, 4) and group["flipped"].dtype == bool
assert [group.attrs["keys"][clip] for clip in group["clip"][...]]
assert group.attrs["licence"] == "DINOv3 License"
assert "deltatok" not in sys.modules
""",
        patches.folder / "shards/000000.zarr.zip",
        tmp_path / "wanted.npy",
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_shard_reads_with_tensorstore(little: Any, tmp_path: Path, dtype: str) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="another reader, not a dependency")
    cache = little.make_patches(tmp_path / "cache", dtype=dtype)
    base = {"driver": "file", "path": str(cache.folder / "shards/000000.zarr.zip")}

    def read(name: str) -> np.ndarray:
        kvstore = {"driver": "zip", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore}
        return np.asarray(tensorstore.open(spec, open=True).result().read().result())

    reader = PatchShards(cache.folder)
    np.testing.assert_array_equal(read("tokens"), reader.stored_tokens(np.arange(5)))
    np.testing.assert_array_equal(read("timestamps_s"), reader.timestamps_s(np.arange(5)))
    np.testing.assert_array_equal(read("flipped"), reader.flipped[:5])
    if dtype == "int8":
        np.testing.assert_array_equal(read("token_scale"), reader.token_scale(np.arange(5)))
        np.testing.assert_array_equal(read("channel_scale"), reader.channel_scale)
