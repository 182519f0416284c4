"""Moving pictures: what was seen, then the truth and several futures side by side.

Cells of tiles that change in time, written as GIF, WebP or MP4; and those of a report, made from
its panels, whatever they show (colours, classes, depths, pictures).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from ...shards.errors import DeltatokError, UsageError
from ...shards.files import partial_path, publish
from .pictures import WEBP_QUALITY, Panel, Strip, Tile, page_picture

if TYPE_CHECKING:
    from av.video.stream import VideoStream

LINE = 22  # pixels of a line of text
GAP = 6  # pixels between cells
PAPER, INK, NOW = (24, 28, 34), (230, 234, 239), (240, 160, 75)
HOLD = 4
"""Steps for which the last picture stands still, so that it can be looked at (a guess)."""
_CODECS = ("libx264", "mpeg4")  # what browsers and phones play; then what every FFmpeg writes

MAX_CELLS, COLUMNS = 9, 3
"""Futures and truths side by side, at most: three lines of three."""
LARGE_GIF = 80_000  # bytes; with photographs in it
EMPTY = 90
"""Grey of a place where there is nothing to show."""
FIRST_CHOICE = ("video", "truth", "label", "best sample", "mean of samples")
"""Strips that are shown if there are any; then samples, in order; then OTHERS."""
OTHERS = ("predictions, best", "discriminative", "copy last")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the picture: its name and a tile for every moment, all of one size."""

    label: str
    tiles: tuple[Tile, ...]


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


def draw_moments(
    cells: Sequence[Cell], captions: Sequence[str], *, columns: int, first_future: int
) -> list[Image.Image]:
    """A picture for every moment, `captions` above it; from `first_future` on it is marked."""
    font = ImageFont.load_default(14)
    height, width = cells[0].tiles[0].shape[:2]
    wide = max([width, *(int(font.getlength(cell.label)) + 1 for cell in cells)])
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    size = (
        columns * (wide + GAP) + GAP,
        LINE + rows * (height + LINE) + GAP,
    )
    size = (size[0] + size[0] % 2, size[1] + size[1] % 2)  # video codecs want even sides
    pictures = []
    for moment, caption in enumerate(captions):
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        colour = NOW if moment >= first_future else INK
        draw.text((GAP, LINE / 2), caption, fill=colour, font=font, anchor="lm")
        for number, cell in enumerate(cells):
            left = GAP + number % columns * (wide + GAP)
            top = LINE + number // columns * (height + LINE)
            picture.paste(Image.fromarray(cell.tiles[moment]), (left, top))
            draw.text((left, top + height + LINE / 2), cell.label, fill=INK, font=font, anchor="lm")
        pictures.append(picture)
    return pictures


def gif_bytes(pictures: Sequence[Image.Image], *, step_s: float, colours: int = 128) -> bytes:
    """The pictures as a GIF that goes round for ever; the last one stands for HOLD steps."""
    step_ms = max(20, round(1000 * step_s))  # under 20 ms viewers choose a time of their own
    durations = [step_ms] * (len(pictures) - 1) + [HOLD * step_ms]
    # One palette for all, made from all: otherwise colours flicker from one moment to the next.
    sheet = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    palette = sheet.quantize(colours, dither=Image.Dither.NONE)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=True,
    )
    return buffer.getvalue()


def webp_bytes(pictures: Sequence[Image.Image], *, step_s: float) -> bytes:
    """As `gif_bytes`, as WebP with losses: much smaller where the tiles are photographs."""
    step_ms = round(1000 * step_s)
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=list(pictures[1:]),
        duration=[step_ms] * (len(pictures) - 1) + [HOLD * step_ms],
        loop=0,
        quality=WEBP_QUALITY,
    )
    return buffer.getvalue()


def write_mp4(path: Path, pictures: Sequence[Image.Image], *, step_s: float) -> None:
    """The pictures as an MP4, each for `step_s`, the last one for HOLD steps; under a partial name
    first. UsageError where the folder cannot be written to."""
    import av  # FFmpeg is loaded where a film is written, not for every report

    rate = Fraction(1 / step_s).limit_denominator(1000)
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error}); give another file") from error
    try:
        with av.open(str(partial), mode="w", format="mp4") as container:
            stream = cast("VideoStream", container.add_stream(_codec(), rate=rate))
            stream.width, stream.height = pictures[0].size
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = 2_000_000
            for picture in [*pictures, *[pictures[-1]] * (HOLD - 1)]:
                frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        publish(partial, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error}); give another file") from error
    finally:
        partial.unlink(missing_ok=True)


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


def _codec() -> str:
    import av

    for name in _CODECS:
        if name in av.codecs_available:
            return name
    raise DeltatokError(f"no video encoder ({', '.join(_CODECS)}) in this FFmpeg: save a .gif")
