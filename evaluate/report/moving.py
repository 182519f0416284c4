"""A panel as a moving picture: what was seen, then the truth and several futures side by side.

Made from the panels of a report, whatever they show (colours, classes, depths, pictures). Called
by `forecast.py`; `report.py` puts them into the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import features

from .animation import Cell, draw_moments, gif_bytes, webp_bytes
from .page import data_uri
from .pictures import Panel, Strip, Tile, page_picture

MAX_CELLS, COLUMNS = 9, 3
"""Futures and truths side by side, at most: three lines of three."""
LARGE_GIF = 80_000  # bytes; with photographs in it
EMPTY = 90
"""Grey of a place where there is nothing to show."""
FIRST_CHOICE = ("video", "truth", "label", "best sample", "mean of samples")
"""Strips that are shown if there are any; then samples, in order; then OTHERS."""
OTHERS = ("predictions, best", "discriminative", "copy last")


@dataclass(frozen=True, kw_only=True)
class Moving:
    """One moving picture, its last moment alone, and its text for who sees neither."""

    title: str
    alt: str
    gif: bytes
    film: tuple[bytes, str]
    """The same for the page, and its kind: "gif", or "webp" where a GIF is large."""
    still: tuple[bytes, str]
    """For who wants nothing to move, and for paper; and its kind."""
    width: int
    """Pixels."""


def moving_panel(panel: Panel, *, times_s: Sequence[float]) -> Moving | None:
    """The panel's strips as cells that move; None where it has no forecasts.

    times_s: of the panel's columns; up to 0 is seen.
    """
    chosen = _choose(panel.strips)
    late = [strip for strip in chosen if len(strip.tiles) < len(panel.columns)]
    if not late:
        return None
    first_future = sum(time_s <= 0 for time_s in times_s)
    whole = [strip for strip in chosen if len(strip.tiles) == len(panel.columns)]
    empty = np.full_like(late[0].tiles[0], EMPTY)
    # Before they differ all cells show the same: what is known of the past, in the panel's terms.
    past = whole[-1].tiles if whole else (empty,) * len(panel.columns)
    cells = [Cell(label=strip.label, tiles=_filled(strip, past)) for strip in chosen]
    words = [
        ("seen " if i < first_future else "forecast ") + text
        for i, text in enumerate(panel.columns)
    ]
    pictures = draw_moments(cells, words, columns=COLUMNS, first_future=first_future)
    step_s = float(np.diff(times_s).mean())
    gif = gif_bytes(pictures, step_s=step_s)
    film = (gif, "gif")
    if len(gif) > LARGE_GIF and features.check("webp"):
        film = (webp_bytes(pictures, step_s=step_s), "webp")
    names = ", ".join(strip.label for strip in chosen)
    return Moving(
        title=panel.title,
        alt=(
            f"Moving picture of {panel.title}: {first_future} moments that are seen, then "
            f"{len(words) - first_future} of the future, side by side: {names}. At the end: "
            + " ".join(strip.alt for strip in late)
        ),
        gif=gif,
        film=film,
        still=page_picture(pictures[-1]),
        width=pictures[0].width,
    )


def moving_panels(
    kinds: Sequence[Sequence[Panel]], times_s: Sequence[Sequence[float]]
) -> list[Moving]:
    """`moving_panel` of every window: of the first kind of panel that shows the past, too.

    kinds: panels of all windows, of one kind after the other; a kind may have none.
    """
    found = []
    for window, times in enumerate(times_s):
        panels = [panels[window] for panels in kinds if panels]
        with_past = [panel for panel in panels if _shows_past(panel)]
        found.append(moving_panel((with_past or panels)[0], times_s=times))
    return [moving for moving in found if moving is not None]


def _shows_past(panel: Panel) -> bool:
    return any(len(strip.tiles) == len(panel.columns) for strip in panel.strips)


def moving_html(pictures: Sequence[Moving]) -> str:
    """The section of the page; nothing without pictures."""
    if not pictures:
        return ""
    figures = "\n".join(map(_figure, pictures))
    return f"""<h2>Possible futures</h2>
<p>{escape(TEXT)}</p>
<div class="moving">
{figures}
</div>"""


TEXT = (
    "What was seen, in its own time; then what came and what was forecast, side by side. Of the "
    "samples, those that differ most are shown: the first is the most typical, each other one the "
    "farthest from those before it. The last moment stands still for a while."
)


def _figure(moving: Moving) -> str:
    still, film = (data_uri(data, kind=kind) for data, kind in (moving.still, moving.film))
    return f"""<figure><picture>
<source media="(prefers-reduced-motion: reduce), print" srcset="{still}">
<img src="{film}" alt="{escape(moving.alt)}" width="{moving.width}">
</picture><figcaption>{escape(moving.title)}</figcaption></figure>"""


def _choose(strips: Sequence[Strip]) -> list[Strip]:
    """FIRST_CHOICE in its order, then samples, then OTHERS; MAX_CELLS at most."""
    by_label = {strip.label.split(", 0 to")[0]: strip for strip in strips}  # of depth: the scale
    chosen = [by_label[label] for label in FIRST_CHOICE if label in by_label]
    samples = [strip for strip in strips if strip.label.startswith("sample ")]
    others = [by_label[label] for label in OTHERS if label in by_label]
    return [*chosen, *samples, *others][:MAX_CELLS]


def _filled(strip: Strip, past: Sequence[Tile]) -> tuple[Tile, ...]:
    """The strip's tiles, before them those of the past."""
    return (*past[: len(past) - len(strip.tiles)], *strip.tiles)
