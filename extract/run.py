"""run_extraction: videos in, a cache out, resumable after any kill, by any number of processes.

    find clips -> cache.json -> plan.jsonl -> black.npy -> for every shard without a done-record
    that no other process has a lease on:
    decode -> crop, resize, flip -> backbone -> convert -> write -> done-record
    -> quarantine.jsonl -> cache.json marked complete

Decoding processes, the backbone and the writing threads work at the same time; the main thread
hands over from one to the next. Called by pipeline/.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..shards.cache import open_cache, read_cache_info
from ..shards.errors import DeltatokError
from ..shards.files import remove_partials
from ..shards.records import DoneRecord, append_timing, read_done
from .backbone import Backbone
from .common import MAX_POLL_S, CommonFolder, Plan, check_sources
from .config import ExtractConfig
from .describe import describe_patches
from .devices import choose_num_workers, load_backbone
from .features import WindowFeatures
from .leases import Leases
from .pool import DecodePool
from .progress import Progress, StageClock
from .sampling import SamplingPolicy
from .shard_rows import ShardMaker
from .sink import ShardSink, check_room, disk_errors
from .sources import Clip, find_clips
from .stop import StopRequest, stop_on_signals
from .tally import Tally
from .work import SharedWork, TakenShard
from .writer import PatchShardWriter, ShardWriter

_LOGGER = logging.getLogger(__name__)

UNIFORM_WINDOWS = 4
"""Windows that a clip is taken to give when a shard's number of clips is chosen for uniform
sampling: how many it really gives is known only once it is decoded (a guess)."""


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


def run_extraction(
    config: ExtractConfig, *, backbone: Backbone | None = None, writer: ShardWriter | None = None
) -> ExtractionSummary:
    """Makes the cache `config.out`, or goes on with it, until all its shards are done.

    Any number of processes may do so at once, on any number of machines that share the folder, and
    each returns when all is done; what a killed one had begun is made by another.

    backbone: instead of loading `config.backbone`. writer: what becomes of the features; by
    default they are stored whole, as a patch-token cache.

    Raises UsageError (2), TooManyQuarantined (3: all shards are written, or 100 clips and more
    are broken), CacheMismatch (4: `out` holds another cache), Stopped (75: by SIGTERM, SIGINT or
    the time limit) and DeltatokError (1: disk full, values that cannot be stored). Finished shards
    always stay.
    """
    start_s = time.monotonic()
    clips = find_clips(config.videos)
    with stop_on_signals(time_limit_s=config.time_limit_s) as stop:
        with stop.at_once():
            backbone = backbone or load_backbone(config)
            writer = writer or PatchShardWriter(dtype=config.dtype, seed=config.seed)
            policy = SamplingPolicy.from_config(config)
            wanted = writer.describe(describe_patches(config, policy, backbone))
        open_cache(config.out, wanted)
        with Leases(Path(config.out), timeout_s=config.lease_timeout_s) as leases:
            job = _Job(config, policy, backbone, writer, clips, stop, leases)
            return job.run(start_s=start_s)


def clips_per_shard(config: ExtractConfig) -> int:
    """How many whole clips make about `frames_per_shard` frames, at least one."""
    windows = config.num_windows if config.sampling == "windows" else UNIFORM_WINDOWS
    return max(1, config.frames_per_shard // (windows * config.num_frames))


class _Job:
    """One run, in a folder that it may share with others."""

    def __init__(
        self,
        config: ExtractConfig,
        policy: SamplingPolicy,
        backbone: Backbone,
        writer: ShardWriter,
        clips: Sequence[Clip],
        stop: StopRequest,
        leases: Leases,
    ) -> None:
        self._config = config
        self._policy = policy
        self._backbone = backbone
        self._writer = writer
        self._clips = {clip.key: clip for clip in clips}
        self._stop = stop
        self._out = Path(config.out)
        self._leases = leases
        self._folder = CommonFolder(
            self._out, leases, stop, poll_s=min(MAX_POLL_S, config.lease_timeout_s / 4)
        )
        self._clock = StageClock()
        self._tally = Tally(self._out, len(clips))
        self._work = SharedWork(self._out, {}, leases)
        self._num_shards = 0
        self._num_done_now = 0

    def run(self, *, start_s: float) -> ExtractionSummary:
        """Makes what is missing."""
        config = self._config
        with disk_errors(self._out):
            pending = self._open()
            self._work = SharedWork(self._out, pending, self._leases)
        if pending:
            self._make_shards(pending)
        with disk_errors(self._out):
            self._tally = self._folder.finish(
                num_frames=config.num_frames, changed=self._num_done_now > 0
            )
        summary = ExtractionSummary(
            **self._tally.counts(num_frames=config.num_frames),
            bytes=self._tally.size_bytes,
            shards_done_now=self._num_done_now,
            seconds=time.monotonic() - start_s,
            slowest_stage=self._clock.slowest(),
        )
        self._tally.check(config.max_quarantined)
        return summary

    def _open(self) -> Plan:
        """What is to be made: shard -> its clips."""
        config = self._config
        for folder in (self._out, self._out / "shards"):
            remove_partials(folder)
        plan = self._folder.plan(
            list(self._clips.values()),
            clips_per_shard=clips_per_shard(config),
            seed=config.seed,
            append=config.append,
        )
        # Read before the done-records: if it is complete and a shard is missing, it is to be
        # made again, and not one that another process has just finished.
        complete = read_cache_info(self._out).complete
        self._num_shards = len(plan)
        self._tally = Tally.read(self._out, plan)
        pending = {shard: plan[shard] for shard in plan if self._is_pending(shard)}
        check_sources(self._out, pending, set(self._clips))
        if pending and complete:
            self._folder.reopen()
        return pending

    def _is_pending(self, shard: int) -> bool:
        done = self._tally.shards.get(shard)
        return done is None or (self._config.retry_quarantined and done.quarantined > 0)

    def _make_shards(self, pending: Plan) -> None:
        config, backbone = self._config, self._backbone
        with disk_errors(self._out):
            black = backbone.black_tokens(config.frame_size)
            self._writer.begin(self._out, black.to(backbone.device))
        num_clips = sum(map(len, pending.values()))
        progress = Progress(
            self._clock,
            num_clips=self._tally.num_clips,
            num_before=self._tally.num_clips - num_clips,
        )
        pool = DecodePool(
            self._policy,
            num_workers=choose_num_workers(config),
            timeout_s=config.decode_timeout_s,
            decode_threads=config.decode_threads,
        )
        sink = ShardSink(
            self._writer,
            self._out,
            min_free_bytes=config.min_free_bytes,
            when_done=self._when_done,
        )
        features = WindowFeatures(
            backbone,
            self._writer,
            num_frames=config.num_frames,
            frame_size=config.frame_size,
            batch_frames=config.batch_frames,
        )
        with progress, sink, pool:
            while True:
                first = self._take()
                self._see_others(progress)
                if first is not None:
                    self._make_free_shards(first, pool, sink, features, progress)
                    continue
                with self._clock.at("write"):
                    sink.finish()
                if not self._work.left:
                    return
                self._folder.wait()  # others have what is left: one of them may die

    def _make_free_shards(
        self,
        first: TakenShard,
        pool: DecodePool,
        sink: ShardSink,
        features: WindowFeatures,
        progress: Progress,
    ) -> None:
        """Makes `first` and then shard after shard, until none is free."""
        config = self._config
        taken = deque([first])

        def clips() -> Iterator[Clip]:
            # Read as far as the pool decodes ahead: no shard is taken sooner than that.
            newest: TakenShard | None = first
            while newest is not None:
                for entry in newest.entries:
                    yield self._clips[entry.key]
                newest = self._take()
                if newest is not None:
                    taken.append(newest)

        decoded = pool.decode(clips())
        maker = ShardMaker(
            backbone=self._backbone,
            features=features,
            frame_size=config.frame_size,
            num_frames=config.num_frames,
            decoded=decoded,
            stop=self._stop,
            clock=self._clock,
            progress=progress,
        )
        try:
            while taken:
                shard = taken.popleft()
                with disk_errors(self._out):
                    check_room(
                        self._out,
                        f"shard {shard.shard:06d}",
                        0,
                        min_free_bytes=config.min_free_bytes,
                    )
                rows = maker.make(shard.entries)
                with self._clock.at("write"):
                    sink.put(shard, rows)
                self._see_others(progress)
        except torch.OutOfMemoryError as error:
            raise DeltatokError(
                f"the backbone ran out of memory with batches of {config.batch_frames} frames "
                f"of {config.frame_size} pixels: lower batch_frames and run again"
            ) from error
        assert next(decoded, None) is None

    def _take(self) -> TakenShard | None:
        with disk_errors(self._out):
            return self._work.take()

    def _see_others(self, progress: Progress) -> None:
        """Counts what other processes have finished."""
        for shard in self._work.done_elsewhere():
            record = read_done(self._out, shard)
            if record is not None:
                self._tally.add(record)
                progress.add_elsewhere(len(record.keys) + len(record.quarantined))

    def _when_done(self, taken: TakenShard, record: DoneRecord | None) -> None:
        self._work.give_back(taken, done=record is not None)
        if record is None:
            _LOGGER.warning("shard %06d: another process took it over", taken.shard)
            return
        self._num_done_now += 1
        self._tally.add(record)
        with disk_errors(self._out):
            append_timing(
                self._out,
                {
                    "shard": record.shard,
                    "windows": record.rows,
                    "seconds_so_far": {k: round(v, 3) for k, v in self._clock.seconds.items()},
                },
            )
            if record.quarantined:
                self._folder.list_quarantined(self._tally)
        _LOGGER.info(
            "shard %06d: %d windows of %d clips; %d of %d shards done",
            record.shard,
            record.rows,
            len(record.keys),
            len(self._tally.shards),
            self._num_shards,
        )
        self._tally.check_certain(self._config.max_quarantined)
