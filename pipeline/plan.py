"""`deltatok-extract --plan`: what an extraction would cost, before anything runs.

A few of the user's own clips are decoded and go through the real backbone; bytes come from little
shards that the real writers write elsewhere. Nothing is written into the output folder.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extract.backbone import Backbone
from ..extract.clips import Clip
from ..extract.describe import describe_patches
from ..extract.devices import load_backbone
from ..extract.pool import default_num_workers
from ..extract.run import clips_per_shard
from ..extract.sampling import SamplingPolicy
from ..extract.sources_select import clips_of
from ..shards.cache import CacheInfo
from ..shards.errors import UsageError
from ..shards.plan import PlanEntry, clips_by_shard, make_plan
from .fused import DeltaShardWriter
from .plan_bytes import CacheSize, ShardPlan, Sizes
from .plan_probe import (
    DecodeProbe,
    DiskProbe,
    ForwardProbe,
    probe_clips,
    probe_disk,
    probe_forward,
)
from .videos_config import VideosConfig

DEFAULT_PROBE_CLIPS = 8
WAITING_BYTES = 2 * 2**30
"""Decoded clips that the decoding pool keeps ahead, at most (extract/pool.py)."""
SHARD_COPIES = 3
"""A shard is in memory as it is made, as the one before is encoded, and as its encoded bytes."""


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """One kind of cache: float16, int8 or deltas."""

    size: CacheSize
    busy_gb_per_s: float
    """GB/s that have to be written to keep the device busy."""
    break_even_epochs: int | None
    """Passes over the windows from which on storing them takes less time than to decode and
    compute them in every pass (the tokenizer only where one is given); None: never, the disk is
    slower than computing."""


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """All that `--plan` says. Seconds and hours are estimates for this machine."""

    out: str
    kind: str
    """Which of `caches` the settings ask for: float16, bfloat16, int8 or deltas."""
    clips: int
    source_bytes: int
    probed: int
    quarantined: dict[str, str]
    """Probed clip that would go to quarantine -> why."""
    windows: int
    """Expected; exact if all clips were probed or, with sampling windows, none fails."""
    frames: int
    shards: int
    device: str
    frame_size: int
    caches: dict[str, CacheCost]
    forward: ForwardProbe
    """Backbone (and tokenizer, if one is given) on frames in memory."""
    disk: DiskProbe
    workers: int
    """Decoding processes."""
    device_hours: float
    decode_core_hours: float
    clock_hours: float
    """All stages overlapped, on this machine."""
    slowest_stage: str
    host_peak_bytes: int
    """Main process and decoding processes together, at most."""


def make_extraction_plan(
    config: VideosConfig, *, num_probe_clips: int = DEFAULT_PROBE_CLIPS
) -> ExtractionPlan:
    """Probes `num_probe_clips` clips, chosen by the seed, and works out the rest.

    Raises UsageError as an extraction would, and TooManyQuarantined if no probed clip is of use.
    """
    if num_probe_clips < 1:
        raise UsageError(f"--probe-clips {num_probe_clips}: wanted 1 or more")
    clips = clips_of(config)
    entries = make_plan(clips, clips_per_shard=clips_per_shard(config), seed=config.seed)
    backbone = load_backbone(config)
    policy = SamplingPolicy.from_config(config)
    patches = describe_patches(config, policy, backbone)
    patches = replace(patches, identity=patches.identity | {"storage": {"dtype": "float16"}})
    disk = probe_disk(Path(config.out))
    by_key = {clip.key: clip for clip in clips}
    # The plan's order is a seeded shuffle of the clips.
    decode = probe_clips(config, [by_key[e.key] for e in entries[:num_probe_clips]], backbone)
    batch_frames = config.frames_per_batch(backbone.device.type)
    batch_windows = max(1, batch_frames // config.num_frames)
    black = backbone.black_tokens(config.frame_size)
    forward = probe_forward(
        backbone,
        _convert(config, patches, black.to(backbone.device)),
        decode.pixels,
        batch_windows=batch_windows,
    )
    sizes = Sizes(
        info=patches,
        tokens=_two_windows(backbone, decode.pixels),
        black=black.numpy(),
        draws=decode.draws,
        plan=entries,
        shards=_shards(entries, decode),
    )
    probes = _Probes(device=backbone.device, decode=decode, forward=forward, disk=disk)
    return _worked_out(config, clips, probes, sizes)


@dataclass(frozen=True, kw_only=True)
class _Probes:
    """All that was measured."""

    device: torch.device
    decode: DecodeProbe
    forward: ForwardProbe
    disk: DiskProbe


def _worked_out(
    config: VideosConfig, clips: Sequence[Clip], probes: _Probes, sizes: Sizes
) -> ExtractionPlan:
    decode, forward, disk = probes.decode, probes.forward, probes.disk
    windows = round(sum(shard.num_windows for shard in sizes.shards))
    frames = windows * config.num_frames
    caches = sizes.of_patches() | {"deltas": sizes.of_deltas()}
    kind = "deltas" if config.tokenizer else config.dtype
    chosen = caches["float16" if kind == "bfloat16" else kind]
    workers = config.workers or default_num_workers()
    device_s = frames / forward.frames_per_s
    decode_s = len(clips) * decode.core_s_per_clip
    stages = _stage_seconds(
        probes.device,
        device_s=device_s,
        pixels_s=frames * decode.pixels_s_per_frame,
        decode_s=decode_s,
        write_s=chosen.bytes / disk.write_bytes_per_s,
        workers=workers,
    )
    slowest = max(stages, key=lambda stage: stages[stage])
    recompute_s = max(device_s, decode_s / workers)
    return ExtractionPlan(
        out=config.out,
        kind=kind,
        clips=len(clips),
        source_bytes=sum(clip.size_bytes for clip in clips),
        probed=len(decode.windows),
        quarantined={entry.clip: entry.reason for entry in decode.quarantined},
        windows=windows,
        frames=frames,
        shards=len(sizes.shards),
        device=_device_name(probes.device),
        frame_size=config.frame_size,
        caches={
            name: CacheCost(
                size=size,
                busy_gb_per_s=forward.frames_per_s * size.bytes_per_frame / 1e9,
                break_even_epochs=_break_even(
                    once_s=max(recompute_s, size.bytes / disk.write_bytes_per_s),
                    stored_s=size.bytes / disk.read_bytes_per_s,
                    recompute_s=recompute_s,
                ),
            )
            for name, size in caches.items()
        },
        forward=forward,
        disk=disk,
        workers=workers,
        device_hours=device_s / 3600,
        decode_core_hours=decode_s / 3600,
        clock_hours=stages[slowest] / 3600,
        slowest_stage=slowest,
        host_peak_bytes=_host_bytes(config, probes, chosen, workers=workers),
    )


def _stage_seconds(
    device: torch.device,
    *,
    device_s: float,
    pixels_s: float,
    decode_s: float,
    write_s: float,
    workers: int,
) -> dict[str, float]:
    """Seconds of every stage were it alone; together they take as long as the longest.

    On the CPU the backbone shares its cores with the decoding processes: `cores` is all the work
    there is over all the cores there are.
    """
    stages = {"decode": decode_s / workers, "backbone": device_s, "write": write_s}
    if device.type == "cuda":
        return stages | {"pixels": pixels_s}
    threads, cores = torch.get_num_threads(), default_num_workers()
    stages["backbone"] = device_s + pixels_s
    stages["cores"] = (min(threads, cores) * (device_s + pixels_s) + decode_s) / cores
    return stages


def _break_even(*, once_s: float, stored_s: float, recompute_s: float) -> int | None:
    """The smallest number of passes with once_s + passes * stored_s < passes * recompute_s."""
    if stored_s >= recompute_s:
        return None
    return math.floor(once_s / (recompute_s - stored_s)) + 1


def _shards(entries: Sequence[PlanEntry], decode: DecodeProbe) -> list[ShardPlan]:
    """The shards to be: probed clips as they were, all others as these on average."""
    share = sum(count > 0 for count in decode.windows.values()) / len(decode.windows)
    expected = sum(decode.windows.values()) / len(decode.windows)
    shards = []
    for part in clips_by_shard(entries).values():
        unknown = [entry.key for entry in part if entry.key not in decode.windows]
        known = {entry.key: decode.windows.get(entry.key, 0) for entry in part}
        keys = [key for key, count in known.items() if count]
        shards.append(
            ShardPlan(
                keys=keys + unknown[: max(1, round(share * len(unknown)))] if unknown else keys,
                num_windows=sum(known.values()) + expected * len(unknown),
            )
        )
    return shards


def _convert(config: VideosConfig, patches: CacheInfo, black: Tensor) -> Callable[[Tensor], Tensor]:
    """What is done to a batch of patch tokens on the device."""
    if config.tokenizer is None:
        return Tensor.half
    writer = DeltaShardWriter.from_config(config)
    writer.describe(patches)
    with TemporaryDirectory() as folder:
        writer.begin(Path(folder), black)
    return writer.convert


def _two_windows(backbone: Backbone, pixels: Sequence[Tensor]) -> "np.ndarray[Any, Any]":
    """float16 (2, T, N, D): the patch tokens of two probed windows, or of one twice."""
    tokens = [backbone.tokens(window).half().cpu().numpy() for window in pixels[:2]]
    return np.stack([tokens[0], tokens[-1]])


def _host_bytes(config: VideosConfig, probes: _Probes, size: CacheSize, *, workers: int) -> int:
    """Upper estimate: what the probe took, shards under way, decoded clips that wait."""
    decode = probes.decode
    shard = size.bytes_per_frame * max(config.frames_per_shard, config.num_frames)
    waiting = min(WAITING_BYTES, 2 * workers * decode.frames_bytes_per_clip)
    return round(
        probes.forward.host_peak_bytes
        + SHARD_COPIES * shard
        + waiting
        + workers * decode.child_bytes
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


def as_json(plan: ExtractionPlan) -> Mapping[str, Any]:
    """The plan as plain JSON values."""
    return asdict(plan)
