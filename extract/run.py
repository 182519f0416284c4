"""run_extraction: videos in, a cache out, resumable after any kill, by any number of processes.

    find clips -> cache.json -> plan.jsonl -> black.npy -> for every shard without a done-record
    that no other process has a lease on:
    decode -> crop, resize, flip -> backbone -> convert -> write -> done-record
    -> quarantine.jsonl -> cache.json marked complete

making.py makes the shards, common.py what is around them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..shards.cache import open_cache, read_cache_info
from ..shards.files import remove_partials
from .backbone import Backbone, load_backbone
from .common import MAX_POLL_S, CommonFolder, Plan, check_sources
from .config import ExtractConfig, parse_shard_of
from .datasets.windows import EvaluationPolicy, Policy
from .decoding.clip import check_installed
from .identity import describe_patches
from .int8_calibration import patch_writer
from .leases import Leases
from .making import Means, Production
from .progress import StageClock
from .sampling import SamplingPolicy
from .sink import disk_errors
from .sources.clip import Clip
from .sources.select import clips_of
from .stop import stop_on_signals
from .tally import Tally
from .work import SharedWork
from .writer import ShardWriter

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

    def told(self) -> str:
        """One line for people: what is there, and what this run did."""
        now = f"{self.shards_done_now} of them now" if self.shards_done_now else "none to make"
        size = f"{self.bytes / 1e9:,.1f} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:,.1f} MB"
        return (
            f"{self.windows:,} windows ({self.frames:,} frames, {size}) "
            f"in {self.shards:,} shards, {now}; "
            f"{self.quarantined:,} of {self.clips:,} clips in quarantine; {self.seconds:,.0f} s"
        )


def run_extraction(
    config: ExtractConfig,
    *,
    backbone: Backbone | None = None,
    writer: ShardWriter | None = None,
    targets: tuple[EvaluationPolicy, Sequence[Clip]] | None = None,
) -> ExtractionSummary:
    """Makes the cache `config.out`, or goes on with it, until all its shards are done.

    Any number of processes may do so at once, on any number of machines that share the folder, and
    each returns when all is done; what a killed one had begun is made by another.

    backbone: instead of loading `config.backbone`. writer: what becomes of the features; by
    default they are stored whole, as a patch-token cache. targets: the windows to make, instead of
    those that `config` samples among its videos: those of an evaluation data set.

    Raises UsageError (2), TooManyQuarantined (3: all shards are written, or 100 clips and more
    are broken), CacheMismatch (4: `out` holds another cache), Stopped (75: by SIGTERM, SIGINT or
    the time limit) and DeltatokError (1: disk full, values that cannot be stored). Finished shards
    always stay.
    """
    start_s = time.monotonic()
    check_installed(config.decoder)
    policy: Policy = SamplingPolicy.from_config(config) if targets is None else targets[0]
    clips = clips_of(config) if targets is None else targets[1]
    with stop_on_signals(time_limit_s=config.time_limit_s) as stop:
        with stop.at_once():
            backbone = backbone or load_backbone(config)
            writer = writer or patch_writer(config, policy, backbone, clips)
            wanted = writer.describe(describe_patches(config, policy, backbone))
        open_cache(config.out, wanted)
        means = Means(
            config=config,
            policy=policy,
            backbone=backbone,
            writer=writer,
            clips={clip.key: clip for clip in clips},
            stop=stop,
            clock=StageClock(),
        )
        with Leases(Path(config.out), timeout_s=config.lease_timeout_s) as leases:
            return _run(means, leases, start_s=start_s)


def clips_per_shard(config: ExtractConfig) -> int:
    """How many whole clips make about `frames_per_shard` frames, at least one."""
    windows = config.num_windows if config.sampling == "windows" else UNIFORM_WINDOWS
    return max(1, config.frames_per_shard // (windows * config.num_frames))


def _run(means: Means, leases: Leases, *, start_s: float) -> ExtractionSummary:
    config, out = means.config, Path(means.config.out)
    poll_s = min(MAX_POLL_S, config.lease_timeout_s / 4)
    folder = CommonFolder(out, leases, means.stop, poll_s=poll_s)
    with disk_errors(out):
        plan, pending, tally = _open(means, folder)
        work = SharedWork(out, pending, leases)
    production = Production(means, folder, work, tally, num_shards=len(plan))
    if pending:
        production.run()
    with disk_errors(out):
        tally = folder.finish(num_frames=config.num_frames, changed=production.num_done > 0)
    summary = ExtractionSummary(
        **tally.counts(num_frames=config.num_frames),
        bytes=tally.size_bytes,
        shards_done_now=production.num_done,
        seconds=time.monotonic() - start_s,
        slowest_stage=means.clock.slowest(),
    )
    tally.check(config.max_quarantined)
    return summary


def _open(means: Means, folder: CommonFolder) -> tuple[Plan, Plan, Tally]:
    """The plan, the part of it that is to be made, and what is done."""
    config, out = means.config, Path(means.config.out)
    for writable in (out, out / "shards"):
        remove_partials(writable)
    plan = folder.plan(
        list(means.clips.values()),
        clips_per_shard=clips_per_shard(config),
        seed=config.seed,
        append=config.append,
        retry=config.retry_quarantined,
    )
    # Read before the done-records: then a shard that is missing from a complete cache is to be
    # made again, and was not finished by another process just now.
    complete = read_cache_info(out).complete
    tally = Tally.read(out, plan)
    part, parts = parse_shard_of(config.shard_of)
    pending = {
        shard: entries
        for shard, entries in plan.items()
        if shard % parts == part
        and (
            shard not in tally.shards
            or (config.retry_quarantined and tally.shards[shard].quarantined > 0)
        )
    }
    check_sources(out, pending, means.clips)
    if pending and complete:
        folder.reopen()
    return plan, pending, tally
