"""The writer of a patch-token extraction; for int8, the channel scales it writes with.

The scales are fitted once, before the cache.json that names their hash: one window of each of up to
SAMPLE_CLIPS clips goes through the backbone, in an order decided by the seed and the keys alone.
channel_scale.npy is created exclusively, and what stands there is used: a run that is resumed, that
joins others or that began with them, on whatever device, has the same scales.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..shards.cache import CHANNEL_SCALE, PATCHES, PCA, read_cache_info
from ..shards.errors import DeltatokError, TooManyQuarantined, UsageError
from ..shards.files import is_partial
from ..shards.patches.int8 import (
    SAMPLE_CLIPS,
    agree_on_channel_scale,
    channel_scale_of,
    read_agreed_scale,
    read_channel_scale,
    sample_order,
)
from ..shards.records import Quarantined
from ..shards.stores.upload import UPLOAD
from .backbone import Backbone
from .config import ExtractConfig
from .datasets.windows import Policy, one_window_a_clip
from .decoding.pool import DecodePool
from .features import WindowFeatures
from .pixels import window_pixels
from .shard_writer import PatchShardWriter
from .sources.clip import Clip

_LOGGER = logging.getLogger(__name__)

MAX_TRIED = 4 * SAMPLE_CLIPS
"""Clips looked at to find as many that can be decoded."""


def patch_writer(
    config: ExtractConfig, policy: Policy, backbone: Backbone, clips: Sequence[Clip]
) -> PatchShardWriter:
    """What stores the patch tokens as `config` says.

    int8: with the scales of the cache `config.out`, or with freshly fitted ones if it has none.
    Raises CacheMismatch or DamagedShard for another kind of cache or changed scales,
    TooManyQuarantined if no clip of the sample can be decoded.
    """
    writer = PatchShardWriter(dtype=config.dtype, seed=config.seed, compression=config.compression)
    if config.dtype != "int8":
        return writer
    out = Path(config.out)
    scale = stored_channel_scale(out, hidden_size=backbone.hidden_size)
    if scale is None and _is_something_else(out):
        return writer  # refused when the cache is opened, with the field that differs
    if scale is None:
        scale = fit_channel_scale(config, policy, backbone, clips)
        if not (out / "cache.json").is_file():
            try:
                out.mkdir(parents=True, exist_ok=True)
                scale = agree_on_channel_scale(out, scale)
            except OSError as error:
                raise UsageError(
                    f"{out}: cannot be written ({error.strerror or error}): give another folder"
                ) from error
        else:  # it names the hash: others began meanwhile, or somebody deleted the scales
            stored = stored_channel_scale(out, hidden_size=backbone.hidden_size)
            scale = scale if stored is None else stored
    return replace(writer, channel_scale=scale)


def stored_channel_scale(folder: Path, *, hidden_size: int) -> NDArray[np.float32] | None:
    """The scales of the int8 cache in `folder`, or of one about to be begun there, float32 (D,);
    None where there are none yet."""
    if not (folder / CHANNEL_SCALE).is_file():
        return None
    if not (folder / "cache.json").is_file():
        other = _is_something_else(folder)
        return None if other else read_agreed_scale(folder, hidden_size=hidden_size)
    return read_channel_scale(folder, read_cache_info(folder, format=PATCHES))


def calibration_sample(config: ExtractConfig, clips: Sequence[Clip]) -> list[Clip]:
    """The clips that are tried, in this order; of this sample it is the sample itself."""
    return sorted(clips, key=lambda clip: sample_order(config.seed, clip.key))[:MAX_TRIED]


def fit_channel_scale(
    config: ExtractConfig, policy: Policy, backbone: Backbone, clips: Sequence[Clip]
) -> NDArray[np.float32]:
    """The scale of every channel, float32 (D,), from a sample of the clips.

    Raises TooManyQuarantined if none of them can be decoded, DeltatokError for values that are not
    finite.
    """
    sample = calibration_sample(config, clips)
    wanted = min(SAMPLE_CLIPS, len(sample))
    _LOGGER.info("int8: fitting the channel scales on one window of each of %d clips", wanted)
    features = WindowFeatures(backbone, _MeanSquares(), config)
    keys: list[str] = []
    refused: list[Quarantined] = []
    with DecodePool.from_config(config, one_window_a_clip(policy)) as pool:
        for clip in pool.decode(sample):
            if isinstance(clip, Quarantined):
                refused.append(clip)
                continue
            window, size = clip.windows[len(clip.windows) // 2], config.frame_size
            frames = clip.frames_of(window)
            features.add(window_pixels(frames, window, frame_size=size, device=backbone.device))
            keys.append(clip.key)
            if len(keys) == wanted:
                break
    if not keys:
        raise TooManyQuarantined(
            f"int8: none of the {len(refused)} clips that were tried to fit the channel scales "
            f"gives a window, first {refused[0].clip!r}: {refused[0].reason}: check the videos"
        )
    mean_squares: NDArray[np.float64] = features.finish()
    for key, row in zip(keys, mean_squares, strict=True):
        if not np.isfinite(row).all():
            raise DeltatokError(
                f"clip {key!r}: {int(np.count_nonzero(~np.isfinite(row)))} of {len(row)} channels "
                "have values that are not finite: run the backbone in float32"
            )
    return channel_scale_of(mean_squares.mean(axis=0))


def holds_something(folder: Path) -> bool:
    """Whether there is more in a folder without cache.json than a run leaves before it writes one:
    what several processes agree on first."""
    ours = (CHANNEL_SCALE, PCA, UPLOAD)
    return folder.is_dir() and any(
        not is_partial(child) and child.name not in ours for child in folder.iterdir()
    )


class _MeanSquares:
    """Keeps of every window the mean square of each channel, float64 (D,)."""

    def convert(self, tokens: Tensor) -> Tensor:
        return tokens.double().square().mean(dim=(1, 2))


def _is_something_else(folder: Path) -> bool:
    """Whether `folder` holds a cache of another dtype, or something that is no cache."""
    if not (folder / "cache.json").is_file():
        return holds_something(folder)
    storage = read_cache_info(folder, format=PATCHES).identity.get("storage")
    return not isinstance(storage, dict) or storage.get("dtype") != "int8"
