"""Extraction and encoding as `deltatok-extract --engine ray` runs them.

what one process does before its loop -> Fleet.make -> what one process does after it
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ...extract.config import ExtractConfig
from ...extract.datasets.windows import Policy
from ...extract.int8_calibration import calibration_sample
from ...extract.progress import Progress
from ...extract.run import ExtractionSummary, begin, finish, note_done, progress_of
from ...extract.sources.clip import Clip
from ...extract.sources.select import clips_of
from ...shards.cache import read_cache_info
from ...shards.errors import UsageError
from ...shards.patches.reader import PatchShards
from ...shards.records import DoneRecord, read_done
from ...shards.running.interrupts import StopRequest
from ...shards.running.parts import Part
from ...shards.running.stopwatch import Stopwatch
from ...shards.stores.upload import out_folder
from ...train.config import TokenizeConfig
from ...train.encode import (
    begin_deltas,
    draws_for,
    draws_of,
    finish_deltas,
    shard_parts,
    with_folders,
)
from ..alive import SignOfLife
from .driver import Fleet, connected, node_resources
from .jobs import Encoding, Extraction
from .options import FleetOptions, Share, share_of
from .shard_server import Job

_LOGGER = logging.getLogger(__name__)


def extract_on_ray(
    config: ExtractConfig,
    options: FleetOptions,
    *,
    targets: tuple[Policy, Sequence[Clip]] | None = None,
) -> ExtractionSummary:
    """`run_extraction` by actors; with a VideosConfig that has a tokenizer, `run_fused`."""
    start_s = time.monotonic()
    part = _part_of_driver(config.shard_of)
    config = replace(config, out=str(out_folder(config.out).absolute()))
    policy: Policy = config.sampling_policy() if targets is None else targets[0]
    clips = clips_of(config) if targets is None else targets[1]
    needs_sample = config.dtype == "int8" or isinstance(config.pca, int)

    def job(share: Share) -> Job:
        return Extraction(
            config=replace(
                config,
                device="cuda" if share.gpus else "cpu",
                workers=config.workers or share.cpus,
            ),
            policy=policy,
            sample=calibration_sample(config, clips) if needs_sample else [],
        )

    stop, watch = StopRequest(time_limit_s=config.time_limit_s), Stopwatch()
    with _started(job, config.out, config.device, options, stop) as fleet:
        ledger, shards = begin(config, clips, part)
        if shards:
            with progress_of(ledger, part, shards, watch) as progress:

                def when_done(record: DoneRecord) -> None:
                    for clip in record.quarantined:
                        _LOGGER.warning(
                            "quarantined %s (%s): %s", clip.clip, clip.stage, clip.reason
                        )
                        progress.add_clip(0)
                    progress.add_clips(record.clips, num_frames=record.rows * config.num_frames)
                    note_done(config, record, ledger, progress, watch)

                fleet.make(
                    shards,
                    stop,
                    when_done=when_done,
                    when_spent=watch.add,
                    when_actors=progress.set_actors,
                )
        return finish(config, part, shards_done_now=len(shards), watch=watch, start_s=start_s)


def encode_on_ray(config: TokenizeConfig, options: FleetOptions) -> None:
    """`write_deltas` by actors."""
    mine = _part_of_driver(config.shard_of)
    config = with_folders(config)
    config = replace(config, out=str(Path(config.out).absolute()))
    draws = draws_for(PatchShards(config.patches), config, draws_of(config))

    def job(share: Share) -> Job:
        device: Literal["cuda", "cpu"] = "cuda" if share.gpus else "cpu"
        return Encoding(config=replace(config, device=device), draws=draws)

    stop, watch = StopRequest(), Stopwatch()
    with _started(job, config.out, config.device, options, stop) as fleet:
        out, work = Path(config.out), list(shard_parts(config.patches))
        begin_deltas(config, work)
        num_frames = read_cache_info(out).shape.num_frames
        left = {
            part.record.shard: [part]
            for part in work
            if part.record.shard in mine and read_done(out, part.record.shard) is None
        }
        num_clips = sum(part.record.clips for part in work if part.record.shard in mine)
        num_left = sum(part.record.clips for (part,) in left.values())
        if left:
            with Progress(watch, num_clips=num_clips, num_before=num_clips - num_left) as progress:

                def when_done(record: DoneRecord) -> None:
                    progress.add_clips(record.clips, num_frames=record.rows * num_frames)
                    progress.add_written(0 if record.file is None else record.file.bytes)

                fleet.make(
                    left,
                    stop,
                    when_done=when_done,
                    when_spent=watch.add,
                    when_actors=progress.set_actors,
                )
        finish_deltas(config, work, mine)


def _part_of_driver(shard_of: str | None) -> Part:
    part = Part.of_this_process(shard_of)
    if part.num_ranks > 1:
        raise UsageError(
            f"engine ray: started as one of {part.num_ranks} processes, wanted one: the actors are "
            "started by Ray; run the command once, without a launcher"
        )
    return part


@contextmanager
def _started(
    job: Callable[[Share], Job], out: str, device: str, options: FleetOptions, stop: StopRequest
) -> Iterator[Fleet]:
    """Actors, the first of which has begun the cache `out`; within, `stop` takes the signals."""
    with connected(options), stop:  # in this order: Ray takes SIGTERM for itself
        nodes = node_resources()
        share = share_of(nodes, options, device=device)
        with Fleet(job(share), Path(out), share, nodes) as fleet:
            _LOGGER.info(
                "%d actors of %g GPUs and %d CPUs on %d nodes",
                share.actors,
                share.gpus,
                share.cpus,
                sum(share.fits(node) > 0 for node in nodes),
            )
            with SignOfLife("waiting for the actors"):
                fleet.open(stop)
            yield fleet
