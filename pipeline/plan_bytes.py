"""How many bytes and files a cache will have, from little shards that the real writers write.

A patch shard is F + C * clips + B * windows bytes: three little ones of each storage type, in a
temporary folder, give F, C and B (B with zstd: as the probed windows were compressed). The padding
of a tar is no such sum, so a delta shard is written as large as it will be.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..extract.sampling import WindowDraw
from ..shards.cache import DELTAS, CacheInfo, CacheShape, open_cache
from ..shards.deltas.writer import DeltaRows, write_delta_shard
from ..shards.patches.int8 import channel_scale_of, quantise, scale_sha256, write_channel_scale
from ..shards.patches.writer import PatchRows, write_black, write_patch_shard
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
OTHER_FILES = 4
"""plan.jsonl, index.jsonl, quarantine.jsonl and timings.jsonl."""
MAX_KINDS = 6
"""Delta shards of so many different sizes are written; more are taken for the commonest one."""


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
    """float16 (2 or more, T, N, D): real windows."""
    black: NDArray[np.float32]
    """float32 (N, D)"""
    draws: Sequence[WindowDraw]
    """Some windows; their frames and crops are written as text, so their digits count."""
    plan: Sequence[PlanEntry]
    shards: Sequence[ShardPlan]
    compression: Literal["none", "zstd"] = "none"
    """Of the patch shards."""
    quarantine_bytes: float = 0.0
    """Of quarantine.jsonl; the done-records hold the same once more."""

    def of_patches(self) -> dict[str, CacheSize]:
        """Of the patch caches that store `float16` (bfloat16: the same but for zstd) and `int8`."""
        scale = channel_scale_of(np.square(self.tokens, dtype=np.float64).mean(axis=(0, 1, 2)))
        int8 = {"dtype": "int8", "scale_sha256": scale_sha256(scale)}
        with TemporaryDirectory() as folder:
            return {
                "float16": self._of_patches(Path(folder, "float16"), {"dtype": "float16"}, None),
                "int8": self._of_patches(Path(folder, "int8"), int8, scale),
            }

    def _of_patches(
        self, folder: Path, storage: dict[str, str], scale: NDArray[np.float32] | None
    ) -> CacheSize:
        """Of the patch cache with this `storage` in its identity; `scale`: of int8."""
        info = replace(self.info, identity=self.info.identity | {"storage": storage})
        open_cache(folder, info)
        write_black(folder, self.black)
        if scale is not None:
            write_channel_scale(folder, scale)
        beside = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
        many = len(self.tokens)
        one, full, other = (
            self._patch_shard(folder, shard, num_clips, num_windows, scale=scale)
            for shard, (num_clips, num_windows) in enumerate(((1, 1), (1, many), (2, many)))
        )
        a_window, a_clip = (full.bytes - one.bytes) / (many - 1), other.bytes - full.bytes
        a_shard = one.bytes - a_window - a_clip
        return self._total(
            lambda shard: a_shard + a_clip * len(shard.keys) + a_window * shard.num_windows,
            beside=sum(beside) + FINISHED_BYTES + BLACK_ENTRY_BYTES,
            files_a_shard=one.files,
            files=len(beside) + OTHER_FILES,
        )

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
            beside = [path.stat().st_size for path in Path(folder).iterdir() if path.is_file()]
        common, common_size = next(iter(sizes.items()))

        def size_of(shard: ShardPlan) -> float:
            return sizes.get(_kind(shard), common_size * shard.num_windows / common[1])

        return self._total(
            size_of,
            beside=sum(beside) + FINISHED_BYTES + TOKENIZER_BYTES,
            files_a_shard=1,
            files=len(beside) + OTHER_FILES,
        )

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
        total += 2 * self.quarantine_bytes
        num_frames = sum(shard.num_windows for shard in full) * self.info.shape.num_frames
        return CacheSize(
            bytes=round(total),
            bytes_per_frame=total / max(num_frames, 1),
            files=files + len(self.shards) + files_a_shard * len(full),
            shards=len(full),
        )

    def _patch_shard(
        self,
        folder: Path,
        shard: int,
        num_clips: int,
        num_windows: int,
        *,
        scale: NDArray[np.float32] | None,
    ) -> "_Written":
        shape = (num_windows, self.info.shape.num_frames)
        tokens: NDArray[Any] = self.tokens[:num_windows]
        token_scale = None
        if scale is not None:
            tokens, token_scale = quantise(tokens.astype(np.float32), scale)
        record = write_patch_shard(
            folder,
            shard,
            PatchRows(
                tokens=tokens,
                token_scale=token_scale,
                timestamps_s=np.zeros(shape, dtype=np.float32),
                frame_index=np.zeros(shape, dtype=np.int32),
                crop=np.zeros((num_windows, 4), dtype=np.float32),
                flipped=np.zeros(num_windows, dtype=np.bool_),
                clip=np.arange(num_windows, dtype=np.int32) % num_clips,
                keys=(keys := self._usual_keys(num_clips)),
            ),
            dtype="float16" if scale is None else "int8",
            seed=0,
            compression=self.compression,
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
