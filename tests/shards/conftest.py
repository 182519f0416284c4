"""Little caches of both formats, made by code: 2 shards of 3 clips, a few kilobytes."""

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DELTAS, PATCHES, CacheInfo, CacheShape
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.files import sha256_file
from deltatok.shards.patches.archive import write_archive
from deltatok.shards.patches.int8 import scale_sha256, write_channel_scale
from deltatok.shards.patches.layout import SUFFIX, TOKENS_CHUNK
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import (
    PlanEntry,
    make_plan,
    window_order,
    write_plan,
)
from deltatok.shards.records import Quarantined, done_bytes, write_quarantine
from deltatok.shards.windows import ShardRows

NUM_FRAMES, GRID, HIDDEN_SIZE = 3, (2, 2), 6
NUM_TOKENS = GRID[0] * GRID[1]
NUM_WINDOWS = 5


@dataclass(frozen=True)
class Clip:
    key: str
    path: Path
    size_bytes: int

    @property
    def origin(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class Little:
    """A cache on disk and what must come out of it."""

    folder: Path
    info: CacheInfo
    plan: list[PlanEntry]
    rows: list[Any]
    """Per shard, in the order they were written: ShardRows."""
    expected: dict[str, np.ndarray]
    """The columns of `rows` for all windows, in the order of the reader's window numbers."""

    def read(self, name: str) -> bytes:
        """The file or, below shards/NNNNNN.zarr.zip/, the member of a zip."""
        path, member = self._split(name)
        return path.read_bytes() if member is None else read_members(path)[member]

    def write(self, name: str, data: bytes) -> None:
        """Puts `data` into its place; into a zip as a writer would have."""
        path, member = self._split(name)
        if member is None:
            path.write_bytes(data)
        else:
            write_members(path, {**read_members(path), member: data})

    def _split(self, name: str) -> tuple[Path, str | None]:
        top, suffix, member = name.partition(f"{SUFFIX}/")
        return self.folder / (top + suffix.rstrip("/")), member or None

    def reseal(self, shard: int = 0) -> None:
        """Makes the done-record, the index and cache.json agree with the file of a shard, as a
        forger would."""
        path = self.folder / f"shards/{shard:06d}.json"
        record = json.loads(path.read_text())
        (file,) = [found for found in path.parent.glob(f"{shard:06d}.*") if found != path]
        record["file"] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        path.write_bytes(done_bytes(record))
        finish_cache(self.folder)


CHANNEL_SCALE = np.array([1.0, 0.5, 2.0, 1.0, 0.75, 10.0], dtype=np.float32)
"""Of int8 caches; the tokens are standard normal."""


def patch_info(dtype: str = "float16", **changes: Any) -> CacheInfo:
    scales = {"scale_sha256": scale_sha256(CHANNEL_SCALE)} if dtype == "int8" else {}
    return replace(
        CacheInfo(
            format=PATCHES,
            identity={
                "backbone": {"config": {"hidden_size": HIDDEN_SIZE}, "weights_sha256": "ab" * 32},
                "preprocessing": {"frame_size": 32, "image_mean": [0.5, 0.5, 0.5]},
                "sampling": {"policy": "windows", "seed": 7, "time_stride_range": [0.04, 1.0]},
                "storage": {"dtype": dtype, **scales},
            },
            shape=CacheShape(
                num_frames=NUM_FRAMES,
                num_tokens=NUM_TOKENS,
                grid=GRID,
                hidden_size=HIDDEN_SIZE,
            ),
            licence="DINOv3 License",
        ),
        **changes,
    )


def delta_info(**changes: Any) -> CacheInfo:
    info = patch_info()
    return replace(
        CacheInfo(
            format=DELTAS,
            identity={
                "patches": info.identity,
                "tokenizer": {"config": {}, "weights_sha256": "cd" * 32},
                "storage": {"dtype": "float16"},
            },
            shape=CacheShape(
                num_frames=NUM_FRAMES, num_tokens=None, grid=None, hidden_size=HIDDEN_SIZE
            ),
            parent_fingerprint=info.fingerprint,
            licence="DINOv3 License",
        ),
        **changes,
    )


def common_columns(num_windows: int, keys: list[str], rng: np.random.Generator) -> dict[str, Any]:
    return {
        "timestamps_s": np.sort(rng.random((num_windows, NUM_FRAMES)), axis=1).astype(np.float32),
        "frame_index": np.sort(rng.integers(0, 1000, (num_windows, NUM_FRAMES)), axis=1).astype(
            np.int32
        ),
        "crop": rng.random((num_windows, 4)).astype(np.float32),
        "flipped": rng.random(num_windows) < 0.5,
        "clip": rng.integers(0, len(keys), num_windows).astype(np.int32),
        "keys": keys,
    }


def patch_rows(num_windows: int, keys: list[str], seed: int) -> ShardRows:
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((num_windows, NUM_FRAMES, NUM_TOKENS, HIDDEN_SIZE))
    return ShardRows(tokens=tokens.astype(np.float32), **common_columns(num_windows, keys, rng))


def delta_rows(num_windows: int, keys: list[str], seed: int) -> ShardRows:
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((num_windows, NUM_FRAMES, HIDDEN_SIZE)).astype(np.float16)
    columns = common_columns(num_windows, keys, rng)
    columns["timestamps_s"] -= columns["timestamps_s"][:, :1].copy()
    return ShardRows(tokens=tokens, **columns)


def lost(keys: list[str]) -> list[Quarantined]:
    return [Quarantined(clip=key, stage="open", reason="empty", attempts=1) for key in keys]


def make_patches(
    folder: Path, *, dtype: str = "float16", compression: str = "none", finish: bool = True
) -> Little:
    info = open_cache(folder, patch_info(dtype))
    clips = [Clip(f"clip{index}.mp4", Path(f"/videos/{index}"), index) for index in range(6)]
    plan = write_plan(folder, make_plan(clips, clips_per_shard=3, seed=7))
    write_black(folder, np.full((NUM_TOKENS, HIDDEN_SIZE), 0.25, dtype=np.float32))
    if dtype == "int8":
        write_channel_scale(folder, CHANNEL_SCALE)
    rows = []
    for shard in range(2):
        keys = [entry.key for entry in plan.shard(shard)]
        rows.append(patch_rows(NUM_WINDOWS + shard, keys, seed=shard))
        write_patch_shard(folder, shard, rows[-1], dtype=dtype, seed=7, compression=compression)
    write_quarantine(folder)
    if finish:
        info = finish_cache(folder)
    expected = _expected(rows, [window_order(5, seed=7, shard=0), window_order(6, seed=7, shard=1)])
    return Little(folder=folder, info=info, plan=plan, rows=rows, expected=expected)


def make_deltas(folder: Path, *, block_windows: int = 2, finish: bool = True) -> Little:
    info = open_cache(folder, delta_info())
    clips = [Clip(f"clip{index}.mp4", Path(f"/videos/{index}"), index) for index in range(6)]
    plan = write_plan(folder, make_plan(clips, clips_per_shard=3, seed=7))
    rows = []
    for shard in range(2):
        keys = [entry.key for entry in plan.shard(shard)]
        rows.append(delta_rows(NUM_WINDOWS + shard, keys, seed=shard))
        write_delta_shard(folder, shard, rows[-1], block_windows=block_windows)
    write_quarantine(folder)
    if finish:
        info = finish_cache(folder)
    expected = _expected(rows, [np.arange(5), np.arange(6)])
    return Little(folder=folder, info=info, plan=plan, rows=rows, expected=expected)


def _expected(rows: list[Any], orders: list[np.ndarray]) -> dict[str, np.ndarray]:
    names = ("tokens", "timestamps_s", "frame_index", "crop", "flipped")
    expected = {
        name: np.concatenate(
            [getattr(shard, name)[order] for shard, order in zip(rows, orders, strict=True)]
        )
        for name in names
    }
    expected["key"] = np.array(
        [
            shard.keys[clip]
            for shard, order in zip(rows, orders, strict=True)
            for clip in shard.clip[order]
        ]
    )
    return expected


def flip_byte(path: Path, position: int, *, member: str | None = None) -> None:
    """Changes one bit of a byte of the file, or of the data of a member of the zip."""
    data = bytearray(path.read_bytes())
    if member is not None:
        offset, size = place(path, member)
        position = offset + position % size
    data[position] ^= 0x10
    path.write_bytes(data)


def place(path: Path, member: str) -> tuple[int, int]:
    """Where the data of a member of a zip lies: offset and bytes."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    lengths = struct.unpack_from("<2H", path.read_bytes(), info.header_offset + 26)
    return info.header_offset + 30 + sum(lengths), info.file_size


def read_members(path: Path) -> dict[str, bytes]:
    """All members of a zip."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def encode_by_zarr(path: Path) -> None:
    """Has zarr write the tokens again: its chunks have another order than ours."""
    import zarr

    before = read_members(path)
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    members = {name: buffer.from_bytes(data) for name, data in before.items()}
    array = zarr.open_group(zarr.storage.MemoryStore(members), mode="r+")["tokens"]
    array[...] = np.asarray(array[...])
    after = {name: members[name].to_bytes() for name in before}
    assert after[TOKENS_CHUNK] != before[TOKENS_CHUNK]
    assert len(after[TOKENS_CHUNK]) == len(before[TOKENS_CHUNK])
    write_members(path, after)


def write_members(path: Path, members: dict[str, bytes]) -> None:
    """The zip of a shard with these members, as the writer puts them."""
    with path.open("wb") as file:
        write_archive(file, members.items(), last=TOKENS_CHUNK)


@pytest.fixture
def patches(tmp_path: Path) -> Little:
    return make_patches(tmp_path / "patches")


@pytest.fixture
def deltas(tmp_path: Path) -> Little:
    return make_deltas(tmp_path / "deltas")


@pytest.fixture
def little() -> Any:
    """The makers above, for tests that need other caches than the two standard ones."""
    return sys.modules[__name__]


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., str]:
    """Runs Python code in a fresh interpreter with warnings as errors; gives its output."""

    def run(code: str, *arguments: str | Path) -> str:
        script = tmp_path / "script.py"
        script.write_text(code)
        result = subprocess.run(
            [sys.executable, "-W", "error", str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
