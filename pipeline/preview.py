"""deltatok-shards preview: some windows of a cache as pictures, on one page or in one image.

    facts        what the cache is
    windows      frames (with --videos), tokens as colours, norms: a panel each
    plots        times and gaps, norms, channels

`preview_patches` and `preview_deltas` make the sections; everything shown comes from the cache.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..evaluate.report.frames import clips_by_key, read_frames
from ..evaluate.report.html import render_page, value_text
from ..evaluate.report.pictures import Panel, Strip, Tile, panel_image, png_bytes, resize_tile
from ..evaluate.report.plots import Plot
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import UsageError
from ..shards.patches.reader import PatchShards

Reader = PatchShards | DeltaShards

MAX_COLUMNS = 12
"""Frames of a window that are shown; more would be too small."""

MARGIN = 24  # pixels around everything in a PNG
TEXT_WIDTH = 120  # characters a line in a PNG


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what to see, and pictures."""

    title: str
    text: str
    panels: tuple[Panel, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preview:
    """All that is on the page."""

    title: str
    summary: str
    facts: Mapping[str, Any]
    sections: tuple[Section, ...]


def choose_windows(reader: Reader, count: int, *, seed: int) -> list[int]:
    """Up to `count` random windows, ascending; of different clips as long as there are some."""
    if count < 1:
        raise UsageError(f"--windows {count}: wanted 1 or more")
    if not reader.num_windows:
        raise UsageError(f"{reader.folder}: has no windows to show: all clips are in quarantine")
    order = np.random.default_rng(seed).permutation(reader.num_windows)
    clips = reader.clip_index[order]
    # How many windows of its clip come before each one.
    by_clip = np.argsort(clips, kind="stable")
    starts = np.searchsorted(clips[by_clip], clips[by_clip])
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_clip] = np.arange(len(order)) - starts
    chosen = order[np.argsort(rank, kind="stable")][:count]
    return sorted(int(window) for window in chosen)


def sample_windows(reader: Reader, count: int, *, seed: int) -> NDArray[np.int64]:
    """Up to `count` random windows, int64, ascending: what plots over many are made from."""
    numbers = np.random.default_rng((seed, 1)).permutation(reader.num_windows)[:count]
    return np.sort(numbers).astype(np.int64)


def window_titles(reader: Reader, windows: Sequence[int]) -> list[str]:
    """Number on the page, clip, class, crop and flip of each window in words."""
    labels, titles = reader.labels, []
    for number, window in enumerate(windows, start=1):
        known = reader.window(window)
        label = labels[int(reader.clip_index[window])]
        label = f" ({label})" if label else ""
        top, left, height, width = (round(edge) for edge in known["crop"])
        flipped = ", flipped" if known["flipped"] else ""
        crop = f"crop {width} x {height} at ({left}, {top}){flipped}"
        titles.append(f"{number}. {known['clip']}{label}: {crop}")
    return titles


def columns_of(reader: Reader, window: int) -> tuple[str, ...]:
    """The times of the frames that are shown, from the window's first one."""
    times = reader.timestamps_s([window])[0]
    later = (f"+{time - times[0]:.2f}" for time in times[1:MAX_COLUMNS])
    return ("0 s", *later)


def norm_fact(norms: NDArray[np.float32]) -> str:
    """How long tokens are, in words."""
    low, middle, high = np.percentile(norms, (1, 50, 99))
    return f"median {middle:.4g}; 98 % within {low:.4g} and {high:.4g}; largest {norms.max():.4g}"


def aspect_of(reader: Reader, window: int) -> float:
    """Width / height of the window's crop."""
    crop = reader.window(window)["crop"]
    return float(crop[3]) / max(float(crop[2]), 1.0)


def frame_strips(reader: Reader, windows: Sequence[int], videos: Sequence[str]) -> dict[int, Strip]:
    """Window -> its frames as the backbone saw them, cropped and flipped, where `videos` have it.

    Raises UsageError if there are videos but none of any shown clip.
    """
    if not videos:
        return {}
    clips = clips_by_key(videos)
    strips = {}
    for window in windows:
        known = reader.window(window)
        if known["clip"] not in clips:
            continue
        frames = read_frames(clips[known["clip"]], known["frames"][:MAX_COLUMNS])
        if frames is None:
            continue
        aspect = aspect_of(reader, window)
        tiles = [
            resize_tile(_seen(frame, known["crop"], known["flipped"]), aspect=aspect, smooth=True)
            for frame in frames
        ]
        alt = f"Frames of {known['clip']}, cropped as for the backbone."
        strips[window] = Strip(label="video", alt=alt, tiles=tuple(tiles))
    if not strips:
        shown = sorted({reader.window(window)["clip"] for window in windows})
        raise UsageError(
            f"--videos: none of the clips shown is among them, first {shown[0]!r}: give the paths "
            "as they were given to deltatok-extract"
        )
    return strips


def _seen(frame: Tile, crop: Sequence[float], flipped: bool) -> Tile:
    top, left, height, width = (round(edge) for edge in crop)
    part = frame[top : top + height, left : left + width]
    return part[:, ::-1] if flipped else part


def preview_html(preview: Preview) -> str:
    """The page: one file, pictures inside, light and dark by the reader's setting."""
    values = {"title": preview.title, "preview": preview}
    return render_page("preview.html.j2", values, package=__package__)


def preview_png(preview: Preview) -> bytes:
    """The same as one tall picture on white."""
    parts = [_text_image(preview.title, size=26), _text_image(preview.summary, size=15)]
    for name, value in preview.facts.items():
        text = f"{name}: {value_text(value)}"
        parts.append(_text_image(textwrap.shorten(text, TEXT_WIDTH), size=13))
    for section in preview.sections:
        parts.append(_text_image(section.title, size=20))
        parts += [_text_image(line, size=14) for line in textwrap.wrap(section.text, TEXT_WIDTH)]
        for panel in section.panels:
            parts += [_text_image(panel.title, size=15), panel_image(panel)]
        for plot in section.plots:
            image = Image.open(io.BytesIO(plot.light)).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            parts.append(Image.alpha_composite(white, image).convert("RGB"))
    gap = MARGIN // 2
    width = max(part.width for part in parts) + 2 * MARGIN
    height = sum(part.height + gap for part in parts) + 2 * MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    top = MARGIN
    for part in parts:
        canvas.paste(part, (MARGIN, top))
        top += part.height + gap
    return png_bytes(canvas)


def _text_image(text: str, *, size: int) -> Image.Image:
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (int(font.getlength(text)) + 4, round(size * 1.6)), "white")
    ImageDraw.Draw(image).text((0, size * 0.8), text, fill="black", font=font, anchor="lm")
    return image
