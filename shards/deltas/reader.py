"""DeltaShards: reads a delta-token cache by window numbers, from the mapped tars.

    deltas = DeltaShards("cache/deltas")
    tokens = deltas.tokens([3, 17])         # float16 (2, T, D)

Windows are numbered through all shards in shard order. Any number of threads may read, and
processes forked while a reader is open may go on reading with it. In a tar, a block of n windows
has three members:

    512 bytes   header of BBBBBB.timestamps.npy: name, size, checksum, "ustar"
    ...         float32 (n, T), filled up to a multiple of 512
    512 bytes   header of BBBBBB.tokens.npy
    ...         float16 (n, T, D)
    512 bytes   header of BBBBBB.windows.json
    ...         a list of n objects: clip, frames, crop, flipped
    1024 bytes  of zeros, after the last block: the end

Members of an uncompressed tar are contiguous, so an array in one can be mapped in place. Only
regular files with the names above are let through: no links, folders, extended headers, paths.
"""

import itertools
import math
import re
import resource
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import DELTAS, CacheShape
from ..errors import damaged_shard
from ..files import ReadOnlyFile
from ..npy import MAX_PREFIX_BYTES, parse_npy, read_npy
from ..reader import CacheReader, checked_out, checked_windows
from ..records import Verify
from ..schema import MAX_JSON_BYTES, STORED, load, parse_json, shown
from ..windows import WindowColumns

BLOCK_BYTES = 512
MEMBER_NAME = re.compile(r"([0-9]{6,9})\.(tokens\.npy|timestamps\.npy|windows\.json)")
MAX_INT32 = 2**31 - 1
"""The largest frame index, and beyond any edge of a crop."""

_ZEROS = bytes(BLOCK_BYTES)
_PARTS = ("timestamps.npy", "tokens.npy", "windows.json")
_FLOAT16 = np.dtype("<f2")
_FLOAT32 = np.dtype("<f4")


class TarMember(NamedTuple):
    """One regular file in a tar."""

    name: str
    offset: int
    """Where its bytes start in the tar."""
    size: int


