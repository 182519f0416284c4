"""`deltatok-extract --plan`: what a cache would cost, found by really making a small part of it.

Some clips, the first in the plan's seeded order, go through the real command into a temporary
folder beside OUT, which is removed again; of more the windows are counted. Bytes and seconds are
scaled by the number of windows, and that from the clips tried to all, in proportion to

    videos, windows drawn       the number of clips
    videos, sampling uniform    the bytes of the videos, which tell long ones from short ones
    data sets                   the number of crops, which is known
    patch-token shards          the number of windows, which is known
"""

import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..extract.backbone import Backbone, load_backbone
from ..extract.config import ExtractConfig
from ..extract.datasets.base import DatasetConfig
from ..extract.datasets.registry import find_targets
from ..extract.datasets.windows import Policy
from ..extract.decoding.pool import DecodePool, choose_num_workers
from ..extract.int8_calibration import patch_writer
from ..extract.pca import check_components
from ..extract.run import clips_per_shard, run_extraction
from ..extract.sources.clip import Clip, Unreadable
from ..extract.sources.select import clips_of
from ..shards.cache import PATCHES, read_cache_info
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import TooManyQuarantined, UsageError
from ..shards.files import size_text
from ..shards.patches.projection import Projection, read_projection
from ..shards.patches.reader import PatchShards
from ..shards.plan import plan_order
from ..shards.records import Quarantined, done_shards, iterate_done, quarantined_of
from ..shards.running.devices import choose_device
from ..shards.running.interrupts import StopRequest
from ..shards.running.parts import Part
from ..shards.tools.export import ClipSelection, export_cache
from ..train.config import TokenizeConfig
from ..train.encode import draws_of, write_deltas
from .commands.extract import VideosConfig
from .fused import DeltaShardWriter

SAMPLE_CLIPS = 16
"""Clips that are tried, as far as BUDGET_S allows; at least SAMPLE_CLIPS_PER_WORKER for every
decoding process, so that half a second to start each of them counts little."""
SAMPLE_CLIPS_PER_WORKER = 4
BUDGET_S = 60.0
COUNT_BUDGET_S = 30.0
"""For decoding more clips, whose windows are only counted: a few clips tell how long all take, but
not how many of them are broken or short."""
SHARD_COPIES = 3
"""A shard is in memory as it is made, as the one before is encoded, and as its encoded bytes."""
SHOWN = 10
"""Clips in quarantine that are named."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """All that `--plan` says. Hours are estimates for this machine."""

    out: str
    clips: int
    source_bytes: int
    probed: int
    """Clips that were tried."""
    counted: int
    """Those, and clips that were decoded to count their windows."""
    quarantined: dict[str, str]
    """Clip that would go to quarantine -> why: of those tried, and all that are not there."""
    quarantined_share: float
    """0..1 of all clips."""
    windows: int
    windows_error: float
    """Standard error of that and, in proportion, of bytes and hours; 0: all clips were tried."""
    frames: int
    shards: int
    files: int
    bytes: int
    """Of all files."""
    other_bytes: dict[str, int]
    """Of the tokens alone, were they stored in another way: float16, int8, deltas."""
    break_even_epochs: int | None
    """Passes over the windows from which on storing them takes less time than making them in every
    pass; None: never, the disk is slower."""
    device: str
    frames_per_s: float
    """With one device, all stages overlapped, as the trial went."""
    clock_hours: float
    """At that rate: hours of the device, too."""
    slowest_stage: str | None
    """Like "decode 71 %": what the trial waited for most, and its share of the time."""
    workers: int
    """Decoding processes; 0 where nothing is decoded."""
    decode_core_hours: float
    gb_per_s: float
    """To write in that time."""
    read_bytes_per_s: float
    device_peak_bytes: int | None
    """Most memory allocated on a cuda device."""
    host_peak_bytes: int
    """Main process and decoding processes together, at most about."""
    disk: str
    """Folder in whose file system the clips were tried."""
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A small cache that was really made, and what that took."""

    folder: Path
    seconds: float
    core_s: float
    """Of the decoding processes."""
    slowest_stage: str | None = None

    @cached_property
    def windows(self) -> Counter[str]:
        """Clip -> its windows."""
        info = read_cache_info(self.folder)
        if not info.counts["windows"]:
            return Counter()
        reader = (PatchShards if info.format == PATCHES else DeltaShards)(self.folder)
        return Counter(reader.keys[clip] for clip in reader.clip_index.tolist())

    @cached_property
    def quarantined(self) -> dict[str, str]:
        """Clip -> why it gives no windows."""
        return {lost.clip: lost.reason for lost in quarantined_of(iterate_done(self.folder))}


