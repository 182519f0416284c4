"""What a delta-token cache is: its cache.json from that of the patch tokens and the tokenizer.

Used by tokenize.py, and by pipeline/ where patch tokens are never stored.
"""

import logging
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from ..shards.cache import DELTAS, CacheInfo, CacheShape, compare
from ..shards.errors import CacheMismatch
from .frame_picks import WindowDraws
from .models.deltatok import DeltaTok
from .pretrained import read_provenance, weights_sha256
from .run_folder import plain

logger = logging.getLogger(__name__)

SAME_FOR_BOTH = (
    "backbone",
    "preprocessing.patch_size",
    "preprocessing.image_mean",
    "preprocessing.image_std",
)
"""What the tokenizer's own training cache and the cache to tokenize must agree in; not the frame
size: a tokenizer may be used at another one."""


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
    model: DeltaTok,
    patches: CacheInfo,
    *,
    autocast_dtype: str,
    parent_fingerprint: str | None,
    draws: WindowDraws | None = None,
) -> CacheInfo:
    """cache.json of the delta tokens of these patch tokens under this tokenizer.

    parent_fingerprint: that of the patch cache, also where its tokens were never stored.
    draws: how windows were drawn among its frames, None where they are its own windows.
    """
    identity = deltas_identity(model, patches.identity, autocast_dtype=autocast_dtype)
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
