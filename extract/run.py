"""run_extraction: videos in, a cache out, resumable after any kill.

    find clips -> cache.json -> plan.jsonl -> black.npy -> for every shard without a done-record:
    decode -> crop, resize, flip -> backbone -> convert -> write -> done-record
    -> quarantine.jsonl -> cache.json marked complete

Decoding processes, the backbone and the writing threads work at the same time; the main thread
hands over from one to the next. Called by pipeline/.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..shards.cache import CacheInfo, finish_cache, open_cache
from ..shards.errors import DeltatokError, UsageError
from ..shards.files import remove_partials
from ..shards.plan import PlanEntry, make_plan, write_plan
from ..shards.records import DoneRecord, append_timing
from .backbone import Autocast, Backbone
from .calibration import patch_writer
from .config import ExtractConfig
from .describe import describe_patches
from .features import WindowFeatures
from .lock import folder_lock
from .pool import DecodePool, default_num_workers
from .progress import Progress, StageClock
from .sampling import SamplingPolicy
from .shard_rows import ShardMaker
from .sink import ShardSink, disk_errors
from .sources import Clip, find_clips
from .stop import StopRequest, stop_on_signals
from .tally import Tally
from .writer import ShardWriter

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

    backbone: instead of loading `config.backbone`. writer: what becomes of the features; by
    default they are stored whole, as a patch-token cache.

    Raises UsageError (2), TooManyQuarantined (3: all shards are written, or 100 clips and more
    are broken), CacheMismatch (4: `out` holds another cache), Stopped (75: by SIGTERM or SIGINT)
    and DeltatokError (1: disk full, values that cannot be stored). Finished shards always stay.
    """
    start_s = time.monotonic()
    clips = find_clips(config.videos)
    with stop_on_signals() as stop:
        with stop.at_once():
            backbone = backbone or load_backbone(config)
            policy = SamplingPolicy.from_config(config)
            writer = writer or patch_writer(config, policy, backbone, clips)
            wanted = writer.describe(describe_patches(config, policy, backbone))
        info = open_cache(config.out, wanted)
        with folder_lock(Path(config.out)):
            job = _Job(config, policy, backbone, writer, clips, stop)
            return job.run(info, start_s=start_s)


def load_backbone(config: ExtractConfig) -> Backbone:
    """The backbone of `config` on its device; UsageError if it cannot be had there."""
    device = _device(config.device)
    default: Autocast = "bfloat16" if device.type == "cuda" else "float32"
    autocast = default if config.autocast == "auto" else config.autocast
    return Backbone.load(config.backbone, device=device, autocast=autocast)


