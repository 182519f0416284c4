"""run_extraction: videos in, a cache out, resumable after any kill, by any number of processes.

    find clips -> cache.json -> plan.json -> for every shard of this process's part that has no
    done-record: decode -> crop, resize, flip -> backbone -> convert -> write -> done-record
    -> once all shards are done: quarantine.jsonl, index.jsonl, cache.json marked complete

`make_shards` is the loop; ledger.py knows which shards are done and closes the cache.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..shards.cache import open_cache
from ..shards.errors import CacheMismatch
from ..shards.evaluation.geometry import shown_size
from ..shards.files import disk_errors, remove_partials
from ..shards.plan import (
    PLAN,
    Plan,
    PlanEntry,
    check_same_clips,
    longer_plan,
    make_plan,
    mended_plan,
    write_plan,
)
from ..shards.records import DoneRecord, Quarantined, append_timing
from ..shards.running.devices import memory_errors
from ..shards.running.interrupts import StopRequest
from ..shards.running.parts import Part
from ..shards.running.stopwatch import Stopwatch
from ..shards.stores.upload import out_folder
from .backbone import Backbone, load_backbone
from .config import ExtractConfig
from .datasets.windows import Policy
from .decoding.clip import DecodedClip, check_installed
from .decoding.pool import DecodePool
from .features import PixelPrefetcher, Pixels, WindowFeatures
from .identity import cache_identity
from .int8_calibration import patch_writer
from .ledger import Ledger, check_quarantined, close_cache, reopen
from .pca import with_projection
from .progress import Progress
from .shard_queue import ShardQueue
from .shard_writer import ShardWindows, ShardWriter, ShardWriterThread
from .sources.clip import Clip
from .sources.select import clips_of

UNIFORM_WINDOWS = 4
"""Windows that a clip is taken to give when a shard's number of clips is chosen for uniform
sampling: how many it really gives is known only once it is decoded (a guess)."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractionSummary:
    """What the cache holds at the end, over all runs, and what this run did."""

    clips: int
    """Clips in the plan, those in quarantine included."""
    quarantined: int
    windows: int
    frames: int
    shards: int
    bytes: int
    """Of the shards' files."""
    shards_done_now: int
    """Shards that this run made; 0 if there was nothing left to do."""
    seconds: float
    """Wall-clock time of this run."""
    slowest_stage: str | None
    """Like "decode 71 %": what this run waited for most, and its share of the time."""

    def summary_line(self) -> str:
        """One line for people: what is there, and what this run did."""
        now = f"{self.shards_done_now} of them now" if self.shards_done_now else "none to make"
        size = f"{self.bytes / 1e9:,.1f} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:,.1f} MB"
        return (
            f"{self.windows:,} windows ({self.frames:,} frames, {size}) "
            f"in {self.shards:,} shards, {now}; "
            f"{self.quarantined:,} of {self.clips:,} clips in quarantine; {self.seconds:,.0f} s"
        )


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a run makes shards with."""

    config: ExtractConfig
    policy: Policy
    backbone: Backbone
    writer: ShardWriter
    stop: StopRequest
    watch: Stopwatch
    """Of the main thread: decode, pixels, backbone, write."""

    @property
    def out(self) -> Path:
        """The cache's folder."""
        return Path(self.config.out)

    @property
    def batch_frames(self) -> int:
        """Frames in one pass through the backbone, about."""
        return self.config.frames_per_batch(self.backbone.device.type)


def run_extraction(
    config: ExtractConfig,
    *,
    backbone: Backbone | None = None,
    writer: ShardWriter | None = None,
    targets: tuple[Policy, Sequence[Clip]] | None = None,
    part: Part | None = None,
) -> ExtractionSummary:
    """Makes this process's part of the cache `config.out`, or what is missing of it.

    Processes with ranks, and runs with different `config.shard_of`, make different shards of one
    folder; each returns when its own are done, and the one that finds all done closes the cache.

    backbone: instead of loading `config.backbone`. writer: what becomes of the features; by
    default they are stored whole, as a patch-token cache. targets: the clips, and how their windows
    are made, instead of those that `config` finds and samples. part: the shards to make, instead of
    those that the launcher's rank and `config.shard_of` say.

    Raises UsageError (2), TooManyQuarantined (3: all shards are written, or 100 clips and more
    are broken), CacheMismatch (4: `out` holds another cache), Stopped (75: by SIGTERM, SIGINT or
    the time limit) and DeltatokError (1: disk full, values that cannot be stored). Finished shards
    always stay.
    """
    start_s = time.monotonic()
    part = part or Part.of_this_process(config.shard_of)
    check_installed(config.decoder)
    config = replace(config, out=str(out_folder(config.out)))
    policy: Policy = config.sampling_policy() if targets is None else targets[0]
    clips = clips_of(config) if targets is None else targets[1]
    with StopRequest(time_limit_s=config.time_limit_s) as stop:
        run = open_run(config, policy, clips, stop=stop, backbone=backbone, writer=writer)
        ledger, shards = begin(config, clips, part)
        del clips  # those of other processes' shards are not needed any more
        if shards:
            with progress_of(ledger, part, shards, run.watch) as progress:
                make_shards(
                    run,
                    ShardQueue(shards.items()),
                    when_clip=progress.add_clip,
                    when_done=lambda record: note_done(config, record, ledger, progress, run.watch),
                )
        return finish(config, part, shards_done_now=len(shards), watch=run.watch, start_s=start_s)


