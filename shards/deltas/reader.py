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

import math
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import DELTAS
from ..errors import DamagedShard
from ..npy import MAX_PREFIX_BYTES, NpyHeader, parse_npy, read_npy
from ..patches.zarr_arrays import ReadOnlyFile
from ..reader import CacheReader, OpenedCache, checked_out, checked_windows, open_finished
from ..records import SHARD_ADVICE, Verify, shard_path
from ..schema import MAX_JSON_BYTES, STORED, load, parse_json, shown
from ..windows import WindowColumns

BLOCK_BYTES = 512
MEMBER_NAME = re.compile(r"([0-9]{6,9})\.(tokens\.npy|timestamps\.npy|windows\.json)")

_ZEROS = bytes(BLOCK_BYTES)
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"L": "a long-name header",
    b"K": "a long-link header",
    b"g": "an extended header",
    b"x": "an extended header",
}


@dataclass(frozen=True)
class TarMember:
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
    members: dict[str, TarMember] = {}
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DamagedShard(
            f"{path}: cannot be opened ({error.strerror}): {SHARD_ADVICE}"
        ) from error
    try:
        file_size = os.fstat(descriptor).st_size
        position = 0
        while True:
            header = os.pread(descriptor, BLOCK_BYTES, position)
            where = f"{path}: byte {position}"
            if len(header) < BLOCK_BYTES:
                raise DamagedShard(f"{where}: the tar ends without its end mark: {SHARD_ADVICE}")
            if header == _ZEROS:
                if os.pread(descriptor, BLOCK_BYTES, position + BLOCK_BYTES) != _ZEROS:
                    raise DamagedShard(f"{where}: half an end mark: {SHARD_ADVICE}")
                return list(members.values())
            name, size = _parse_header(header, where=where)
            offset = position + BLOCK_BYTES
            if offset + size > file_size:
                raise DamagedShard(
                    f"{where}: member {name!r} of {size} bytes does not fit into the file of "
                    f"{file_size}: {SHARD_ADVICE}"
                )
            if name in members:
                raise DamagedShard(f"{where}: member {name!r} a second time: {SHARD_ADVICE}")
            members[name] = TarMember(name=name, offset=offset, size=size)
            position = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {SHARD_ADVICE}") from error
    finally:
        os.close(descriptor)


def _parse_header(header: bytes, *, where: str) -> tuple[str, int]:
    """The name and size in a 512-byte ustar header (POSIX.1-1988)."""
    checksum = _octal(header[148:156], "checksum", where=where)
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise DamagedShard(f"{where}: a tar header with a wrong checksum: {SHARD_ADVICE}")
    if header[257:263] != b"ustar\0":
        raise DamagedShard(
            f"{where}: {shown(header[257:265])}, wanted a ustar header: {SHARD_ADVICE}"
        )
    kind = header[156:157]
    raw = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0")
    name = (prefix + b"/" + raw if prefix else raw).decode("latin-1")
    if kind not in (b"0", b"\0"):
        what = _TYPES.get(kind, f"of type {shown(kind)}")
        raise DamagedShard(f"{where}: member {shown(name)} is {what}, wanted regular files")
    if name.startswith("/") or ".." in name.split("/"):
        raise DamagedShard(f"{where}: member {shown(name)} would leave the folder it is read in")
    if not MEMBER_NAME.fullmatch(name):
        raise DamagedShard(
            f"{where}: member {shown(name)}, wanted NNNNNN.tokens.npy, NNNNNN.timestamps.npy "
            "or NNNNNN.windows.json"
        )
    return name, _octal(header[124:136], "size", where=where)


def _octal(field: bytes, what: str, *, where: str) -> int:
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise DamagedShard(f"{where}: {what} {shown(field)} in a tar header, wanted octal digits")
    return int(match[1], 8)


