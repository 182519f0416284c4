"""What a forecast evaluation reads: cache, models, labels, videos; opened and checked before work.

Called by `forecast.py`.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..extract.clips import Clip
from ..shards.cache import CacheInfo, compare
from ..shards.errors import UsageError
from ..shards.patches import PatchShards
from .config import UNNAMED, ForecastConfig
from .loading import ForecastModels, load_models
from .panels import ShownWindow, keep_features
from .pictures import Tile
from .plots import Curve, read_curve
from .predict import HorizonForecast
from .prediction_rows import PredictionRows
from .videos import clips_by_key, read_frames
from .windows import Windows, is_evaluation, open_windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ForecastInputs:
    """Everything that is read, on the device where it is computed with."""

    config: ForecastConfig
    cache: PatchShards
    models: ForecastModels
    arrangement: Windows
    """What belongs together, and its labels."""
    videos: dict[str, Clip]
    """Clip key -> clip; empty without videos."""
    curves: list[Curve]
    black: Tensor
    """(N, D) tokens of a black frame."""
    device: torch.device
    predictions: PredictionRows | None
    """Another model's frames; None without any."""

    def batches(self) -> list[list[int]]:
        """The windows that are scored: all, or those that have predictions."""
        batches = self.arrangement.batches()
        if self.predictions is None or not self.config.predictions_subset:
            return batches
        kept = set(self.predictions.folder.windows(len(self.cache)))
        rest = [[window for window in batch if window in kept] for batch in batches]
        return [batch for batch in rest if batch]

    def windows(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Features (B, T, N, D) and times (B, T) of the frames that take part, T = C + mid.

        Times are seconds from the window's first frame, float32.
        """
        num_frames = self.config.num_frames
        x = torch.from_numpy(self.cache.tokens(indices)[:, :num_frames]).to(self.device)
        times = self.cache.timestamps_s(indices)[:, :num_frames]
        return x, torch.from_numpy(times - times[:, :1]).to(self.device)

    def step_s(self, indices: list[int]) -> float:
        """Seconds of a step after the frames seen: the median over these windows."""
        config, times = self.config, self.cache.timestamps_s(indices).astype(np.float64)
        ahead = times[:, config.num_frames - 1] - times[:, config.num_context - 1]
        return float(np.median(ahead)) / config.mid_steps

    def key(self, index: int) -> str:
        """The clip of a window."""
        return self.cache.keys[int(self.cache.clip_index[index])]

    def shown_window(
        self, index: int, forecast: HorizonForecast, position: int, truth: Tensor
    ) -> ShownWindow:
        """What the panels of window `index` need: it is number `position` in the mid `forecast`,
        and its true features are `truth` (T, N, D)."""
        config, key = self.config, self.key(index)
        frame_index = self.cache.frame_index([index])[0, : config.num_frames].tolist()
        times = self.cache.timestamps_s([index])[0, : config.num_frames]
        _, _, height, width = self.cache.crop[index].tolist()
        kept = keep_features(forecast, position, grid=self.cache.grid)
        rows, samples, numbers, spread = kept
        return ShownWindow(
            title=f"{key}, window {index}",
            times_s=tuple((times - times[config.num_context - 1]).tolist()),
            aspect=width / height,
            grid=self.cache.grid,
            truth=truth.float().cpu().numpy(),
            rows=rows,
            samples=samples,
            sample_numbers=numbers,
            spread=spread,
            labels=self.arrangement.shown_labels(index),
            frames=self.arrangement.shown_frames(index) or self._frames(key, frame_index),
        )

    def _frames(self, key: str, frame_index: list[int]) -> tuple[Tile, ...]:
        if not self.videos:
            return ()
        if key not in self.videos:
            logger.warning("clip %s is not among --videos: its pictures have no frames", key)
            return ()
        return tuple(read_frames(self.videos[key], frame_index) or ())


def open_inputs(config: ForecastConfig, device: torch.device) -> ForecastInputs:
    """Open and check everything.

    Raises:
        CacheMismatch: the cache holds training windows, or a model does not belong to it; names
            the field.
        UsageError: too few frames or no windows; models, labels, videos or curves of no use.
    """
    cache = PatchShards(config.patches)
    if is_evaluation(cache.info):
        config = named(config, cache.info)
    else:
        compare(
            cache.info.identity,
            {"sampling": {"policy": "uniform"}},
            what_got=f"--patches {config.patches}",
            what_wanted="a cache of policy evaluation, or of windows to evaluate on",
            fields=["sampling.policy"],
            advice="extract one with --dataset, or with --sampling uniform",
        )
    if cache.shape[0] < config.num_frames:
        raise UsageError(
            f"--patches {config.patches}: {cache.shape[0]} frames a window, wanted at least "
            f"num_context + mid_steps = {config.num_frames}; extract with --num-frames "
            f"{config.num_frames}"
        )
    if not cache.num_windows:
        raise UsageError(f"--patches {config.patches}: no windows; see its quarantine.jsonl")
    models = load_models(config, cache.info, device)
    return ForecastInputs(
        config=config,
        cache=cache,
        models=models,
        arrangement=open_windows(
            config, cache, models.head, _last_frames(cache, config.num_frames)
        ),
        videos=clips_by_key(config.videos) if config.videos else {},
        curves=[read_curve(path) for path in config.curves],
        black=torch.tensor(cache.black, device=device),
        device=device,
        predictions=PredictionRows(config, cache, device) if config.predictions else None,
    )


def named(config: ForecastConfig, info: CacheInfo) -> ForecastConfig:
    """The config with the data set's own name, where none was given."""
    name = info.identity["sampling"].get("dataset")
    return replace(config, dataset=name) if config.dataset == UNNAMED and name else config


def _last_frames(cache: PatchShards, num_frames: int) -> dict[str, int]:
    """Clip key -> the highest frame index in the first `num_frames` of its windows."""
    last: dict[str, int] = {}
    highest = cache.table().frame_index[:, :num_frames].max(axis=1)
    for clip, frame in zip(cache.clip_index.tolist(), highest.tolist(), strict=True):
        last[cache.keys[clip]] = max(frame, last.get(cache.keys[clip], 0))
    return last


def windows_to_show(clip_index: NDArray[np.int64], count: int) -> list[int]:
    """Up to `count` window numbers, spread evenly: first over clips, then over their windows."""
    # Rank of each window within its clip: windows of equal rank are one round through the clips.
    order = np.argsort(clip_index, kind="stable")
    clips = clip_index[order]
    starts = np.searchsorted(clips, clips)
    rank = np.arange(len(clips)) - starts
    rounds = order[np.lexsort((clips, rank))]
    num_clips = len(np.unique(clip_index))
    if count < num_clips:
        picked = rounds[np.linspace(0, num_clips, count, endpoint=False).astype(int)]
    else:
        picked = rounds[:count]
    return sorted(picked.tolist())
