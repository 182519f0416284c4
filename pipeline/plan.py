"""`deltatok-extract --plan`: what an extraction would cost, before anything runs.

A few of the user's own clips are decoded and go through the real backbone; bytes come from little
shards that the real writers write elsewhere. Nothing is written into the output folder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extract.backbone import Backbone, load_backbone
from ..extract.decoding.pool import default_num_workers
from ..extract.identity import describe_patches
from ..extract.run import clips_per_shard
from ..extract.sampling import SamplingPolicy
from ..extract.sources.clip import Clip
from ..extract.sources.select import clips_of
from ..shards.cache import CacheInfo
from ..shards.errors import UsageError
from ..shards.patches.int8 import SAMPLE_CLIPS
from ..shards.plan import make_plan
from .commands.extract import VideosConfig
from .fused import DeltaShardWriter
from .plan_bytes import CacheSize, ShardPlan, Sizes
from .plan_clips import MAX_COUNTED, ClipSample, sample_clips, with_probed
from .plan_probe import DecodeProbe, DiskProbe, ForwardProbe, probe_clips, probe_disk, probe_forward
from .plan_result import CacheCost, ExtractionPlan

DEFAULT_PROBE_CLIPS = 8
WAITING_BYTES = 2 * 2**30
"""Decoded clips that the decoding pool keeps ahead, at most (extract/pool.py)."""
ZSTD_WINDOWS = 16
"""Windows whose compressed size is measured, at most."""
SHARD_COPIES = 3
"""A shard is in memory as it is made, as the one before is encoded, and as its encoded bytes."""


def make_extraction_plan(
    config: VideosConfig,
    *,
    num_probe_clips: int = DEFAULT_PROBE_CLIPS,
    max_counted: int = MAX_COUNTED,
) -> ExtractionPlan:
    """Counts up to `max_counted` clips, times `num_probe_clips`, chosen by the seed, and works
    out the rest.

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
    shuffled = [by_key[entry.key] for entry in entries]
    sample = sample_clips(config, shuffled, max_counted=max_counted)
    decode = probe_clips(config, shuffled[:num_probe_clips], backbone)
    sample = with_probed(sample, decode.windows, decode.quarantined)
    batch_windows = max(1, config.frames_per_batch(backbone.device.type) // config.num_frames)
    black = backbone.black_tokens(config.frame_size)
    forward = probe_forward(
        backbone,
        _convert(config, patches, black.to(backbone.device)),
        decode.pixels,
        batch_windows=batch_windows,
    )
    sizes = Sizes(
        info=patches,
        tokens=_some_windows(backbone, decode.pixels, compression=config.compression),
        black=black.numpy(),
        draws=decode.draws,
        plan=entries,
        shards=sample.shards(entries),
        compression=config.compression,
        quarantine_bytes=sample.quarantine_bytes(),
    )
    probes = _Probes(
        device=backbone.device, sample=sample, decode=decode, forward=forward, disk=disk
    )
    return _worked_out(config, clips, probes, sizes)


@dataclass(frozen=True, kw_only=True)
class _Probes:
    """All that was measured."""

    device: torch.device
    sample: ClipSample
    decode: DecodeProbe
    forward: ForwardProbe
    disk: DiskProbe


def _worked_out(
    config: VideosConfig, clips: Sequence[Clip], probes: _Probes, sizes: Sizes
) -> ExtractionPlan:
    sample, decode, forward, disk = probes.sample, probes.decode, probes.forward, probes.disk
    windows = round(sum(shard.num_windows for shard in sizes.shards))
    frames = windows * config.num_frames
    caches = sizes.of_patches() | {"deltas": sizes.of_deltas()}
    kind = "deltas" if config.tokenizer else config.dtype
    chosen = caches["float16" if kind == "bfloat16" else kind]
    workers = config.workers or default_num_workers()
    batch_windows = max(1, config.frames_per_batch(probes.device.type) // config.num_frames)
    frames_made = _frames_in_batches(sizes.shards, batch_windows, config.num_frames)
    device_s = frames_made / forward.frames_per_s
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
    # The scales of int8 are fitted before the first shard, on a window each of some clips.
    fitted = min(SAMPLE_CLIPS, len(clips)) if config.dtype == "int8" else 0
    fit_device_s = fitted * config.num_frames / forward.frames_per_s
    fit_s = max(fit_device_s, fitted * decode.core_s_per_clip / workers)
    recompute_s = max(device_s, decode_s / workers)
    return ExtractionPlan(
        out=config.out,
        kind=kind,
        clips=len(clips),
        source_bytes=sum(clip.size_bytes for clip in clips),
        counted=len(sample.windows),
        probed=len(decode.windows),
        quarantined={entry.clip: entry.reason for entry in sample.quarantined.values()},
        quarantined_share=sample.share_quarantined,
        quarantined_share_error=sample.share_error,
        windows=windows,
        windows_error=sample.windows_error,
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
        clock_hours=(stages[slowest] + fit_s) / 3600,
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


def _frames_in_batches(shards: Sequence[ShardPlan], batch_windows: int, num_frames: int) -> int:
    """Frames that go through the backbone: the last batch of a shard is filled up."""
    batches = sum(math.ceil(shard.num_windows / batch_windows) for shard in shards)
    return batches * batch_windows * num_frames


def _convert(config: VideosConfig, patches: CacheInfo, black: Tensor) -> Callable[[Tensor], Tensor]:
    """What is done to a batch of patch tokens on the device."""
    if config.tokenizer is None:
        return Tensor.half
    writer = DeltaShardWriter.from_config(config)
    writer.describe(patches)
    with TemporaryDirectory() as folder:
        writer.begin(Path(folder), black)
    return writer.convert


def _some_windows(
    backbone: Backbone, pixels: Sequence[Tensor], *, compression: str
) -> "np.ndarray[Any, Any]":
    """float16 (2 or more, T, N, D): the patch tokens of probed windows, or of one twice.

    Two give all sizes that don't depend on the numbers; zstd's do, so more are tried.
    """
    chosen = pixels[:ZSTD_WINDOWS] if compression == "zstd" else pixels[:2]
    tokens = [backbone.tokens(window).half().cpu().numpy() for window in chosen]
    return np.stack(tokens if len(tokens) > 1 else tokens * 2)


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