def plan_extraction(
    config: VideosConfig | DatasetConfig, *, num_clips: int | None = None
) -> CostPlan:
    """What videos or a data set would take, from trying `num_clips` clips.

    Raises what the extraction does, UsageError if nothing can be written beside `config.out`, and
    TooManyQuarantined if no clip that was tried gives a window.
    """
    policy: Policy
    if isinstance(config, DatasetConfig):
        (policy, clips), extraction = find_targets(config), config.to_extraction()
    else:
        policy, clips, extraction = config.sampling_policy(), clips_of(config), config
    fused = config if isinstance(config, VideosConfig) and config.tokenizer else None
    backbone = _as_stored(extraction, load_backbone(extraction))
    workers = choose_num_workers(extraction)
    lost = {c.key: c.source.reason for c in clips if isinstance(c.source, Unreadable)}
    usable = {clip.key: clip for clip in clips if clip.key not in lost}
    order = [key for key in plan_order([c.key for c in clips], seed=config.seed) if key in usable]

    def try_out(count: int, out: Path) -> _Trial:
        chosen = [usable[key] for key in sorted(order[:count])]
        settings: dict[str, Any] = {"out": str(out), "max_quarantined": 1.0, "append": False}
        settings |= {"retry_quarantined": False, "shard_of": None, "time_limit": None}
        tried = replace(extraction, **settings)
        writer = (
            DeltaShardWriter.from_config(fused)
            if fused
            else patch_writer(tried, policy, backbone, chosen)
        )
        targets, before_s = (policy, chosen), _core_seconds_of_children()
        done = run_extraction(tried, backbone=backbone, writer=writer, targets=targets, part=Part())
        return _Trial(
            folder=out,
            seconds=done.seconds,
            core_s=_core_seconds_of_children() - before_s,
            slowest_stage=done.slowest_stage,
        )

    weights = {key: _weight(clip, policy) for key, clip in usable.items()}
    default = max(SAMPLE_CLIPS, SAMPLE_CLIPS_PER_WORKER * workers)
    with _trials(try_out, Path(config.out), num_clips=num_clips, default=default) as trials:
        windows, refused = trials[1].windows.copy(), trials[1].quarantined.copy()
        probed = len(windows) + len(refused)
        if num_clips is None:
            rest = (usable[key] for key in order[probed:])
            _count_more(extraction, policy, rest, windows, refused)
        looked_at = [key for key in order if key in windows or key in refused]
        tried = np.array([weights[key] for key in looked_at])
        given = np.array([windows[key] for key in looked_at])
        share = (len(lost) + np.mean(given == 0) * len(usable)) / len(clips)
        return _scaled(
            trials,
            out=config.out,
            kind="deltas" if fused else config.dtype,
            num_windows=given.sum() * sum(weights.values()) / max(tried.sum(), 1),
            shards=math.ceil(len(clips) / clips_per_shard(extraction)),
            grid=math.prod(backbone.grid(config.frame_size)),
            device=backbone.device,
            workers=workers,
            clips=len(clips),
            source_bytes=sum(clip.size_bytes for clip in clips),
            probed=probed,
            counted=len(looked_at),
            quarantined=refused | lost,
            quarantined_share=float(share),
            windows_error=_standard_error(tried, given, population=len(usable)),
        )


