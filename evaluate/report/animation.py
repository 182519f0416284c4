"""Moving pictures: what was seen, then the truth and several futures side by side.

Strips of which one tile after the other is shown, written as GIF or MP4; and those of a report,
made from its panels, whatever they show (colours, classes, depths, pictures).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ...shards.errors import DeltatokError, UsageError
from ...shards.files import partial_path, publish
from .pictures import Panel, Strip, Tile

if TYPE_CHECKING:
    from av.video.stream import VideoStream

LINE = 22  # pixels of a line of text
GAP = 6  # pixels between cells
PAPER, INK, NOW = (24, 28, 34), (230, 234, 239), (240, 160, 75)
HOLD = 4
"""Steps for which the last picture stands still, so that it can be looked at (a guess)."""
_CODECS = ("libx264", "mpeg4")  # what browsers and phones play; then what every FFmpeg writes

MAX_CELLS, COLUMNS = 8, 4
"""Futures and truths side by side, at most: two lines of four."""
MAX_SAMPLES = 3
EMPTY = 90
"""Grey of a place where there is nothing to show."""
FIRST_CHOICE = ("video", "truth", "label", "best sample", "mean of samples")
"""Strips that are shown if there are any; then MAX_SAMPLES samples, in order, without the best one
where others are left; then OTHERS."""
OTHERS = ("discriminative", "predictions, best", "copy last")
MIN_STEP_S = 0.4
"""A moment is shown for so long at least (a guess): faster, eight places cannot be followed."""


@dataclass(frozen=True, kw_only=True)
class Moving:
    """One moving picture: strips of tiles of one size, each with a tile for every moment."""

    title: str
    moments: tuple[str, ...]
    """Their times."""
    num_seen: int
    """Moments before the forecasts begin."""
    step_s: float
    """Seconds between moments in the video."""
    strips: tuple[Strip, ...]
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    outlined: bool = False
    """The forecasts have the outline of the truth."""

    @property
    def shown_step_s(self) -> float:
        """Seconds for which a moment is shown."""
        return max(self.step_s, MIN_STEP_S)

    def gif(self) -> bytes:
        """The same as one GIF, to show elsewhere."""
        words = [
            ("seen " if i < self.num_seen else "forecast ") + text
            for i, text in enumerate(self.moments)
        ]
        pictures = draw_moments(self.strips, words, columns=COLUMNS, first_future=self.num_seen)
        return gif_bytes(pictures, step_s=self.shown_step_s)


def draw_moments(
    strips: Sequence[Strip], captions: Sequence[str], *, columns: int, first_future: int
) -> list[Image.Image]:
    """A picture for every moment, `captions` above it; from `first_future` on it is marked."""
    font = ImageFont.load_default(14)
    height, width = strips[0].tiles[0].shape[:2]
    wide = max([width, *(int(font.getlength(strip.label)) + 1 for strip in strips)])
    columns = min(columns, len(strips))
    rows = -(-len(strips) // columns)
    sides = columns * (wide + GAP) + GAP, LINE + rows * (height + LINE) + GAP
    size = (sides[0] + sides[0] % 2, sides[1] + sides[1] % 2)  # video codecs want even sides
    pictures = []
    for moment, caption in enumerate(captions):
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        colour = NOW if moment >= first_future else INK
        draw.text((GAP, LINE / 2), caption, fill=colour, font=font, anchor="lm")
        for number, strip in enumerate(strips):
            left = GAP + number % columns * (wide + GAP)
            top = LINE + number // columns * (height + LINE)
            picture.paste(Image.fromarray(strip.tiles[moment]), (left, top))
            below = (left, top + height + LINE / 2)
            draw.text(below, strip.label, fill=INK, font=font, anchor="lm")
        pictures.append(picture)
    return pictures


def gif_bytes(pictures: Sequence[Image.Image], *, step_s: float) -> bytes:
    """The pictures as a GIF that goes round for ever; the last one stands for HOLD steps."""
    step_ms = max(20, round(1000 * step_s))  # under 20 ms viewers choose a time of their own
    durations = [step_ms] * (len(pictures) - 1) + [HOLD * step_ms]
    # One palette for all, made from all: otherwise colours flicker from one moment to the next.
    sheet = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    palette = sheet.quantize(128, dither=Image.Dither.NONE)
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
    """The panel's strips as a moving picture; None where it has no forecasts.

    times_s: of the panel's columns; up to 0 is seen.
    """
    chosen = _choose(panel.strips)
    count = len(panel.columns)
    late = [strip for strip in chosen if len(strip.tiles) < count]
    if not late:
        return None
    whole = [strip for strip in chosen if len(strip.tiles) == count]
    # Before they differ all places show the same: what is known of the past, in the panel's terms.
    past = whole[-1].tiles if whole else (np.full_like(late[0].tiles[0], EMPTY),) * count
    label = next((strip for strip in late + whole if strip.label == "label"), None)
    return Moving(
        title=panel.title,
        moments=panel.columns,
        num_seen=sum(time_s <= 0 for time_s in times_s),
        step_s=float(np.diff(times_s).mean()),
        strips=tuple(_filled(strip, past, label) for strip in chosen),
        legend=panel.legend,
        outlined=label is not None,
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
    best = by_label.get("best sample")
    twice = [one for one in samples if best and np.array_equal(one.tiles, best.tiles)]
    if len(samples) > MAX_SAMPLES and len(twice) == 1:
        samples = [one for one in samples if one is not twice[0]]
    others = [by_label[label] for label in OTHERS if label in by_label]
    return [*chosen, *samples[:MAX_SAMPLES], *others][:MAX_CELLS]


def _filled(strip: Strip, past: Sequence[Tile], label: Strip | None) -> Strip:
    """The strip with the past before its own tiles, and in these the outline of the label's."""
    tiles = [*strip.tiles]
    if label is not None and strip is not label and len(tiles) < len(past):
        for i in range(1, min(len(tiles), len(label.tiles)) + 1):
            tiles[-i] = outlined(tiles[-i], label.tiles[-i])
    return replace(strip, tiles=(*past[: len(past) - len(tiles)], *tiles))


def outlined(tile: Tile, truth: Tile) -> Tile:
    """The tile with a white line, black beside it, where `truth` changes its colour."""
    edges = np.zeros(truth.shape[:2], bool)
    across = (truth[:, 1:] != truth[:, :-1]).any(axis=-1)
    down = (truth[1:] != truth[:-1]).any(axis=-1)
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    beside = Image.fromarray(edges).convert("L").filter(ImageFilter.MaxFilter(3))
    drawn = tile.copy()
    drawn[np.asarray(beside) > 0] = 0
    drawn[edges] = 255
    return drawn


def _codec() -> str:
    import av

    for name in _CODECS:
        if name in av.codecs_available:
            return name
    raise DeltatokError(f"no video encoder ({', '.join(_CODECS)}) in this FFmpeg: save a .gif")
