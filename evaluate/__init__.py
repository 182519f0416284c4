"""Forecasts scored as the paper does, from caches, and looked at: the report and its pictures.

forecast/          the protocol from a cache: windows, rollouts, scores, intervals, modes
report/            report.json and report.html: tables, plots, pictures; its page in templates/
inference/         DeltaWorld for Python: from pixels to possible futures
compare.py         several reports side by side
cache_fidelity.py  what a storage type costs
flops.py           GFLOPs of the real modules
tables.py          tables as Markdown

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