def open_run(
    config: ExtractConfig,
    policy: Policy,
    clips: Sequence[Clip],
    *,
    stop: StopRequest,
    backbone: Backbone | None = None,
    writer: ShardWriter | None = None,
) -> RunContext:
    """Loads what is not given, and begins the cache unless it has begun. clips: all there are, a
    sample of which int8 and principal components are fitted on."""
    with stop.at_once():
        backbone = with_projection(config, policy, backbone or load_backbone(config), clips)
        writer = writer or patch_writer(config, policy, backbone, clips)
        info = writer.describe(cache_identity(config, policy, backbone))
    open_cache(config.out, info)
    return RunContext(
        config=config,
        policy=policy,
        backbone=backbone,
        writer=writer,
        stop=stop,
        watch=Stopwatch(),
    )


def make_shards(
    run: RunContext,
    queue: ShardQueue[Clip],
    *,
    when_clip: Callable[[int], None],
    when_done: Callable[[DoneRecord], None],
) -> None:
    """Makes the shards of `queue` one after the other; a stop abandons the one at hand.

    Clips are decoded, and on a GPU cropped and resized, ahead of this loop, in order, also over a
    shard's end; finished shards are written behind it. when_clip: told of every clip how many
    frames it gave. when_done: told of every shard, by the thread that wrote it. Raises what
    run_extraction does.
    """
    config, backbone, watch = run.config, run.backbone, run.watch
    doing = f"backbone, {shown_size(config.frame_size)} pixels"

    def advice() -> str:
        return f"lower batch_frames, now {run.batch_frames}"

    with disk_errors(run.out), memory_errors(doing, advice):
        black = backbone.black_tokens(config.frame_size)
        run.writer.begin(run.out, black.to(backbone.device))
    # A batch; on the CPU, where the same cores would make pixels and tokens, nothing.
    on_cpu = backbone.device.type == "cpu"
    num_ahead = 0 if on_cpu else max(1, run.batch_frames // config.num_frames)
    features = WindowFeatures(backbone, run.writer, config)
    with (
        memory_errors(doing, advice),
        ShardWriterThread(
            run.writer, run.out, min_free_bytes=config.min_free_bytes, when_done=when_done
        ) as sink,
        DecodePool.from_config(config, run.policy) as pool,
        PixelPrefetcher(
            frame_size=config.frame_size, device=backbone.device, num_ahead=num_ahead
        ) as prefetcher,
    ):
        decoded = _decoded(pool, prefetcher, queue.items_ahead())
        for shard, clips in queue.shards():
            sink.check_free(shard)
            windows = ShardWindows(config.num_frames)
            for _ in clips:
                with watch.at("decode"), run.stop.at_once():
                    clip, pixels = next(decoded)
                if isinstance(clip, Quarantined):
                    _LOGGER.warning("quarantined %s (%s): %s", clip.clip, clip.stage, clip.reason)
                    windows.quarantined.append(clip)
                    when_clip(0)
                    continue
                windows.add(clip)
                while pixels:
                    run.stop.check()
                    with watch.at("pixels"):
                        window = pixels.popleft()()  # and its decoded frames are let go of
                    with watch.at("backbone"):
                        features.add(window)
                when_clip(len(clip.windows) * config.num_frames)
            with watch.at("backbone"):
                values = features.finish_later()
            with watch.at("write"):
                sink.put(shard, windows, values)
        with watch.at("write"):
            sink.finish()


def _decoded(
    pool: DecodePool, prefetcher: PixelPrefetcher, clips: Iterator[Clip | None]
) -> Iterator[tuple[DecodedClip | Quarantined, deque[Pixels]]]:
    """The clips with their pixels, in order; to be asked only for clips that are known."""
    while True:  # again where all that were known had been given before there were more
        yield from prefetcher.clips(pool.decode(clips))


def clips_per_shard(config: ExtractConfig) -> int:
    """How many whole clips make about `frames_per_shard` frames, at least one."""
    windows = config.num_windows if config.sampling == "windows" else UNIFORM_WINDOWS
    return max(1, config.frames_per_shard // (windows * config.num_frames))


def begin(
    config: ExtractConfig, clips: Sequence[Clip], part: Part
) -> tuple[Ledger, dict[int, list[Clip]]]:
    """What is done, and the shards of `part` that are to be made, number -> clips in plan order.
    The cache is there."""
    out = Path(config.out)
    with disk_errors(out):
        remove_partials(out)
        remove_partials(out / "shards")
        by_key = {clip.key: clip for clip in clips}
        plan = _follow_plan(config, by_key)
        ledger = Ledger.read(out, plan)
        again = set(ledger.in_quarantine) if config.retry_quarantined else set()
        to_make = {
            shard
            for shard in range(plan.num_shards)
            if shard in part and (not ledger.is_done(shard) or shard in again)
        }
        shards = _clips_of_shards(plan, to_make, by_key)
        if to_make:
            reopen(out)
        for shard in sorted(again & to_make):
            ledger.take_back(shard)
    return ledger, shards


def progress_of(
    ledger: Ledger, part: Part, shards: Mapping[int, Sequence[Clip]], watch: Stopwatch
) -> Progress:
    """The progress line of making `shards`, which are what is left of `part`."""
    num_done = sum(count for shard, count in enumerate(ledger.clips.tolist()) if shard in part)
    num_clips = num_done + sum(map(len, shards.values()))
    return Progress(watch, num_clips=num_clips, num_before=num_done)


def note_done(
    config: ExtractConfig,
    record: DoneRecord,
    ledger: Ledger,
    progress: Progress,
    watch: Stopwatch,
) -> None:
    """Counts a shard that is written, and tells the files for people and the log of it. Raises
    TooManyQuarantined if the run is bound to end so."""
    ledger.add(record)
    progress.add_written(0 if record.file is None else record.file.bytes)
    with disk_errors(ledger.folder):
        seconds = {stage: round(spent_s, 3) for stage, spent_s in dict(watch.seconds).items()}
        timing = {"shard": record.shard, "windows": record.rows, "seconds_so_far": seconds}
        append_timing(ledger.folder, timing)
        if record.quarantined:
            ledger.list_quarantined(now=False)
    _LOGGER.info(
        "shard %06d: %d windows of %d clips; %d of %d shards done",
        record.shard,
        record.rows,
        record.clips,
        ledger.num_done,
        ledger.plan.num_shards,
    )
    ledger.check_certain(config.max_quarantined)


def finish(
    config: ExtractConfig, part: Part, *, shards_done_now: int, watch: Stopwatch, start_s: float
) -> ExtractionSummary:
    """Closes the cache if all of it is done; TooManyQuarantined if too little of that is good."""
    with disk_errors(Path(config.out)):
        totals = close_cache(Path(config.out), changed=shards_done_now > 0, part=part)
    summary = ExtractionSummary(
        **totals.counts,
        bytes=totals.size_bytes,
        shards_done_now=shards_done_now,
        seconds=time.monotonic() - start_s,
        slowest_stage=watch.slowest(),
    )
    if totals.is_complete:  # else whoever closes the cache says so
        num_lost, num_clips = summary.quarantined, summary.clips
        check_quarantined(Path(config.out), num_lost, num_clips, most=config.max_quarantined)
    return summary


def _follow_plan(config: ExtractConfig, clips: Mapping[str, Clip]) -> Plan:
    """The plan for `clips`, by key. One that is there is followed, or with --append made longer;
    with --retry-quarantined clips that were not there, and now are, are filled in.

    Raises CacheMismatch if it is for other clips, without --append. Several processes may do so at
    once: each would write the same bytes.
    """
    out = Path(config.out)
    num_clips, seed = clips_per_shard(config), config.seed
    if not (out / PLAN).exists():
        return write_plan(out, make_plan(clips.values(), clips_per_shard=num_clips, seed=seed))
    plan = stored = Plan.open(out)
    if config.retry_quarantined:
        plan = mended_plan(plan, clips)
    if config.append:
        plan = longer_plan(plan, clips, clips_per_shard=num_clips, seed=seed)
    else:
        check_same_clips(plan, clips)
    if plan != stored:
        reopen(out)  # first: a finished cache.json tells the hash of its plan
        plan.commit()
    return plan


def _clips_of_shards(
    plan: Plan, shards: Container[int], clips: Mapping[str, Clip]
) -> dict[int, list[Clip]]:
    """Number -> clips in plan order, of these shards; CacheMismatch unless all are in `clips`."""
    found: dict[int, list[Clip]] = {}
    missing: list[PlanEntry] = []
    for shard, entries in plan.shards(shards):
        missing += [entry for entry in entries if entry.key not in clips]
        found[shard] = [clips[entry.key] for entry in entries if entry.key in clips]
    if missing:
        raise CacheMismatch(
            f"{plan.folder}: clip {missing[0].key!r} is in a shard that is not done, but not among "
            f"the videos given ({len(missing)} such clips; it came from {missing[0].source}): give "
            "the old videos as well"
        )
    return found
