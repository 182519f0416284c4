"""Tables of windows: all that is known of each beside its tokens; with them, the rows of a shard.

Extraction fills `ShardRows` and the writers take them; the readers give `WindowColumns`. W windows
of T frames.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .errors import CacheMismatch
from .plan import keys_sha256
from .records import DoneRecord, Quarantined

COLUMNS = ("timestamps_s", "frame_index", "crop", "flipped", "clip")


@dataclass(frozen=True, kw_only=True)
class WindowColumns:
    """W windows, in any order."""

    timestamps_s: NDArray[np.float32]
    """float32 (W, T), seconds since the clip's first shown frame; of delta tokens since the
    window's first frame."""
    frame_index: NDArray[np.int32]
    """int32 (W, T), in presentation order."""
    crop: NDArray[np.float32]
    """float32 (W, 4): top, left, height, width in source pixels."""
    flipped: NDArray[np.bool_]
    """bool (W,): whether the crop was mirrored left to right."""
    clip: NDArray[np.signedinteger[Any]]
    """int32 (W,) of a shard, int64 of a whole cache: index into keys."""
    keys: list[str]
    """The clips that have windows."""

    def __len__(self) -> int:
        return len(self.clip)

    @staticmethod
    def empty(num_frames: int) -> "WindowColumns":
        """No window of T = `num_frames` frames."""
        return WindowColumns(
            timestamps_s=np.empty((0, num_frames), dtype=np.float32),
            frame_index=np.empty((0, num_frames), dtype=np.int32),
            crop=np.empty((0, 4), dtype=np.float32),
            flipped=np.empty(0, dtype=np.bool_),
            clip=np.empty(0, dtype=np.int32),
            keys=[],
        )

    @staticmethod
    def concatenate(parts: "Sequence[WindowColumns]") -> "WindowColumns":
        """The windows of one part after the other, their clips numbered through; one part or
        more."""
        first_keys = np.cumsum([0, *(len(part.keys) for part in parts)])
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS
        }
        columns["clip"] += np.repeat(first_keys[:-1], list(map(len, parts))).astype(
            columns["clip"].dtype
        )
        return WindowColumns(**columns, keys=[key for part in parts for key in part.keys])

    def take(self, windows: NDArray[Any]) -> "WindowColumns":
        """These windows, by their numbers or a mask; `keys` stays."""
        columns: dict[str, Any] = {name: getattr(self, name)[windows] for name in COLUMNS}
        return WindowColumns(**columns, keys=self.keys)

    def from_first_frame(self) -> Self:
        """The same with times from each window's first frame, as delta caches have them."""
        return replace(self, timestamps_s=self.timestamps_s - self.timestamps_s[:, :1])

    def describe(self, window: int) -> dict[str, Any]:
        """One window as plain values: clip (key), frames, crop, flipped."""
        return {
            "clip": self.keys[int(self.clip[window])],
            "frames": self.frame_index[window].tolist(),
            "crop": self.crop[window].tolist(),
            "flipped": bool(self.flipped[window]),
        }

    def check_columns(self, *, num_windows: int, num_frames: int, where: str) -> None:
        """Raises CacheMismatch, naming the column, unless all have the dtype and shape that shards
        of such windows have."""
        wanted = replace(WindowColumns.empty(num_frames), keys=self.keys)
        for name in COLUMNS:
            array, like = getattr(self, name), getattr(wanted, name)
            shape = (num_windows, *like.shape[1:])
            if array.shape != shape or array.dtype != like.dtype:
                raise CacheMismatch(
                    f"{where}: {name} is {array.dtype} {array.shape}, wanted {like.dtype} {shape}"
                )
        if num_windows and not 0 <= self.clip.min() <= self.clip.max() < len(self.keys):
            raise CacheMismatch(f"{where}: clip has an index outside of the {len(self.keys)} keys")


@dataclass(frozen=True, kw_only=True)
class ShardRows(WindowColumns):
    """The windows of one shard with their tokens, and what became of its clips."""

    tokens: NDArray[Any]
    """Patch tokens float32 or float16 (W, T, N, D), finite; or as they are to be stored: uint16
    bits for bfloat16, int8 codes for int8 (see `patches.int8`). Delta tokens float16 (W, T, D),
    finite; token t leads from frame t - 1 (token 0: from black) to t."""
    token_scale: NDArray[np.float16] | None = None
    """float16 (W, T, N), with int8 codes only."""
    decoders: dict[str, str] = field(default_factory=dict)
    """Clip -> the decoder that read it, where that is known."""
    quarantined: list[Quarantined] = field(default_factory=list)
    """The shard's clips that have no windows."""

    def record(self, shard: int, *, abs_max: float, beyond_float16: int = 0) -> DoneRecord:
        """What the done-record of the shard of these rows says, but for its file."""
        counted = Counter(self.decoders.values())
        decoder = max(sorted(counted), key=counted.__getitem__, default=None)
        others = {key: self.decoders.get(key) for key in self.keys}
        return DoneRecord(
            shard=shard,
            clips=len(self.keys),
            keys_sha256=keys_sha256(self.keys),
            rows=len(self.tokens),
            abs_max=abs_max,
            beyond_float16=beyond_float16,
            decoder=decoder,
            other_decoders={key: other for key, other in others.items() if other != decoder},
            quarantined=list(self.quarantined),
        )
