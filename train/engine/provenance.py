"""Whether a model belongs to a cache, or to another model: by what its provenance.json says."""

import logging
from collections.abc import Mapping
from typing import Any

from ...shards.cache import CacheInfo, compare
from .model_folder import read_provenance

logger = logging.getLogger(__name__)

SAME_PREPROCESSING = (
    "preprocessing.patch_size",
    "preprocessing.image_mean",
    "preprocessing.image_std",
    "preprocessing.resize",
)
SAME_FEATURES = ("backbone", *SAME_PREPROCESSING)
"""What makes patch tokens alike. Not the frame size: a model trained at 256 px may be used at
512 px, as in the paper."""


def check_trained_on(folder: str, cache: CacheInfo, *, what: str) -> bool:
    """Whether the model's provenance names the patch tokens it was trained on; a warning where not.

    CacheMismatch, naming the field, if those are of another backbone or preprocessing than the
    patch tokens of `cache`. what: the model in messages.
    """
    trained_on = read_provenance(folder).get("patches")
    if not isinstance(trained_on, Mapping):
        warn_unchecked(what, "patches")
        return False
    check_features(cache, trained_on, what=what)
    return True


def check_features(cache: CacheInfo, trained_on: Mapping[str, Any], *, what: str) -> None:
    """CacheMismatch, naming the field, unless the patch tokens of `cache` are of the backbone and
    preprocessing of those with the identity `trained_on`."""
    compare(
        cache.identity,
        trained_on,
        what_got="the cache",
        what_wanted=f"the provenance of {what}",
        fields=SAME_FEATURES,
        advice="give one that was trained on features of this backbone, or extract the cache with "
        "that one's",
    )


def check_made_by(
    weights_sha256: str, deltas: Mapping[str, Any], *, what_got: str, what: str
) -> None:
    """CacheMismatch, with both hashes, unless the tokenizer of these weights made the delta tokens
    that a world model was trained on, whose identity is `deltas`."""
    compare(
        {"tokenizer": {"weights_sha256": weights_sha256}},
        deltas,
        what_got=what_got,
        what_wanted=f"the provenance of {what}",
        fields=["tokenizer.weights_sha256"],
        advice="give the tokenizer that made the delta tokens it was trained on",
    )


def warn_unchecked(what: str, missing: str) -> None:
    """Say that a model does not say what it was trained on."""
    logger.warning(
        "%s does not say what it was trained on: its provenance.json has no %s, so that it belongs "
        "here is not checked",
        what,
        missing,
    )