def _as_stored(config: ExtractConfig, backbone: Backbone) -> Backbone:
    """The backbone with a projection of the size that will be stored; which one costs the same."""
    if config.pca is None:
        return backbone
    if isinstance(config.pca, str):
        return replace(backbone, projection=read_projection(config.pca))
    width = backbone.hidden_size
    check_components(config.pca, width)
    first = np.eye(config.pca, width, dtype=np.float32)
    ones = np.ones(width, dtype=np.float32)
    projection = Projection(mean=0 * ones, deviation=ones, components=first)
    return replace(backbone, projection=projection)


def plan_encoding(config: TokenizeConfig, *, num_clips: int | None = None) -> CostPlan:
    """What `--patches --tokenizer` would take, from encoding the windows of `num_clips` clips."""
    patches, draws = PatchShards(config.patches), draws_of(config)
    order = plan_order(patches.keys, seed=config.seed or 0)

    def try_out(count: int, out: Path) -> _Trial:
        part = out.with_name(f"{out.name}-patches")
        chosen = frozenset(order[:count])
        export_cache([config.patches], part, selection=ClipSelection(clips=chosen))
        start_s = time.monotonic()
        write_deltas(replace(config, patches=str(part), out=str(out)), draws=draws)
        return _Trial(folder=out, seconds=time.monotonic() - start_s, core_s=0.0)

    uniform = patches.info.identity["sampling"]["policy"] == "uniform"
    with _trials(try_out, Path(config.out), num_clips=num_clips, default=SAMPLE_CLIPS) as trials:
        return _scaled(
            trials,
            out=config.out,
            kind="deltas",
            num_windows=len(order) * draws.num_windows if uniform else patches.num_windows,
            shards=patches.info.counts["shards"],
            grid=patches.shape[1],
            device=choose_device(config.device),
            workers=0,
            clips=len(order),
            source_bytes=sum(p.stat().st_size for p in patches.folder.rglob("*") if p.is_file()),
            probed=len(trials[1].windows),
            counted=len(order),
            quarantined={},
            quarantined_share=0.0,
            windows_error=0.0,
        )


@contextmanager
def _trials(
    try_out: Callable[[int, Path], _Trial], out: Path, *, num_clips: int | None, default: int
) -> Iterator[tuple[_Trial, _Trial]]:
    """What `try_out(clips, folder)` gives for one clip, and for `num_clips`, by default for as many
    as there is time for. Their folder lies in the file system of `out` and is removed whatever
    happens. One trial more goes first, which loads libraries and compiles."""
    if num_clips is not None and num_clips < 1:
        raise UsageError(f"--probe-clips {num_clips}: wanted 1 or more")
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".deltatok-plan-", dir=_existing(out))
    except OSError as error:
        raise UsageError(
            f"{_existing(out)}: cannot be written ({error.strerror or error}): give another --out"
        ) from error
    with temporary as name, StopRequest() as stop, stop.at_once():
        _LOGGER.info("plan: trying some clips in %s, which is removed again", name)
        try_out(1, Path(name, "first"))
        one = try_out(1, Path(name, "one"))
        affordable = max(2, int(BUDGET_S / one.seconds))
        some = try_out(num_clips or min(default, affordable), Path(name, "some"))
        if not some.windows:
            clip, reason = next(iter(some.quarantined.items()))
            raise TooManyQuarantined(
                f"none of the {len(some.quarantined)} probed clips gives a window, first {clip}: "
                f"{reason}: check the videos, or probe more clips (--probe-clips)"
            )
        yield one, some


def _count_more(
    config: ExtractConfig,
    policy: Policy,
    clips: Iterable[Clip],
    windows: Counter[str],
    refused: dict[str, str],
) -> None:
    """Adds to `windows` and `refused` those of as many `clips` as are decoded in COUNT_BUDGET_S."""
    end_s = time.monotonic() + COUNT_BUDGET_S
    with DecodePool.from_config(config, policy) as pool:
        for clip in pool.decode(clips):
            if isinstance(clip, Quarantined):
                refused[clip.clip] = clip.reason
            else:
                windows[clip.key] = len(clip.windows)
            if time.monotonic() > end_s:
                break


