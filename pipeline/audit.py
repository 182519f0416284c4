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

from ..evaluate.cache_fidelity import COLUMNS
from ..extract.backbone import load_backbone
from ..extract.config import ExtractConfig
from ..extract.identity import cache_identity
from ..extract.pca import with_projection
from ..extract.run import run_extraction
from ..extract.shard_writer import PatchShardWriter, ShardWriter
from ..extract.sources.clip import Clip
from ..extract.sources.find import find_clips
from ..shards.cache import CacheInfo, compare, pca_of, read_cache_info
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import UsageError
from ..shards.evaluation.geometry import frame_shape
from ..shards.patches.int8 import read_channel_scale
from ..shards.patches.reader import PatchShards
from ..shards.plan import Plan, PlanEntry
from ..shards.records import iterate_done, quarantined_of
from ..shards.running.interrupts import StopRequest
from ..shards.running.parts import Part
from ..train.models.deltatok import DeltaTok
from .commands.shards import VerifyConfig
from .fused import DeltaShardWriter

ROUNDED = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2}
"""What a storage type rounds off, relative to the values."""
COMPUTED = {"float32": 1e-3, "bfloat16": 3e-2}
"""What another device or batch shape changes, likewise (a guess); the same ones change nothing."""


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What `audit_cache` found."""

    clips: int
    """That were extracted again."""
    windows: int
    largest_error: float
    """Over windows: root mean square of the difference over that of the values."""
    allowed_error: float
    differing: dict[str, str]
    """Clip that is not what its video gives -> its shard, and what differs."""

    def lines(self) -> Iterator[str]:
        """For people."""
        for clip, what in self.differing.items():
            yield f"clip {clip!r}, {what}"
        yield (
            f"audit: {self.windows} windows of {self.clips} clips made again, "
            f"{len(self.differing)} clips differ; largest relative error {self.largest_error:.3g}, "
            f"allowed {self.allowed_error:.3g}"
        )


def audit_cache(config: VerifyConfig) -> AuditReport:
    """Extracts `config.audit` random clips of the cache again.

    Raises UsageError where videos, backbone or tokenizer are missing, CacheMismatch if they are not
    those that made the cache, DamagedShard for a shard that cannot be read.
    """
    folder, info = Path(config.dir), read_cache_info(config.dir)
    extraction, allowed = _extraction(config, info)
    stored = _open(folder, info)
    if not stored.num_windows:
        raise UsageError(f"{folder}: has no windows: there is nothing to audit")
    policy = extraction.sampling_policy()
    backbone = with_projection(extraction, policy, load_backbone(extraction), ())
    writer = _writer(config, info, extraction)
    compare(
        writer.describe(cache_identity(extraction, policy, backbone)).identity,
        info.identity,
        what_got="the backbone and tokenizer given",
        what_wanted=str(folder),
    )
    rng = np.random.Generator(np.random.PCG64(config.seed or 0))
    count = min(config.audit or 0, len(stored.keys))
    keys = sorted(stored.keys[i] for i in rng.choice(len(stored.keys), size=count, replace=False))
    chosen = set(keys)
    planned = {entry.key: entry for entry in Plan.open(folder) if entry.key in chosen}
    clips = _find(config, keys, planned)
    errors, differing = [0.0], {}
    with tempfile.TemporaryDirectory() as out, StopRequest() as stop, stop.at_once():
        run, targets = replace(extraction, out=out), (policy, clips)
        run_extraction(run, backbone=backbone, writer=writer, targets=targets, part=Part())
        made = _open(Path(out), info)
        refused = {lost.clip: lost for lost in quarantined_of(iterate_done(out))}
        for clip in clips:
            size, what = planned[clip.key].size_bytes, ""
            if clip.size_bytes != size:
                what = f"the video has {clip.size_bytes} bytes, had {size} when it was planned"
            elif lost := refused.get(clip.key):
                what = f"the video gives no windows ({lost.stage}: {lost.reason})"
            else:
                error, what = _compare_clip(stored, made, clip.key, allowed=allowed)
                errors.append(error)
            if what:
                differing[clip.key] = f"shard {planned[clip.key].shard:06d}: {what}"
    return AuditReport(
        clips=len(keys),
        windows=sum(len(_windows(stored, key)) for key in keys),
        largest_error=max(errors),
        allowed_error=allowed,
        differing=differing,
    )


def _open(folder: Path, info: CacheInfo) -> PatchShards | DeltaShards:
    return (DeltaShards if info.shape.grid is None else PatchShards)(folder, verify="size")


def _windows(cache: PatchShards | DeltaShards, key: str) -> list[int]:
    """The windows of a clip, in an order that does not depend on where they are stored."""
    table, windows = cache.table(), np.flatnonzero(cache.clip_index == cache.keys.index(key))
    drawn = {w: [getattr(table, name)[w].tolist() for name in COLUMNS] for w in windows.tolist()}
    return sorted(drawn, key=drawn.__getitem__)


def _compare_clip(
    stored: PatchShards | DeltaShards, made: PatchShards | DeltaShards, key: str, *, allowed: float
) -> tuple[float, str]:
    """The largest relative error of the clip's windows, and what differs, if anything."""
    ours, theirs = _windows(stored, key), _windows(made, key)
    if len(ours) != len(theirs):
        return 0.0, f"{len(ours)} windows stored, the video gives {len(theirs)}"
    for name in COLUMNS:
        got, wanted = getattr(stored.table(), name)[ours], getattr(made.table(), name)[theirs]
        for window, one, other in zip(ours, got.tolist(), wanted.tolist(), strict=True):
            if one != other:
                return 0.0, f"window {window}: {name} {one} stored, the video gives {other}"
    errors = []
    for window, other in zip(ours, theirs, strict=True):
        wanted = made.tokens([other]).astype(np.float32)
        rest = np.linalg.norm(stored.tokens([window]).astype(np.float32) - wanted)
        errors.append(float(rest / max(np.linalg.norm(wanted), np.finfo(np.float32).tiny)))
    worst = int(np.argmax(errors))
    what = f"window {ours[worst]}: relative error {errors[worst]:.3g}, allowed {allowed:.3g}"
    return errors[worst], "" if errors[worst] <= allowed else what


