"""write_deltas: a patch-token cache and a tokenizer -> a delta-token cache.

One delta shard for each patch shard, the windows in the same order. Token 0 of a window is the
change from a black frame to its first frame, token t from frame t - 1 to t: open loop, each from
the true frames. Used by `deltatok-extract --patches --tokenizer` and at the end of tokenizer.py.
"""

import logging
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..shards.cache import (
    DELTAS,
    CacheInfo,
    CacheShape,
    compare,
    finish_cache,
    open_cache,
    read_cache_info,
)
from ..shards.delta_writer import DeltaRows, write_delta_shard
from ..shards.errors import CacheMismatch, Stopped
from ..shards.files import remove_partials
from ..shards.patches import PatchShards
from ..shards.plan import read_plan, write_plan
from ..shards.records import (
    DoneRecord,
    append_timing,
    read_all_done,
    read_done,
    write_quarantine,
)
from .config import TokenizeConfig
from .devices import Accelerator, make_accelerator, precision_name
from .logs import Meter
from .models.deltatok import DeltaTok
from .order import Indices
from .prefetch import Prefetcher
from .pretrained import read_provenance, weights_sha256
from .run_folder import plain
from .stop import StopSignal

SAME_FOR_BOTH = (
    "backbone",
    "preprocessing.patch_size",
    "preprocessing.image_mean",
    "preprocessing.image_std",
)
"""What the tokenizer's own training cache and the cache to tokenize must agree in; not the frame
size: a tokenizer may be used at another one."""

logger = logging.getLogger(__name__)


def write_deltas(config: TokenizeConfig) -> CacheInfo:
    """Write the delta-token cache, or what is missing of it; gives its cache.json.

    Ranks share the shards. Raises CacheMismatch, naming the field, where the tokenizer was trained
    on tokens of another kind, or config.out holds another cache; Stopped after a SIGTERM.
    """
    patches, out = PatchShards(config.patches), Path(config.out)
    accelerator = make_accelerator(config.device, config.autocast)
    model = DeltaTok.from_pretrained(config.tokenizer)
    check_tokenizer(model, config.tokenizer, patches.info)
    info = describe_deltas(
        model,
        patches.info,
        autocast_dtype=precision_name(config.autocast, accelerator.device),
        parent_fingerprint=patches.fingerprint,
    )
    plan = read_plan(config.patches)
    if accelerator.is_main_process:
        open_cache(out, info)
        write_plan(out, plan)
        remove_partials(out)
        remove_partials(out / "shards")
    accelerator.wait_for_everyone()
    encoder = _Encoder(model.to(accelerator.device), patches, config, accelerator)
    work = list(_shards_of(config.patches))
    mine = work[accelerator.process_index :: accelerator.num_processes]
    with (
        tqdm(
            total=sum(len(part.windows) for part in mine), unit="window", disable=None
        ) as progress,
        StopSignal() as stop,
    ):
        for part in mine:
            shard = part.record.shard
            if read_done(out, shard) is None:
                if stop.requested:
                    raise Stopped(f"stopped before shard {shard:06d}: run again to go on")
                meter = Meter("windows", accelerator.device)
                write_delta_shard(
                    out,
                    shard,
                    encoder.rows(part, meter),
                    decoders=part.record.decoders,
                    quarantined=part.record.quarantined,
                )
                append_timing(out, {"shard": shard, **meter.report()})
            progress.update(len(part.windows))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not read_cache_info(out).complete:
        quarantined = write_quarantine(out)
        finish_cache(
            out,
            {
                "clips": len(plan),
                "quarantined": len(quarantined),
                "windows": patches.num_windows,
                "frames": patches.num_windows * patches.shape[0],
                "shards": len(work),
            },
        )
    accelerator.wait_for_everyone()
    logger.info("%d windows of delta tokens are in %s", patches.num_windows, out)
    return read_cache_info(out)


