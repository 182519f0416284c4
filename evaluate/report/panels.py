"""The panels of one window: features as colours, and what a head reads from them.

A `ShownWindow` is kept of each window that is to be shown, and becomes panels at the end. Rows from
top to bottom: video, truth or labels, then the forecasts, then copy last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...shards.evaluation.labels import IGNORE, NO_DEPTH
from ...train.models.heads import DepthHead, feature_map
from ...train.models.rgb_head import RGBHead
from ..forecast.rollout import HorizonForecast
from ..forecast.scores import Label
from .pictures import (
    Panel,
    Strip,
    Tile,
    class_legend,
    class_palette,
    class_tile,
    fit_pca_colours,
    heat_tile,
    resize_tile,
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
Segment = Callable[[Features, tuple[int, int]], ClassMap]
"""Features (N, D) and a size (H, W) -> class map (H, W)."""

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


def feature_panel(window: ShownWindow) -> Panel:
    """All rows as colours of one basis, fitted on the window's true features."""
    colours = fit_pca_colours(window.truth.reshape(-1, window.truth.shape[-1]))

    def tile(tokens: Features) -> Tile:
        picture = colours(tokens, window.grid)
        return resize_tile(picture, aspect=window.aspect, smooth=False)

    strips = [*video_strip(window)]
    strips.append(
        Strip(
            label="truth",
            alt=f"True features of {window.title} as colours.",
            tiles=tuple(map(tile, window.truth)),
        )
    )
    for label, row in panel_forecasts(window, FORECASTS):
        alt = f"Features of the row {label} at the target frames, in the colours of the truth."
        strips.append(Strip(label=label, alt=alt, tiles=tuple(map(tile, row))))
    if window.spread is not None:
        top = float(window.spread.max())
        heat = [
            resize_tile(heat_tile(values, top=top), aspect=window.aspect, smooth=False)
            for values in window.spread
        ]
        alt = "Where the samples differ at the target frames: black nowhere, bright most."
        strips.append(Strip(label="spread of samples", alt=alt, tiles=tuple(heat)))
    return Panel(title=window.title, columns=panel_columns(window), strips=tuple(strips))


def class_panel(
    window: ShownWindow, segment: Segment, *, num_classes: int, class_names: Sequence[str]
) -> Panel:
    """Labels, and class maps read from the features of every row, at the labels' size."""
    palette = class_palette(num_classes)
    size = window.labels[0].shape
    labels = [label.astype(np.uint8) for label in window.labels]
    seen: list[ClassMap] = [*labels]

    def tile(classes: ClassMap) -> Tile:
        picture = class_tile(classes, palette)
        return resize_tile(picture, aspect=window.aspect, smooth=False)

    strips = [*video_strip(window)]
    strips.append(
        Strip(
            label="label",
            alt=f"Labels of {window.title}: {_shares(labels[-1], class_names)} at the end.",
            tiles=tuple(map(tile, labels)),
        )
    )
    for label, row in panel_forecasts(window, ("present", *FORECASTS)):
        maps = [segment(tokens, (size[0], size[1])) for tokens in row]
        seen += maps
        alt = f"Classes of the row {label}: {_shares(maps[-1], class_names)} at the end."
        strips.append(Strip(label=label, alt=alt, tiles=tuple(map(tile, maps))))
    return Panel(
        title=window.title,
        columns=panel_columns(window),
        strips=tuple(strips),
        legend=class_legend(seen, palette, class_names),
    )


def rgb_panel(window: ShownWindow, head: RGBHead, device: torch.device) -> Panel:
    """Pictures decoded from features, about what a camera would have seen."""

    def tile(tokens: Features) -> Tile:
        picture = _read(head, tokens, window.grid, device).clip(0, 1)
        pixels = np.rint(255 * picture).astype(np.uint8).transpose(1, 2, 0)
        return resize_tile(pixels, aspect=window.aspect, smooth=True)

    return _head_panel(window, [*video_strip(window)], tile, what="Picture")


def depth_panel(window: ShownWindow, head: DepthHead, device: torch.device) -> Panel:
    """Depths in one scale: black is near, bright as far as the farthest of the true features."""
    truth = [_read(head, x, window.grid, device)[0] for x in window.rows["present"]]
    top = float(np.max(truth))

    def tile(tokens: Features) -> Tile:
        depth = _read(head, tokens, window.grid, device)[0]
        return resize_tile(heat_tile(depth, top=top), aspect=window.aspect, smooth=False)

    strips = [*video_strip(window)]
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
    return _head_panel(window, strips, tile, what="Depth")


def panel_forecasts(window: ShownWindow, names: Sequence[str]) -> list[tuple[str, Features]]:
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


def video_strip(window: ShownWindow) -> list[Strip]:
    """The video's frames, or no strip."""
    if not window.frames:
        return []
    tiles = tuple(resize_tile(frame, aspect=window.aspect, smooth=True) for frame in window.frames)
    return [Strip(label="video", alt=f"Frames of {window.title}.", tiles=tiles)]


def panel_columns(window: ShownWindow) -> tuple[str, ...]:
    """The times of the frames, 0 at the last that was seen."""
    return tuple(f"{time:+.1f} s" if abs(time) > 0.005 else "0 s" for time in window.times_s)


def _head_panel(
    window: ShownWindow, strips: list[Strip], tile: Callable[[Features], Tile], *, what: str
) -> Panel:
    for label, row in panel_forecasts(window, HEAD_ROWS):
        alt = f"{what} read from the features of the row {label} at the target frames."
        strips.append(Strip(label=label, alt=alt, tiles=tuple(map(tile, row))))
    return Panel(title=window.title, columns=panel_columns(window), strips=tuple(strips))


def _read(
    head: RGBHead | DepthHead, tokens: Features, grid: tuple[int, int], device: torch.device
) -> Features:
    """Head output (C, h, w) of features (N, D), float32 whatever the autocast."""
    x = torch.from_numpy(tokens)[None].to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        output: Features = head(feature_map(x, grid=grid))[0].float().cpu().numpy()
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
