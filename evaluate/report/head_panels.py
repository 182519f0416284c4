"""Panels of one window: what a depth head or an RGB head reads from the features of every row.
Rows as in the other panels (panels.py).
"""

from collections.abc import Callable

import numpy as np
import torch

from ...shards.evaluation.labels import NO_DEPTH
from ...train.models.heads import DepthHead, feature_map
from ...train.models.rgb_head import RGBHead
from .panels import Features, ShownWindow, panel_columns, panel_forecasts, video_strip
from .pictures import Panel, Strip, Tile, heat_tile, resize_tile

ROWS_SHOWN = ("present", "reconstruction", "best", "mean", "discriminative", "copy_last")


def rgb_panel(window: ShownWindow, head: RGBHead, device: torch.device) -> Panel:
    """Pictures decoded from features, about what a camera would have seen."""

    def tile(tokens: Features) -> Tile:
        picture = _read(head, tokens, window.grid, device).clip(0, 1)
        pixels = np.rint(255 * picture).astype(np.uint8).transpose(1, 2, 0)
        return resize_tile(pixels, aspect=window.aspect, smooth=True)

    return _panel(window, [*video_strip(window)], tile, what="Picture")


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
    return _panel(window, strips, tile, what="Depth")


def _panel(
    window: ShownWindow, strips: list[Strip], tile: Callable[[Features], Tile], *, what: str
) -> Panel:
    for label, row in panel_forecasts(window, ROWS_SHOWN):
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
