"""`deltatok-extract --plan`: what a cache would cost, found by really making a small part of it.

Some clips, the first in the plan's seeded order, go through the real command into a temporary
folder beside OUT, which is removed again; of more the windows are counted. Windows, bytes and
seconds are scaled to all clips:

    videos, windows drawn       by the number of clips
    videos, sampling uniform    by the bytes of the videos, which tell long ones from short ones
    data sets                   by the number of crops, which is known
    patch-token shards          by the number of windows, which is known
"""

import json
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extract.backbone import load_backbone
from ..extract.config import ExtractConfig
from ..extract.datasets.base import DatasetConfig
from ..extract.datasets.registry import find_targets
from ..extract.datasets.windows import Policy
from ..extract.decoding.pool import DecodePool, choose_num_workers
from ..extract.int8_calibration import patch_writer
from ..extract.ledger import Part
from ..extract.run import clips_per_shard, run_extraction
from ..extract.shard_writer import ShardWriter
from ..extract.sources.clip import Clip, Unreadable
from ..extract.sources.select import clips_of
from ..shards.cache import PATCHES, CacheInfo, read_cache_info
from ..shards.deltas.reader import DeltaShards
from ..shards.devices import choose_device
from ..shards.errors import TooManyQuarantined, UsageError
from ..shards.files import size_text
from ..shards.interrupts import StopRequest
from ..shards.patches.reader import PatchShards
from ..shards.plan import make_plan, num_shards, plan_order
from ..shards.records import DoneRecord, Quarantined, quarantined_of, read_all_done
from ..shards.tools.export import ClipSelection, export_cache
from ..shards.windows import ShardRows
from ..train.config import TokenizeConfig
from ..train.encode import write_deltas
from .commands.extract import VideosConfig
from .fused import DeltaShardWriter
from .uniform_draws import UniformDraws

