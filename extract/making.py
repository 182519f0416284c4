"""Shard after shard, made by this process as long as there is one that nobody else makes.

Decoding processes, the backbone and the writing threads work at the same time; the main thread
hands over from one to the next.
"""

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..shards.errors import DeltatokError
from ..shards.records import DoneRecord, append_timing, read_done
from .backbone import Backbone, choose_num_workers
from .common import CommonFolder
from .config import ExtractConfig
from .datasets.windows import Policy
from .decoding.pool import DecodePool
from .features import PixelStage, WindowFeatures
from .heap import give_back_freed
from .progress import Progress, StageClock
from .shard_rows import ShardMaker
from .sink import ShardSink, check_room, disk_errors
from .sources.clip import Clip
from .stop import StopRequest
from .tally import Tally
from .work import SharedWork, TakenShard
from .writer import ShardWriter

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a run makes shards with."""

    config: ExtractConfig
    policy: Policy
    backbone: Backbone
    writer: ShardWriter
    clips: Mapping[str, Clip]
    """Key -> clip, all that may have to be read."""
    stop: StopRequest
    clock: StageClock


class Production:
    """One run's part in the shards of `work`."""

    def __init__(
        self, means: Means, folder: CommonFolder, work: SharedWork, tally: Tally, num_shards: int
    ) -> None:
        """tally: of the shards that are done; kept up to date. num_shards: in the plan."""
        self._means = means
        self._out = Path(means.config.out)
        self._folder = folder
        self._work = work
        self._tally = tally
        self._num_shards = num_shards
        self.num_done = 0
        """Shards that this process has made."""

    def run(self) -> None:
        """Makes shards until all are done, by whomever.

        Raises what run_extraction does; what was begun is then free for others again.
        """
        means = self._means
        config, backbone, clock = means.config, means.backbone, means.clock
        with disk_errors(self._out):
            black = backbone.black_tokens(config.frame_size)
            means.writer.begin(self._out, black.to(backbone.device))
        num_clips = self._tally.num_clips
        progress = Progress(
            clock, num_clips=num_clips, num_before=num_clips - self._work.num_clips_left
        )
        pool = DecodePool(
            means.policy,
            num_workers=choose_num_workers(config),
            timeout_s=config.decode_timeout_s,
            decode_threads=config.decode_threads,
            decoder=config.decoder,
        )
        sink = ShardSink(
            means.writer,
            self._out,
            min_free_bytes=config.min_free_bytes,
            when_done=partial(self._when_done, progress),
        )
        batch_frames = config.frames_per_batch(backbone.device.type)
        features = WindowFeatures(
            backbone,
            means.writer,
            num_frames=config.num_frames,
            frame_size=config.frame_size,
            batch_frames=batch_frames,
        )
        on_cpu = backbone.device.type == "cpu"
        stage = PixelStage(
            frame_size=config.frame_size,
            device=backbone.device,
            num_ahead=0 if on_cpu else max(1, batch_frames // config.num_frames),
        )
        with progress, sink, pool, stage:
            while True:
                first = self._take()
                self._see_others(progress)
                if first is not None:
                    self._make_free(first, pool, stage, sink, features, progress)
                    continue
                with self._means.clock.at("write"):
                    sink.finish()
                if not self._work.left:
                    return
                self._folder.wait()  # others have what is left: one of them may die

    def _make_free(
        self,
        first: TakenShard,
        pool: DecodePool,
        stage: PixelStage,
        sink: ShardSink,
        features: WindowFeatures,
        progress: Progress,
    ) -> None:
        """Makes `first` and then shard after shard, until none is free."""
        means = self._means
        config = means.config
        taken = deque([first])

        def clips() -> Iterator[Clip]:
            # Read as far as the pool decodes ahead: no shard is taken sooner than that.
            newest: TakenShard | None = first
            while newest is not None:
                for entry in newest.entries:
                    yield means.clips[entry.key]
                newest = self._take()
                if newest is not None:
                    taken.append(newest)

        staged = stage.clips(pool.decode(clips()))
        maker = ShardMaker(
            features=features,
            num_frames=config.num_frames,
            clips=staged,
            stop=means.stop,
            clock=self._means.clock,
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
                with self._means.clock.at("write"):
                    sink.put(shard, rows)
                self._see_others(progress)
        except torch.OutOfMemoryError as error:
            batch_frames = config.frames_per_batch(means.backbone.device.type)
            raise DeltatokError(
                f"the backbone ran out of memory with batches of {batch_frames} frames "
                f"of {config.frame_size} pixels: lower batch_frames and run again"
            ) from error
        assert next(staged, None) is None

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

    def _when_done(self, progress: Progress, taken: TakenShard, record: DoneRecord | None) -> None:
        self._work.give_back(taken, done=record is not None)
        if record is None:
            _LOGGER.warning("shard %06d: another process took it over", taken.shard)
            return
        self.num_done += 1
        self._tally.add(record)
        give_back_freed()
        progress.add_written(sum(file["bytes"] for file in record.files.values()))
        with disk_errors(self._out):
            append_timing(
                self._out,
                {
                    "shard": record.shard,
                    "windows": record.rows,
                    "seconds_so_far": {
                        k: round(v, 3) for k, v in self._means.clock.seconds.items()
                    },
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
        self._tally.check_certain(self._means.config.max_quarantined)
