"""write_deltas: a patch-token cache and a tokenizer -> a delta-token cache.

One delta shard for each patch shard, the windows in the same order. Token 0 of a window is the
change from a black frame to its first frame, token t from frame t - 1 to t: open loop, each from
the true frames. A cache of training windows gives them as they are. A `uniform` cache holds the
frames of a clip at a fixed rate, cut into consecutive windows: they are joined again, and training
windows are drawn among them.

Letters: n windows, T frames of a window to write, N patches, D channels.
"""

import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..shards.cache import (
    DELTAS,
    CacheInfo,
    CacheShape,
    finish_cache,
    open_cache,
    read_cache_info,
    reopen_cache,
)
from ..shards.deltas.writer import write_delta_shard
from ..shards.errors import CacheMismatch, Stopped, UsageError
from ..shards.files import remove_partials
from ..shards.patches.reader import PatchShards
from ..shards.plan import PLAN, Plan, begins, copied_plan, remove_strangers
from ..shards.records import (
    DoneRecord,
    append_timing,
    done_shards,
    iterate_done,
    read_done,
    remove_done,
)
from ..shards.running.devices import memory_errors, precision_name
from ..shards.running.interrupts import StopRequest
from ..shards.running.parts import Part
from ..shards.running.stopwatch import Stopwatch
from ..shards.sampling import UniformDraws
from ..shards.schema import plain
from ..shards.stores.mirror import fetch_records, local_folder
from ..shards.stores.upload import out_folder, take_records
from ..shards.windows import ShardRows
from .config import DRAWN_FRAMES, DRAWN_WINDOWS, TokenizeConfig
from .data.batches import Prefetcher
from .data.order import Indices
from .engine.devices import Accelerator, make_accelerator
from .engine.logs import Meter
from .engine.model_folder import (
    check_trained_on,
    weights_sha256,
)
from .models.deltatok import DeltaTok


class ShardPart(NamedTuple):
    """One patch shard: its done-record and where it lies in PatchShards."""

    record: DoneRecord
    windows: Indices
    first_key: int

    def keys(self, patches: PatchShards) -> list[str]:
        """Of its clips that have windows."""
        return patches.keys[self.first_key : self.first_key + self.record.clips]


class FramePicks(NamedTuple):
    """Where the frames of n windows lie in a patch cache."""

    window: Indices
    """int64 (n, T): the stored window of every frame."""
    frame: Indices
    """int64 (n, T): its place in that window."""
    clip: NDArray[np.int32]
    """int32 (n,), index into the shard's keys."""


def shard_parts(folder: str) -> Iterator[ShardPart]:
    """The finished shards of a patch cache, those without windows too."""
    window = key = 0
    for record in iterate_done(folder):
        yield ShardPart(record, np.arange(window, window + record.rows), key)
        if record.rows:
            window += record.rows
            key += record.clips


def stored_windows(patches: PatchShards, part: ShardPart) -> FramePicks:
    """The shard's windows as they are stored, in the same order."""
    frames = np.arange(patches.shape[0], dtype=np.int64)
    window, frame = np.broadcast_arrays(part.windows[:, None], frames)
    clip = patches.clip_index[part.windows] - part.first_key
    return FramePicks(window, frame, clip.astype(np.int32))