SAMPLE_CLIPS = 16
"""Clips that are tried, as far as BUDGET_S allows; at least SAMPLE_CLIPS_PER_WORKER for every
decoding process, so that half a second to start each of them counts little."""
SAMPLE_CLIPS_PER_WORKER = 4
BUDGET_S = 60.0
COUNT_BUDGET_S = 30.0
"""For decoding more clips, whose windows are only counted."""
SHARD_COPIES = 3
"""A shard is in memory as it is made, as the one before is encoded, and as its encoded bytes."""
LISTS = ("plan.jsonl", "index.jsonl", "quarantine.jsonl", "timings.jsonl")
"""Files of a cache with a line for every clip or shard."""
SHOWN = 10
"""Clips in quarantine that are named."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """One way to store the windows."""

    bytes: int
    """Of all files; of a way that was not tried, of the tokens alone."""
    break_even_epochs: int | None
    """Passes over the windows from which on storing them takes less time than making them in every
    pass; None: never, the disk is slower."""


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """All that `--plan` says. Seconds and hours are estimates for this machine."""

    out: str
    kind: str
    """Which of `caches` the settings ask for."""
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
    caches: dict[str, CacheCost]
    device: str
    frames_per_s: float
    """What the device gets through: backbone, tokenizer, and on the CPU also the pixels."""
    device_hours: float
    device_peak_bytes: int | None
    """Most memory allocated on a cuda device."""
    workers: int
    """Decoding processes; 0 where nothing is decoded."""
    decode_core_hours: float
    clock_hours: float
    """All stages overlapped."""
    gb_per_s: float
    """To write in that time."""
    slowest_stage: str
    host_peak_bytes: int
    """Main process and decoding processes together, at most about."""
    disk: str
    """Folder in whose file system the clips were tried."""
    free_bytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float


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
    backbone = load_backbone(extraction)
    workers = choose_num_workers(extraction)
    lost = {c.key: c.source.reason for c in clips if isinstance(c.source, Unreadable)}
    usable = {clip.key: clip for clip in clips if clip.key not in lost}
    order = [key for key in plan_order([c.key for c in clips], seed=config.seed) if key in usable]

    def try_out(count: int, out: Path) -> "_Trial":
        chosen = [usable[key] for key in sorted(order[:count])]
        settings: dict[str, Any] = {"out": str(out), "max_quarantined": 1.0, "append": False}
        settings |= {"retry_quarantined": False, "shard_of": None, "time_limit": None}
        tried = replace(extraction, **settings)
        writer: ShardWriter
        if fused is None:
            writer = patch_writer(tried, policy, backbone, chosen)
        else:
            writer = DeltaShardWriter.from_config(fused)
        timed = _TimedWriter(writer)
        cores_s = _core_seconds_of_children()
        targets = (policy, chosen)
        run_extraction(tried, backbone=backbone, writer=timed, targets=targets, part=Part())
        return _Trial.of(
            out,
            probed=len(chosen),
            device_s=timed.device_s(),
            decode_core_s=_core_seconds_of_children() - cores_s,
        )

    wanted = max(SAMPLE_CLIPS, SAMPLE_CLIPS_PER_WORKER * workers)
    trial = _try_some(try_out, config.out, num_clips=num_clips, default=wanted)
    windows, refused = trial.windows, trial.quarantined
    if num_clips is None:
        more = (usable[key] for key in order[trial.probed :])
        windows, refused = _count_more(extraction, policy, more, windows, refused)
    weights = {key: _weight(clip, policy) for key, clip in usable.items()}
    looked_at = [key for key in order if key in windows or key in refused]
    tried = np.array([weights[key] for key in looked_at])
    given = np.array([windows[key] for key in looked_at])
    scale = sum(weights.values()) / max(tried.sum(), 1)
    height, width = backbone.grid(config.frame_size)
    entries = make_plan(clips, clips_per_shard=clips_per_shard(extraction), seed=config.seed)
    return _scaled(
        trial,
        out=config.out,
        kind="deltas" if fused else config.dtype,
        clips=len(clips),
        source_bytes=sum(clip.size_bytes for clip in clips),
        counted=len(looked_at),
        quarantined=refused | lost,
        lost_share=(len(lost) + np.mean(given == 0) * len(usable)) / len(clips),
        windows=given.sum() * scale,
        windows_error=_standard_error(tried, given, population=len(usable)),
        shards=num_shards(entries),
        tokens_per_frame=height * width,
        device=backbone.device,
        workers=workers,
    )


def plan_encoding(config: TokenizeConfig, *, num_clips: int | None = None) -> CostPlan:
    """What `--patches --tokenizer` would take, from encoding the windows of `num_clips` clips."""
    patches, draws = PatchShards(config.patches), UniformDraws.from_config(config)
    order = plan_order(patches.keys, seed=config.seed or 0)

    def try_out(count: int, out: Path) -> "_Trial":
        part = out.with_name(f"{out.name}-patches")
        chosen = frozenset(order[:count])
        export_cache([config.patches], part, selection=ClipSelection(clips=chosen))
        write_deltas(replace(config, patches=str(part), out=str(out)), draws=draws)
        timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
        records = {record.shard: record.rows for record in read_all_done(out)}
        seconds = sum(records[line["shard"]] / line["windows_per_s"] for line in timings)
        return _Trial.of(out, probed=len(chosen), device_s=seconds, decode_core_s=0.0)

    trial = _try_some(try_out, config.out, num_clips=num_clips, default=SAMPLE_CLIPS)
    uniform = patches.info.identity["sampling"]["policy"] == "uniform"
    windows = len(patches.keys) * draws.num_windows if uniform else patches.num_windows
    return _scaled(
        trial,
        out=config.out,
        kind="deltas",
        clips=len(patches.keys),
        counted=len(patches.keys),
        source_bytes=sum(p.stat().st_size for p in patches.folder.rglob("*") if p.is_file()),
        quarantined={},
        lost_share=0.0,
        windows=windows,
        windows_error=0.0,
        shards=patches.info.counts["shards"],
        tokens_per_frame=patches.shape[1],
        device=choose_device(config.device),
        workers=0,
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A small cache that was really made, and what that took."""

    info: CacheInfo
    probed: int
    windows: Counter[str]
    """Clip -> its windows."""
    quarantined: dict[str, str]
    shards: int
    token_bytes: int
    """Of the shards' data: in proportion to the windows."""
    record_bytes: int
    """Of done-records and LISTS: in proportion to the shards."""
    other_bytes: int
    shard_files: int
    other_files: int
    device_s: float
    decode_core_s: float
    write_bytes_per_s: float
    read_bytes_per_s: float

    @classmethod
    def of(cls, folder: Path, **measured: Any) -> "_Trial":
        """With the sizes of the files in `folder`; measured: the other fields."""
        info = read_cache_info(folder)
        windows: Counter[str] = Counter()
        if info.counts["windows"]:
            reader = (PatchShards if info.format == PATCHES else DeltaShards)(folder)
            windows.update(reader.keys[clip] for clip in reader.clip_index.tolist())
        files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        records = {path for path in (folder / "shards").iterdir() if path.suffix == ".json"}
        tokens = {path for path in files if folder / "shards" in path.parents} - records
        lists = {path for path in files if path.name in LISTS}
        token_bytes, record_bytes = (
            sum(files[path] for path in part) for part in (tokens, records | lists)
        )
        write_rate, read_rate = _disk_rates(max(files, key=files.__getitem__))
        return cls(
            info=info,
            windows=windows,
            quarantined={lost.clip: lost.reason for lost in quarantined_of(read_all_done(folder))},
            shards=len(records),
            token_bytes=token_bytes,
            record_bytes=record_bytes,
            other_bytes=sum(files.values()) - token_bytes - record_bytes,
            shard_files=len(tokens | records),
            other_files=len(files) - len(tokens | records),
            write_bytes_per_s=write_rate,
            read_bytes_per_s=read_rate,
            **measured,
        )


