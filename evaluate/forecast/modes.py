"""Mode recall, mode precision and calibration: forecasts held against all possible futures.

    mode_recall            share of the possible futures that some forecast hits
    mode_recall_weighted   the same, each future counting as much as it is probable
    mode_precision         share of the forecasts that are a possible future

Averaged over windows; a single forecast's recall is at most 1 / (number of its futures). What a
forecast shows is what the segmentation head reads from its features; see `modes.py` for when two
pictures are alike. Called by `forecast.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.errors import UsageError
from ..shards.patches import PatchShards
from ..train.draws import seed_for
from ..train.models.heads import SegmentationHead
from .config import ForecastConfig
from .known_futures import FutureFolder, KnownFutures
from .modes import NO_MODE, Modes, find_modes, hits, recall_of_draws
from .predict import HorizonForecast, WindowBatch
from .protocol import IGNORE, segment
from .rows import HORIZONS, MODE_METRICS, MODE_ROWS
from .sequences import Score, SequenceScores

SAMPLES_ROW = "samples"
BIN_EDGES = (0.0, 0.001, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Bins of the predicted frequency; the first holds the modes that no sample hits."""
_DRAWS = 64
"""Sets of true draws a window, for what perfect sampling would score."""


@dataclass
class Calibration:
    """One horizon's modes: how often samples hit each, and how probable it is."""

    predicted: list[float] = field(default_factory=list)
    true: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    """By window: half the summed difference of frequency and probability, 0 to 1."""
    distance_of_draws: list[float] = field(default_factory=list)
    recall_of_draws: list[tuple[float, float]] = field(default_factory=list)
    """By window: mode recall of as many true draws, plain and by probability."""
    recall_of_one: list[tuple[float, float]] = field(default_factory=list)
    """The same of one true draw."""

    def add(self, modes: Modes, found: NDArray[np.int64], seed: int) -> None:
        """Take in the modes that a window's samples hit."""
        true, count = modes.probability, len(found)
        frequency = np.bincount(found[found != NO_MODE], minlength=len(true)) / count
        self.predicted += frequency.tolist()
        self.true += true.tolist()
        missed = float(np.mean(found == NO_MODE))
        self.distance.append(float(np.abs(frequency - true).sum() + missed) / 2)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(count, true / true.sum(), size=_DRAWS) / count
        self.distance_of_draws.append(float(np.abs(drawn - true).sum(axis=1).mean()) / 2)
        self.recall_of_draws.append(recall_of_draws(true, count))
        self.recall_of_one.append(recall_of_draws(true, 1))

    def summary(self) -> dict[str, Any]:
        """Plain JSON values; mode_section.py has the words."""
        bins = reliability(np.array(self.predicted), np.array(self.true))
        gaps = [abs(found["frequency"] - found["probability"]) * found["modes"] for found in bins]
        return {
            "modes_per_window": len(self.true) / len(self.distance),
            "calibration_error": sum(gaps) / len(self.true),
            "frequency_distance": float(np.mean(self.distance)),
            "frequency_distance_of_true_draws": float(np.mean(self.distance_of_draws)),
            "true_draws": _recalls(self.recall_of_draws),
            "one_true_draw": _recalls(self.recall_of_one),
            "reliability": bins,
        }


class ModeScorer:
    """Holds forecasts against the known futures of their windows."""

    def __init__(
        self,
        config: ForecastConfig,
        cache: PatchShards,
        head: SegmentationHead,
    ) -> None:
        """Raises UsageError where `config.futures` is no folder or a clip has none in it."""
        if config.futures is None:
            raise UsageError("futures: not given")
        self._config, self._cache, self._head = config, cache, head
        self._folder = FutureFolder(config.futures)
        self._calibration: dict[str, Calibration] = {}
        for horizon in HORIZONS:
            for index in range(len(cache)):
                self._futures(horizon, index)

    def add(
        self,
        horizon: str,
        forecast: HorizonForecast,
        batch: WindowBatch,
        *,
        seed: int,
        scores: SequenceScores,
    ) -> None:
        """Score a batch of one horizon into `scores`."""
        rows = {name: row[:, None, -1] for name, row in forecast.rows.items() if name in MODE_ROWS}
        if forecast.samples is not None:
            rows[SAMPLES_ROW] = forecast.samples[:, :, -1]
        for position, index in enumerate(batch.indices):
            futures = self._futures(horizon, index)
            modes = find_modes(futures, threshold=self._config.mode_overlap)
            for name, features in rows.items():
                tokens = features[position]
                found = hits(modes, self._class_maps(tokens, modes))
                if name == SAMPLES_ROW:
                    draws = seed_for("true draws", self._config.seed, horizon, index)
                    self._calibration.setdefault(horizon, Calibration()).add(modes, found, draws)
                key = self._cache.keys[int(self._cache.clip_index[index])]
                for metric, value in zip(MODE_METRICS, mode_values(modes, found), strict=True):
                    scores.add(Score(horizon, name, metric), seed, key, value, 1)

    def probes(self) -> dict[str, Any]:
        """{"modes": {"overlap", horizon: calibration}}, without samples only the overlap."""
        found = {horizon: part.summary() for horizon, part in self._calibration.items()}
        return {"modes": {"overlap": self._config.mode_overlap, **found}}

    def _futures(self, horizon: str, index: int) -> KnownFutures:
        config = self._config
        frames = self._cache.frame_index([index])[0, : config.num_frames].tolist()
        seen = frames[config.context_start(horizon) + config.num_context - 1]
        key = self._cache.keys[int(self._cache.clip_index[index])]
        futures = self._folder.window(key, seen, frames[-1])
        known = futures.classes[futures.classes != IGNORE]
        if known.size and int(known.max()) >= self._head.config.num_classes:
            raise UsageError(
                f"clip {key}: its futures have class {int(known.max())}, the head knows 0 to "
                f"{self._head.config.num_classes - 1} (255 = counts nowhere)"
            )
        return futures

    def _class_maps(self, tokens: Tensor, modes: Modes) -> NDArray[np.uint8]:
        """Class maps uint8 (S, H, W), of the futures' size, of features (S, N, D)."""
        height, width = modes.futures.classes.shape[1:]
        with torch.autocast(tokens.device.type, enabled=False):
            maps = segment(self._head, tokens.float(), grid=self._cache.grid, size=(height, width))
        found: NDArray[np.uint8] = maps.to("cpu", torch.uint8).numpy()
        return found


def reliability(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Modes by predicted frequency: [{"modes", "frequency", "probability"}], means of each bin
    that is not empty."""
    which = np.clip(np.searchsorted(BIN_EDGES, predicted, side="right") - 1, 0, len(BIN_EDGES) - 2)
    return [
        {
            "modes": int((which == number).sum()),
            "frequency": float(predicted[which == number].mean()),
            "probability": float(true[which == number].mean()),
        }
        for number in np.unique(which).tolist()
    ]


def mode_values(modes: Modes, found: NDArray[np.int64]) -> tuple[float, float, float]:
    """The MODE_METRICS of one window, from the modes (S,) that its forecasts hit."""
    is_hit = np.isin(np.arange(len(modes.probability)), found)
    weighted = float(modes.probability[is_hit].sum() / modes.probability.sum())
    return float(is_hit.mean()), float(np.mean(found != NO_MODE)), weighted


def _recalls(found: list[tuple[float, float]]) -> dict[str, float]:
    plain, weighted = np.mean(found, axis=0).tolist()
    return {"mode_recall": plain, "mode_precision": 1.0, "mode_recall_weighted": weighted}