def _existing(out: Path) -> Path:
    """The nearest folder above `out` that exists; `out` itself where it is a mount."""
    if out.is_mount():
        return out
    return next(parent for parent in out.absolute().parents if parent.is_dir())


def _weight(clip: Clip, policy: Policy) -> int:
    """In proportion to which a clip is expected to give windows; of data sets, how many."""
    if clip.target is not None:
        height, width = clip.target.label_size
        return 1 if height == width else 2
    return clip.size_bytes if policy.policy == "uniform" else 1


def _standard_error(tried: Any, given: Any, *, population: int) -> float:
    """Of the estimated windows of all clips; tried: weights of the clips that were tried, int64
    (n,), given: their windows. 0 where all were tried.

    Two clips that fail and two as the others are added (Agresti and Coull), so that a few clips
    that agree are not taken for proof that all do.
    """
    mean = tried.mean()
    good = given.sum() / max(tried[given > 0].sum(), 1)
    tried, given = np.append(tried, [mean] * 4), np.append(given, [0, 0, good * mean, good * mean])
    rest = given - tried * given.sum() / max(tried.sum(), 1)
    unseen = 1 - (len(tried) - 4) / population
    return population * math.sqrt(unseen * rest.var(ddof=1) / len(tried))


def _scaled(
    trials: tuple[_Trial, _Trial],
    *,
    num_windows: float,
    shards: int,
    grid: int,
    kind: str,
    out: str,
    device: torch.device,
    workers: int,
    **known: Any,
) -> CostPlan:
    """The plan for all clips, from trials of one clip and of some. grid: patch tokens of a frame;
    kind: a dtype or "deltas"; known: the fields that nothing has to be scaled for."""
    one, some = trials
    shape, windows = read_cache_info(some.folder).shape, some.windows.total()
    sizes = {path: path.stat().st_size for path in some.folder.rglob("*") if path.is_file()}
    shard_files = sum(some.folder / "shards" in path.parents for path in sizes)
    tried_shards = len(done_shards(some.folder))
    num_bytes = round(sum(sizes.values()) * num_windows / windows)
    frames = round(num_windows) * shape.num_frames
    other_bytes = {
        "float16": frames * grid * shape.hidden_size * 2,
        "int8": frames * grid * (shape.hidden_size + 2),
        "deltas": frames * shape.hidden_size * 2,
    }
    other_bytes.pop(kind, None)
    window_s, window_core_s = some.seconds / windows, some.core_s / windows
    more = windows - one.windows.total()
    if more > 0 and some.seconds > one.seconds:
        # What the further windows took longer: to start costs both the same.
        window_s = (some.seconds - one.seconds) / more
        window_core_s = max(some.core_s - one.core_s, 0.0) / more
    clock_s = some.seconds + window_s * (num_windows - windows)
    read_rate = _read_rate(max(sizes, key=sizes.__getitem__))
    folder, on_cuda = _existing(Path(out)), device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} threads"
    return CostPlan(
        out=out,
        windows=round(num_windows),
        frames=frames,
        shards=shards,
        files=len(sizes) + round(shard_files * (shards / tried_shards - 1)),
        bytes=num_bytes,
        other_bytes=other_bytes,
        break_even_epochs=_break_even(
            once_s=clock_s, stored_s=num_bytes / read_rate, recompute_s=window_s * num_windows
        ),
        device=f"{device.type} ({name})",
        frames_per_s=shape.num_frames / window_s,
        clock_hours=clock_s / 3600,
        slowest_stage=some.slowest_stage,
        workers=workers,
        decode_core_hours=window_core_s * num_windows / 3600,
        gb_per_s=num_bytes / clock_s / 1e9,
        read_bytes_per_s=read_rate,
        device_peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        host_peak_bytes=_peak_bytes(resource.RUSAGE_SELF)
        + workers * _peak_bytes(resource.RUSAGE_CHILDREN)
        + SHARD_COPIES * max(0, num_bytes // shards - sum(sizes.values()) // tried_shards),
        disk=str(folder),
        free_bytes=shutil.disk_usage(folder).free,
        **known,
    )


def _break_even(*, once_s: float, stored_s: float, recompute_s: float) -> int | None:
    """The smallest number of passes with once_s + passes * stored_s < passes * recompute_s."""
    if stored_s >= recompute_s:
        return None
    return math.floor(once_s / (recompute_s - stored_s)) + 1


def _read_rate(path: Path) -> float:
    """Bytes a second to read the file, from the disk where that can be had: what memory still holds
    would be read at its speed."""
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start_s = time.monotonic()
        size = len(file.readall())
        return size / max(time.monotonic() - start_s, 1e-9)


def _core_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_bytes(who: int) -> int:
    """Peak resident memory; macOS counts in bytes, Linux in units of 1024."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plan_text(plan: CostPlan) -> str:
    """Some fifteen lines for people, without a newline at the end."""
    names = [f"           {clip}: {why}" for clip, why in plan.quarantined.items()]
    more = [f"           and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    frames, epochs, device_memory = (
        max(plan.frames, 1),
        plan.break_even_epochs,
        plan.device_peak_bytes,
    )
    others = [f"{name} about {size_text(size)}" for name, size in plan.other_bytes.items()]
    lines = [
        "nothing has been written yet; this is what it would take",
        f"clips      {plan.clips} ({size_text(plan.source_bytes)}), {plan.probed} tried, "
        f"windows of {plan.counted} counted",
        f"quarantine {100 * plan.quarantined_share:.3g} %"
        f" ({len(plan.quarantined)} clips known to give no windows)",
        *names[:SHOWN],
        *more,
        f"windows    {plan.windows} of {plan.frames // max(plan.windows, 1)} frames: {plan.frames} "
        f"frames in {plan.shards} shards, {plan.files} files",
        f"bytes      {size_text(plan.bytes)}, {size_text(plan.bytes / frames)} a frame; "
        f"other ways to store them: {', '.join(others)}",
        f"clock      about {hours_text(plan.clock_hours)} with one device"
        + (f", the slowest stage: {plan.slowest_stage}" if plan.slowest_stage else ""),
        f"device     {plan.device}: {plan.frames_per_s:.3g} frames/s, all stages overlapped",
        f"decoding   {hours_text(plan.decode_core_hours)} of a core, in {plan.workers} processes",
        f"memory     {f'{size_text(device_memory)} of the device, ' if device_memory else ''}"
        f"at most about {size_text(plan.host_peak_bytes)} of main memory",
        f"disk       {size_text(plan.free_bytes)} free in {plan.disk}, "
        f"{plan.gb_per_s:.3g} GB/s to write, reads {plan.read_bytes_per_s / 1e9:.2f} GB/s",
        "pays off   "
        + ("never: the disk is slower" if epochs is None else f"from epoch {epochs} on")
        + ", against making the tokens in every epoch",
    ]
    if plan.windows_error:
        percent = 200 * plan.windows_error / max(plan.windows, 1)
        lines.append(f"all this   give or take {percent:.2g} %: not all clips were tried")
    if plan.bytes > plan.free_bytes:
        lines.append(
            f"TOO LARGE  {size_text(plan.bytes)} are needed: take fewer windows, a smaller frame "
            "size or dtype, delta tokens (--tokenizer), or another --out"
        )
    return "\n".join(lines)


def hours_text(hours: float) -> str:
    """Like "1.5 hours", "12 minutes" or "3.1 seconds"."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours >= 1 / 60 else f"{hours * 3600:.3g} seconds"
