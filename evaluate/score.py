"""Running sums of an evaluation: from the forecasts of a batch to rows, probes and best-of-k.

Per-window values are kept (one number each) and averaged at the end in the order of the windows,
so that the batch size does not change a digit.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..shards.errors import DeltatokError
from ..train.models.heads import SegmentationHead
from ..train.probes import participation_ratio
from .config import ForecastConfig
from .dense import Head, LabelledFrame, LabelScores
from .predict import HorizonForecast, WindowBatch, feature_loss
from .probes import best_of_k, mean_square_motion, mean_square_spread, spread_ratio
from .protocol import segment
from .rows import HORIZONS, ROW_NAMES, ReportRow
from .sequences import Score, SequenceScores


class Scorer:
    """Takes every window once, at both horizons, in the order of the cache."""

    def __init__(
        self,
        config: ForecastConfig,
        *,
        head: Head | None,
        grid: tuple[int, int],
        keys: Sequence[str],
    ) -> None:
        """`keys`: the sequence of every window of the cache; `sequences` keeps scores by it."""
        self._config = config
        self._keys = keys
        self.sequences = SequenceScores()
        self._labels = None if head is None else LabelScores(head, grid=grid, record=self._record)
        self._z: list[Tensor] = []
        self._losses: dict[tuple[str, str], list[list[float]]] = defaultdict(list)  # by step
        self._open_loop: dict[str, list[float]] = defaultdict(list)
        self._sample_losses: dict[str, list[list[float]]] = defaultdict(list)
        self._spread: dict[str, list[float]] = defaultdict(list)
        self._motion: dict[str, list[float]] = defaultdict(list)

    def add_tokens(self, batch: WindowBatch) -> None:
        """Take in the delta tokens of frame pairs (token 0, black -> frame 0, is another thing)."""
        self._z.append(batch.z[:, 1:].flatten(0, 1).cpu())
        self.sequences.windows.update(self._keys[index] for index in batch.indices)

    def add(self, horizon: str, forecast: HorizonForecast, batch: WindowBatch) -> None:
        """Take in one horizon's feature losses and probes."""
        for name, row in forecast.rows.items():
            losses = feature_loss(row, forecast.truth).tolist()
            self._check_finite(losses, name, batch)
            self._losses[horizon, name] += losses
            for index, steps in zip(batch.indices, losses, strict=True):
                score = Score(horizon, name, "feature_loss")
                self._record(score, self._keys[index], steps[-1], 1)
        self._open_loop[horizon] += feature_loss(forecast.open_loop, forecast.truth)[:, -1].tolist()
        is_first_seed = "copy_last" in forecast.rows
        if is_first_seed and forecast.samples is not None and forecast.sample_losses is not None:
            truth, last = forecast.truth[:, -1], forecast.rows["copy_last"][:, 0]
            self._sample_losses[horizon] += forecast.sample_losses.tolist()
            self._spread[horizon] += mean_square_spread(forecast.samples[:, :, -1]).tolist()
            self._motion[horizon] += mean_square_motion(truth, last).tolist()

    def add_labels(
        self, horizon: str, forecast: HorizonForecast, frames: Sequence[LabelledFrame]
    ) -> None:
        """Take in the labels of a horizon's target frames; nothing without a head."""
        if self._labels is not None:
            self._labels.add(horizon, forecast.rows, frames)
            for frame in frames if horizon == HORIZONS[0] else ():  # both have the same targets
                self.sequences.add_label(frame.sequence, frame.label)

    def rows(self) -> list[ReportRow]:
        """All rows, mIoU or RMSE first."""
        labelled = {} if self._labels is None else self._labels.values()
        metric = "" if self._labels is None else self._labels.metric
        found = []
        for horizon in HORIZONS:
            for name in ROW_NAMES:
                if (horizon, name) in labelled:
                    found.append(self._row(horizon, name, metric, labelled[horizon, name]))
                if (horizon, name) in self._losses:
                    value = _mean([steps[-1] for steps in self._losses[horizon, name]])
                    found.append(self._row(horizon, name, "feature_loss", value))
        return found

    def per_class_iou(self) -> list[dict[str, Any]]:
        """[{"horizon", "row", "iou": [0-1 or None of every class]}], empty without mIoU."""
        ious = {} if self._labels is None else self._labels.per_class()
        return [
            {"horizon": horizon, "row": name, "iou": ious[horizon, name]}
            for horizon in HORIZONS
            for name in ROW_NAMES
            if (horizon, name) in ious
        ]

    def best_of_k(self) -> list[dict[str, Any]]:
        """[{"horizon", "k", "feature_loss"}], empty without a world model."""
        return [
            {"horizon": horizon, "k": k, "feature_loss": float(loss)}
            for horizon, losses in self._sample_losses.items()
            for k, loss in enumerate(best_of_k(np.array(losses)), start=1)
        ]

    def probes(self) -> dict[str, Any]:
        """The probes that come from the forecasts; see report.PROBE_TEXTS."""
        probes: dict[str, Any] = {
            "z_participation_ratio": participation_ratio(torch.cat(self._z)),
            "open_loop_feature_loss": {h: _mean(v) for h, v in self._open_loop.items()},
            "feature_loss_by_step": {
                name: np.mean(self._losses["mid", name], axis=0).tolist()
                for name in ROW_NAMES
                if ("mid", name) in self._losses
            },
        }
        if self._spread:
            probes["sample_spread"] = {
                h: spread_ratio(spread, self._motion[h]) for h, spread in self._spread.items()
            }
        return probes

    def _record(self, score: Score, sequence: str, sums: ArrayLike, counts: ArrayLike) -> None:
        self.sequences.add(score, self._config.seed, sequence, sums, counts)

    def _row(self, horizon: str, name: str, metric: str, value: float) -> ReportRow:
        return ReportRow(
            dataset=self._config.dataset, horizon=horizon, row=name, metric=metric, value=value
        )

    def _check_finite(self, losses: list[list[float]], name: str, batch: WindowBatch) -> None:
        for index, steps in zip(batch.indices, losses, strict=True):
            if not np.isfinite(steps).all():
                raise DeltatokError(
                    f"window {index}: the features of the row {name} are not finite; evaluate "
                    "with --autocast float32, or check the model that made them"
                )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def class_map(
    head: SegmentationHead, tokens: Tensor, *, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Class map int64 (H, W) = size from features (N, D), in float32 whatever the autocast: logits
    of bfloat16 tie often, and ties go to the first class."""
    with torch.autocast(tokens.device.type, enabled=False):
        return segment(head, tokens[None].float(), grid=grid, size=size)[0]
