"""Pictures of forecasts: features as PCA colours, class maps, strips of tiles.

A `Panel` is one window: columns are frames in time, a `Strip` is one row of tiles (video, truth,
best, ...). The page shows strips one by one; `panel_image` draws a whole panel as one PNG.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...shards.evaluation.labels import IGNORE

Tile = NDArray[np.uint8]  # (H, W, 3) RGB
TILE_HEIGHT = 160  # pixels; a page shows seven tiles of a window side by side, or four that move
GAP = 4  # pixels between tiles
LARGE_PNG = 30_000  # bytes; strips of colour maps have less, of photographs more
WEBP_QUALITY = 80
_MAX_WEBP = 16_383  # pixels a side
IGNORE_COLOUR = (128, 128, 128)
_MAX_ASPECT = 2.0  # a wider or taller frame is squeezed, to keep the strip readable
_COLOUR_PERCENTILES = (1.0, 99.0)  # a guess: keeps single outlier tokens from greying the rest


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A row of tiles for the last columns of a panel: all of them, or only the forecast ones."""

    label: str
    alt: str
    tiles: tuple[Tile, ...]
    blocks: bool = False
    """A patch token is a block of one colour, and stays one at any size."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """All strips of one window. `legend`: (name, RGB) of the colours that occur."""

    title: str
    columns: tuple[str, ...]
    strips: tuple[Strip, ...]
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PcaColours:
    """A map from features (D,) to RGB, fitted once so that several feature maps can be compared."""

    mean: NDArray[np.float64]  # (D,)
    axes: NDArray[np.float64]  # (D, 3)
    low: NDArray[np.float64]  # (3,)
    high: NDArray[np.float64]  # (3,)

    def __call__(self, tokens: NDArray[np.float32], grid: tuple[int, int]) -> Tile:
        """Tokens (N, D) as a picture (h, w, 3); features beyond the fitted range saturate."""
        place = (tokens - self.mean) @ self.axes
        span = np.maximum(self.high - self.low, 1e-12)
        colours = np.clip((place - self.low) / span, 0, 1)
        return np.rint(255 * colours).astype(np.uint8).reshape(*grid, 3)


def fit_pca_colours(tokens: NDArray[np.float32]) -> PcaColours:
    """The three main directions of tokens (M, D), M and D at least 3, as red, green and blue."""
    flat = tokens.astype(np.float64)
    mean = flat.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(flat - mean, rowvar=False))
    axes = vectors[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that runs agree.
    peaks = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    axes = axes * np.where(peaks < 0, -1.0, 1.0)
    low, high = np.percentile((flat - mean) @ axes, _COLOUR_PERCENTILES, axis=0)
    return PcaColours(mean=mean, axes=axes, low=low, high=high)


def class_palette(num_classes: int) -> NDArray[np.uint8]:
    """(256, 3) colours of classes, neighbours far apart in hue; 255 (ignore) is grey."""
    palette = np.tile(np.array(IGNORE_COLOUR, np.uint8), (256, 1))
    hues = (np.arange(num_classes) * 0.618034 + 0.58) % 1.0  # golden ratio: no two alike
    saturation = np.where(np.arange(num_classes) % 2 == 0, 0.62, 0.82)
    value = np.array([0.90, 0.68, 0.98])[np.arange(num_classes) % 3]
    hsv = np.stack([hues, saturation, value], axis=1)
    palette[:num_classes] = np.rint(255 * hsv_to_rgb(hsv)).astype(np.uint8)
    return palette


def class_legend(
    maps: Sequence[NDArray[np.uint8]], palette: NDArray[np.uint8], names: Sequence[str]
) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    """Name and colour of each class that occurs in `maps`, in order of the class's number."""
    legend = []
    for number in np.unique(np.concatenate([np.unique(found) for found in maps])).tolist():
        name = "ignored" if number == IGNORE else f"class {number}"
        if number < len(names):
            name = names[number]
        red, green, blue = palette[number].tolist()
        legend.append((name, (red, green, blue)))
    return tuple(legend)


def heat_tile(values: NDArray[np.float32], *, top: float) -> Tile:
    """Values (h, w), 0 to `top`, as colours from black over red to yellow-white."""
    scaled = np.clip(values / max(top, 1e-12), 0, 1)
    colours: NDArray[np.float64] = colormaps["inferno"](scaled)[..., :3]
    return np.rint(255 * colours).astype(np.uint8)


def tile_size(aspect: float) -> tuple[int, int]:
    """Width and height of a tile with width / height = `aspect`, at most 2:1 or 1:2."""
    return round(TILE_HEIGHT * min(max(aspect, 1 / _MAX_ASPECT), _MAX_ASPECT)), TILE_HEIGHT


def resize_tile(tile: Tile, *, aspect: float, smooth: bool) -> Tile:
    """A tile of `tile_size`; `smooth` for photos, else every value stays a block."""
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(tile).resize(tile_size(aspect), method))


def strip_image(strip: Strip) -> Image.Image:
    """The tiles side by side, RGBA, each with a transparent gap at its right and bottom."""
    height, width = strip.tiles[0].shape[:2]
    canvas = np.zeros((height + GAP, len(strip.tiles) * (width + GAP), 4), np.uint8)
    for i, tile in enumerate(strip.tiles):
        left = i * (width + GAP)
        canvas[:height, left : left + width, :3] = tile
        canvas[:height, left : left + width, 3] = 255
    return Image.fromarray(canvas, "RGBA")


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def page_picture(image: Image.Image) -> tuple[bytes, str]:
    """An image for a page, and its kind ("png", "webp"): photographs, of which a PNG is large, with
    losses that are not seen; maps of colours exactly."""
    png = png_bytes(image)
    if len(png) < LARGE_PNG or max(image.size) > _MAX_WEBP:
        return png, "png"
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue(), "webp"


def panel_image(panel: Panel) -> Image.Image:
    """A whole panel as one picture on white, with labels: to show outside of the report."""
    font = ImageFont.load_default(14)
    images = [strip_image(strip) for strip in panel.strips]
    margin = 12 + max(int(font.getlength(strip.label)) for strip in panel.strips)
    column_width = images[0].width // len(panel.strips[0].tiles)
    right = margin + column_width * len(panel.columns)
    line = 22
    bottom = line + sum(image.height for image in images)
    picture = Image.new("RGB", (right, bottom + line * bool(panel.legend)), "white")
    draw = ImageDraw.Draw(picture)
    for column, text in enumerate(panel.columns):
        middle = margin + column_width * (column + 0.5)
        draw.text((middle, line / 2), text, fill="black", font=font, anchor="mm")
    top = line
    for strip, image in zip(panel.strips, images, strict=True):
        start = right - image.width
        middle = top + image.height / 2
        draw.text((start - 6, middle), strip.label, fill="black", font=font, anchor="rm")
        picture.paste(image, (start, top), image)
        top += image.height
    left = float(margin)
    for name, colour in panel.legend:
        draw.rectangle((left, bottom + 5, left + 12, bottom + 17), fill=colour)
        draw.text((left + 17, bottom + 11), name, fill="black", font=font, anchor="lm")
        left += 32 + font.getlength(name)
    return picture
