"""Holds a cache against the videos: random clips are extracted again and their windows compared.

Everything that was drawn (frames, crop, flip, times) must be equal, token values up to what the
storage type rounds off and what another device or batch computes differently. Patch caches, and
delta caches made from sampled windows.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluate.cache_fidelity import COLUMNS, TokenErrors
from ..extract.backbone import load_backbone
from ..extract.config import ExtractConfig
from ..extract.identity import cache_identity
from ..extract.ledger import Part
from ..extract.run import run_extraction
from ..extract.shard_writer import PatchShardWriter, ShardWriter
from ..extract.sources.clip import VIDEO_SUFFIXES, Clip, FrameFolder
from ..extract.sources.find import find_clips
from ..shards.cache import CacheInfo, compare, read_cache_info
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import DamagedShard, UsageError
from ..shards.interrupts import StopRequest
from ..shards.patches.int8 import read_channel_scale
from ..shards.patches.reader import PatchShards
from ..shards.plan import PlanEntry, read_plan, window_order
from ..shards.records import quarantined_of, read_all_done
from ..train.models.deltatok import DeltaTok
from .fused import DeltaShardWriter

ROUNDED = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2}
"""What a storage type rounds off, relative to the values."""
COMPUTED = {"float32": 1e-3, "bfloat16": 3e-2}
"""What another device or batch shape changes, likewise (a guess); the same ones change nothing."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What is asked of an audit; the fields are the flags of `deltatok-shards verify`."""

    cache: str
    clips: int
    """How many to extract again."""
    videos: tuple[str, ...] = ()
    """As for an extraction; none: where the plan says."""
    root: str | None = None
    backbone: str | None = None
    """Hub id or folder; none: the one that cache.json names."""
    tokenizer: str | None = None
    """Folder; delta caches only."""
    device: str = "auto"
    seed: int = 0
    """Which clips."""