def clips_per_shard(config: ExtractConfig) -> int:
    """How many whole clips make about `frames_per_shard` frames, at least one."""
    windows = config.num_windows if config.sampling == "windows" else UNIFORM_WINDOWS
    return max(1, config.frames_per_shard // (windows * config.num_frames))


class _Job:
    """One run, in a folder that it has for itself."""

    def __init__(
        self,
        config: ExtractConfig,
        policy: SamplingPolicy,
        backbone: Backbone,
        writer: ShardWriter,
        clips: Sequence[Clip],
        stop: StopRequest,
    ) -> None:
        self._config = config
        self._policy = policy
        self._backbone = backbone
        self._writer = writer
        self._clips = {clip.key: clip for clip in clips}
        self._stop = stop
        self._out = Path(config.out)
        self._clock = StageClock()
        self._tally = Tally(self._out, len(clips))
        self._num_shards = 0
        self._num_done_now = 0

    def run(self, info: CacheInfo, *, start_s: float) -> ExtractionSummary:
        """Makes what is missing; `info` is the cache.json that was found or made."""
        with disk_errors(self._out):
            for folder in (self._out, self._out / "shards"):
                remove_partials(folder)
            plan = self._plan()
        self._num_shards = len(plan)
        self._tally = Tally.read(self._out, plan)
        pending = {shard: plan[shard] for shard in sorted(plan) if self._is_pending(shard)}
        if pending:
            self._make_shards(pending)
        with disk_errors(self._out):
            self._finish(info)
        summary = ExtractionSummary(
            **self._counts(),
            bytes=self._tally.size_bytes,
            shards_done_now=self._num_done_now,
            seconds=time.monotonic() - start_s,
            slowest_stage=self._clock.slowest(),
        )
        self._tally.check(self._config.max_quarantined)
        return summary

    def _plan(self) -> dict[int, list[PlanEntry]]:
        """Shard -> its clips. A plan that is there already is followed."""
        made = make_plan(
            self._clips.values(),
            clips_per_shard=clips_per_shard(self._config),
            seed=self._config.seed,
        )
        plan: dict[int, list[PlanEntry]] = defaultdict(list)
        for entry in write_plan(self._out, made):
            plan[entry.shard].append(entry)
        return plan

    def _is_pending(self, shard: int) -> bool:
        done = self._tally.shards.get(shard)
        return done is None or (self._config.retry_quarantined and done.quarantined > 0)

    def _make_shards(self, pending: dict[int, list[PlanEntry]]) -> None:
        config, backbone = self._config, self._backbone
        entries = [entry for shard in pending.values() for entry in shard]
        with disk_errors(self._out):
            black = backbone.black_tokens(config.frame_size)
            self._writer.begin(self._out, black.to(backbone.device))
        progress = Progress(
            self._clock, num_clips=len(self._clips), num_before=len(self._clips) - len(entries)
        )
        pool = DecodePool(
            self._policy,
            num_workers=config.workers or default_num_workers(),
            timeout_s=config.decode_timeout_s,
            decode_threads=config.decode_threads,
        )
        sink = ShardSink(self._writer, self._out, when_done=self._when_done)
        with progress, sink, pool:
            maker = ShardMaker(
                backbone=backbone,
                features=WindowFeatures(
                    backbone,
                    self._writer,
                    num_frames=config.num_frames,
                    frame_size=config.frame_size,
                    batch_frames=config.batch_frames,
                ),
                frame_size=config.frame_size,
                num_frames=config.num_frames,
                decoded=pool.decode(self._clips[entry.key] for entry in entries),
                stop=self._stop,
                clock=self._clock,
                progress=progress,
            )
            try:
                for shard, shard_entries in pending.items():
                    rows = maker.make(shard_entries)
                    with self._clock.at("write"):
                        sink.put(shard, rows)
                with self._clock.at("write"):
                    sink.finish()
            except torch.OutOfMemoryError as error:
                raise DeltatokError(
                    f"the backbone ran out of memory with batches of {config.batch_frames} frames "
                    f"of {config.frame_size} pixels: lower batch_frames and run again"
                ) from error

    def _when_done(self, record: DoneRecord) -> None:
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
                self._tally.list_quarantined(now=False)
        _LOGGER.info(
            "shard %06d: %d windows of %d clips; %d of %d shards done",
            record.shard,
            record.rows,
            len(record.keys),
            len(self._tally.shards),
            self._num_shards,
        )
        self._tally.check_certain(self._config.max_quarantined)

    def _finish(self, info: CacheInfo) -> None:
        """Nothing is written where nothing changed."""
        counts = self._counts()
        if self._num_done_now or not info.complete or info.counts != counts:
            self._tally.list_quarantined(now=True)
            finish_cache(self._out, counts)

    def _counts(self) -> dict[str, int]:
        return {
            "clips": len(self._clips),
            "quarantined": self._tally.quarantined,
            "windows": self._tally.windows,
            "frames": self._tally.windows * self._config.num_frames,
            "shards": len(self._tally.shards),
        }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"device {name}: cannot be used here ({reason}): wanted auto, cpu, cuda or cuda:N"
        ) from error
    return device
