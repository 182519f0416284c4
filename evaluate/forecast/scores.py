"""Scores of forecasts: from the features of a batch to rows, probes and best-of-k.

mIoU, RMSE and delta1 hold what a head reads from features against labels. A labelled frame was seen
through one window (the whole frame) or two (square crops); each half of its label is scored against
the prediction of its crop. Feature losses and probes are kept per window (one number each) and
averaged at the end in the order of the windows, so that the batch size does not change a digit.

Letters: B windows of a batch, P crops of a frame (1 or 2), H steps of the horizon, S samples,
N patch tokens, D channels, C classes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ...shards.errors import DeltatokError, UsageError
from ...shards.evaluation.geometry import Cut
from ...shards.evaluation.labels import IGNORE, NO_DEPTH
from ...train.heads.crops import cut_labels, upsample_half, upsample_predictions
from ...train.models.heads import DepthHead, SegmentationHead, feature_map
from ...train.probes import participation_ratio
from ..report.rows import (
    ENSEMBLE_METRICS,
    ENSEMBLE_ROWS,
    FREQUENCY_METRICS,
    HORIZONS,
    MODE_METRICS,
    MODE_ROWS,
    ROW_NAMES,
    ReportRow,
)
from .config import ForecastConfig
from .intervals import Resamples
from .rollout import HorizonForecast, WindowBatch, feature_loss, sample_losses
from .sequences import Score, SequenceScores, values

Head = SegmentationHead | DepthHead
Label = NDArray[np.uint8] | NDArray[np.float32]
"""(H, W): classes with IGNORE, or metres with NO_DEPTH."""
DELTA1 = 1.25
"""The ratio of depths that the metric delta1 allows (Eigen et al. 2014)."""
WHOLE = Cut(wide=None, overlap=False)
"""How a frame is cut that one window shows."""


@dataclass(frozen=True, kw_only=True)
class LabelledFrame:
    """A target frame's label, and which windows of the batch see the frame."""

    sequence: str
    """What the frame belongs to: frames of one sequence are alike."""
    positions: tuple[int, ...]
    """Places in the batch, left or top crop first: P of them."""
    cut: Cut
    label: Label


def label_sums(
    head: Head, tokens: Tensor, frame: LabelledFrame, *, grid: tuple[int, int]
) -> dict[str, tuple[ArrayLike, ArrayLike]]:
    """Metric -> sums and counts (C,) or () that a frame adds to it, from the features (P, N, D) of
    its crops: mIoU, or RMSE and delta1."""
    label = torch.from_numpy(frame.label)[None].to(tokens.device)
    halves = cut_labels(label, frame.cut)
    size = (halves.shape[-2], halves.shape[-1])
    maps = read_maps(head, tokens, grid=grid, cut=frame.cut, size=size)
    if isinstance(head, DepthHead):
        return {"rmse": squared_errors(maps, halves), "delta1": near_depths(maps, halves)}
    confusion = confusion_matrix(maps.argmax(dim=1), halves, num_classes=head.config.num_classes)
    return {"miou": class_counts(confusion)}


def read_maps(
    head: Head,
    tokens: Tensor,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    cut: Cut = WHOLE,
) -> Tensor:
    """Logits (B, C, *size) or metres (B, 1, *size) from features (B, N, D): of whole frames, or of
    the crops of frames at the size of their cut label. In float32 whatever the autocast: logits of
    bfloat16 tie often, and ties go to the first class."""
    return upsample_predictions(_read(head, tokens, grid), cut, size=size)


def class_maps(
    head: SegmentationHead,
    tokens: Tensor,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[Cut, bool] = (WHOLE, False),
) -> NDArray[np.uint8]:
    """Class maps uint8 (B, *size) of features (B, N, D) that show whole frames, or all the same
    `crop`: how frames are cut, and whether it is the second one. size: of its half of a label."""
    cut, second = crop
    logits = upsample_half(_read(head, tokens, grid), cut, second=second, size=size)
    classes: NDArray[np.uint8] = logits.argmax(dim=1).to("cpu", torch.uint8).numpy()
    return classes


