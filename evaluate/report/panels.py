"""The panels of one window: features as colours, and what a head reads from them.

A `ShownWindow` is kept of each window that is to be shown, and becomes panels at the end. Rows from
top to bottom: video, truth or labels, then the forecasts, then copy last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...shards.evaluation.labels import IGNORE, NO_DEPTH
from ...train.models.heads import DepthHead, SegmentationHead, feature_map
from ...train.models.rgb_head import RGBHead
from ..forecast.rollout import HorizonForecast
from ..forecast.scores import Head, Label, class_maps
from .pictures import (
    Panel,
    Strip,
    Tile,
    class_legend,
    class_palette,
    fit_pca_colours,
    heat_tile,
    resize_tile,
    tile_size,
)

NUM_SAMPLES_SHOWN = 4
FORECASTS = (
    "best",
    "mean",
    "predictions_best",
    "predictions_mean",
    "discriminative",
    "copy_last",
)
"""Rows of a panel, where there are any, in order; single samples come after the mean."""
HEAD_ROWS = ("present", "reconstruction", "best", "mean", "discriminative", "copy_last")
"""The same of panels of depths and RGB pictures."""
Features = NDArray[np.float32]
ClassMap = NDArray[np.uint8]

_FORECAST_LABELS = {
    "present": "present",
    "reconstruction": "reconstruction",
    "best": "best sample",
    "mean": "mean of samples",
    "predictions_mean": "predictions, mean",
    "predictions_best": "predictions, best",
    "discriminative": "discriminative",
    "copy_last": "copy last",
}


@dataclass(frozen=True, kw_only=True)
class ShownWindow:
    """One window at the mid horizon, on the CPU. C context and H target frames."""

    title: str
    times_s: tuple[float, ...]
    """C + H times, 0 at the last context frame."""
    aspect: float
    """Width / height of the window in the video."""
    grid: tuple[int, int]
    truth: Features
    """(C + H, N, D)"""
    rows: dict[str, Features]
    """Row name -> (H, N, D)."""
    samples: Features
    """(S, H, N, D), S up to NUM_SAMPLES_SHOWN, 0 without a world model."""
    sample_numbers: tuple[int, ...] = ()
    """Which samples these are, from 0; by default the first ones."""
    spread: NDArray[np.float32] | None
    """(H, h, w): standard deviation of all samples, root mean square over channels."""
    labels: tuple[Label, ...] = ()
    """Labels (H, W) of all C + H frames, of the target alone, or none."""
    frames: tuple[Tile, ...] = ()
    """C + H frames of the video, or none."""


def keep_features(
    forecast: HorizonForecast, i: int, *, grid: tuple[int, int]
) -> tuple[dict[str, Features], Features, tuple[int, ...], NDArray[np.float32] | None]:
    """Rows, the samples that differ most with their numbers, and spread of window `i` of a batch,
    as ShownWindow holds them."""
    rows = {name: _array(row[i]) for name, row in forecast.rows.items()}
    if forecast.samples is None:
        nothing = np.empty((0, *rows["copy_last"].shape), np.float32)
        return rows, nothing, (), None
    samples = forecast.samples[i]
    spread = samples.var(dim=0, correction=0).mean(dim=-1).sqrt()
    numbers = most_diverse(samples[:, -1], NUM_SAMPLES_SHOWN)
    return rows, _array(samples[numbers]), tuple(numbers), _array(spread).reshape(-1, *grid)


def most_diverse(samples: Tensor, count: int) -> list[int]:
    """Numbers of up to `count` of the samples (S, ...): first the one nearest to their mean, then
    each time the one farthest from all that were taken; equal samples are taken once."""
    if not len(samples) or count < 1:
        return []
    flat = samples.flatten(1).float()
    distance = (flat - flat.mean(dim=0)).square().sum(dim=1)
    taken = [int(distance.argmin())]
    nearest = (flat - flat[taken[0]]).square().sum(dim=1)
    while len(taken) < count and float(nearest.max()) > 0:
        taken.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (flat - flat[taken[-1]]).square().sum(dim=1))
    return taken


def most_uncertain_first(windows: Sequence[ShownWindow]) -> list[ShownWindow]:
    """The windows by how much their samples differ, most first; without samples as they are."""
    spreads = [0.0 if w.spread is None else float(np.square(w.spread).mean()) for w in windows]
    return [windows[i] for i in np.argsort(np.negative(spreads), kind="stable")]


def feature_panel(window: ShownWindow) -> Panel:
    """All rows as colours of one basis, fitted on the window's true features."""
    colours = fit_pca_colours(window.truth.reshape(-1, window.truth.shape[-1]))

    def strip(label: str, alt: str, pictures: Sequence[Tile]) -> Strip:
        tiles = [resize_tile(one, aspect=window.aspect, smooth=False) for one in pictures]
        return Strip(label=label, alt=alt, tiles=tuple(tiles), blocks=True)

    truth = [colours(tokens, window.grid) for tokens in window.truth]
    strips = [*_video_strip(window)]
    strips.append(strip("truth", f"True features of {window.title} as colours.", truth))
    for label, row in _forecasts(window, FORECASTS):
        alt = f"Features of the row {label} at the target frames, in the colours of the truth."
        strips.append(strip(label, alt, [colours(tokens, window.grid) for tokens in row]))
    if window.spread is not None:
        top = float(window.spread.max())
        heat = [heat_tile(values, top=top) for values in window.spread]
        alt = "Where the samples differ at the target frames: black nowhere, bright most."
        strips.append(strip("spread of samples", alt, heat))
    return Panel(title=window.title, columns=_columns(window), strips=tuple(strips))