def read_members(path: Path) -> list[TarMember]:
    """The members of a delta-token tar, in file order.

    Raises DamagedShard for anything but regular files of our names that lie within the file, each
    once, followed by the end mark.
    """
    file = ReadOnlyFile(path)
    file_size, position = file.size(), 0
    members: dict[str, TarMember] = {}
    while (header := file.read(position, BLOCK_BYTES)) != _ZEROS:
        where = f"{path}: byte {position}"
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise damaged_shard(f"{where}: no tar header ({error})") from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
            raise damaged_shard(f"{where}: member {shown(info.name)} is no regular file")
        if not MEMBER_NAME.fullmatch(info.name):
            raise damaged_shard(
                f"{where}: member {shown(info.name)}, wanted NNNNNN.tokens.npy, "
                "NNNNNN.timestamps.npy or NNNNNN.windows.json"
            )
        offset = position + BLOCK_BYTES
        if offset + info.size > file_size:
            raise damaged_shard(
                f"{where}: member {info.name} of {info.size} bytes does not fit into the file of "
                f"{file_size}"
            )
        if info.name in members:
            raise damaged_shard(f"{where}: member {info.name} a second time")
        members[info.name] = TarMember(info.name, offset, info.size)
        position = offset + -(-info.size // BLOCK_BYTES) * BLOCK_BYTES
    if file.read(position + BLOCK_BYTES, BLOCK_BYTES) != _ZEROS:
        raise damaged_shard(f"{path}: byte {position}: half an end mark")
    return list(members.values())


@dataclass(frozen=True, kw_only=True)
class Block:
    """One sample of a delta-token tar."""

    num_windows: int
    tokens_offset: int
    """Byte of the tar at which the first window's tokens start; the others follow."""
    tokens: TarMember
    timestamps: TarMember
    windows: TarMember


def read_blocks(path: Path, *, num_frames: int, hidden_size: int) -> list[Block]:
    """The blocks of a tar in order; DamagedShard unless all are whole and of these sizes."""
    samples: dict[int, dict[str, TarMember]] = {}
    for member in read_members(path):
        block, _, part = member.name.partition(".")
        samples.setdefault(int(block), {})[part] = member
    if list(samples) != list(range(len(samples))):
        raise damaged_shard(f"{path}: its blocks are not numbered from 0 on in order")
    file, blocks = ReadOnlyFile(path), []
    for number, parts in samples.items():
        where = f"{path}: block {number:06d}"
        if tuple(sorted(parts)) != _PARTS:
            raise damaged_shard(f"{where}: has {sorted(parts)}, wanted {list(_PARTS)}")
        tokens, start = _read_header(file, parts["tokens.npy"], _FLOAT16, num_axes=3)
        timestamps, _ = _read_header(file, parts["timestamps.npy"], _FLOAT32, num_axes=2)
        n = tokens[0]
        if n == 0 or tokens != (n, num_frames, hidden_size) or timestamps != (n, num_frames):
            raise damaged_shard(
                f"{where}: tokens {tokens} and timestamps {timestamps}, wanted (n, {num_frames}, "
                f"{hidden_size}) and (n, {num_frames}) as in cache.json"
            )
        blocks.append(
            Block(
                num_windows=n,
                tokens_offset=parts["tokens.npy"].offset + start,
                tokens=parts["tokens.npy"],
                timestamps=parts["timestamps.npy"],
                windows=parts["windows.json"],
            )
        )
    return blocks


def _read_header(
    file: ReadOnlyFile, member: TarMember, dtype: np.dtype[Any], *, num_axes: int
) -> tuple[tuple[int, ...], int]:
    """The shape of an npy member, and the bytes before its first number."""
    prefix = file.read(member.offset, min(member.size, MAX_PREFIX_BYTES))
    where = f"{file.path}: {member.name}"
    return parse_npy(prefix, size=member.size, dtype=dtype, num_axes=num_axes, where=where)


def read_tokens(path: Path, block: Block) -> NDArray[np.float16]:
    """float16 (n, T, D), read and not mapped."""
    return _read_array(path, block.tokens, _FLOAT16, num_axes=3)


def read_timestamps(path: Path, block: Block) -> NDArray[np.float32]:
    """float32 (n, T), seconds from the window's first frame."""
    return _read_array(path, block.timestamps, _FLOAT32, num_axes=2)


def _read_array(
    path: Path, member: TarMember, dtype: np.dtype[Any], *, num_axes: int
) -> NDArray[Any]:
    data = ReadOnlyFile(path).read(member.offset, member.size)
    return read_npy(data, dtype=dtype, num_axes=num_axes, where=f"{path}: {member.name}")


@dataclass(frozen=True)
class _StoredWindow:
    """A window in windows.json; frames in presentation order, crop in source pixels."""

    clip: str
    frames: list[int]
    crop: list[float]
    flipped: bool


def read_shard_table(
    path: Path, blocks: Sequence[Block], keys: list[str] | None, *, num_frames: int
) -> WindowColumns:
    """The windows of a tar, times from each window's first frame; DamagedShard if its windows.json
    say anything else, or name a clip that is not one of `keys` (None: they may name any)."""
    windows = [window for block in blocks for window in _read_windows(path, block, num_frames)]
    if keys is None:
        keys = list(dict.fromkeys(window.clip for window in windows))
    position = {key: index for index, key in enumerate(keys)}
    for window in windows:
        if window.clip not in position:
            raise damaged_shard(
                f"{path}: a window of clip {window.clip!r}, which the plan does not name"
            )
    return WindowColumns(
        timestamps_s=np.concatenate([read_timestamps(path, block) for block in blocks]),
        frame_index=np.array([window.frames for window in windows], dtype=np.int32),
        crop=np.array([window.crop for window in windows], dtype=np.float32),
        flipped=np.array([window.flipped for window in windows], dtype=np.bool_),
        clip=np.array([position[window.clip] for window in windows], dtype=np.int32),
        keys=keys,
    )


def _read_windows(path: Path, block: Block, num_frames: int) -> list[_StoredWindow]:
    member, where = block.windows, f"{path}: {block.windows.name}"
    if member.size > MAX_JSON_BYTES:
        raise damaged_shard(f"{where}: {member.size} bytes of JSON")
    value = parse_json(ReadOnlyFile(path).read(member.offset, member.size), where=where)
    if not isinstance(value, list) or len(value) != block.num_windows:
        raise damaged_shard(f"{where}: wanted a list of {block.num_windows} windows")
    windows = [load(_StoredWindow, item, where=where, how=STORED) for item in value]
    for window in windows:
        frames, crop = window.frames, window.crop
        sizes = (len(frames), len(crop))
        if sizes != (num_frames, 4) or max(map(abs, [*frames, *crop])) > MAX_INT32:
            raise damaged_shard(
                f"{where}: frames {shown(frames)} and crop {shown(crop)}, wanted {num_frames} "
                "indices and 4 numbers"
            )
    return windows


MAX_MAPPED_SHARDS = 4096
"""Shards mapped at once; a quarter of the files a process may open, where that is less (each
mapping holds a file descriptor)."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything is in the tar of a shard of W windows."""

    path: Path
    size: int
    """Bytes of the tar."""
    blocks: list[Block]
    starts: NDArray[np.int64]
    """int64 (blocks + 1,): the number within the shard of the first window of every block."""
    offsets: NDArray[np.int64]
    """int64 (W,): byte of the tar at which the tokens of a window start."""
    stride: int
    """A number of bytes that divides all offsets."""


class DeltaShards(CacheReader[np.float16]):
    """A finished delta-token cache, opened for reading.

    A tar is hashed and held against the index when a process reads of it first (it has no checksums
    of its own); with verify="size" only its size is looked at: for the other ranks of a run, and
    for huge caches that `deltatok-shards verify` has seen.

    Raises CacheMismatch for a folder that is no delta cache or is not finished (unless
    `allow_incomplete`: its finished shards), DamagedShard for what is missing or changed.
    """

    def __init__(
        self, folder: Path | str, *, verify: Verify = "sha256", allow_incomplete: bool = False
    ) -> None:
        super().__init__(folder, format=DELTAS, verify=verify, allow_incomplete=allow_incomplete)
        shape = self.info.shape
        self.shape: tuple[int, int] = (shape.num_frames, shape.hidden_size)

    _OF_PROCESS = (*CacheReader._OF_PROCESS, "_layouts", "_rows", "_max_mapped")

    def _begin(self) -> None:
        super()._begin()
        self._layouts: dict[int, _Layout] = {}
        self._rows: dict[int, NDArray[np.void]] = {}
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_mapped = max(1, min(MAX_MAPPED_SHARDS, soft_limit // 4))

    @property
    def _suffix(self) -> str:
        return ".tar"

    @property
    def size_bytes(self) -> int:
        """Bytes of the tokens of the whole cache, as `load` gives them."""
        return self.num_windows * self._row_bytes

    def tokens(
        self, windows: ArrayLike, *, out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """The delta tokens of `windows` (B,), float16 (B, T, D), in the order asked.

        `out`: a float16 array of that shape to fill and return. Raises IndexError for a window
        that is not there.
        """
        numbers = checked_windows(windows, self.num_windows)
        filled = checked_out(out, (len(numbers), *self.shape), np.dtype("<f2"))
        # One window is one item of raw bytes: a shard's windows are gathered in one step.
        flat = filled.reshape(len(numbers), math.prod(self.shape))
        items = flat.view(f"V{self._row_bytes}")[:, 0]
        order = np.argsort(numbers)
        shards, windows = self._locate(numbers[order])
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
        self._check_all(shards[edges[:-1]] if len(shards) else shards)
        for begin, end in itertools.pairwise(edges if len(shards) else ()):
            shard = int(shards[begin])
            layout = self._layout(shard)
            chosen = layout.offsets[windows[begin:end]] // layout.stride
            items[order[begin:end]] = self._mapped(shard)[chosen]
        return filled

    @cached_property
    def block_starts(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,): the first window of every block, and the end. The windows of a block
        lie one after the other in a file."""
        starts = [np.zeros(1, dtype=np.int64)]
        for shard, first in enumerate(self.shard_starts[:-1].tolist()):
            starts.append(first + self._layout(shard).starts[1:])
        return np.concatenate(starts)

    def read_block(
        self, block: int, *, out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """The tokens of a block's windows, float16 (n, T, D), in one read from the file; for whole
        passes over a cache that memory does not hold. `out`: as of `tokens`."""
        first, end = self.block_starts[block : block + 2].tolist()
        filled = checked_out(out, (end - first, *self.shape), np.dtype("<f2"))
        shard = int(np.searchsorted(self.shard_starts, first, side="right")) - 1
        self._check(shard)
        layout = self._layout(shard)
        inside = int(np.searchsorted(layout.starts, first - self.shard_starts[shard]))
        self._mapped(shard)  # its size is checked
        offset = layout.blocks[inside].tokens_offset
        self._opened(shard, ReadOnlyFile).read_into([filled.reshape(-1).view(np.uint8)], offset)
        return filled

    def timestamps_s(self, windows: ArrayLike) -> NDArray[np.float32]:
        """float32 (B, T): seconds from the window's first frame."""
        return self._timestamps[checked_windows(windows, self.num_windows)]

    def load(self) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """All tokens, float16 (W, T, D), and timestamps, float32 (W, T), in memory."""
        return self.tokens(np.arange(self.num_windows)), self._timestamps.copy()

    def release(self) -> None:
        """Lets go of the mapped files; what is read next maps them again."""
        self._rows.clear()

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * 2

    @cached_property
    def _timestamps(self) -> NDArray[np.float32]:
        """float32 (W, T); without the rest of `table`, of which training needs nothing."""
        parts = [np.empty((0, self.shape[0]), dtype=np.float32)]
        self._check_all(np.arange(len(self._shards)))
        for shard in range(len(self._shards)):
            layout = self._layout(shard)
            parts += [read_timestamps(layout.path, block) for block in layout.blocks]
        return np.concatenate(parts)

    def _shard_table(self, shard: int) -> WindowColumns:
        self._check(shard)
        layout, keys = self._layout(shard), self._shard_keys(shard)
        return read_shard_table(layout.path, layout.blocks, keys, num_frames=self.shape[0])

    def _mapped(self, shard: int) -> NDArray[np.void]:
        """The mapped tar as one item of a window's bytes at every multiple of its stride."""
        rows = self._rows.get(shard)
        if rows is None:
            layout = self._layout(shard)
            rows = self._opened(
                shard, lambda path: _map_rows(path, layout, row_bytes=self._row_bytes)
            )
            while len(self._rows) >= self._max_mapped:
                self._rows.pop(next(iter(self._rows)), None)
            self._rows[shard] = rows
        return rows

    def _layout(self, shard: int) -> _Layout:
        layout = self._layouts.get(shard)
        if layout is None:
            if self._verify != "sha256":
                self._check(shard)
            layout = self._layouts[shard] = _read_layout(
                self._path(shard),
                self.info.shape,
                rows=int(self._shards.rows[shard]),
                size=int(self._shards.bytes[shard]),
            )
        return layout


def _read_layout(path: Path, shape: CacheShape, *, rows: int, size: int) -> _Layout:
    row_bytes = shape.num_frames * shape.hidden_size * 2
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    counts = [block.num_windows for block in blocks]
    starts = np.cumsum([0, *counts], dtype=np.int64)
    if starts[-1] != rows:
        raise damaged_shard(f"{path}: {starts[-1]} windows, the done-record says {rows}")
    firsts = np.array([block.tokens_offset for block in blocks], dtype=np.int64)
    inside = np.arange(rows) - np.repeat(starts[:-1], counts)
    offsets = np.repeat(firsts, counts) + row_bytes * inside
    return _Layout(
        path=path,
        size=size,
        blocks=blocks,
        starts=starts,
        offsets=offsets,
        stride=int(np.gcd.reduce(offsets)),
    )


def _map_rows(path: Path, layout: _Layout, *, row_bytes: int) -> NDArray[np.void]:
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise damaged_shard(f"{path}: cannot be mapped ({error})") from error
    if mapped.size != layout.size:
        raise damaged_shard(f"{path}: {mapped.size} bytes, had {layout.size} when opened")
    return np.ndarray(
        shape=((mapped.size - row_bytes) // layout.stride + 1,),
        dtype=np.dtype((np.void, row_bytes)),
        buffer=mapped.data,
        strides=(layout.stride,),
    )