def _read(head: Head, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        maps: Tensor = head(feature_map(tokens.float(), grid=grid))
    return maps


def confusion_matrix(predictions: Tensor, label: Tensor, *, num_classes: int) -> Tensor:
    """Pixels int64 (C, C), rows are labels, columns predictions; those of label 255 count nowhere.

    label: integers (B, H, W); predictions: the same (classes) or float (B, C, H, W) (logits).
    """
    found: Tensor = multiclass_confusion_matrix(
        predictions,
        label.long(),
        num_classes=num_classes,
        ignore_index=IGNORE,
        validate_args=False,
    )
    return found


def class_counts(confusion: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of intersection and of union of every class, (C,) each, of a confusion matrix."""
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return both.cpu().numpy(), either.cpu().numpy()


def class_ious(both: NDArray[Any], either: NDArray[Any]) -> list[float | None]:
    """IoU of every class from `class_counts`; None where a class never occurs."""
    pairs = zip(both.tolist(), either.tolist(), strict=True)
    return [(shared / union) if union else None for shared, union in pairs]


def squared_errors(metres: Tensor, label: Tensor) -> tuple[float, int]:
    """Summed squared error and number of the pixels that have a depth; metres (P, 1, h, w), label
    (P, h, w)."""
    valid = label > NO_DEPTH
    errors = metres.reshape(label.shape)[valid].double() - label[valid]
    return float(errors.square().sum()), int(valid.sum())


def near_depths(metres: Tensor, label: Tensor) -> tuple[int, int]:
    """Pixels whose depth is within DELTA1 times the label either way, and pixels that have a depth
    at all; metres (P, 1, h, w), label (P, h, w)."""
    valid = label > NO_DEPTH
    found, wanted = metres.reshape(label.shape)[valid].double(), label[valid].double()
    near = torch.maximum(found / wanted, wanted / found) < DELTA1
    return int(near.sum()), int(valid.sum())


def check_labels(frames: Iterable[LabelledFrame], head: Head) -> None:
    """Reads every label once, before any work: one that is of no use is found now, not after hours.

    Raises UsageError for such a label (whatever reads it does), and where no label has a single
    valid pixel.
    """
    depth = isinstance(head, DepthHead)
    num_valid = 0
    for frame in frames:
        valid = frame.label > NO_DEPTH if depth else frame.label != IGNORE
        num_valid += int(np.count_nonzero(valid))
    if not num_valid:
        nothing = (
            f"no pixel of any target frame has a depth (all {NO_DEPTH:g})"
            if depth
            else f"every pixel of every target frame is {IGNORE} (ignore)"
        )
        raise UsageError(f"labels: {nothing}; give the labels of these frames, or no --labels")


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
        self._curves = SequenceScores()
        self._head, self._grid = head, grid
        self._label_metrics = ("rmse", "delta1") if isinstance(head, DepthHead) else ("miou",)
        self._z: list[Tensor] = []
        self._losses: dict[tuple[str, str], list[list[float]]] = defaultdict(list)  # by step
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
            self._losses[horizon, name] += losses
            for index, steps in zip(batch.indices, losses, strict=True):
                if not np.isfinite(steps).all():
                    raise DeltatokError(
                        f"window {index}: the features of the row {name} are not finite; evaluate "
                        "with --autocast float32, or check the model that made them"
                    )
                score = Score(horizon, name, "feature_loss")
                self._record(score, self._keys[index], steps[-1], 1)
        is_first_seed = "copy_last" in forecast.rows
        if is_first_seed and forecast.samples is not None:
            truth, last = forecast.truth[:, -1], forecast.rows["copy_last"][:, 0]
            losses = sample_losses(forecast.samples, forecast.truth).tolist()
            self._sample_losses[horizon] += losses
            means = mean_of_k(forecast.samples[:, :, -1], truth).tolist()
            for index, ours, of_mean in zip(batch.indices, losses, means, strict=True):
                for name, points in (("best", best_of_k(np.array([ours]))), ("mean", of_mean)):
                    score = Score(horizon, name, "feature_loss")
                    one_each = np.ones(len(points))
                    self._curves.add(score, self._config.seed, self._keys[index], points, one_each)
            self._spread[horizon] += mean_square_spread(forecast.samples[:, :, -1]).tolist()
            self._motion[horizon] += mean_square_motion(truth, last).tolist()

    def add_labels(
        self, horizon: str, forecast: HorizonForecast, frames: Sequence[LabelledFrame]
    ) -> None:
        """Take in the labels of a horizon's target frames, which rows (B, H, N, D) show at their
        last step; nothing without a head."""
        if self._head is None:
            return
        for frame in frames:
            for name, row in forecast.rows.items():
                tokens = row[list(frame.positions), -1]
                found = label_sums(self._head, tokens, frame, grid=self._grid)
                for metric, part in found.items():
                    self._record(Score(horizon, name, metric), frame.sequence, *part)
            if horizon == HORIZONS[0]:  # both have the same targets
                self.sequences.add_label(frame.sequence, frame.label)

    def rows(self) -> list[ReportRow]:
        """All rows, those of the head first."""
        found = []
        for horizon in HORIZONS:
            for name in ROW_NAMES:
                for metric in self._label_metrics:
                    score = Score(horizon, name, metric)
                    if score in self.sequences.parts:
                        value = values(metric, *self.sequences.total(score, self._config.seed))
                        found.append(self._row(horizon, name, metric, float(value)))
                if (horizon, name) in self._losses:
                    value = _mean([steps[-1] for steps in self._losses[horizon, name]])
                    found.append(self._row(horizon, name, "feature_loss", value))
        return found

    def per_class_iou(self) -> list[dict[str, Any]]:
        """[{"horizon", "row", "iou": [0-1 or None of every class]}], empty without mIoU."""
        scores = [Score(horizon, name, "miou") for horizon in HORIZONS for name in ROW_NAMES]
        return [
            {
                "horizon": score.horizon,
                "row": score.row,
                "iou": class_ious(*self.sequences.total(score, self._config.seed)),
            }
            for score in scores
            if score in self.sequences.parts
        ]

    def best_of_k(self) -> list[dict[str, Any]]:
        """[{"horizon", "k", "feature_loss", "interval_low", "interval_high"}] of the best of k
        samples, and "mean_feature_loss" with an interval of the mean of k; empty without a world
        model."""
        resamples = Resamples(len(self.sequences.windows), seed=self._config.seed)
        found = []
        for horizon, losses in self._sample_losses.items():
            best, mean = (
                resamples.curve(sums)
                for name in ("best", "mean")
                for sums in self._curves.by_seed(
                    Score(horizon, name, "feature_loss"), self.sequences.windows
                ).values()
            )
            found += [
                {
                    "horizon": horizon,
                    "k": k,
                    "feature_loss": float(loss),
                    "interval_low": best[k - 1].low,
                    "interval_high": best[k - 1].high,
                    "mean_feature_loss": mean[k - 1].value,
                    "mean_interval_low": mean[k - 1].low,
                    "mean_interval_high": mean[k - 1].high,
                }
                for k, loss in enumerate(best_of_k(np.array(losses)), start=1)
            ]
        return found

    def probes(self) -> dict[str, Any]:
        """The probes that come from the forecasts; the page says what they are."""
        probes: dict[str, Any] = {
            "z_participation_ratio": participation_ratio(torch.cat(self._z)),
            "open_loop_feature_loss": {
                horizon: _mean([steps[-1] for steps in losses])
                for (horizon, name), losses in self._losses.items()
                if name == "reconstruction_open_loop"
            },
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


def with_intervals(
    config: ForecastConfig, rows: Sequence[ReportRow], scores: SequenceScores
) -> list[ReportRow]:
    """The rows, each with its interval and its seeds' values; after them those of the modes and of
    the ensemble. A share of nothing (the likeliest future among no hits) is no row."""
    others = (
        (MODE_ROWS, MODE_METRICS),
        (MODE_ROWS, FREQUENCY_METRICS),
        (ENSEMBLE_ROWS, ENSEMBLE_METRICS),
    )
    more_rows = [
        ReportRow(dataset=config.dataset, horizon=horizon, row=row, metric=metric, value=np.nan)
        for names, metrics in others
        for horizon in HORIZONS
        for row in names
        for metric in metrics
        if Score(horizon, row, metric) in scores.parts
    ]
    resamples = Resamples(len(scores.windows), seed=config.seed)
    found = [_with_interval(row, resamples, scores) for row in more_rows]
    known = [row for row in found if np.isfinite(row.value)]
    return [*(_with_interval(row, resamples, scores) for row in rows), *known]


def _with_interval(row: ReportRow, resamples: Resamples, scores: SequenceScores) -> ReportRow:
    by_seed = scores.by_seed(Score(row.horizon, row.row, row.metric), scores.windows)
    if not by_seed:
        return row
    found = resamples.estimate(row.metric, by_seed)
    by_its_seed = [resamples.value(row.metric, sums) for sums in by_seed.values()]
    # A single seed's value stays the one that its metric accumulated.
    keeps = len(by_seed) == 1 and np.isfinite(row.value)
    return replace(
        row,
        value=row.value if keeps else found.value,
        interval_low=found.low,
        interval_high=found.high,
        by_seed=by_its_seed if len(by_seed) > 1 else [],
    )


def best_of_k(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected loss of the best of k samples, k = 1..S, averaged over windows: float64 (S,).

    losses: (W, S), one loss for each window and sample. The expectation is over all choices of k
    of the S samples, so that it does not hang on which samples came first; k = S is the best row.
    """
    num_samples = losses.shape[1]
    mean_by_rank = np.sort(losses, axis=1).mean(axis=0)
    expected = np.empty(num_samples)
    for k in range(1, num_samples + 1):
        # The i-th smallest (from 0) is the best of k when the other k - 1 are among the larger.
        others = [math.comb(num_samples - 1 - i, k - 1) for i in range(num_samples)]
        expected[k - 1] = sum(mean_by_rank * others) / math.comb(num_samples, k)
    return expected


def mean_of_k(samples: Tensor, truth: Tensor) -> Tensor:
    """Feature loss of the mean of k samples (B, S, N, D), k = 1..S, to the truth (B, N, D): (B, S).

    Averaged over the S choices of k that follow one another, the first after the last: k = 1 is the
    loss of one sample, k = S the mean row.
    """
    total, losses = torch.zeros_like(samples), []
    for k in range(1, samples.shape[1] + 1):
        total = total + samples.roll(1 - k, dims=1)
        losses.append(feature_loss(total / k, truth[:, None].expand_as(total)).mean(dim=1))
    return torch.stack(losses, dim=1)


def mean_square_spread(samples: Tensor) -> Tensor:
    """Squared distance of samples (B, S, N, D) from their mean, averaged over all but B: (B,)."""
    return samples.var(dim=1, correction=0).mean(dim=(1, 2))


def mean_square_motion(truth: Tensor, last: Tensor) -> Tensor:
    """Squared distance of the truth (B, N, D) from the last context frame (B, N, D): (B,)."""
    return (truth - last).square().mean(dim=(1, 2))


def spread_ratio(spread: Sequence[float], motion: Sequence[float]) -> float | None:
    """Root of (summed spread / summed motion): 0 = all samples alike, 1 = they differ as much as
    the frames do. None where nothing moves."""
    return (sum(spread) / sum(motion)) ** 0.5 if sum(motion) > 0 else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
