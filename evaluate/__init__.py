"""Forecasts scored as the paper does, from caches, and looked at: the report and its pictures.

forecast.py    the protocol from a cache       rollout.py   samples -> features
protocol.py    crops, labels, metrics          probes.py    spread, best-of-k, use of the token
report.py      report.json and report.html     flops.py     GFLOPs of the real modules
page.py        parts of HTML pages            modes.py     which possible future a forecast is
sequences.py   scores by sequence             intervals.py bootstrap intervals of them
compare.py     several reports side by side
cache_fidelity.py  what a storage type costs
api.py         DeltaWorld for Python: from pixels to possible futures (stream.py, futures.py)
predictions.py, prediction_rows.py    frames of any other model under the same protocol
panels.py, moving.py    pictures of windows, still and moving
paper_rows.py  the paper's rows, and when they may stand beside ours

`DeltaWorld`, `Futures` and `WorldState` are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.futures import Futures
    from .inference.model import DeltaWorld, WorldState

__all__ = ["DeltaWorld", "Futures", "WorldState"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from .inference import model as api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