class _TimedWriter:
    """A ShardWriter that looks at the clock and leaves the work to another one."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._batches = 0
        self._begun_s = self._first_s = self._last_s = 0.0

    def device_s(self) -> float:
        """Seconds for all batches, by those after the first: before it processes start."""
        if self._batches < 2:
            return self._last_s - self._begun_s
        return (self._last_s - self._first_s) * self._batches / (self._batches - 1)

    def describe(self, patches: CacheInfo) -> CacheInfo:
        return self._writer.describe(patches)

    def begin(self, folder: Path, black_tokens: Tensor) -> None:
        self._writer.begin(folder, black_tokens)
        self._begun_s = time.monotonic()

    def convert(self, tokens: Tensor) -> Tensor:
        rows = self._writer.convert(tokens)
        self._batches += 1
        if self._batches == 1:
            if rows.is_cuda:
                torch.cuda.synchronize(rows.device)
            self._first_s = time.monotonic()
        return rows

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        self._last_s = time.monotonic()  # the rows are here, so the device has made them
        return self._writer.write(folder, shard, rows)


def _try_some(
    try_out: Callable[[int, Path], _Trial], out: str, *, num_clips: int | None, default: int
) -> _Trial:
    """What `try_out(clips, folder)` found of `num_clips` clips, by default of as many as there is
    time for; one goes first, which loads libraries and compiles."""
    if num_clips is not None and num_clips < 1:
        raise UsageError(f"--probe-clips {num_clips}: wanted 1 or more")
    with _folder_beside(Path(out)) as folder:
        _LOGGER.info("plan: trying some clips in %s, which is removed again", folder)
        start_s = time.monotonic()
        try_out(1, folder / "first")
        shutil.rmtree(folder / "first")
        affordable = max(2, int(BUDGET_S / (time.monotonic() - start_s)))
        trial = try_out(num_clips or min(default, affordable), folder / "more")
    if not trial.windows:
        clip, reason = next(iter(trial.quarantined.items()))
        raise TooManyQuarantined(
            f"none of the {trial.probed} probed clips gives a window, first {clip}: {reason}: "
            "check the videos, or probe more clips (--probe-clips)"
        )
    return trial


def _count_more(
    config: ExtractConfig,
    policy: Policy,
    clips: Iterator[Clip],
    windows: Counter[str],
    refused: dict[str, str],
) -> tuple[Counter[str], dict[str, str]]:
    """`windows` and `refused` with those of as many `clips` as are decoded in COUNT_BUDGET_S: a
    few clips tell how long all take, but not how many of them are broken or short."""
    windows, refused = windows.copy(), dict(refused)
    end_s = time.monotonic() + COUNT_BUDGET_S
    with DecodePool.from_config(config, policy) as pool:
        for clip in pool.decode(clips):
            if isinstance(clip, Quarantined):
                refused[clip.clip] = clip.reason
            else:
                windows[clip.key] = len(clip.windows)
            if time.monotonic() > end_s:
                break
    return windows, refused


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder in the file system of `out`, removed whatever happens within."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".deltatok-plan-", dir=_existing(out))
    except OSError as error:
        raise UsageError(
            f"{_existing(out)}: cannot be written ({error.strerror or error}): give another --out"
        ) from error
    with temporary as folder, StopRequest() as stop, stop.at_once():
        yield Path(folder)


def _existing(out: Path) -> Path:
    """The nearest folder above `out` that exists; `out` itself where it is a mount."""
    above = next(parent for parent in out.absolute().parents if parent.is_dir())
    if out.is_dir() and out.stat().st_dev != above.stat().st_dev:
        return out
    return above


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
    trial: _Trial,
    *,
    out: str,
    kind: str,
    clips: int,
    source_bytes: int,
    counted: int,
    quarantined: dict[str, str],
    lost_share: float,
    windows: float,
    windows_error: float,
    shards: int,
    tokens_per_frame: int,
    device: torch.device,
    workers: int,
) -> CostPlan:
    """The plan for all clips."""
    scale = windows / trial.windows.total()
    num_bytes = trial.token_bytes * scale + trial.record_bytes * shards / trial.shards
    num_bytes += trial.other_bytes
    num_frames, width = trial.info.shape.num_frames, trial.info.shape.hidden_size
    frames = round(windows) * num_frames
    a_frame = {
        "bfloat16" if kind == "bfloat16" else "float16": 2 * tokens_per_frame * width,
        "int8": tokens_per_frame * (width + 2),
        "deltas": 2 * width,
    }
    sizes = {name: frames * size for name, size in a_frame.items()} | {kind: round(num_bytes)}
    decode_s, device_s = trial.decode_core_s * scale, trial.device_s * scale
    stages = {
        "decode": decode_s / max(workers, 1),
        "device": device_s,
        "write": num_bytes / trial.write_bytes_per_s,
    }
    slowest = max(stages, key=stages.__getitem__)
    make_s = max(stages["decode"], device_s)
    shard_growth = trial.token_bytes * max(0.0, scale / shards - 1 / trial.shards)
    children = workers * _peak_bytes(resource.RUSAGE_CHILDREN)
    on_cuda = device.type == "cuda"
    folder = _existing(Path(out))
    return CostPlan(
        out=out,
        kind=kind,
        clips=clips,
        source_bytes=source_bytes,
        probed=trial.probed,
        counted=counted,
        quarantined=quarantined,
        quarantined_share=float(lost_share),
        windows=round(windows),
        windows_error=windows_error,
        frames=frames,
        shards=shards,
        files=round(trial.shard_files * shards / trial.shards) + trial.other_files,
        caches={
            name: CacheCost(
                bytes=size,
                break_even_epochs=_break_even(
                    once_s=max(make_s, size / trial.write_bytes_per_s),
                    stored_s=size / trial.read_bytes_per_s,
                    recompute_s=make_s,
                ),
            )
            for name, size in sizes.items()
        },
        device=f"cuda ({torch.cuda.get_device_name(device)})"
        if on_cuda
        else f"{device.type} ({torch.get_num_threads()} threads)",
        frames_per_s=frames / device_s,
        device_hours=device_s / 3600,
        device_peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        workers=workers,
        decode_core_hours=decode_s / 3600,
        clock_hours=stages[slowest] / 3600,
        gb_per_s=num_bytes / stages[slowest] / 1e9,
        slowest_stage=slowest,
        host_peak_bytes=round(
            _peak_bytes(resource.RUSAGE_SELF) + children + SHARD_COPIES * shard_growth
        ),
        disk=str(folder),
        free_bytes=shutil.disk_usage(folder).free,
        write_bytes_per_s=trial.write_bytes_per_s,
        read_bytes_per_s=trial.read_bytes_per_s,
    )


def _break_even(*, once_s: float, stored_s: float, recompute_s: float) -> int | None:
    """The smallest number of passes with once_s + passes * stored_s < passes * recompute_s."""
    if stored_s >= recompute_s:
        return None
    return math.floor(once_s / (recompute_s - stored_s)) + 1


def _disk_rates(path: Path) -> tuple[float, float]:
    """Bytes a second to write a copy of the file and to read it, from the disk where that can be
    had: what memory still holds would be read at its speed."""
    data = path.read_bytes()
    with tempfile.TemporaryFile(dir=path.parent, buffering=0) as file:
        start_s = time.monotonic()
        file.write(data)
        os.fsync(file.fileno())
        write_s = time.monotonic() - start_s
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start_s = time.monotonic()
        file.readall()
        return len(data) / max(write_s, 1e-9), len(data) / max(time.monotonic() - start_s, 1e-9)


def _core_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_bytes(who: int) -> int:
    """Peak resident memory; macOS counts in bytes, Linux in units of 1024."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plan_text(plan: CostPlan) -> str:
    """Some twenty lines for people, without a newline at the end."""
    names = [f"           {clip}: {why}" for clip, why in plan.quarantined.items()]
    more = [f"           and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    about = f", give or take {200 * plan.windows_error / max(plan.windows, 1):.2g} %"
    decoding = f"{hours_text(plan.decode_core_hours)} of a core, in {plan.workers} processes"
    device_memory = plan.device_peak_bytes
    lines = [
        "nothing has been written yet; this is what it would take",
        f"clips      {plan.clips} ({size_text(plan.source_bytes)}), {plan.probed} tried, "
        f"windows of {plan.counted} counted",
        f"quarantine {100 * plan.quarantined_share:.3g} %"
        f" ({len(plan.quarantined)} clips known to give no windows)",
        *names[:SHOWN],
        *more,
        f"windows    {plan.windows} of {plan.frames // max(plan.windows, 1)} frames: {plan.frames} "
        f"frames in {plan.shards} shards, {plan.files} files"
        f"{about if plan.windows_error else ''}",
        "",
        "cache           bytes   a frame   storing them beats making them again",
        *(_row(plan, name) for name in plan.caches),
        "",
        f"device     {plan.device}: {plan.frames_per_s:.3g} frames/s, "
        f"{hours_text(plan.device_hours)} of the device",
        f"decoding   {decoding if plan.workers else 'nothing'}",
        f"clock      about {hours_text(plan.clock_hours)} on this machine, "
        f"the slowest stage: {plan.slowest_stage}; {plan.gb_per_s:.3g} GB/s to write",
        f"memory     {f'{size_text(device_memory)} of the device, ' if device_memory else ''}"
        f"at most about {size_text(plan.host_peak_bytes)} of main memory",
        f"disk       {size_text(plan.free_bytes)} free in {plan.disk}, "
        f"writes {plan.write_bytes_per_s / 1e9:.2f} GB/s, "
        f"reads {plan.read_bytes_per_s / 1e9:.2f} GB/s",
    ]
    needed = plan.caches[plan.kind].bytes
    if needed > plan.free_bytes:
        lines.append(
            f"TOO LARGE  {size_text(needed)} are needed: take fewer windows, a smaller frame size "
            "or dtype, delta tokens (--tokenizer), or another --out"
        )
    return "\n".join(lines)


def _row(plan: CostPlan, name: str) -> str:
    cost, chosen = plan.caches[name], name == plan.kind
    first = cost.break_even_epochs
    return (
        f"{name + ' <-' * chosen:<11}{'' if chosen else '~':>1}{size_text(cost.bytes):>9} "
        f"{size_text(cost.bytes / max(plan.frames, 1)):>9}   "
        f"{'never: the disk is slower' if first is None else f'from epoch {first} on'}"
    )


def hours_text(hours: float) -> str:
    """Like "1.5 hours", "12 minutes" or "3.1 seconds"."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours >= 1 / 60 else f"{hours * 3600:.3g} seconds"