def drawn_windows(patches: PatchShards, part: ShardPart, draws: UniformDraws) -> FramePicks:
    """`draws.num_windows` windows of every clip of the shard, clip after clip, drawn among all
    frames that are stored of the clip, whatever windows they are stored in."""
    table = patches.table()
    clips = patches.clip_index[part.windows] - part.first_key
    picked_windows = [np.empty((0, draws.num_frames), dtype=np.int64)]
    picked_frames = [np.empty((0, draws.num_frames), dtype=np.int64)]
    for clip, key in enumerate(part.keys(patches)):
        own = part.windows[clips == clip]
        # A slow clip repeats frames, and windows may overlap: every shown frame counts once.
        _, first = np.unique(table.frame_index[own], return_index=True)
        times = table.timestamps_s[own].reshape(-1)[first].astype(np.float64)
        window, frame = own[first // patches.shape[0]], first % patches.shape[0]
        rows = draws.rows(key, times - times[0])
        picked_windows.append(window[rows])
        picked_frames.append(frame[rows].astype(np.int64))
    return FramePicks(
        window=np.concatenate(picked_windows),
        frame=np.concatenate(picked_frames),
        clip=np.repeat(np.arange(part.record.clips), draws.num_windows).astype(np.int32),
    )


def read_tokens(patches: PatchShards, window: Indices, frame: Indices) -> NDArray[np.float32]:
    """Patch tokens float32 (n, T, N, D) of picked frames: window, frame int64 (n, T)."""
    if (window == window[:, :1]).all() and (frame == np.arange(patches.shape[0])).all():
        return patches.tokens(window[:, 0])
    tokens = np.empty((*window.shape, *patches.shape[1:]), dtype=np.float32)
    # Window by window: one of 8 frames at gaps of up to 1/3 s touches few stored windows.
    for row, windows, frames in zip(tokens, window, frame, strict=True):
        stored, place = np.unique(windows, return_inverse=True)
        row[...] = patches.tokens(stored)[place, frames]
    return tokens


logger = logging.getLogger(__name__)


def check_tokenizer(model: DeltaTok, folder: str, patches: CacheInfo) -> None:
    """CacheMismatch, naming the field, unless the tokenizer was trained on this kind of tokens.

    patches: the cache.json of the patch tokens that it is about to encode.
    """
    check_trained_on(folder, patches, what=f"tokenizer {folder}")
    size = patches.shape.hidden_size
    if model.config.hidden_size != size:
        raise CacheMismatch(
            f"{folder}: hidden_size is {model.config.hidden_size}, the patch tokens have {size} "
            "channels: use a tokenizer that was trained for this backbone, or another cache"
        )


def describe_deltas(
    model: DeltaTok,
    patches: CacheInfo,
    *,
    autocast_dtype: str,
    parent_fingerprint: str | None,
    draws: UniformDraws | None = None,
) -> CacheInfo:
    """cache.json of the delta tokens of these patch tokens under this tokenizer.

    parent_fingerprint: that of the patch cache, also where its tokens were never stored.
    draws: how windows were drawn among its frames, None where they are its own windows.
    """
    identity: dict[str, Any] = {  # all that determines delta tokens
        "patches": patches.identity,
        "tokenizer": {
            "config": plain(asdict(model.config)),
            "weights_sha256": weights_sha256(model),
        },
        "storage": {"dtype": "float16"},
        "autocast_dtype": autocast_dtype,
    }
    if draws is not None:
        identity["sampling"] = draws.identity()
    shape = patches.shape
    return CacheInfo(
        format=DELTAS,
        identity=identity,
        shape=CacheShape(
            num_frames=shape.num_frames if draws is None else draws.num_frames,
            num_tokens=None,
            grid=None,
            hidden_size=shape.hidden_size,
        ),
        parent_fingerprint=parent_fingerprint,
        backbone=patches.backbone,
        licence=patches.licence,
        software={
            **{name: version(name) for name in ("deltatok", "numpy")},
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def draws_of(config: TokenizeConfig) -> UniformDraws:
    """What the flags ask for, or their defaults."""
    return UniformDraws(
        num_windows=DRAWN_WINDOWS if config.num_windows is None else config.num_windows,
        num_frames=DRAWN_FRAMES if config.num_frames is None else config.num_frames,
        seed=config.seed or 0,
    )


def write_deltas(config: TokenizeConfig, *, draws: UniformDraws | None = None) -> CacheInfo:
    """Write the delta-token cache, or what is missing of it; gives its cache.json.

    A patch cache that was appended to gives new shards to its delta cache; nothing old is touched.
    Ranks, and runs with different `config.shard_of`, make different shards; whoever finds all done
    closes the cache. draws: how windows are drawn among the frames of a `uniform` cache;
    not used for any other. Raises CacheMismatch, naming the field, where the tokenizer was trained
    on tokens of another kind, or config.out holds another cache; UsageError for draws that the
    cache has no use for, or needs; Stopped after a SIGTERM or Ctrl-C.
    """
    config = with_folders(config)
    process = Part.of_this_process(config.shard_of)
    encoder, out = DeltaEncoder.open(config, draws), Path(config.out)
    accelerator = encoder.accelerator
    work = list(shard_parts(config.patches))
    if accelerator.is_main_process:
        encoder.begin_cache()
        begin_deltas(config, work)
    accelerator.wait_for_everyone()
    mine = [part for part in work if part.record.shard in process]
    with (
        tqdm(
            total=sum(num_windows_of(part, encoder.draws) for part in mine),
            unit="window",
            disable=None,
        ) as progress,
        StopRequest() as stop,
    ):
        for part in mine:
            shard = part.record.shard
            if read_done(out, shard) is None:
                if stop.asked:
                    raise Stopped(f"stopped before shard {shard:06d}: run again to go on")
                encoder.write_shard(part)
            progress.update(num_windows_of(part, encoder.draws))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_deltas(config, work, process)
    accelerator.wait_for_everyone()
    return read_cache_info(out)


def with_folders(config: TokenizeConfig) -> TokenizeConfig:
    """`config` with caches at addresses as the folders in which they are read and made."""
    patches, out = local_folder(config.patches), out_folder(config.out)
    fetch_records(patches, read_cache_info(patches).counts.get("shards", 0))
    return replace(config, patches=str(patches), out=str(out))


def num_windows_of(part: ShardPart, draws: UniformDraws | None) -> int:
    """How many windows the delta shard of this patch shard has."""
    return part.record.rows if draws is None else part.record.clips * draws.num_windows


def begin_deltas(config: TokenizeConfig, work: Sequence[ShardPart]) -> None:
    """Makes the begun cache ready for the shards of `work`: the plan, nothing left over."""
    out = Path(config.out)
    _follow_plan(out, Plan.open(config.patches))
    remove_partials(out)
    remove_partials(out / "shards")
    _forget_outdated(out, work)


def finish_deltas(config: TokenizeConfig, work: Sequence[ShardPart], process: Part) -> None:
    """Closes the cache if all its shards are done; else says who is to make the others than
    `process`."""
    out = Path(config.out)
    take_records(out)
    done = set(done_shards(out))
    missing = [part.record.shard for part in work if part.record.shard not in done]
    if missing:
        makers = process.elsewhere(missing)
        logger.info("%s: %d of %d shards are left to %s", out, len(missing), len(work), makers)
        return
    if not read_cache_info(out).complete:
        remove_strangers(out)
        finish_cache(out)
    logger.info("%d windows of delta tokens are in %s", read_cache_info(out).counts["windows"], out)


def _follow_plan(out: Path, plan: Plan) -> None:
    """Makes `plan`, of the patch cache, that of the delta cache; one that is there may be its
    beginning, or that of before clips were tried again."""
    if (out / PLAN).exists():
        stored = Plan.open(out)
        if stored == plan:
            return
        begins(stored, plan, may_be_mended=True)
        reopen_cache(out)  # first: a finished cache.json tells the hash of its plan
    copied_plan(plan, out).commit()


def _forget_outdated(out: Path, work: Sequence[ShardPart]) -> None:
    """Has delta shards made again whose patch shard was made again since, with clips that were in
    quarantine before."""
    for part in work:
        shard = part.record.shard
        done = read_done(out, shard)
        if done is not None and done.keys_sha256 != part.record.keys_sha256:
            if read_cache_info(out).complete:
                reopen_cache(out)
            logger.info("shard %06d of the patches has other clips now: encoding it again", shard)
            remove_done(out, shard)


@dataclass(frozen=True)
class DeltaEncoder:
    """A tokenizer on its device, and the patch tokens it encodes."""

    model: DeltaTok
    patches: PatchShards
    config: TokenizeConfig
    accelerator: Accelerator
    draws: UniformDraws | None
    """None where the windows are those that are stored."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """read, encode, write."""

    @classmethod
    def open(cls, config: TokenizeConfig, draws: UniformDraws | None) -> "DeltaEncoder":
        """Raises what write_deltas does."""
        patches = PatchShards(config.patches)
        draws = draws_for(patches, config, draws)
        accelerator = make_accelerator(config.device, config.autocast)
        model = DeltaTok.from_pretrained(config.tokenizer)
        check_tokenizer(model, config.tokenizer, patches.info)
        return cls(model.to(accelerator.device), patches, config, accelerator, draws)

    def begin_cache(self) -> None:
        """Writes cache.json, or checks that the one there is for the same tokens."""
        info = describe_deltas(
            self.model,
            self.patches.info,
            autocast_dtype=precision_name(self.config.autocast, self.accelerator.device),
            parent_fingerprint=self.patches.fingerprint,
            draws=self.draws,
        )
        open_cache(self.config.out, info)

    def write_shard(self, part: ShardPart) -> DoneRecord:
        """Encodes and writes the delta shard of one patch shard."""
        out, shard = Path(self.config.out), part.record.shard
        meter = Meter("windows", self.accelerator.device)
        advice = f"lower batch_windows, now {self.config.batch_windows}"
        with memory_errors("encoding", lambda: advice):
            rows = self.rows(part, meter)
        with self.watch.at("write"):
            # Stored windows are permuted already, drawn ones come clip by clip.
            seed = None if self.draws is None else self.config.seed or 0
            record = write_delta_shard(out, shard, rows, seed=seed)
        append_timing(out, {"shard": shard, **meter.report()})
        return record

    def rows(self, part: ShardPart, meter: Meter) -> ShardRows:
        """The rows of the delta shard of one patch shard."""
        if self.draws is None:
            picks = stored_windows(self.patches, part)
        else:
            picks = drawn_windows(self.patches, part, self.draws)
        table, keys = self.patches.table(), part.keys(self.patches)
        return ShardRows(
            tokens=self._encode(picks, meter),
            timestamps_s=table.timestamps_s[picks.window, picks.frame],
            frame_index=table.frame_index[picks.window, picks.frame],
            crop=table.crop[picks.window[:, 0]],
            flipped=table.flipped[picks.window[:, 0]],
            clip=picks.clip,
            keys=keys,
            decoders=part.record.decoders(keys),
            quarantined=part.record.quarantined,
        ).from_first_frame()

    @torch.no_grad()
    def _encode(self, picks: FramePicks, meter: Meter) -> np.ndarray[Any, np.dtype[np.float16]]:
        """Delta tokens float16 (n, T, D). Every batch has the same shape, the last one filled up
        with its last window, so that a number does not depend on how many windows a shard has."""
        size, count = self.config.batch_windows, len(picks.clip)
        filled = np.empty((*picks.window.shape, self.patches.shape[2]), dtype=np.float16)
        starts = range(0, count, size)
        black = torch.tensor(self.patches.black).to(self.accelerator.device)

        def read(batch: int) -> Tensor:
            chosen = np.arange(starts[batch], starts[batch] + size).clip(max=count - 1)
            tokens = read_tokens(self.patches, picks.window[chosen], picks.frame[chosen])
            return torch.from_numpy(tokens)

        with Prefetcher(read, start=0, stop=len(starts)) as batches:
            for start in starts:
                with meter.waiting("loader_wait"), self.watch.at("read"):
                    x = batches.next().to(self.accelerator.device)
                part = filled[start : start + size]
                with self.watch.at("encode"):
                    with self.accelerator.autocast():
                        z = self.model.encode_sequence(x, black, grid=self.patches.grid)
                    part[...] = z.half().cpu().numpy()[: len(part)]
                meter.count(len(part))
        return filled


def draws_for(
    patches: PatchShards, config: TokenizeConfig, draws: UniformDraws | None
) -> UniformDraws | None:
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
