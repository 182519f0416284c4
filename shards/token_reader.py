"""The tokens of one patch-token shard, frame by frame: as stored, or as the float32 they stand for.

What the dtypes differ in is here: int8 has scales beside its codes. Used by `patches` and
`contents`; file descriptors are the caller's, one set a thread.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import CacheInfo
from .dtypes import STORED_DTYPES, from_stored
from .frame_file import FrameFile
from .int8 import check_channel_scale, dequantise
from .patch_layout import CHANNEL_SCALE_SPEC, TOKEN_SCALE_SPEC
from .patch_table import logical_dtype
from .zarr_map import ReadOnlyFile, read_array

OpenFiles = tuple[ReadOnlyFile, ...]
"""What `TokenReader.open` gives: the file of the tokens and, for int8, that of their scales."""


class TokenReader:
    """The tokens of the shard in the folder `group`, W = `rows` windows. T, N, D as the cache's."""

    def __init__(
        self, group: Path, info: CacheInfo, *, rows: int, check_once: bool = False
    ) -> None:
        """check_once: see FrameFile."""
        shape = info.shape
        self._frame_shape = (shape.num_tokens or 0, shape.hidden_size)
        self._dtype = logical_dtype(info)
        windows = (rows, shape.num_frames)
        stored = STORED_DTYPES[self._dtype]
        self._tokens = FrameFile(
            group,
            "tokens",
            shape=(*windows, *self._frame_shape),
            dtype=stored,
            check_once=check_once,
        )
        self.path = self._tokens.path
        self.compression = self._tokens.compression
        """"none" or "zstd"."""
        self._scales: FrameFile | None = None
        self.channel_scale: NDArray[np.float32] | None = None
        """float32 (D,), with int8 only."""
        if self._dtype == "int8":
            self._scales = FrameFile(
                group,
                "token_scale",
                shape=(*windows, self._frame_shape[0]),
                dtype=TOKEN_SCALE_SPEC.dtype,
                check_once=check_once,
            )
            self.channel_scale = read_array(
                group,
                "channel_scale",
                shape=(shape.hidden_size,),
                dtype=CHANNEL_SCALE_SPEC.dtype,
            )
            check_channel_scale(self.channel_scale, info, where=f"{group}: channel_scale")

    def open(self) -> OpenFiles:
        """The data files, to be passed to the reading methods."""
        files = [self._tokens] if self._scales is None else [self._tokens, self._scales]
        return tuple(file.open() for file in files)

    def new_frames(self, count: int) -> NDArray[Any]:
        """An array for stored frames, (count, N, D)."""
        return np.empty((count, *self._frame_shape), dtype=STORED_DTYPES[self._dtype])

    def read_stored(
        self, files: OpenFiles, window: int, frames: Sequence[int], *, out: NDArray[Any]
    ) -> None:
        """Fills `out`, C-contiguous (F, N, D) of the stored dtype, or its bytes, with F `frames`
        of a window."""
        rows = out.reshape(len(frames), -1).view(np.uint8)
        self._tokens.read_frames(files[0], window, frames, out=rows)

    def read_scale(
        self, files: OpenFiles, window: int, frames: Sequence[int], *, out: NDArray[np.float16]
    ) -> None:
        """int8 only: fills `out` with the token scales of the frames, float16 (F, N)."""
        if self._scales is None:
            raise AssertionError("only int8 shards have token scales")
        self._scales.read_frames(files[1], window, frames, out=out.view(np.uint8))

    def read_values(
        self,
        files: OpenFiles,
        window: int,
        frames: Sequence[int],
        *,
        out: NDArray[np.float32],
        stored: NDArray[Any],
    ) -> None:
        """Fills `out`, float32 (F, N, D); `stored` is a `new_frames(F)` to read into."""
        self.read_stored(files, window, frames, out=stored)
        if self.channel_scale is None:
            from_stored(stored, self._dtype, out=out)
        else:
            scale = np.empty((len(frames), self._frame_shape[0]), dtype=np.float16)
            self.read_scale(files, window, frames, out=scale)
            dequantise(stored, scale, self.channel_scale, out=out)