def class_panel(
    window: ShownWindow, head: SegmentationHead, *, class_names: Sequence[str]
) -> Panel:
    """Labels, and class maps read from the features of every row."""
    palette = class_palette(head.config.num_classes)
    labels = [label.astype(np.uint8) for label in window.labels]
    tiles = [resize_tile(palette[label], aspect=window.aspect, smooth=False) for label in labels]
    alt = f"Labels of {window.title}: {_shares(labels[-1], class_names)} at the end."
    strips = [*_video_strip(window), Strip(label="label", alt=alt, tiles=tuple(tiles))]
    seen = [*labels]
    for label, row in _forecasts(window, ("present", *FORECASTS)):
        maps = [
            read_classes(head, _to_head(head, x), grid=window.grid, aspect=window.aspect)
            for x in row
        ]
        seen += maps
        alt = f"Classes of the row {label}: {_shares(maps[-1], class_names)} at the end."
        strips.append(Strip(label=label, alt=alt, tiles=tuple(palette[one] for one in maps)))
    return Panel(
        title=window.title,
        columns=_columns(window),
        strips=tuple(strips),
        legend=class_legend(seen, palette, class_names),
    )


def rgb_panel(window: ShownWindow, head: RGBHead) -> Panel:
    """Pictures decoded from features, about what a camera would have seen."""
    return _head_panel(window, head, _video_strip(window), what="Picture")


def depth_panel(window: ShownWindow, head: DepthHead) -> Panel:
    """Depths in one scale: black is near, bright as far as the farthest of the true features."""
    top = max(
        float(_read(head, _to_head(head, x), window.grid).max()) for x in window.rows["present"]
    )
    strips = _video_strip(window)
    if window.labels:
        labels = [label.astype(np.float32) for label in window.labels]
        seen = labels[-1][labels[-1] > NO_DEPTH]
        words = f"{seen.min():.1f} to {seen.max():.1f} m" if seen.size else "nothing labelled"
        tiles = [
            resize_tile(heat_tile(label, top=top), aspect=window.aspect, smooth=False)
            for label in labels
        ]
        alt = f"Labels of {window.title}: {words} at the end."
        strips.append(Strip(label=f"label, 0 to {top:.0f} m", alt=alt, tiles=tuple(tiles)))
    return _head_panel(window, head, strips, what="Depth", top=top)