_PARTS = ("timestamps.npy", "tokens.npy", "windows.json")
MAX_INT32 = 2**31 - 1
"""The largest frame index, and beyond any edge of a crop."""
_FLOAT16 = np.dtype("<f2")
_FLOAT32 = np.dtype("<f4")


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
        match = MEMBER_NAME.fullmatch(member.name)
        if match is None:
            raise AssertionError("read_members lets no other name pass")
        samples.setdefault(int(match[1]), {})[match[2]] = member
    if list(samples) != list(range(len(samples))):
        raise DamagedShard(
            f"{path}: its blocks are not numbered from 0 on in order: {SHARD_ADVICE}"
        )
    blocks = []
    for number, parts in samples.items():
        where = f"{path}: block {number:06d}"
        if tuple(sorted(parts)) != _PARTS:
            raise DamagedShard(
                f"{where}: has {sorted(parts)}, wanted {list(_PARTS)}: {SHARD_ADVICE}"
            )
        tokens = _header(path, parts["tokens.npy"], dtype=_FLOAT16, num_axes=3)
        timestamps = _header(path, parts["timestamps.npy"], dtype=_FLOAT32, num_axes=2)
        num_windows = tokens.shape[0]
        if (
            num_windows == 0
            or tokens.shape[1:] != (num_frames, hidden_size)
            or timestamps.shape != (num_windows, num_frames)
        ):
            raise DamagedShard(
                f"{where}: tokens {tokens.shape} and timestamps {timestamps.shape}, wanted "
                f"(n, {num_frames}, {hidden_size}) and (n, {num_frames}) as in cache.json: "
                f"{SHARD_ADVICE}"
            )
        blocks.append(
            Block(
                num_windows=num_windows,
                tokens_offset=parts["tokens.npy"].offset + tokens.start,
                tokens=parts["tokens.npy"],
                timestamps=parts["timestamps.npy"],
                windows=parts["windows.json"],
            )
        )
    return blocks


def read_tokens(path: Path, block: Block) -> NDArray[np.float16]:
    """float16 (n, T, D), read and not mapped."""
    data = _read(path, block.tokens, limit=block.tokens.size)
    return read_npy(data, dtype=_FLOAT16, num_axes=3, where=f"{path}: {block.tokens.name}")


def read_timestamps(path: Path, block: Block) -> NDArray[np.float32]:
    """float32 (n, T), seconds from the window's first frame."""
    data = _read(path, block.timestamps, limit=block.timestamps.size)
    return read_npy(data, dtype=_FLOAT32, num_axes=2, where=f"{path}: {block.timestamps.name}")


def read_windows(path: Path, block: Block, *, num_frames: int) -> list[dict[str, Any]]:
    """Per window: clip (str), frames (list of T int), crop (list of 4 numbers), flipped (bool).

    Raises DamagedShard if the member says anything else.
    """
    where = f"{path}: {block.windows.name}"
    if block.windows.size > MAX_JSON_BYTES:
        raise DamagedShard(f"{where}: {block.windows.size} bytes of JSON: {SHARD_ADVICE}")
    value = parse_json(_read(path, block.windows, limit=block.windows.size), where=where)
    if not isinstance(value, list) or len(value) != block.num_windows:
        raise DamagedShard(f"{where}: wanted a list of {block.num_windows} windows: {SHARD_ADVICE}")
    windows = []
    for item in value:
        window = load(_StoredWindow, item, where=where, how=STORED)
        frames, crop = window.frames, window.crop
        sizes = (len(frames), len(crop))
        if sizes != (num_frames, 4) or max(map(abs, [*frames, *crop])) > MAX_INT32:
            raise DamagedShard(
                f"{where}: frames {shown(frames)} and crop {shown(crop)}, wanted {num_frames} "
                f"indices and 4 numbers: {SHARD_ADVICE}"
            )
        windows.append(vars(window))
    return windows


@dataclass(frozen=True)
class _StoredWindow:
    """A window in windows.json; frames in presentation order, crop in source pixels."""

    clip: str
    frames: list[int]
    crop: list[float]
    flipped: bool


def _header(path: Path, member: TarMember, *, dtype: np.dtype[Any], num_axes: int) -> NpyHeader:
    return parse_npy(
        _read(path, member, limit=MAX_PREFIX_BYTES),
        size=member.size,
        dtype=dtype,
        num_axes=num_axes,
        where=f"{path}: {member.name}",
    )


def _read(path: Path, member: TarMember, *, limit: int) -> bytes:
    """The first `limit` bytes of a member."""
    wanted = min(limit, member.size)
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), wanted, member.offset)
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {SHARD_ADVICE}") from error
    if len(data) != wanted:
        raise DamagedShard(f"{path}: {member.name} is cut off: {SHARD_ADVICE}")
    return data


MAX_MAPPED_SHARDS = 4096
"""Shards mapped at once; a quarter of the files a process may open, where that is less (each
mapping holds a file descriptor)."""

KEPT_BLOCKS = 16
"""Blocks whose windows.json stays parsed, for `window`."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything is in the tar of a shard of W windows."""

    blocks: list[Block]
    starts: NDArray[np.int64]
    """int64 (blocks + 1,): the number within the shard of the first window of every block."""
    offsets: NDArray[np.int64]
    """int64 (W,): byte of the tar at which the tokens of a window start."""
    stride: int
    """A number of bytes that divides all offsets."""


