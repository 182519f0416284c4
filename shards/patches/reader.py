"""PatchShards: reads a patch-token cache by window numbers.

    patches = PatchShards("cache/patches")
    tokens = patches.tokens([3, 17])        # float32 (2, T, N, D)

Windows are numbered through all shards in shard order. Any number of threads may read, and
processes forked while a reader is open may go on reading with it.

A `TokenReader` reads one shard frame by frame: as stored, or as the float32 values that stands for
(int8 has scales beside its codes). File descriptors are the caller's, one a thread.

`read_shard_table` gives all but the tokens: one row a window; `read_black` the tokens of a black
frame.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import BLACK, PATCHES, CacheInfo
from ..errors import SHARD_ADVICE, CacheMismatch, DamagedShard, UsageError, damaged_shard
from ..files import ReadOnlyFile
from ..npy import read_npy
from ..plan import keys_sha256
from ..reader import CacheReader, checked_out, checked_windows
from ..records import Verify, shard_path
from ..schema import read_file
from ..windows import WindowColumns
from .archive import ShardFile
from .int8 import check_channel_scale, dequantise, read_channel_scale
from .layout import (
    CHANNEL_SCALE_SPEC,
    STORED_DTYPES,
    SUFFIX,
    TOKEN_SCALE_SPEC,
    WINDOW_ARRAYS,
    array_shapes,
    from_stored,
    member_names,
)
from .zarr_arrays import FrameMember, read_array, read_attributes

MAX_BLACK_BYTES = 2**30
"""Of black.npy: one frame in float32 (a guess)."""


def logical_dtype(info: CacheInfo) -> str:
    """How the tokens are stored, a key of STORED_DTYPES; CacheMismatch for another."""
    storage = info.identity.get("storage")
    dtype = storage.get("dtype") if isinstance(storage, dict) else None
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise CacheMismatch(
            f"cache.json: identity.storage.dtype is {dtype!r}, this release reads "
            f"{', '.join(STORED_DTYPES)}: update deltatok, or extract again"
        )
    return dtype


def open_shard(folder: Path, shard: int, info: CacheInfo) -> ShardFile:
    """The file of a shard of this cache; DamagedShard for one that is cut, added to or changed."""
    return ShardFile(shard_path(folder, shard, SUFFIX), member_names(logical_dtype(info)))


def read_shard_table(
    file: ShardFile, keys: list[str], *, rows: int, num_frames: int
) -> WindowColumns:
    """The windows of one shard, as stored. Raises DamagedShard if an array is broken."""
    columns: dict[str, Any] = {
        name: read_array(file, name, shape=shape, dtype=WINDOW_ARRAYS[name].dtype)
        for name, shape in array_shapes(rows, num_frames).items()
    }
    clip = columns["clip"]
    if not 0 <= clip.min() <= clip.max() < len(keys):
        raise damaged_shard(f"{file.path}: clip has an index outside of the {len(keys)} keys")
    return WindowColumns(**columns, keys=keys)


def read_keys(file: ShardFile, info: CacheInfo, *, sha256: str) -> list[str]:
    """The keys of a shard's clips, as it says itself; `sha256`: theirs, by the done-record. Raises
    CacheMismatch if the shard says that it belongs to another cache."""
    attributes = read_attributes(file)
    keys: Any = attributes.get("keys")
    are_texts = type(keys) is list and all(type(key) is str for key in keys)
    for name, is_ours in (
        ("fingerprint", attributes.get("fingerprint") == info.fingerprint),
        ("keys", are_texts and keys_sha256(keys) == sha256),
    ):
        if not is_ours:
            raise CacheMismatch(
                f"{file.path}: its attribute {name} is not that of cache.json and the done-record: "
                f"the shard belongs to another cache: {SHARD_ADVICE}"
            )
    return list(keys)


def read_black(path: Path, info: CacheInfo, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """black.npy, float32 `shape`; DamagedShard if it is not that."""
    advice = "extract again, it is written first"
    data = read_file(path, max_bytes=MAX_BLACK_BYTES, advice=advice)
    entry = info.files.get(path.name)
    if entry is not None and hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedShard(f"{path}: was changed since the cache was finished: {advice}")
    tokens = read_npy(data, dtype=np.dtype("<f4"), num_axes=2, where=str(path))
    if tokens.shape != shape:
        raise DamagedShard(f"{path}: shape {tokens.shape}, cache.json says {shape}: {advice}")
    return tokens


class TokenReader:
    """The tokens of a shard of W = `rows` windows. T, N, D as the cache's."""

    def __init__(
        self, file: ShardFile, info: CacheInfo, *, rows: int, check_once: bool = False
    ) -> None:
        """check_once: see FrameMember."""
        shape = info.shape
        self._frame_shape = (shape.num_tokens or 0, shape.hidden_size)
        self._dtype = logical_dtype(info)
        windows = (rows, shape.num_frames)
        stored = STORED_DTYPES[self._dtype]
        frames = (*windows, *self._frame_shape)
        self._tokens = FrameMember(
            file, "tokens", shape=frames, dtype=stored, check_once=check_once
        )
        self._path = file.path
        self.where = self._tokens.where
        """For messages."""
        self.compression = self._tokens.compression
        """"none" or "zstd"."""
        self._scales: FrameMember | None = None
        self.channel_scale: NDArray[np.float32] | None = None
        """float32 (D,), with int8 only."""
        if self._dtype == "int8":
            tokens, scale = TOKEN_SCALE_SPEC.dtype, CHANNEL_SCALE_SPEC.dtype
            self._scales = FrameMember(
                file, "token_scale", shape=frames[:3], dtype=tokens, check_once=check_once
            )
            self.channel_scale = read_array(
                file, "channel_scale", shape=(shape.hidden_size,), dtype=scale
            )
            check_channel_scale(self.channel_scale, info, where=f"{file.path}: channel_scale")

    def open(self) -> ReadOnlyFile:
        """The shard's file, to be passed to the reading methods."""
        return ReadOnlyFile(self._path)

    def new_frames(self, count: int) -> NDArray[Any]:
        """An array for stored frames, (count, N, D)."""
        return np.empty((count, *self._frame_shape), dtype=STORED_DTYPES[self._dtype])

    def read_stored(
        self, file: ReadOnlyFile, window: int, frames: Sequence[int], *, out: NDArray[Any]
    ) -> None:
        """Fills `out`, C-contiguous (F, N, D) of the stored dtype, or its bytes, with F `frames`
        of a window."""
        rows = out.reshape(len(frames), -1).view(np.uint8)
        self._tokens.read_frames(file, window, frames, out=rows)

    def read_scale(
        self, file: ReadOnlyFile, window: int, frames: Sequence[int], *, out: NDArray[np.float16]
    ) -> None:
        """int8 only: fills `out` with the token scales of the frames, float16 (F, N)."""
        if self._scales is None:
            raise AssertionError("only int8 shards have token scales")
        self._scales.read_frames(file, window, frames, out=out.view(np.uint8))

    def read_values(
        self,
        file: ReadOnlyFile,
        window: int,
        frames: Sequence[int],
        *,
        out: NDArray[np.float32],
        stored: NDArray[Any],
    ) -> None:
        """Fills `out`, float32 (F, N, D); `stored` is a `new_frames(F)` to read into."""
        self.read_stored(file, window, frames, out=stored)
        if self.channel_scale is None:
            from_stored(stored, self._dtype, out=out)
        else:
            scale = np.empty((len(frames), self._frame_shape[0]), dtype=np.float16)
            self.read_scale(file, window, frames, out=scale)
            dequantise(stored, scale, self.channel_scale, out=out)


