"""How many bytes and files a cache will have, from little shards that the real writers write.

A patch shard is F + C * clips + B * windows bytes, whatever the tokens: three little ones, in a
temporary folder, give F, C and B. The padding of a tar is no such sum, so a delta shard is written
as large as it will be. int8 is worked out from float16: another D bytes a token, and its scales.
Called by plan.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ..extract.sampling import WindowDraw
from ..shards.cache import DELTAS, CacheInfo, CacheShape, open_cache
from ..shards.delta_writer import DeltaRows, write_delta_shard
from ..shards.patch_writer import PatchRows, write_black, write_patch_shard
from ..shards.plan import PlanEntry
from ..shards.records import DoneRecord, shard_path

TIMING_BYTES = 116
"""A line of timings.jsonl, about."""
FINISHED_BYTES = 220
"""What cache.json gains when the cache is finished: counts and the hash of plan.jsonl, about."""
BLACK_ENTRY_BYTES = 120
"""What it gains with the hash of black.npy, about."""
TOKENIZER_BYTES = 640
"""What the tokenizer's config and hash add to the cache.json of a delta cache, about."""
MAX_KINDS = 6
"""Delta shards of so many different sizes are written; more are taken for the commonest one."""
INDEX_BYTES = 4 + 16
"""Of a chunk of a Zarr shard: its checksum and its place (shards/FORMAT.md)."""
ARRAY_METADATA_BYTES = 1000
"""zarr.json of an array in a Zarr shard, about (measured: 620 to 1,450)."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to be."""

    keys: list[str]
    """The clips expected to give windows."""
    num_windows: float
    """Windows they are expected to give."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """A finished cache of one kind."""

    bytes: int
    """Of all files in its folder."""
    bytes_per_frame: float
    files: int
    shards: int
    """Shards that have windows."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the sizes of every kind of cache are worked out from."""

    info: CacheInfo
    """cache.json of the float16 patch cache."""
    tokens: NDArray[np.float16]
    """float16 (2, T, N, D): two real windows."""
    black: NDArray[np.float32]
    """float32 (N, D)"""
    draws: Sequence[WindowDraw]
    """Some windows; their frames and crops are written as text, so their digits count."""
    plan: Sequence[PlanEntry]
    shards: Sequence[ShardPlan]

    def of_patches(self) -> dict[str, CacheSize]:
        """Of the patch caches that store `float16` (bfloat16: the same) and `int8`."""
        shape = self.info.shape
        num_frames, num_tokens = shape.num_frames, shape.num_tokens or 0
        with TemporaryDirectory() as folder:
            one = self._patch_shard(Path(folder, "a"), num_clips=1, num_windows=1)
            two = self._patch_shard(Path(folder, "b"), num_clips=1, num_windows=2)
            three = self._patch_shard(Path(folder, "c"), num_clips=2, num_windows=2)
            beside = (Path(folder, "a", "cache.json").stat().st_size) + (
                Path(folder, "a", "black.npy").stat().st_size
            )
        a_window, a_clip = two.bytes - one.bytes, three.bytes - two.bytes
        a_shard = one.bytes - a_window - a_clip

        def size_of(shard: ShardPlan) -> float:
            return a_shard + a_clip * len(shard.keys) + a_window * shard.num_windows

        saved = num_frames * (
            num_tokens * shape.hidden_size - 2 * num_tokens - INDEX_BYTES
        )  # by a window: two bytes a number become one, but every token has a float16 scale
        scales = 4 * shape.hidden_size  # float32, in every shard and once beside them

        def int8_size_of(shard: ShardPlan) -> float:
            return (
                size_of(shard) - saved * shard.num_windows + scales + 2 * ARRAY_METADATA_BYTES + 300
            )  # 300: the four files more in the done-record

        beside += FINISHED_BYTES + BLACK_ENTRY_BYTES
        return {
            "float16": self._total(size_of, beside=beside, files_a_shard=one.files, files=5),
            "int8": self._total(
                int8_size_of, beside=beside + scales, files_a_shard=one.files + 4, files=6
            ),
        }

    def of_deltas(self) -> CacheSize:
        """Of the delta-token cache."""
        kinds = Counter(_kind(shard) for shard in self.shards if shard.keys)
        sizes: dict[tuple[int, int], int] = {}
        with TemporaryDirectory() as folder:
            info = CacheInfo(
                format=DELTAS,
                identity={"patches": self.info.identity},
                shape=CacheShape(
                    num_frames=self.info.shape.num_frames,
                    num_tokens=None,
                    grid=None,
                    hidden_size=self.info.shape.hidden_size,
                ),
                licence=self.info.licence,
                backbone=self.info.backbone,
                software=self.info.software,
            )
            open_cache(folder, info)
            for number, (kind, _) in enumerate(kinds.most_common(MAX_KINDS)):
                sizes[kind] = self._delta_shard(Path(folder), number, *kind)
            beside = Path(folder, "cache.json").stat().st_size
        common, common_size = next(iter(sizes.items()))

        def size_of(shard: ShardPlan) -> float:
            return sizes.get(_kind(shard), common_size * shard.num_windows / common[1])

        beside += FINISHED_BYTES + TOKENIZER_BYTES
        return self._total(size_of, beside=beside, files_a_shard=1, files=4)

    def _total(
        self,
        size_of: Callable[[ShardPlan], float],
        *,
        beside: int,
        files_a_shard: int,
        files: int,
    ) -> CacheSize:
        """files: those beside the shards; files_a_shard: without its done-record."""
        full = [shard for shard in self.shards if shard.keys and shard.num_windows > 0]
        plan_bytes = sum(
            len(json.dumps(asdict(entry), sort_keys=True).encode()) + 1 for entry in self.plan
        )
        total = beside + plan_bytes + TIMING_BYTES * len(self.shards) + sum(map(size_of, full))
        num_frames = sum(shard.num_windows for shard in full) * self.info.shape.num_frames
        return CacheSize(
            bytes=round(total),
            bytes_per_frame=total / max(num_frames, 1),
            files=files + len(self.shards) + files_a_shard * len(full),
            shards=len(full),
        )

    def _patch_shard(self, folder: Path, *, num_clips: int, num_windows: int) -> "_Written":
        open_cache(folder, self.info)
        write_black(folder, self.black)
        shape = (num_windows, self.info.shape.num_frames)
        record = write_patch_shard(
            folder,
            0,
            PatchRows(
                tokens=self.tokens[:num_windows],
                timestamps_s=np.zeros(shape, dtype=np.float32),
                frame_index=np.zeros(shape, dtype=np.int32),
                crop=np.zeros((num_windows, 4), dtype=np.float32),
                flipped=np.zeros(num_windows, dtype=np.bool_),
                clip=np.arange(num_windows, dtype=np.int32) % num_clips,
                keys=(keys := self._usual_keys(num_clips)),
            ),
            dtype="float16",
            seed=0,
            decoders=dict.fromkeys(keys, "decord"),
        )
        return _written(folder, record)

    def _delta_shard(self, folder: Path, shard: int, num_clips: int, num_windows: int) -> int:
        """Bytes of a delta shard of that size, its done-record included."""
        rng = np.random.default_rng(0)
        shape = (num_windows, self.info.shape.num_frames)
        keys = self._usual_keys(num_clips)
        draws = [self.draws[number % len(self.draws)] for number in range(num_windows)]
        tokens = rng.standard_normal((*shape, self.info.shape.hidden_size), dtype=np.float32)
        record = write_delta_shard(
            folder,
            shard,
            DeltaRows(
                tokens=tokens.astype(np.float16),
                timestamps_s=np.zeros(shape, dtype=np.float32),
                frame_index=np.array([draw.frame_index for draw in draws], dtype=np.int32),
                crop=np.array([draw.crop for draw in draws], dtype=np.float32),
                flipped=np.array([draw.flipped for draw in draws], dtype=np.bool_),
                clip=(np.arange(num_windows) % num_clips).astype(np.int32),
                keys=keys,
            ),
            decoders=dict.fromkeys(keys, "decord"),
        )
        return _written(folder, record).bytes

    def _usual_keys(self, count: int) -> list[str]:
        """Made-up keys, each as long as the clips' keys are on average."""
        length = round(sum(len(json.dumps(e.key)) - 2 for e in self.plan) / len(self.plan))
        return [f"{number}".rjust(length, "k") for number in range(count)]


def _kind(shard: ShardPlan) -> tuple[int, int]:
    """Clips and windows: delta shards that agree in them are of one size."""
    return len(shard.keys), max(1, round(shard.num_windows))


@dataclass(frozen=True)
class _Written:
    bytes: int
    files: int


def _written(folder: Path, record: DoneRecord) -> _Written:
    data = sum(int(entry["bytes"]) for entry in record.files.values())
    done = shard_path(folder, record.shard, ".json").stat().st_size
    return _Written(data + done, len(record.files))