@dataclass(frozen=True, kw_only=True)
class DifferentWindow:
    """A window that is not what the videos give."""

    window: int
    shard: int
    clip: str
    what: str


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What `audit_cache` found."""

    windows: int
    """Windows of the clips that were extracted again."""
    clips: int
    largest_error: float
    """Over windows: root mean square of the difference over that of the values."""
    allowed_error: float
    differing: list[DifferentWindow]

    def lines(self) -> Iterator[str]:
        """For people."""
        for found in self.differing:
            yield f"shard {found.shard:06d}: window {found.window} of {found.clip!r}: {found.what}"
        yield (
            f"audit: {self.windows} windows of {self.clips} clips made again, "
            f"{len(self.differing)} differ; largest relative error {self.largest_error:.3g}, "
            f"allowed {self.allowed_error:.3g}"
        )


def audit_cache(config: AuditConfig) -> AuditReport:
    """Extracts `config.clips` random clips of the cache again.

    Raises UsageError where videos, backbone or tokenizer are missing, CacheMismatch if they are not
    those that made the cache, DamagedShard for a shard that cannot be read.
    """
    folder, info = Path(config.cache), read_cache_info(config.cache)
    extraction, allowed = _extraction(config, info)
    stored = _open(folder, info)
    if not stored.num_windows:
        raise UsageError(f"{folder}: has no windows: there is nothing to audit")
    policy, backbone = extraction.sampling_policy(), load_backbone(extraction)
    writer = _writer(config, info, extraction)
    compare(
        writer.describe(cache_identity(extraction, policy, backbone)).identity,
        info.identity,
        what_got="the backbone and tokenizer given",
        what_wanted=str(folder),
    )
    rng = np.random.Generator(np.random.PCG64(config.seed))
    count = min(config.clips, len(stored.keys))
    keys = sorted(stored.keys[i] for i in rng.choice(len(stored.keys), size=count, replace=False))
    planned = {entry.key: entry for entry in read_plan(folder)}
    clips = _find(config, keys, planned)
    errors: dict[int, float] = {}
    differing: dict[int, str] = {}
    ours = _windows_as_drawn(stored, seed=extraction.seed)
    with tempfile.TemporaryDirectory() as out, StopRequest() as stop, stop.at_once():
        run = replace(extraction, out=out)
        targets = (policy, clips)
        run_extraction(run, backbone=backbone, writer=writer, targets=targets, part=Part())
        made = _open(Path(out), info)
        theirs = _windows_as_drawn(made, seed=extraction.seed)
        refused = {lost.clip: lost for lost in quarantined_of(read_all_done(out))}
        for clip in clips:
            mine, its = ours[clip.key], theirs.get(clip.key, [])
            size, what = planned[clip.key].size_bytes, ""
            if clip.size_bytes != size:
                what = f"the video has {clip.size_bytes} bytes, had {size} when it was planned"
            elif lost := refused.get(clip.key):
                what = f"the video gives no windows ({lost.stage}: {lost.reason})"
            elif len(mine) != len(its):
                what = f"{len(mine)} windows stored, the video gives {len(its)}"
            if what:
                differing |= dict.fromkeys(mine, what)
                continue
            for window, other in zip(mine, its, strict=True):
                errors[window] = _relative_error(stored.tokens([window]), made.tokens([other]))
                what = _drawn_differently(stored, window, made, other)
                if not what and not errors[window] <= allowed:
                    what = f"relative error {errors[window]:.3g}, allowed {allowed:.3g}"
                if what:
                    differing[window] = what
    shards = [record.shard for record in read_all_done(folder) if record.rows]
    return AuditReport(
        windows=sum(len(ours[key]) for key in keys),
        clips=len(keys),
        largest_error=max(errors.values(), default=0.0),
        allowed_error=allowed,
        differing=[
            DifferentWindow(
                window=window,
                shard=shards[int(np.searchsorted(stored.shard_starts, window, side="right")) - 1],
                clip=stored.keys[int(stored.clip_index[window])],
                what=what,
            )
            for window, what in sorted(differing.items())
        ],
    )


def _open(folder: Path, info: CacheInfo) -> PatchShards | DeltaShards:
    return (DeltaShards if info.shape.grid is None else PatchShards)(folder, verify="size")


def _windows_as_drawn(reader: PatchShards | DeltaShards, *, seed: int) -> dict[str, list[int]]:
    """Clip -> its windows in the order they were drawn: a shard stores its own permuted."""
    windows: dict[str, list[int]] = {}
    first = 0
    for record in read_all_done(reader.folder):
        order = window_order(record.rows, seed=seed, shard=record.shard)
        for window in first + np.argsort(order):
            windows.setdefault(reader.keys[int(reader.clip_index[window])], []).append(int(window))
        first += record.rows
    return windows


def _drawn_differently(
    stored: PatchShards | DeltaShards, window: int, made: PatchShards | DeltaShards, other: int
) -> str:
    """Which of COLUMNS is not as it is drawn from the video; "" if all are."""
    for name in COLUMNS:
        got, wanted = (
            getattr(reader.table(), name)[number].tolist()
            for reader, number in ((stored, window), (made, other))
        )
        if got != wanted:
            return f"{name} {got} stored, the video gives {wanted}"
    return ""


def _relative_error(stored: NDArray[Any], made: NDArray[Any]) -> float:
    if stored.shape != made.shape:
        raise DamagedShard(f"windows of {stored.shape}, made {made.shape}")
    # (1, T, N, D), also of delta tokens: one a frame.
    first, second = (
        torch.from_numpy(tokens.astype(np.float32)).reshape(
            1, tokens.shape[1], -1, tokens.shape[-1]
        )
        for tokens in (stored, made)
    )
    judge = TokenErrors()
    judge.add(np.zeros(1, np.int64), second, first)
    error, _ = judge.results()["relative_error"]
    return float("inf") if error is None else error


def _extraction(config: AuditConfig, info: CacheInfo) -> tuple[ExtractConfig, float]:
    """The extraction that made the cache, or its patch tokens, by its identity; and the relative
    error that is allowed."""
    is_delta = info.shape.grid is None
    if is_delta and "sampling" in info.identity:
        raise UsageError(
            f"{config.cache}: its windows were drawn from stored frames, not from videos: audit "
            "the patch cache that it was made from"
        )
    backbone = config.backbone or info.backbone.get("name")
    if not isinstance(backbone, str):
        raise UsageError(f"{config.cache}: names no backbone: give --backbone")
    if config.backbone is None and "/" not in backbone and not Path(backbone).is_dir():
        raise UsageError(
            f"{config.cache}: its backbone was a local folder, {backbone!r}, and it does not say "
            "where: give --backbone"
        )
    try:
        identity = info.identity["patches"] if is_delta else info.identity
        sampling: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in identity["sampling"].items()
        }
        policy, dtype = sampling.pop("policy"), identity["storage"]["dtype"]
        if policy == "evaluation":
            raise UsageError(
                f"{config.cache}: is an evaluation cache, which has no videos to be audited by: "
                "extract it again, with --limit a part of it, and compare the two"
            )
        if is_delta and dtype != "float16":
            raise UsageError(
                f"{config.cache}: was made from {dtype} patch tokens, an audit makes delta tokens "
                "from float16 ones: audit the patch cache that it was made from"
            )
        extraction = ExtractConfig(
            videos=config.videos or ("the plan's sources",),
            out=config.cache,
            backbone=backbone,
            frame_size=identity["preprocessing"]["frame_size"],
            sampling=policy,
            dtype=dtype,
            device=config.device,
            autocast=identity["autocast_dtype"],
            max_quarantined=1.0,
            **sampling,
        )
        allowed = ROUNDED[info.identity["storage"]["dtype"]] + COMPUTED[extraction.autocast]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{config.cache}: its identity is not one that deltatok-extract writes ({error!r}): "
            "it cannot be audited"
        ) from error
    return extraction, allowed


def _writer(config: AuditConfig, info: CacheInfo, extraction: ExtractConfig) -> ShardWriter:
    if info.shape.grid is not None:
        is_int8 = extraction.dtype == "int8"
        return PatchShardWriter(
            dtype=extraction.dtype,
            seed=extraction.seed,
            channel_scale=read_channel_scale(Path(config.cache), info) if is_int8 else None,
        )
    if config.tokenizer is None:
        raise UsageError(f"{config.cache}: holds delta tokens: give the --tokenizer that made it")
    return DeltaShardWriter(
        DeltaTok.from_pretrained(config.tokenizer),
        config.tokenizer,
        autocast_dtype=info.identity["autocast_dtype"],
        seed=extraction.seed,
    )


def _find(config: AuditConfig, keys: Sequence[str], planned: Mapping[str, PlanEntry]) -> list[Clip]:
    """The clips of these keys among `config.videos`, or, where none are given, where the plan says
    that they were; UsageError for one that is not there."""
    if not config.videos:
        return [_from_source(planned[key]) for key in keys]
    known = {clip.key: clip for clip in find_clips(config.videos, root=config.root)}
    missing = [key for key in keys if key not in known]
    if missing:
        raise UsageError(
            f"--videos: clip {missing[0]!r} of {config.cache} is not among them ({len(missing)} of "
            f"{len(keys)} clips; it came from {planned[missing[0]].source}): give the paths that "
            "the cache was made from"
        )
    return [known[key] for key in keys]


def _from_source(entry: PlanEntry) -> Clip:
    """The clip where the plan says it was: a video, a folder of frames, or in an archive."""
    path = Path(entry.source)
    if path.is_dir():
        return Clip(entry.key, path, entry.size_bytes, FrameFolder())
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"{path}: clip {entry.key!r} is no longer there: give --videos")
        return Clip(entry.key, path, entry.size_bytes)
    inside = [
        clip for clip in find_clips([path]) if f"/{entry.key}".endswith(f"/{clip.key}")
    ]  # keys of a folder of archives begin with the archives' names
    if not inside:
        raise UsageError(f"{path}: holds no clip {entry.key!r}: give --videos")
    return replace(max(inside, key=lambda clip: len(clip.key)), key=entry.key)
