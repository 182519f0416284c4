"""--pca: the projection that an extraction stores tokens through, fitted once on its own clips.

One window of each of up to SAMPLE_CLIPS clips goes through the backbone, in the order that int8
takes its sample in: decided by the seed and the keys alone. The file is created exclusively and
what stands there is used, as with the scales of int8: a run that is resumed or joins others has the
same components, on whatever device it would have fitted others.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..shards.cache import PCA, SAME_SETTINGS, pca_of, read_cache_info
from ..shards.errors import CacheMismatch, TooManyQuarantined, UsageError
from ..shards.patches.int8 import SAMPLE_CLIPS
from ..shards.patches.projection import (
    Projection,
    agree_on_projection,
    fit_projection,
    read_agreed_projection,
    read_projection,
)
from ..shards.records import Quarantined
from .backbone import Backbone
from .config import ExtractConfig
from .datasets.windows import Policy, one_window_a_clip
from .decoding.pool import DecodePool
from .int8_calibration import calibration_sample, holds_something
from .pixels import window_pixels
from .sources.clip import Clip

_LOGGER = logging.getLogger(__name__)


def with_projection(
    config: ExtractConfig, policy: Policy, backbone: Backbone, clips: Sequence[Clip]
) -> Backbone:
    """The backbone that gives what `config` stores: itself without --pca.

    A number of components is fitted on `clips`, unless the cache `config.out` has them already; a
    folder's are taken over, and so is a projection that the backbone has. Raises UsageError for
    more components than the features have channels or for too few frames, CacheMismatch where
    `config.out` is a cache without or of other layers, DamagedShard where its file was changed.
    """
    if config.pca is None and backbone.projection is None:
        return backbone
    out, width = Path(config.out), backbone.hidden_size
    projection = backbone.projection
    if isinstance(config.pca, str) and projection is None:
        projection = read_projection(config.pca)
    if isinstance(config.pca, int) and projection is None:
        check_components(config.pca, width)
        projection = stored_projection(out) or fit(
            config, policy, backbone, clips, num_components=config.pca
        )
        if len(projection.components) != config.pca:
            raise CacheMismatch(
                f"{out}: backbone.pca.components is {len(projection.components)}, but {config.pca} "
                f"in the settings given: {SAME_SETTINGS}"
            )
    assert projection is not None
    if backbone.projection is None and projection.width != width:
        where = out if isinstance(config.pca, int) else config.pca
        raise CacheMismatch(
            f"{where}: {PCA} is for features of {projection.width} channels, the backbone's have "
            f"{width} (backbone.layers): give the backbone and layers it was fitted with"
        )
    if not (out / "cache.json").is_file() and not holds_something(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            projection = agree_on_projection(out, projection)
        except OSError as error:
            raise UsageError(
                f"{out}: cannot be written ({error.strerror or error}): give another folder"
            ) from error
    return replace(backbone, projection=projection)


def check_components(number: int, width: int) -> None:
    """Raises UsageError for more components than features of `width` channels have."""
    if number > width:
        raise UsageError(
            f"pca: got {number} components, the backbone's features have {width} channels: give at "
            "most as many, or more --layers"
        )


def stored_projection(folder: Path) -> Projection | None:
    """That of the cache in `folder`, or of one about to be begun there; None where there is none
    yet. CacheMismatch for a cache without, and for what is no cache."""
    if (folder / "cache.json").is_file():
        info = read_cache_info(folder)
        if pca_of(info.identity) is None:
            raise CacheMismatch(
                f"{folder}: backbone.pca is missing, but given in the settings: use a cache that "
                "was made with --pca, or make a new one in another folder"
            )
        return read_projection(folder, info)
    if holds_something(folder):
        raise CacheMismatch(
            f"{folder}: not a deltatok cache, and it is not empty: give a new or empty folder"
        )
    return read_agreed_projection(folder) if (folder / PCA).is_file() else None


def fit(
    config: ExtractConfig,
    policy: Policy,
    backbone: Backbone,
    clips: Sequence[Clip],
    *,
    num_components: int,
) -> Projection:
    """The projection of a sample of the clips; UsageError where that has fewer tokens than the
    features have channels."""
    count = 0
    shift = total = products = torch.zeros(0)
    for tokens in _sampled(config, policy, backbone, clips):
        if not count:
            # About the first window's mean: sums of squares far from 0 would lose the digits.
            shift = tokens.mean(0)
            total = torch.zeros_like(shift, dtype=torch.float64)
            products = total.new_zeros(len(shift), len(shift))
        centred = tokens - shift
        count += len(centred)
        total += centred.sum(0, dtype=torch.float64)
        products += (centred.T @ centred).double()
    width = backbone.hidden_size
    if count < width:
        raise UsageError(
            f"pca: fitted on {count} tokens, wanted at least as many as the features have "
            f"channels, {width}: give more clips, or --pca CACHE, another cache's"
        )
    off = total / count
    covariance = products / count - torch.outer(off, off)
    return fit_projection(
        (shift.double() + off).cpu().numpy(),
        covariance.cpu().numpy().astype(np.float64),
        num_components=num_components,
    )


def _sampled(
    config: ExtractConfig, policy: Policy, backbone: Backbone, clips: Sequence[Clip]
) -> Iterator[Tensor]:
    """Features float32 (T * N, F) of one window of each clip of the sample, on the device."""
    sample = calibration_sample(config, clips)
    wanted = min(SAMPLE_CLIPS, len(sample))
    _LOGGER.info("pca: fitting %s components on one window of each of %d clips", config.pca, wanted)
    taken, refused = 0, []
    with DecodePool.from_config(config, one_window_a_clip(policy)) as pool:
        for clip in pool.decode(sample):
            if isinstance(clip, Quarantined):
                refused.append(clip)
                continue
            window = clip.windows[len(clip.windows) // 2]
            frames, size = clip.frames_of(window), config.frame_size
            pixels = window_pixels(frames, window, frame_size=size, device=backbone.device)
            yield backbone.tokens(pixels).flatten(0, 1)
            taken += 1
            if taken == wanted:
                return
    if not taken:
        raise TooManyQuarantined(
            f"pca: none of the {len(refused)} clips that were tried gives a window, first "
            f"{refused[0].clip!r}: {refused[0].reason}: check the videos"
        )
