"""Predicted frames through the cache's own backbone: the rows `predictions_best`, `_mean`.

Frames are resized and cut exactly as the frames in the cache were, then scored as the samples of a
world model are. Called by `forecast.py`. B windows, S samples, H steps, N patch tokens, D channels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extract.backbone import Autocast, Backbone
from ..extract.resize import resize_bilinear
from ..shards.crops import compute_resize_sizes, square_corners
from ..shards.errors import UsageError
from ..shards.patches import PatchShards
from ..train.targets import windows_of_clips
from .config import ForecastConfig
from .parts import check_same_features
from .predictions import Frames, PredictionFolder
from .rollout import best_sample, mean_sample

ASPECT_SLACK = 0.05
"""Part by which a predicted frame's shape may differ from the region's: models predict at sizes of
their own (1280 x 704 for 16:9 is 2 % off), crops and bars are further off (a guess)."""
FRAMES_AT_ONCE = 32  # through the backbone


@dataclass(frozen=True, kw_only=True)
class View:
    """What a window shows of a frame: `region` is resized to `resized`, then cut at `corner`."""

    region: tuple[float, float]
    """Height and width in source pixels; only their ratio matters."""
    resized: tuple[int, int]
    corner: tuple[int, int]


class PredictionRows:
    """Scores a PredictionFolder beside the forecasts of a cache."""

    def __init__(self, config: ForecastConfig, cache: PatchShards, device: torch.device) -> None:
        """Open folder and backbone.

        Raises:
            CacheMismatch: a backbone that did not make the cache; names both fingerprints.
            UsageError: predictions missing, or no such backbone.
        """
        if config.backbone is None:
            raise UsageError("--predictions without --backbone: frames have to become features")
        identity = cache.info.identity
        self.folder = PredictionFolder(config, cache)
        autocast: Autocast = identity["autocast_dtype"]
        self._backbone = Backbone.load(config.backbone, device=device, autocast=autocast)
        check_same_features(
            self._backbone,
            identity,
            what_got=f"--backbone {config.backbone}",
            what_wanted=f"--patches {config.patches}",
        )
        self._frame_size = int(identity["preprocessing"]["frame_size"])
        self._views = _views(cache, self._frame_size)

    def provenance(self) -> dict[str, Any]:
        """What the report says of them."""
        return {
            "folder": self.folder.root.resolve().name,
            "num_samples": self.folder.num_samples,
            "backbone": self._backbone.name,
        }

    def rows(self, windows: list[int], horizon: str, truth: Tensor) -> dict[str, Tensor]:
        """Row name -> (B, H, N, D) of the windows of a batch; truth (B, H, N, D)."""
        samples = torch.stack([self._samples(window, horizon) for window in windows])
        best, _ = best_sample(samples, truth)
        return {"predictions_best": best, "predictions_mean": mean_sample(samples)}

    def _samples(self, window: int, horizon: str) -> Tensor:
        """Features (S, H, N, D) float32 of a window's predictions."""
        folder = self.folder.folder(window, horizon)
        view = self._views[window]
        samples = self.folder.frames(window, horizon)
        squares = torch.cat([self._squares(frames, view, folder) for frames in samples])
        with torch.autocast(squares.device.type, enabled=False):  # the backbone has its own
            tokens = torch.cat(
                [self._backbone.tokens(x) for x in torch.split(squares, FRAMES_AT_ONCE)]
            )
        return tokens.reshape(len(samples), -1, *tokens.shape[1:])

    def _squares(self, frames: Frames, view: View, folder: Path) -> Tensor:
        """uint8 (H, 3, side, side) as the window's own frames were made."""
        height, width = frames.shape[1:3]
        ratio = (width / height) / (view.region[1] / view.region[0])
        if abs(np.log(ratio)) > np.log1p(ASPECT_SLACK):
            raise UsageError(
                f"{folder}: frames of {width}x{height} pixels, the windows show "
                f"{view.region[1]:g}x{view.region[0]:g}: predict the whole of it, at any size of "
                "that shape, without bars or crop"
            )
        planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        resized = resize_bilinear(planes.to(self._backbone.device), view.resized)
        top, left = view.corner
        side = self._frame_size
        return resized[..., top : top + side, left : left + side]


def _views(cache: PatchShards, side: int) -> list[View]:
    """The view of every window of a uniform or evaluation cache."""
    crops = cache.crop
    if cache.info.identity["sampling"]["policy"] != "evaluation":
        return [
            View(region=(height, width), resized=(side, side), corner=(0, 0))
            for _, _, height, width in crops.tolist()
        ]
    views: dict[int, View] = {}
    for windows in windows_of_clips(cache).values():
        low = crops[windows, :2].min(axis=0)
        high = (crops[windows, :2] + crops[windows, 2:]).max(axis=0)
        height, width = (float(x) for x in np.rint(high - low))  # of whole frames: whole pixels
        resized = compute_resize_sizes(int(height), int(width), side)
        for window, corner in zip(windows, square_corners(*resized), strict=True):
            views[window] = View(region=(height, width), resized=resized, corner=corner)
    return [views[window] for window in range(len(views))]
