"""What `--plan` measures: decoding, pixels and the backbone on the user's own clips, and the disk.

The real decoding processes, the real backbone at the real frame size and batch, and a nameless
temporary file in the file system that the cache would be written to.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extract.backbone import Backbone
from ..extract.config import ExtractConfig
from ..extract.decoding.pool import DecodedClip, DecodePool
from ..extract.pixels import window_pixels
from ..extract.sampling import SamplingPolicy, WindowDraw
from ..extract.sources.clip import Clip
from ..shards.errors import TooManyQuarantined, UsageError
from ..shards.records import Quarantined

FORWARD_BUDGET_S = 20.0
"""Seconds the backbone may take: where a batch takes longer, a smaller one is timed."""
FORWARD_MIN_S = 3.0
"""Batches are timed for at least so long, where there is more than one (a guess)."""
DISK_BYTES = 256 * 2**20
DISK_CHUNK_BYTES = 16 * 2**20
DISK_BUDGET_S = 3.0
"""The temporary file is at most so large and takes at most about so long to write."""


@dataclass(frozen=True, kw_only=True)
class DecodeProbe:
    """What the probed clips gave."""

    windows: dict[str, int]
    """Probed clip -> its windows, 0 if it would go to quarantine."""
    quarantined: list[Quarantined]
    core_s_per_clip: float
    """Seconds of one decoding process for one clip, those in quarantine included."""
    pixels_s_per_frame: float
    """Seconds of the main process to crop, resize and flip a frame."""
    frames_bytes_per_clip: float
    """Bytes of RGB of a good clip's windows."""
    child_bytes: int
    """Peak memory of a decoding process."""
    draws: list[WindowDraw]
    """All windows of the probed clips."""
    pixels: list[Tensor]
    """Some of them, uint8 (T, 3, S, S) on the backbone's device: one batch, of as many clips as
    there are."""


@dataclass(frozen=True, kw_only=True)
class ForwardProbe:
    """How fast the device eats frames that are in its memory already."""

    frames_per_s: float
    batch_frames: int
    """Frames in the batches that were timed; fewer than the real ones on a slow device."""
    batches: int
    """Batches that were timed."""
    device_peak_bytes: int | None
    """Most memory allocated on a cuda device; None: the backbone runs in main memory."""
    host_peak_bytes: int
    """Peak memory of this process."""


@dataclass(frozen=True, kw_only=True)
class DiskProbe:
    """The file system of the output folder."""

    folder: str
    """Where the temporary file was: the nearest folder above the output that exists."""
    free_bytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float


