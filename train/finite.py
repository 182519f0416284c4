"""Which windows to look at when a number is not finite. Used by loop.py and the stages."""

from collections.abc import Callable

from torch import Tensor

from ..shards.errors import DamagedShard
from .data import Batch
from .order import Indices

MAX_NAMED_WINDOWS = 4
"""Windows that are named at most."""


def named_windows(losses: Tensor, batch: Batch, *, clip_of: Callable[[int], str]) -> str:
    """ "(its own loss is not finite): window 3 of clip 'a.mp4', ...": of one rank's losses (B,)
    those that are not finite; all, where every one is (then it is the gradient, or another rank).
    """
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    which = "its own loss is not finite" if bad else "its own losses are finite"
    chosen = bad or range(len(losses))
    return f"({which}): {_named([int(batch.windows[index]) for index in chosen], clip_of)}"


def check_finite(tokens: Tensor, windows: Indices, *, clip_of: Callable[[int], str]) -> None:
    """DamagedShard naming those of the validation `windows`, tokens (w, ...), that hold anything
    but numbers: else every evaluation would say nothing, and no checkpoint be the best."""
    bad = (~tokens.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise DamagedShard(
            f"validation: {_named([int(windows[index]) for index in bad], clip_of)}: holds "
            "numbers that are not finite: run `deltatok-shards verify` on the cache, and make what "
            "it names again"
        )


def _named(windows: list[int], clip_of: Callable[[int], str]) -> str:
    different = list(dict.fromkeys(windows))
    named = ", ".join(
        f"window {window} of clip {clip_of(window)!r}" for window in different[:MAX_NAMED_WINDOWS]
    )
    return f"{named}{', ...' if len(different) > MAX_NAMED_WINDOWS else ''}"
