"""When the frames of windows are: a plot for both kinds of cache, and the facts on top."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..evaluate.report.plots import COLOURS, Plot, draw_plot
from ..shards.tools.info import describe_cache
from .preview import Reader

_SHOWN_FACTS = (
    "format",
    "fingerprint",
    "windows",
    "clips",
    "quarantined",
    "shards",
    "frames_per_window",
    "tokens_per_frame",
    "channels",
    "dtype",
    "bytes",
    "abs_max",
)


def cache_facts(reader: Reader) -> dict[str, Any]:
    """What the cache is, for the top of the page."""
    found = describe_cache(reader.folder)
    facts = {
        name.replace("_", " "): found[name] for name in _SHOWN_FACTS if found[name] is not None
    }
    identity = reader.info.identity
    patches = identity.get("patches", identity)
    sampling = identity.get("sampling") or patches.get("sampling")
    if isinstance(sampling, Mapping):
        facts["sampling"] = sampling
    facts["backbone"] = reader.info.backbone.get("name")
    facts["licence"] = reader.info.licence
    return facts


def plot_times(reader: Reader, shown: Sequence[int], sample: NDArray[np.int64]) -> Plot:
    """Left: the frames of the shown windows in time. Right: how long the gaps of the sample are."""
    times = reader.timestamps_s(shown).astype(np.float64)
    gaps = np.diff(reader.timestamps_s(sample).astype(np.float64), axis=1).ravel()
    alt = f"{len(shown)} windows, from {np.ptp(times, axis=1).min():.2f} to "
    alt += f"{np.ptp(times, axis=1).max():.2f} s long."
    if gaps.size:
        alt += (
            f" Gaps between frames of {len(sample)} windows: {gaps.min():.3f} to {gaps.max():.3f} "
            f"s, median {np.median(gaps):.3f} s."
        )
    return draw_plot(functools.partial(_draw_times, times=times, gaps=gaps), alt=alt)


def _draw_times(
    figure: Figure, ink: dict[str, str], *, times: NDArray[np.float64], gaps: NDArray[np.float64]
) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = np.arange(1, len(times) + 1)
    left.hlines(rows, times[:, 0], times[:, -1], color=ink["faint"], linewidth=1.5)
    left.plot(times.T, np.broadcast_to(rows, times.T.shape), "o", color=COLOURS[0], markersize=3)
    left.set(xlabel="seconds", ylabel="window shown", title="Frames in time")
    left.set_ylim(len(times) + 0.6, 0.4)
    left.yaxis.get_major_locator().set_params(integer=True)
    if gaps.size:
        right.hist(1000 * gaps, bins=40, color=COLOURS[0])
    right.set(xlabel="gap between frames, ms", ylabel="gaps", title="Gaps")
