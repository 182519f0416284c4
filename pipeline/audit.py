"""Holds a cache against the videos: random windows are made again and compared.

Everything that was drawn (frames, crop, flip, times) must be equal, token values up to what the
storage type rounds off and what another device or batch computes differently. Patch caches, and
delta caches made from sampled windows.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..extract.backbone import load_backbone
from ..extract.config import ExtractConfig
from ..extract.decoding.pool import DecodedWindow, DecodePool
from ..extract.identity import describe_patches
from ..extract.pixels import window_pixels
from ..extract.sampling import SamplingPolicy
from ..extract.shard_writer import PatchShardWriter, split_int8
from ..shards.cache import CacheInfo, compare, read_cache_info
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import DamagedShard, UsageError
from ..shards.patches.int8 import dequantise, read_channel_scale
from ..shards.patches.layout import STORED_DTYPES, from_stored
from ..shards.patches.reader import PatchShards
from ..shards.records import Quarantined
from ..train.models.deltatok import DeltaTok
from .audit_windows import AuditedWindow, choose_windows, find_audited
from .fused import DeltaShardWriter

ROUNDED = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2}
"""What a storage type rounds off, of a channel's root mean square."""
COMPUTED = {"float32": 1e-3, "bfloat16": 3e-2}
"""What another device or batch shape changes, likewise (a guess); the same ones change nothing."""
DECODE_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What is asked of an audit; the fields are the flags of `deltatok-shards verify`."""

    cache: str
    windows: int
    """How many to make again."""
    videos: tuple[str, ...] = ()
    """As for an extraction; none: where the plan says."""
    root: str | None = None
    backbone: str | None = None
    """Hub id or folder; none: the one that cache.json names."""
    tokenizer: str | None = None
    """Folder; delta caches only."""
    device: str = "auto"
    seed: int = 0
    """Which windows."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A window that is not what the videos give."""

    window: int
    shard: int
    clip: str
    what: str


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What `audit_cache` found."""

    windows: int
    """Windows made again."""
    clips: int
    largest_error: float
    """Over windows and channels: root mean square of the difference over that of the values."""
    allowed_error: float
    differing: list[Difference]

    def lines(self) -> Iterator[str]:
        """For people."""
        for found in self.differing:
            yield f"shard {found.shard:06d}: window {found.window} of {found.clip!r}: {found.what}"
        yield (
            f"audit: {self.windows} windows of {self.clips} clips made again, "
            f"{len(self.differing)} differ; largest relative error {self.largest_error:.3g}, "
            f"allowed {self.allowed_error:.3g}"
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def audit_cache(config: AuditConfig) -> AuditReport:
    """Makes `config.windows` random windows again.

    Raises UsageError where videos, backbone or tokenizer are missing, CacheMismatch if they are not
    those that made the cache, DamagedShard for a shard that cannot be read.
    """
    folder = Path(config.cache)
    info = read_cache_info(folder)
    reader: PatchShards | DeltaShards
    if info.shape.grid is None:
        reader = DeltaShards(folder, verify="size", allow_incomplete=True)
    else:
        reader = PatchShards(folder, allow_incomplete=True)
    maker = _Maker(config, info)
    policy = maker.policy
    chosen = choose_windows(
        reader, count=config.windows, draw_seed=config.seed, plan_seed=policy.seed
    )
    keys = sorted({window.key for window in chosen})
    clips = find_audited(folder, keys, videos=config.videos, root=config.root)
    differing: list[Difference] = []
    largest = 0.0
    by_clip = {key: list(group) for key, group in groupby(chosen, key=lambda window: window.key)}
    with DecodePool(policy, num_workers=1, timeout_s=DECODE_TIMEOUT_S) as pool:
        decoded = pool.decode(clips[key][0] for key in keys)
        for key, clip in zip(keys, decoded, strict=True):
            for window in by_clip[key]:
                size, planned = clips[key][0].size_bytes, clips[key][1].size_bytes
                if size != planned:
                    what = f"the video has {size} bytes, had {planned} when the plan was made"
                elif isinstance(clip, Quarantined):
                    what = f"the video gives no windows ({clip.stage}: {clip.reason})"
                elif len(clip.windows) != window.num_drawn:
                    what = f"{window.num_drawn} windows stored, the video gives {len(clip.windows)}"
                else:
                    drawn = clip.windows[window.drawn]
                    what = _drawn_differently(reader, window, drawn)
                    error = maker.error(reader, window, drawn)
                    largest = max(largest, error)
                    if not what and not error <= maker.allowed_error:
                        what = f"relative error {error:.3g}, allowed {maker.allowed_error:.3g}"
                if what:
                    differing.append(
                        Difference(window=window.window, shard=window.shard, clip=key, what=what)
                    )
    return AuditReport(
        windows=len(chosen),
        clips=len(keys),
        largest_error=largest,
        allowed_error=maker.allowed_error,
        differing=differing,
    )


class _Maker:
    """Makes the tokens of a window as the extraction of this cache did."""

    def __init__(self, config: AuditConfig, info: CacheInfo) -> None:
        folder = Path(config.cache)
        is_delta = info.shape.grid is None
        identity = info.identity["patches"] if is_delta else info.identity
        extraction = _extraction(config, info, identity)
        self.policy = SamplingPolicy.from_config(extraction)
        self._frame_size = extraction.frame_size
        self._dtype = identity["storage"]["dtype"]
        if is_delta and self._dtype != "float16":
            raise UsageError(
                f"{folder}: was made from {self._dtype} patch tokens, an audit makes delta tokens "
                "from float16 ones: audit the patch cache that it was made from"
            )
        self.allowed_error = (
            ROUNDED[info.identity["storage"]["dtype"]] + COMPUTED[identity["autocast_dtype"]]
        )
        self._channel_scale: NDArray[np.float32] | None = None
        if not is_delta and self._dtype == "int8":
            self._channel_scale = read_channel_scale(folder, info)
        self._backbone = load_backbone(extraction)
        self._is_delta = is_delta
        self._writer: PatchShardWriter | DeltaShardWriter
        if is_delta:
            if config.tokenizer is None:
                raise UsageError(f"{folder}: holds delta tokens: give the --tokenizer that made it")
            self._writer = DeltaShardWriter(
                DeltaTok.from_pretrained(config.tokenizer),
                config.tokenizer,
                autocast_dtype=info.identity["autocast_dtype"],
                seed=self.policy.seed,
            )
        else:
            self._writer = PatchShardWriter(
                dtype=self._dtype, seed=self.policy.seed, channel_scale=self._channel_scale
            )
        wanted = self._writer.describe(describe_patches(extraction, self.policy, self._backbone))
        compare(
            wanted.identity,
            info.identity,
            what_got="the backbone and tokenizer given",
            what_wanted=str(folder),
        )
        if isinstance(self._writer, DeltaShardWriter):
            black = self._backbone.black_tokens(self._frame_size)
            self._writer.begin(folder, black.to(self._backbone.device))

    @torch.inference_mode()
    def error(
        self, reader: PatchShards | DeltaShards, window: AuditedWindow, drawn: DecodedWindow
    ) -> float:
        """The largest channel's root mean square of stored minus made, over that of the stored."""
        device = self._backbone.device
        pixels = window_pixels(drawn.frames, drawn.draw, frame_size=self._frame_size, device=device)
        rows = self._writer.convert(self._backbone.tokens(pixels)[None])[0].cpu().numpy()
        made = self._values(rows)
        stored = reader.tokens([window.window])[0].astype(np.float32)
        if stored.shape != made.shape:
            raise DamagedShard(f"{reader.folder}: windows of {stored.shape}, made {made.shape}")
        axes = tuple(range(stored.ndim - 1))
        difference = np.sqrt(np.square(stored - made, dtype=np.float64).mean(axis=axes))
        size = np.sqrt(np.square(stored, dtype=np.float64).mean(axis=axes))
        # A channel that is almost nothing has almost no relative error to speak of.
        floor = max(0.01 * float(np.median(size)), float(np.finfo(np.float32).tiny))
        return float((difference / np.maximum(size, floor)).max())

    def _values(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        if self._is_delta:
            return rows.astype(np.float32)
        if self._channel_scale is not None:
            codes, scale = split_int8(rows)
            return dequantise(codes, scale, self._channel_scale)
        return from_stored(rows.view(STORED_DTYPES[self._dtype]), self._dtype)


def _drawn_differently(
    reader: PatchShards | DeltaShards, window: AuditedWindow, drawn: DecodedWindow
) -> str:
    """What of a window's frames, times, crop and flip is not as drawn from the video; "" if all
    is."""
    number, draw = window.window, drawn.draw
    times_s = np.array(draw.timestamps_s, dtype=np.float32)
    if isinstance(reader, PatchShards):
        frames = reader.frame_index([number])[0].tolist()
        crop, flipped = reader.crop[number].tolist(), bool(reader.flipped[number])
    else:
        stored = reader.window(number)
        frames, crop, flipped = stored["frames"], stored["crop"], stored["flipped"]
        times_s = times_s - times_s[0]
    for name, got, wanted in (
        ("frames", frames, list(draw.frame_index)),
        ("crop", crop, [float(edge) for edge in draw.crop]),
        ("flipped", flipped, draw.flipped),
        ("timestamps_s", reader.timestamps_s([number])[0].tolist(), times_s.tolist()),
    ):
        if got != wanted:
            return f"{name} {got} stored, the video gives {wanted}"
    return ""


def _extraction(config: AuditConfig, info: CacheInfo, identity: dict[str, Any]) -> ExtractConfig:
    """The extraction that made the cache, from its identity."""
    if "sampling" in info.identity and info.shape.grid is None:
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
        sampling: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in identity["sampling"].items()
        }
        policy = sampling.pop("policy")
        if policy == "evaluation":
            raise UsageError(
                f"{config.cache}: is an evaluation cache, which has no videos to be audited by: "
                "extract it again, with --limit a part of it, and compare the two"
            )
        return ExtractConfig(
            videos=config.videos or ("the plan's sources",),
            out=config.cache,
            backbone=backbone,
            frame_size=identity["preprocessing"]["frame_size"],
            sampling=policy,
            dtype=identity["storage"]["dtype"],
            device=config.device,
            autocast=identity["autocast_dtype"],
            **sampling,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{config.cache}: its identity is not one that deltatok-extract writes ({error!r}): "
            "it cannot be audited"
        ) from error