class DeltaShards(CacheReader[np.float16]):
    """A finished delta-token cache, opened for reading.

    Opening hashes every tar and holds it against its done-record (a tar has no checksums of its
    own); verify="size" checks sizes and, when a shard is read first, samples of it: for the other
    ranks of a run, and for huge caches that `deltatok-shards verify` has seen.

    Raises CacheMismatch for a folder that is no delta cache or is not finished (unless
    `allow_incomplete`: its finished shards), DamagedShard for what is missing or changed.
    """

    def __init__(
        self, folder: Path | str, *, verify: Verify = "sha256", allow_incomplete: bool = False
    ) -> None:
        super().__init__(
            open_finished(folder, format=DELTAS, verify=verify, allow_incomplete=allow_incomplete)
        )
        self._arguments = (str(folder), allow_incomplete)
        shape = self.info.shape
        self.shape: tuple[int, int] = (shape.num_frames, shape.hidden_size)
        self._layouts: dict[int, _Layout] = {}
        for shard in range(len(self._cache.records)) if self._cache.is_eager else ():
            self._layout(shard)
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_mapped = max(1, min(MAX_MAPPED_SHARDS, soft_limit // 4))
        self._rows: dict[int, NDArray[np.void]] = {}
        self._timestamps: NDArray[np.float32] | None = None
        self._clip_index: NDArray[np.int64] | None = None
        self._table: WindowColumns | None = None
        self._windows: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._arguments

    @property
    def size_bytes(self) -> int:
        """Bytes of the tokens of the whole cache, as `load` gives them."""
        return self.num_windows * self._row_bytes

    @property
    def clip_index(self) -> NDArray[np.int64]:
        """int64 (W,): the clip of every window, index into `keys`; read on first use."""
        if self._clip_index is None:
            windows = self._all_windows()
            self._clip_index = np.fromiter((clip for clip, _ in windows), dtype=np.int64)
        return self._clip_index

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
        shards, windows = self._cache.locate(numbers[order])
        for shard, begin, end in _runs(shards):
            layout = self._layout(shard)
            chosen = layout.offsets[windows[begin:end]] // layout.stride
            items[order[begin:end]] = self._mapped(shard)[chosen]
        return filled

    @cached_property
    def block_starts(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,): the first window of every block, and the end. The windows of a block
        lie one after the other in a file."""
        starts = [np.zeros(1, dtype=np.int64)]
        for shard, first in enumerate(self._cache.starts[:-1].tolist()):
            starts.append(first + self._layout(shard).starts[1:])
        return np.concatenate(starts)

    def read_block(
        self, block: int, *, out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """The tokens of a block's windows, float16 (n, T, D), in one read from the file; for whole
        passes over a cache that memory does not hold. `out`: as of `tokens`."""
        first, end = self.block_starts[block : block + 2].tolist()
        filled = checked_out(out, (end - first, *self.shape), np.dtype("<f2"))
        shard = int(np.searchsorted(self._cache.starts, first, side="right")) - 1
        starts = self._layout(shard).starts
        inside = int(np.searchsorted(starts, first - self._cache.starts[shard]))
        place = self._layout(shard).blocks[inside]
        self._mapped(shard)  # its size is checked
        file = ReadOnlyFile(self._path(shard))
        file.read_into([filled.reshape(-1).view(np.uint8)], place.tokens_offset)
        return filled

    def timestamps_s(self, windows: ArrayLike) -> NDArray[np.float32]:
        """float32 (B, T): seconds from the window's first frame."""
        return self._all_timestamps()[checked_windows(windows, self.num_windows)]

    def table(self) -> WindowColumns:
        """Everything but the tokens of all windows, read on first use; times from the window's
        first frame."""
        if self._table is None:
            count = self.num_windows
            frame_index = np.empty((count, self.shape[0]), dtype=np.int32)
            crop = np.empty((count, 4), dtype=np.float32)
            flipped = np.empty(count, dtype=np.bool_)
            clip = np.empty(count, dtype=np.int64)
            for number, (position, window) in enumerate(self._all_windows()):
                frame_index[number] = window["frames"]
                crop[number] = window["crop"]
                flipped[number] = window["flipped"]
                clip[number] = position
            self._clip_index = clip
            self._table = WindowColumns(
                timestamps_s=self._all_timestamps(),
                frame_index=frame_index,
                crop=crop,
                flipped=flipped,
                clip=clip,
                keys=self.keys,
            )
        return self._table

    def window(self, index: int) -> dict[str, Any]:
        """What is known of one window: clip (key), frames (T indices), crop, flipped."""
        numbers = checked_windows([index], self.num_windows)
        shard, number = (int(place[0]) for place in self._cache.locate(numbers))
        starts = self._layout(shard).starts
        block = int(np.searchsorted(starts, number, side="right")) - 1
        windows = self._windows.get((shard, block))
        if windows is None:
            windows = self._read_windows(shard, self._layout(shard).blocks[block])
            if len(self._windows) >= KEPT_BLOCKS:
                self._windows.clear()
            self._windows[shard, block] = windows
        return dict(windows[number - int(starts[block])])

    def load(self) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """All tokens, float16 (W, T, D), and timestamps, float32 (W, T), in memory."""
        return self.tokens(np.arange(self.num_windows)), self._all_timestamps().copy()

    def release(self) -> None:
        """Lets go of the mapped files; what is read next maps them again."""
        self._rows.clear()

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * 2

    def _mapped(self, shard: int) -> NDArray[np.void]:
        """The mapped tar as one item of a window's bytes at every multiple of its stride."""
        rows = self._rows.get(shard)
        if rows is None:
            record = self._cache.records[shard]
            rows = _map_rows(
                shard_path(self.folder, record.shard, ".tar"),
                size=sum(entry["bytes"] for entry in record.files.values()),
                row_bytes=self._row_bytes,
                stride=self._layout(shard).stride,
            )
            while len(self._rows) >= self._max_mapped:
                self._rows.pop(next(iter(self._rows)), None)
            self._rows[shard] = rows
        return rows

    def _all_timestamps(self) -> NDArray[np.float32]:
        if self._timestamps is None:
            parts = [np.empty((0, self.shape[0]), dtype=np.float32)]
            for shard in range(len(self._cache.records)):
                path = self._path(shard)
                parts += [read_timestamps(path, block) for block in self._layout(shard).blocks]
            self._timestamps = np.concatenate(parts)
        return self._timestamps

    def _path(self, shard: int) -> Path:
        return shard_path(self.folder, self._cache.records[shard].shard, ".tar")

    def _layout(self, shard: int) -> _Layout:
        layout = self._layouts.get(shard)
        if layout is None:
            layout = self._layouts[shard] = _read_layout(self._cache, shard)
        return layout

    def _read_windows(self, shard: int, block: Block) -> list[dict[str, Any]]:
        return read_windows(self._path(shard), block, num_frames=self.shape[0])

    def _all_windows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Of every window its clip, index into `keys`, and what `window` gives; parsed anew."""
        for shard, first_key in enumerate(self._cache.first_keys().tolist()):
            keys = self._cache.records[shard].keys
            position = {key: first_key + index for index, key in enumerate(keys)}
            for block in self._layout(shard).blocks:
                for window in self._read_windows(shard, block):
                    if window["clip"] not in position:
                        raise DamagedShard(
                            f"{self._path(shard)}: a window of clip {window['clip']!r}, which the "
                            f"done-record does not name: {SHARD_ADVICE}"
                        )
                    yield position[window["clip"]], window


def _reopen(folder: str, allow_incomplete: bool) -> DeltaShards:
    # The tars were hashed when the reader was first opened, not again by every worker.
    return DeltaShards(folder, verify="size", allow_incomplete=allow_incomplete)


def _read_layout(cache: OpenedCache, shard: int) -> _Layout:
    shape, record = cache.info.shape, cache.records[shard]
    row_bytes = shape.num_frames * shape.hidden_size * 2
    path = shard_path(cache.folder, record.shard, ".tar")
    if list(record.files) != [path.relative_to(cache.folder).as_posix()]:
        raise DamagedShard(
            f"{path}: the done-record names other files than this one: {SHARD_ADVICE}"
        )
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    starts = np.cumsum([0, *(block.num_windows for block in blocks)], dtype=np.int64)
    if starts[-1] != record.rows:
        raise DamagedShard(
            f"{path}: {starts[-1]} windows, the done-record says {record.rows}: {SHARD_ADVICE}"
        )
    offsets = np.concatenate(
        [
            block.tokens_offset + row_bytes * np.arange(block.num_windows, dtype=np.int64)
            for block in blocks
        ]
    )
    return _Layout(
        blocks=blocks, starts=starts, offsets=offsets, stride=int(np.gcd.reduce(offsets))
    )


def _map_rows(path: Path, *, size: int, row_bytes: int, stride: int) -> NDArray[np.void]:
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise DamagedShard(f"{path}: cannot be mapped ({error}): {SHARD_ADVICE}") from error
    if mapped.size != size:
        raise DamagedShard(f"{path}: {mapped.size} bytes, had {size} when opened: {SHARD_ADVICE}")
    return np.ndarray(
        shape=((mapped.size - row_bytes) // stride + 1,),
        dtype=np.dtype((np.void, row_bytes)),
        buffer=mapped.data,
        strides=(stride,),
    )


def _runs(values: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(value, begin, end) for every run of equal values in the sorted `values` (B,)."""
    edges = np.flatnonzero(np.diff(values)) + 1
    begins = [0, *edges.tolist()] if len(values) else []
    ends = [*edges.tolist(), len(values)]
    for begin, end in zip(begins, ends, strict=False):
        yield int(values[begin]), begin, end
