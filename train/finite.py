"""Which windows to look at when a loss or a gradient is not finite. Used by loop.py."""

from collections.abc import Callable

from torch import Tensor

from .data import Batch

MAX_NAMED_WINDOWS = 4
"""Windows that are named at most."""


def named_windows(losses: Tensor, batch: Batch, *, clip_of: Callable[[int], str]) -> str:
    """ "(its own loss is not finite): window 3 of clip 'a.mp4', ...": of one rank's losses (B,)
    those that are not finite; all, where every one is (then it is the gradient, or another rank).
    """
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    which = "its own loss is not finite" if bad else "its own losses are finite"
    chosen = bad or range(len(losses))
    windows = list(dict.fromkeys(int(batch.windows[index]) for index in chosen))
    named = ", ".join(
        f"window {window} of clip {clip_of(window)!r}" for window in windows[:MAX_NAMED_WINDOWS]
    )
    return f"({which}): {named}{', ...' if len(windows) > MAX_NAMED_WINDOWS else ''}"