def read_tile(
    head: Head | RGBHead, tokens: Tensor, *, grid: tuple[int, int], aspect: float, top: float = 1.0
) -> Tile:
    """What a head reads from features (N, D), smooth between its pixels; depths from black (0 m) to
    bright (`top`)."""
    if isinstance(head, SegmentationHead):
        classes = read_classes(head, tokens, grid=grid, aspect=aspect)
        tile: Tile = class_palette(head.config.num_classes)[classes]
        return tile
    output = _read(head, tokens, grid)
    if isinstance(head, RGBHead):
        pixels = np.rint(255 * output.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
        return resize_tile(pixels, aspect=aspect, smooth=True)
    depth = Image.fromarray(output[0]).resize(tile_size(aspect), Image.Resampling.BILINEAR)
    return heat_tile(np.asarray(depth), top=top)


def read_classes(
    head: SegmentationHead, tokens: Tensor, *, grid: tuple[int, int], aspect: float
) -> ClassMap:
    """Class map (H, W) of `tile_size` from features (N, D): the logits are interpolated, as for a
    score."""
    width, height = tile_size(aspect)
    with torch.no_grad():
        found: ClassMap = class_maps(head, tokens[None], grid=grid, size=(height, width))[0]
    return found


def _forecasts(window: ShownWindow, names: Sequence[str]) -> list[tuple[str, Features]]:
    """(label, (H, N, D)) of the rows that the window has, single samples after the mean."""
    found = []
    for name in names:
        if name in window.rows:
            found.append((_FORECAST_LABELS[name], window.rows[name]))
        if name == "mean":
            numbers = window.sample_numbers or range(len(window.samples))
            labels = [f"sample {number + 1}" for number in numbers]
            found += list(zip(labels, window.samples, strict=True))
    return found


def _video_strip(window: ShownWindow) -> list[Strip]:
    """The video's frames, or no strip."""
    if not window.frames:
        return []
    tiles = tuple(resize_tile(frame, aspect=window.aspect, smooth=True) for frame in window.frames)
    return [Strip(label="video", alt=f"Frames of {window.title}.", tiles=tiles)]


def _columns(window: ShownWindow) -> tuple[str, ...]:
    """The times of the frames, 0 at the last that was seen."""
    return tuple(f"{time:+.1f} s" if abs(time) > 0.005 else "0 s" for time in window.times_s)


def _head_panel(
    window: ShownWindow,
    head: RGBHead | DepthHead,
    strips: Sequence[Strip],
    *,
    what: str,
    top: float = 1.0,
) -> Panel:
    found = [*strips]
    for label, row in _forecasts(window, HEAD_ROWS):
        alt = f"{what} read from the features of the row {label} at the target frames."
        tiles = [
            read_tile(head, _to_head(head, x), grid=window.grid, aspect=window.aspect, top=top)
            for x in row
        ]
        found.append(Strip(label=label, alt=alt, tiles=tuple(tiles)))
    return Panel(title=window.title, columns=_columns(window), strips=tuple(found))


def _to_head(head: torch.nn.Module, tokens: Features) -> Tensor:
    return torch.from_numpy(tokens).to(next(head.parameters()).device)


def _read(head: RGBHead | DepthHead, tokens: Tensor, grid: tuple[int, int]) -> Features:
    """Head output (C, h, w) of features (N, D), float32 whatever the autocast."""
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        output: Features = (
            head(feature_map(tokens[None].float(), grid=grid))[0].float().cpu().numpy()
        )
    return output


def _shares(classes: ClassMap, names: Sequence[str]) -> str:
    """The largest classes of a map in words: `road 60 %, car 12 %`."""
    numbers, counts = np.unique(classes[classes != IGNORE], return_counts=True)
    if not counts.size:
        return "nothing labelled"
    parts = []
    for i in np.argsort(-counts, kind="stable")[:4]:
        number = int(numbers[i])
        name = names[number] if number < len(names) else f"class {number}"
        parts.append(f"{name} {100 * counts[i] / counts.sum():.0f} %")
    return ", ".join(parts)


def _array(values: Tensor) -> Features:
    array: Features = values.float().cpu().numpy()
    return array