def check_tokenizer(model: DeltaTok, folder: str, patches: CacheInfo) -> None:
    """CacheMismatch, naming the field, unless the tokenizer was trained on this kind of tokens.

    patches: the cache.json of the patch tokens that it is about to encode.
    """
    size = patches.shape.hidden_size
    if model.config.hidden_size != size:
        raise CacheMismatch(
            f"{folder}: hidden_size is {model.config.hidden_size}, the patch tokens have {size} "
            "channels: use a tokenizer that was trained for this backbone, or another cache"
        )
    trained_on = read_provenance(folder).get("patches")
    if not isinstance(trained_on, dict):
        logger.warning("%s does not say what it was trained on: only its size was checked", folder)
        return
    compare(
        patches.identity,
        trained_on,
        what_got="the patch tokens",
        what_wanted=f"those that {folder} was trained on",
        fields=SAME_FOR_BOTH,
    )


def describe_deltas(
    model: DeltaTok, patches: CacheInfo, *, autocast_dtype: str, parent_fingerprint: str | None
) -> CacheInfo:
    """cache.json of the delta tokens of these patch tokens under this tokenizer.

    parent_fingerprint: that of the patch cache, None where its tokens were never stored.
    """
    shape = patches.shape
    return CacheInfo(
        format=DELTAS,
        identity=deltas_identity(model, patches.identity, autocast_dtype=autocast_dtype),
        shape=CacheShape(
            num_frames=shape.num_frames,
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


def deltas_identity(
    model: DeltaTok, patches: dict[str, Any], *, autocast_dtype: str
) -> dict[str, Any]:
    """All that determines delta tokens: the patch tokens' identity and the tokenizer."""
    return {
        "patches": patches,
        "tokenizer": {
            "config": plain(asdict(model.config)),
            "weights_sha256": weights_sha256(model),
        },
        "storage": {"dtype": "float16"},
        "autocast_dtype": autocast_dtype,
    }


@dataclass(frozen=True)
class _Encoder:
    model: DeltaTok
    patches: PatchShards
    config: TokenizeConfig
    accelerator: Accelerator

    def rows(self, part: "_ShardPart", meter: Meter) -> DeltaRows:
        """What write_delta_shard takes for one patch shard."""
        windows, patches = part.windows, self.patches
        times = patches.timestamps_s(windows)
        return DeltaRows(
            tokens=self._encode(windows, meter),
            timestamps_s=times - times[:, :1],
            frame_index=patches.frame_index(windows),
            crop=patches.crop[windows],
            flipped=patches.flipped[windows],
            clip=(patches.clip_index[windows] - part.first_key).astype(np.int32),
            keys=part.record.keys,
        )

    @torch.no_grad()
    def _encode(self, windows: Indices, meter: Meter) -> np.ndarray[Any, np.dtype[np.float16]]:
        """Delta tokens float16 (n, T, D). Every batch has the same shape, the last one filled up
        with its last window, so that a number does not depend on how many windows a shard has."""
        size = self.config.batch_windows
        num_frames, _, channels = self.patches.shape
        filled = np.empty((len(windows), num_frames, channels), dtype=np.float16)
        starts = range(0, len(windows), size)
        black = torch.tensor(self.patches.black).to(self.accelerator.device)

        def read(batch: int) -> Tensor:
            chosen = windows[starts[batch] : starts[batch] + size]
            padded = np.pad(chosen, (0, size - len(chosen)), mode="edge")
            return torch.from_numpy(self.patches.tokens(padded))

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


@dataclass(frozen=True)
class _ShardPart:
    """One patch shard: its done-record and where it lies in PatchShards."""

    record: DoneRecord
    windows: Indices
    first_key: int


def _shards_of(folder: str) -> Iterator[_ShardPart]:
    window = key = 0
    for record in read_all_done(folder):
        numbers = np.arange(window, window + record.rows, dtype=np.int64)
        yield _ShardPart(record, numbers, key)
        if record.rows:
            window += record.rows
            key += len(record.keys)