MAX_OPEN_FILES = 128
"""Shards kept open by each thread; a process may open 1,024 files on most machines."""


class PatchShards(CacheReader[np.float32]):
    """A finished patch-token cache, opened for reading.

    When a process uses a shard first, its file must have the size that the index says, with
    verify="sha256" its bytes, too. A frame that is read first is held against its checksum
    (check_once=False: a frame every time it is read, at about two thirds of the rate; frames under
    zstd always are).

    Raises CacheMismatch for a folder that is no patch cache or is not finished (unless
    `allow_incomplete`: its finished shards), DamagedShard for what is missing or changed.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        verify: Verify = "size",
        allow_incomplete: bool = False,
        check_once: bool = True,
    ) -> None:
        super().__init__(folder, format=PATCHES, verify=verify, allow_incomplete=allow_incomplete)
        self._check_once = check_once
        shape = self.info.shape
        if shape.num_tokens is None or shape.grid is None:
            raise AssertionError("read_cache_info lets no patch cache pass without tokens")
        self.shape: tuple[int, int, int] = (shape.num_frames, shape.num_tokens, shape.hidden_size)
        self.grid: tuple[int, int] = shape.grid
        self.dtype = logical_dtype(self.info)

    _OF_PROCESS = (*CacheReader._OF_PROCESS, "_readers", "_thread")

    def _begin(self) -> None:
        super()._begin()
        self._readers: dict[int, TokenReader] = {}
        self._thread = threading.local()

    @property
    def _suffix(self) -> str:
        return SUFFIX

    @property
    def size_bytes(self) -> int:
        """Bytes of the tokens of the whole cache, as `load` gives them."""
        bytes_each = 2 if self.dtype == "float16" else 4
        return self.num_windows * int(np.prod(self.shape)) * bytes_each

    @cached_property
    def black(self) -> NDArray[np.float32]:
        """float32 (N, D): the tokens of a black frame, what precedes a window's first frame."""
        return read_black(self.folder / BLACK, self.info, self.shape[1:])

    def tokens(
        self,
        windows: ArrayLike,
        *,
        frames: ArrayLike | None = None,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The patch tokens of `windows` (B,), float32 (B, T, N, D), in the order asked.

        `frames`: the F frames of each window to read, whole numbers (B, F), instead of all T; those
        that follow one another are one read. `out`: a float32 array of the result's shape to fill
        and return. Raises DamagedShard for a frame whose checksum is wrong, IndexError for a window
        or frame that is not there.
        """
        chosen, shape, places = self._places(windows, frames)
        filled = checked_out(out, shape, np.dtype(np.float32))
        stored: NDArray[Any] = np.empty(shape[1:], dtype=STORED_DTYPES[self.dtype])
        for place, reader, file, window in places:
            reader.read_values(file, window, chosen[place], out=filled[place], stored=stored)
        return filled

    def stored_tokens(
        self,
        windows: ArrayLike,
        *,
        frames: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """As `tokens`, raw: float16, the bits of bfloat16 as uint16, or int8 codes, whose scales
        `token_scale` and `channel_scale` give (FORMAT.md has the formulas)."""
        chosen, shape, places = self._places(windows, frames)
        filled = checked_out(out, shape, STORED_DTYPES[self.dtype])
        for place, reader, file, window in places:
            reader.read_stored(file, window, chosen[place], out=filled[place])
        return filled

    def token_scale(
        self, windows: ArrayLike, *, frames: ArrayLike | None = None
    ) -> NDArray[np.float16]:
        """float16 (B, T, N): value = int8 * token_scale * channel_scale; UsageError if not int8.
        `frames`: as of `tokens`."""
        self._check_int8()
        chosen, shape, places = self._places(windows, frames)
        filled = np.empty(shape[:3], dtype=np.float16)
        for place, reader, file, window in places:
            reader.read_scale(file, window, chosen[place], out=filled[place])
        return filled

    @property
    def channel_scale(self) -> NDArray[np.float32]:
        """float32 (D,), the same for the whole cache. UsageError without int8."""
        self._check_int8()
        return read_channel_scale(self.folder, self.info)

    def load(self) -> NDArray[Any]:
        """The whole cache (W, T, N, D) in memory: float16 as stored, float32 for the other dtypes.

        See `size_bytes` before asking.
        """
        windows = np.arange(self.num_windows)
        return self.stored_tokens(windows) if self.dtype == "float16" else self.tokens(windows)

    def _shard_table(self, shard: int) -> WindowColumns:
        file, keys = self._open_shard(shard)
        rows = int(self._shards.rows[shard])
        return read_shard_table(file, keys, rows=rows, num_frames=self.shape[0])

    def _open_shard(self, shard: int) -> tuple[ShardFile, list[str]]:
        """The file of a shard, held against the index, and its keys."""
        self._check(shard)
        names = member_names(self.dtype)
        file = self._opened(shard, lambda path: ShardFile(path, names))
        return file, read_keys(file, self.info, sha256=self._keys_sha256(shard))

    def _frames(self, frames: ArrayLike | None, num_windows: int) -> NDArray[np.int64]:
        """Frames within the window, int64 (B, F), F >= 1."""
        num_frames = self.shape[0]
        if frames is None:
            return np.broadcast_to(np.arange(num_frames), (num_windows, num_frames))
        numbers = np.asarray(frames)
        if numbers.ndim != 2 or len(numbers) != num_windows or numbers.shape[1] == 0:
            raise ValueError(f"frames has shape {numbers.shape}, wanted ({num_windows}, F), F >= 1")
        if numbers.dtype.kind not in "iu":
            raise TypeError(f"frames is {numbers.dtype}, wanted whole numbers")
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < num_frames):
            raise IndexError(
                f"frames {numbers.min()}..{numbers.max()} asked for, a window has "
                f"0..{num_frames - 1}"
            )
        return numbers.astype(np.int64)

    def _places(
        self, windows: ArrayLike, frames: ArrayLike | None
    ) -> tuple[
        list[list[int]], tuple[int, ...], Iterator[tuple[int, TokenReader, ReadOnlyFile, int]]
    ]:
        """The frames of each window, the shape of their tokens (B, F, N, D), and where to read.

        Their shards are opened: before room is made for what a made-up shape says."""
        numbers = checked_windows(windows, self.num_windows)
        shards = np.unique(self._locate(numbers)[0])
        self._check_all(shards)
        for shard in shards.tolist():
            self._reader(shard)
        chosen = self._frames(frames, len(numbers))
        shape = (*chosen.shape, *self.shape[1:])
        return chosen.tolist(), shape, self._in_file_order(numbers)

    def _in_file_order(
        self, numbers: NDArray[np.int64]
    ) -> Iterator[tuple[int, TokenReader, ReadOnlyFile, int]]:
        """(position in `numbers`, the shard's reader, its open file, window within the shard)."""
        order = np.argsort(numbers, kind="stable")
        shards, windows = self._locate(numbers[order])
        opened = -1
        for place, shard, window in zip(
            order.tolist(), shards.tolist(), windows.tolist(), strict=True
        ):
            if shard != opened:
                reader, opened = self._reader(shard), shard
                file = self._open_file(shard)
            yield place, reader, file, window

    def _reader(self, shard: int) -> TokenReader:
        reader = self._readers.get(shard)
        if reader is None:
            file, _ = self._open_shard(shard)
            rows = int(self._shards.rows[shard])
            reader = self._readers[shard] = TokenReader(
                file, self.info, rows=rows, check_once=self._check_once
            )
        return reader

    def _open_file(self, shard: int) -> ReadOnlyFile:
        # Per thread, so that no lock is needed (a lock held during a fork stays locked).
        opened: dict[int, ReadOnlyFile] = self._thread.__dict__.setdefault("files", {})
        file = opened.pop(shard, None) or self._opened(shard, ReadOnlyFile)
        opened[shard] = file  # the most recently used is last
        if len(opened) > MAX_OPEN_FILES:
            del opened[next(iter(opened))]
        return file

    def _check_int8(self) -> None:
        if self.dtype != "int8":
            raise UsageError(f"{self.folder}: stores {self.dtype}, only int8 has scales")