def probe_clips(config: ExtractConfig, clips: Sequence[Clip], backbone: Backbone) -> DecodeProbe:
    """Decodes `clips`, one after the other in one process, and makes their pixels.

    Raises TooManyQuarantined if none of them gives a window.
    """
    batch_frames = config.frames_per_batch(backbone.device.type)
    batch_windows = max(1, batch_frames // config.num_frames)
    windows: dict[str, int] = {}
    quarantined: list[Quarantined] = []
    draws: list[WindowDraw] = []
    firsts: list[Tensor] = []
    others: list[Tensor] = []
    decode_s = pixels_s = num_bytes = 0.0
    num_pixel_frames = 0
    policy = SamplingPolicy.from_config(config)
    with DecodePool(
        policy,
        num_workers=1,
        timeout_s=config.decode_timeout_s,
        decode_threads=config.decode_threads,
        decoder=config.decoder,
    ) as pool:
        list(pool.decode([clips[0]]))  # starts the process, which takes longer than a clip
        for clip in clips:
            start_s = time.monotonic()
            (result,) = pool.decode([clip])
            decode_s += time.monotonic() - start_s
            windows[clip.key] = len(result.windows) if isinstance(result, DecodedClip) else 0
            if isinstance(result, Quarantined):
                quarantined.append(result)
                continue
            draws += [window.draw for window in result.windows]
            num_bytes += sum(window.frames.nbytes for window in result.windows)
            start_s = time.monotonic()
            for number, window in enumerate(result.windows):
                made = window_pixels(
                    window.frames,
                    window.draw,
                    frame_size=config.frame_size,
                    device=backbone.device,
                )
                num_pixel_frames += len(made)
                part = others if number else firsts
                part += [made] if len(part) < batch_windows else []
            synchronise(backbone.device)
            pixels_s += time.monotonic() - start_s
    pixels = (firsts + others)[:batch_windows]
    if not pixels:
        raise TooManyQuarantined(
            f"none of the {len(clips)} probed clips gives a window, first {quarantined[0].clip}: "
            f"{quarantined[0].reason}: check the videos, or probe more clips (--probe-clips)"
        )
    return DecodeProbe(
        windows=windows,
        quarantined=quarantined,
        core_s_per_clip=decode_s / len(clips),
        pixels_s_per_frame=pixels_s / num_pixel_frames,
        frames_bytes_per_clip=num_bytes / (len(clips) - len(quarantined)),
        child_bytes=_peak_bytes(resource.RUSAGE_CHILDREN),
        draws=draws,
        pixels=pixels,
    )


@torch.inference_mode()
def probe_forward(
    backbone: Backbone,
    convert: Callable[[Tensor], Tensor],
    pixels: Sequence[Tensor],
    *,
    batch_windows: int,
    budget_s: float = FORWARD_BUDGET_S,
    min_s: float = FORWARD_MIN_S,
) -> ForwardProbe:
    """Times batches through the backbone and `convert` (B, T, N, D), rows copied back.

    pixels: uint8 (T, 3, S, S) each, repeated to fill a batch. A batch that would take more than
    half of `budget_s` is made smaller.
    """
    device = backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def seconds(batch: Tensor) -> float:
        synchronise(device)
        start_s = time.monotonic()
        tokens = backbone.tokens(batch.flatten(0, 1))
        convert(tokens.reshape(*batch.shape[:2], *tokens.shape[1:])).cpu()
        return time.monotonic() - start_s

    one = torch.stack([pixels[0]])
    seconds(one)
    affordable = int(budget_s / 2 / max(seconds(one), 1e-9))
    size = max(1, min(batch_windows, affordable))
    batch = torch.stack([pixels[i % len(pixels)] for i in range(size)])
    if device.type == "cuda":  # the first batch of a shape allocates and chooses kernels
        seconds(batch)
    spent = [seconds(batch)]
    while sum(spent) < min_s and sum(spent) + spent[0] < budget_s:
        spent.append(seconds(batch))
    on_cuda = device.type == "cuda"
    num_frames = batch.shape[0] * batch.shape[1]
    return ForwardProbe(
        frames_per_s=num_frames * len(spent) / sum(spent),
        batch_frames=num_frames,
        batches=len(spent),
        device_peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        host_peak_bytes=_peak_bytes(resource.RUSAGE_SELF),
    )


def probe_disk(out: Path) -> DiskProbe:
    """Writes and reads back a temporary file where `out` is, or would be; nothing stays.

    Raises UsageError if nothing can be written there.
    """
    folder = _folder_above(out.absolute())
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    chunk = np.random.default_rng(0).bytes(DISK_CHUNK_BYTES)  # no file system can shorten it
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            size, start_s = 0, time.monotonic()
            while size < min(DISK_BYTES, free // 4) and time.monotonic() - start_s < DISK_BUDGET_S:
                size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            write_s = time.monotonic() - start_s
            if hasattr(os, "posix_fadvise"):  # what memory still holds would be read at its speed
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start_s = time.monotonic()
            while file.read(DISK_CHUNK_BYTES):
                pass
            read_s = time.monotonic() - start_s
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}): give another --out"
        ) from error
    return DiskProbe(
        folder=str(folder),
        free_bytes=free,
        write_bytes_per_s=size / max(write_s, 1e-9),
        read_bytes_per_s=size / max(read_s, 1e-9),
    )


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(who: int) -> int:
    """Peak resident memory; macOS counts in bytes, Linux in units of 1024."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _folder_above(out: Path) -> Path:
    """The nearest folder above `out` on its file system; `out` itself only where it is a mount."""
    above = next(parent for parent in out.parents if parent.is_dir())
    if out.is_dir() and out.stat().st_dev != above.stat().st_dev:
        return out
    return above