def _extraction(config: VerifyConfig, info: CacheInfo) -> tuple[ExtractConfig, float]:
    """The extraction that made the cache, or its patch tokens, by its identity; and the relative
    error that is allowed."""
    is_delta = info.shape.grid is None
    if is_delta and "sampling" in info.identity:
        raise UsageError(
            f"{config.dir}: its windows were drawn from stored frames, not from videos: audit "
            "the patch cache that it was made from"
        )
    backbone = config.backbone or info.backbone.get("name")
    if not isinstance(backbone, str):
        raise UsageError(f"{config.dir}: names no backbone: give --backbone")
    if config.backbone is None and "/" not in backbone and not Path(backbone).is_dir():
        raise UsageError(
            f"{config.dir}: its backbone was a local folder, {backbone!r}, and it does not say "
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
                f"{config.dir}: is an evaluation cache, which has no videos to be audited by: "
                "extract it again, with --limit a part of it, and compare the two"
            )
        if is_delta and dtype != "float16":
            raise UsageError(
                f"{config.dir}: was made from {dtype} patch tokens, an audit makes delta tokens "
                "from float16 ones: audit the patch cache that it was made from"
            )
        extraction = ExtractConfig(
            videos=config.videos or ("the plan's sources",),
            out=config.dir,
            backbone=backbone,
            frame_size=frame_shape(identity["preprocessing"]["frame_size"]),
            layers=tuple(identity["backbone"].get("layers", ())),
            pca=None if pca_of(identity) is None else config.dir,
            sampling=policy,
            dtype=dtype,
            device=config.device or "auto",
            autocast=identity["autocast_dtype"],
            max_quarantined=1.0,
            **sampling,
        )
        allowed = ROUNDED[info.identity["storage"]["dtype"]] + COMPUTED[extraction.autocast]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{config.dir}: its identity is not one that deltatok-extract writes ({error!r}): "
            "it cannot be audited"
        ) from error
    return extraction, allowed


def _writer(config: VerifyConfig, info: CacheInfo, extraction: ExtractConfig) -> ShardWriter:
    if info.shape.grid is not None:
        is_int8 = extraction.dtype == "int8"
        return PatchShardWriter(
            dtype=extraction.dtype,
            seed=extraction.seed,
            channel_scale=read_channel_scale(Path(config.dir), info) if is_int8 else None,
        )
    if config.tokenizer is None:
        raise UsageError(f"{config.dir}: holds delta tokens: give the --tokenizer that made it")
    return DeltaShardWriter(
        DeltaTok.from_pretrained(config.tokenizer),
        config.tokenizer,
        autocast_dtype=info.identity["autocast_dtype"],
        seed=extraction.seed,
    )


def _find(
    config: VerifyConfig, keys: Sequence[str], planned: Mapping[str, PlanEntry]
) -> list[Clip]:
    """The clips of these keys among `config.videos`, or, where none are given, where the plan says
    that they were; UsageError for one that is not there."""
    if config.videos:
        known = {clip.key: clip for clip in find_clips(config.videos, root=config.root)}
    else:
        # A single source has shorter keys: without the folders, archives or lists it was found in.
        known = {}
        for key in keys:
            found = find_clips([planned[key].source])
            same = [clip for clip in found if f"/{key}".endswith(f"/{clip.key}")]
            if same:
                known[key] = replace(max(same, key=lambda clip: len(clip.key)), key=key)
    for key in keys:
        if key not in known:
            raise UsageError(
                f"--videos: clip {key!r} of {config.dir} is not among them; it came from "
                f"{planned[key].source}: give the paths that the cache was made from"
            )
    return [known[key] for key in keys]
