"""What the shards of a fleet are: clips to extract, or patch shards to encode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...extract.config import ExtractConfig
from ...extract.datasets.windows import Policy
from ...extract.decoding.clip import check_installed
from ...extract.decoding.pool import LOOK_AHEAD, choose_num_workers
from ...extract.run import RunContext, clips_per_shard, make_shards, open_run
from ...extract.shard_queue import ShardQueue
from ...extract.sources.clip import Clip
from ...shards.plan import Plan, shard_keys
from ...shards.records import DoneRecord
from ...shards.running.interrupts import StopRequest
from ...shards.sampling import UniformDraws
from ...train.config import TokenizeConfig
from ...train.encode import DeltaEncoder, ShardPart
from ..commands.extract import VideosConfig
from ..fused import DeltaShardWriter

HELD = 2
"""Shards that an actor holds: with one it waits for the next one after nearly every shard."""


@dataclass(kw_only=True)
class Extraction:
    """A `Job`: videos or a data set -> patch tokens; with a tokenizer -> delta tokens."""

    config: ExtractConfig
    policy: Policy
    sample: list[Clip]
    """What int8 is fitted on; of any other dtype nothing."""
    _run: RunContext = field(init=False)

    def open(self, stop: StopRequest) -> int:
        """Beside HELD shards, those that the decoding processes are ahead with."""
        config = self.config
        check_installed(config.decoder)
        writer = None
        if isinstance(config, VideosConfig) and config.tokenizer is not None:
            writer = DeltaShardWriter.from_config(config)
        self._run = open_run(config, self.policy, self.sample, stop=stop, writer=writer)
        return HELD + LOOK_AHEAD * choose_num_workers(config) // clips_per_shard(config)

    def make(self, queue: ShardQueue[Clip], when_done: Callable[[DoneRecord], None]) -> None:
        make_shards(self._run, queue, when_clip=lambda num_frames: None, when_done=when_done)

    def seconds(self) -> Mapping[str, float]:
        return dict(self._run.watch.seconds)

    def clip_keys(self, items: Sequence[Clip]) -> list[str]:
        return [clip.key for clip in items]


@dataclass(kw_only=True)
class Encoding:
    """A `Job`: patch shards -> delta shards. An item is the one patch shard of a delta shard."""

    config: TokenizeConfig
    draws: UniformDraws | None
    _stop: StopRequest = field(init=False)
    _encoder: DeltaEncoder = field(init=False)

    def open(self, stop: StopRequest) -> int:
        self._stop = stop
        self._encoder = DeltaEncoder.open(self.config, self.draws)
        self._encoder.begin_cache()
        return HELD

    def make(self, queue: ShardQueue[ShardPart], when_done: Callable[[DoneRecord], None]) -> None:
        for _, (part,) in queue.shards():
            self._stop.check()
            when_done(self._encoder.write_shard(part))

    def seconds(self) -> Mapping[str, float]:
        return dict(self._encoder.watch.seconds)

    def clip_keys(self, items: Sequence[ShardPart]) -> list[str]:
        record = items[0].record
        ((_, keys),) = Plan.open(self.config.patches).keys_of_shards((record.shard,))
        return shard_keys(keys, record.lost)
