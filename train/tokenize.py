"""write_deltas: a patch-token cache and a tokenizer -> a delta-token cache.

One delta shard for each patch shard, the windows in the same order; from a `uniform` cache training
windows are drawn among the stored frames (frame_picks.py). Token 0 of a window is the
change from a black frame to its first frame, token t from frame t - 1 to t: open loop, each from
the true frames. Used by `deltatok-extract --patches --tokenizer` and at the end of tokenizer.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..shards.cache import (
    CacheInfo,
    finish_cache,
    open_cache,
    read_cache_info,
    reopen_cache,
)
from ..shards.delta_writer import DeltaRows, write_delta_shard
from ..shards.errors import Stopped, UsageError
from ..shards.files import remove, remove_partials
from ..shards.interrupts import StopRequest
from ..shards.patches import PatchShards
from ..shards.plan import continue_plan, is_begun, read_plan, write_plan
from ..shards.records import append_timing, read_done, shard_path, write_quarantine
from .config import TokenizeConfig
from .delta_identity import check_tokenizer, describe_deltas
from .devices import Accelerator, make_accelerator, precision_name
from .frame_picks import (
    FramePicks,
    ShardPart,
    WindowDraws,
    drawn_windows,
    read_tokens,
    shard_parts,
    stored_windows,
)
from .logs import Meter
from .models.deltatok import DeltaTok
from .prefetch import Prefetcher

logger = logging.getLogger(__name__)


def write_deltas(config: TokenizeConfig, *, draws: WindowDraws | None = None) -> CacheInfo:
    """Write the delta-token cache, or what is missing of it; gives its cache.json.

    A patch cache that was appended to gives new shards to its delta cache; nothing old is touched.
    Ranks share the shards. draws: how windows are drawn among the frames of a `uniform` cache;
    not used for any other. Raises CacheMismatch, naming the field, where the tokenizer was trained
    on tokens of another kind, or config.out holds another cache; UsageError for draws that the
    cache has no use for, or needs; Stopped after a SIGTERM or Ctrl-C.
    """
    patches, out = PatchShards(config.patches), Path(config.out)
    draws = _draws_for(patches, config, draws)
    accelerator = make_accelerator(config.device, config.autocast)
    model = DeltaTok.from_pretrained(config.tokenizer)
    check_tokenizer(model, config.tokenizer, patches.info)
    info = describe_deltas(
        model,
        patches.info,
        autocast_dtype=precision_name(config.autocast, accelerator.device),
        parent_fingerprint=patches.fingerprint,
        draws=draws,
    )
    plan, work = read_plan(config.patches), list(shard_parts(config.patches))
    if accelerator.is_main_process:
        open_cache(out, info)
        if is_begun(out, plan):
            reopen_cache(out)  # first: a finished cache.json tells the hash of its plan
            continue_plan(out, plan)
        write_plan(out, plan)
        remove_partials(out)
        remove_partials(out / "shards")
        _forget_outdated(out, work)
    accelerator.wait_for_everyone()
    encoder = _Encoder(model.to(accelerator.device), patches, config, accelerator, draws)
    mine = work[accelerator.process_index :: accelerator.num_processes]
    with (
        tqdm(total=sum(map(encoder.num_windows, mine)), unit="window", disable=None) as progress,
        StopRequest() as stop,
    ):
        for part in mine:
            shard = part.record.shard
            if read_done(out, shard) is None:
                if stop.asked:
                    raise Stopped(f"stopped before shard {shard:06d}: run again to go on")
                meter = Meter("windows", accelerator.device)
                write_delta_shard(
                    out,
                    shard,
                    encoder.rows(part, meter),
                    # Stored windows are permuted already, drawn ones come clip by clip.
                    seed=None if draws is None else config.seed or 0,
                    decoders=part.record.decoders,
                    quarantined=part.record.quarantined,
                )
                append_timing(out, {"shard": shard, **meter.report()})
            progress.update(encoder.num_windows(part))
    accelerator.wait_for_everyone()
    num_windows = sum(map(encoder.num_windows, work))
    if accelerator.is_main_process and not read_cache_info(out).complete:
        quarantined = write_quarantine(out)
        finish_cache(
            out,
            {
                "clips": len(plan),
                "quarantined": len(quarantined),
                "windows": num_windows,
                "frames": num_windows * info.shape.num_frames,
                "shards": len(work),
            },
        )
    accelerator.wait_for_everyone()
    logger.info("%d windows of delta tokens are in %s", num_windows, out)
    return read_cache_info(out)


def _forget_outdated(out: Path, work: Sequence[ShardPart]) -> None:
    """Has delta shards made again whose patch shard was made again since, with clips that were in
    quarantine before."""
    made = {part.record.shard: read_done(out, part.record.shard) for part in work}
    outdated = [
        part.record.shard
        for part in work
        if (done := made[part.record.shard]) is not None and set(done.keys) != set(part.record.keys)
    ]
    if outdated and read_cache_info(out).complete:
        reopen_cache(out)
    for shard in outdated:
        logger.info("shard %06d of the patches has other clips now: encoding it again", shard)
        remove(shard_path(out, shard, ".json"))


@dataclass(frozen=True)
class _Encoder:
    model: DeltaTok
    patches: PatchShards
    config: TokenizeConfig
    accelerator: Accelerator
    draws: WindowDraws | None

    def num_windows(self, part: ShardPart) -> int:
        """How many windows the delta shard of this patch shard has."""
        if self.draws is None:
            return part.record.rows
        return len(part.record.keys) * self.draws.num_windows

    def rows(self, part: ShardPart, meter: Meter) -> DeltaRows:
        """What write_delta_shard takes for one patch shard."""
        if self.draws is None:
            picks = stored_windows(self.patches, part)
        else:
            picks = drawn_windows(self.patches, part, self.draws)
        table = self.patches.table()
        times = table.timestamps_s[picks.window, picks.frame]
        return DeltaRows(
            tokens=self._encode(picks, meter),
            timestamps_s=times - times[:, :1],
            frame_index=table.frame_index[picks.window, picks.frame],
            crop=table.crop[picks.window[:, 0]],
            flipped=table.flipped[picks.window[:, 0]],
            clip=picks.clip,
            keys=part.record.keys,
        )

    @torch.no_grad()
    def _encode(self, picks: FramePicks, meter: Meter) -> np.ndarray[Any, np.dtype[np.float16]]:
        """Delta tokens float16 (n, T, D). Every batch has the same shape, the last one filled up
        with its last window, so that a number does not depend on how many windows a shard has."""
        size = self.config.batch_windows
        filled = np.empty((*picks.window.shape, self.patches.shape[2]), dtype=np.float16)
        starts = range(0, len(picks), size)
        black = torch.tensor(self.patches.black).to(self.accelerator.device)

        def read(batch: int) -> Tensor:
            chosen = np.arange(starts[batch], starts[batch] + size).clip(max=len(picks) - 1)
            return torch.from_numpy(read_tokens(self.patches, picks.take(chosen)))

        with Prefetcher(read, start=0, stop=len(starts)) as batches:
            for start in starts:
                with meter.waiting("loader_wait"):
                    x = batches.next().to(self.accelerator.device)
                with self.accelerator.autocast():
                    z = self.model.encode_sequence(x, black, grid=self.patches.grid)
                part = filled[start : start + size]
                part[...] = z.half().cpu().numpy()[: len(part)]
                meter.count(len(part))
        return filled


def _draws_for(
    patches: PatchShards, config: TokenizeConfig, draws: WindowDraws | None
) -> WindowDraws | None:
    """`draws` for a uniform cache, None for any other."""
    policy = patches.info.identity.get("sampling", {}).get("policy")
    if policy == "uniform":
        if draws is None:
            raise UsageError(
                f"{config.patches}: holds frames at a fixed rate, training windows have to be "
                "drawn among them: use deltatok-extract --patches --tokenizer, or give `draws`"
            )
        return draws
    for name in ("num_windows", "num_frames", "seed"):
        value = getattr(config, name)
        if value is not None:
            raise UsageError(
                f"{name}: got {value}, but the windows of {config.patches} are drawn already "
                f"(sampling.policy {policy!r}, wanted 'uniform'): leave it out"
            )
    return None
