"""Scores by sequence (clip): what intervals and comparisons are made from.

Every metric of a report is a function of two sums over sequences, so that any choice of sequences
can be scored again from their sums alone:

    value = mean over classes with count > 0 of (sum of sums / sum of counts)

    miou            sums: intersection, counts: union, pixels, of each class
    feature_loss    sums: loss, counts: windows; one class. So with mode_recall, mode_precision.
    rmse            sums: squared error, counts: pixels; and a square root at the end

    OUT/sequences.jsonl    a line for each sequence:
        {"sequence": KEY, "windows": W, "labels": CRC-32 of its target frames' labels,
         "scores": {HORIZON: {ROW: {METRIC: {SEED: [[class, sum, count], ...]}}}}}
        classes without a count are left out, as is "labels" without labels

Letters: Q sequences, C classes, K seeds.

What the rows do not tell: spread of the samples, gain from more of them, use of the delta token.

The tokenizer's own probes (z swapped, z zeroed, copy last) are those of train/probes.py.

The dense-forecasting protocol: sizes, crops, labels, masks and metrics, as released.

Frames are resized so that the short side is the model's size and cut into two squares at the two
ends (they may overlap); labels are never resized and cut at the middle; a prediction is brought
to the size of its half of the labels. Pure functions, used by the forecast evaluation. The
geometry is in shards/crops.py and train/cuts.py, the label rules in train/label_rules.py; all can
be had from here.

Letters: B batch, T frames, C classes or channels, H, W pixels. After a cut the batch holds all
first (left or top) crops, then all second ones. Checked by tests/parity (08_eval).

Labels held against what a head reads from features: mIoU, per-class IoU, depth RMSE.

A labelled frame was seen through one window (the whole frame) or two (square crops); each half of
its label is scored against the prediction of its crop. Everything is summed over the whole set.

Letters: B windows of a batch, P crops of a frame (1 or 2), N patch tokens, D channels, C classes.

The part of a label that one square crop of its frame shows. For pictures only: metrics cut
labels at the middle (protocol.py).

Running sums of an evaluation: from the forecasts of a batch to rows, probes and best-of-k.

Per-window values are kept (one number each) and averaged at the end in the order of the windows,
so that the batch size does not change a digit.
"""

import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex

from ...shards.errors import DeltatokError, UsageError
from ...shards.evaluation.geometry import (
    KB_CROP,
    MAX_ASPECT_RATIO,
    Cut,
    compute_resize_sizes,
    cut_of,
)
from ...shards.evaluation.labels import (
    IGNORE,
    NO_DEPTH,
    cityscapes_table,
    depth_label,
    garg_mask,
    kb_crop,
    vspw_table,
)
from ...train.heads.crops import (
    cut_frames,
    cut_labels,
    join_halves,
    repeat_for_crops,
    resize,
    upsample_predictions,
)
from ...train.losses import log_cosh
from ...train.models.deltatok import DeltaTok
from ...train.models.heads import DepthHead, SegmentationHead, feature_map
from ...train.probes import participation_ratio, probe_tokenizer
from ..report.rows import HORIZONS, ROW_NAMES, ReportRow
from .config import ForecastConfig
from .rollout import HorizonForecast, WindowBatch, feature_loss


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


def tokenizer_probes(
    tokenizer: DeltaTok, frames: Tensor, *, grid: tuple[int, int], windows_at_once: int
) -> dict[str, float | None]:
    """z_swap_ratio, zero_z_ratio and copy_last_ratio on frames (V, T, N, D), in log-cosh (the
    released tokenizer loss); None where there is nothing to divide by."""
    found = probe_tokenizer(
        tokenizer, frames, grid=grid, loss=log_cosh, windows_at_once=windows_at_once
    )
    ratios = {
        "z_swap_ratio": found.z_swap_ratio,
        "zero_z_ratio": found.zero_z_ratio,
        "copy_last_ratio": found.copy_last_ratio,
    }
    return {name: ratio if math.isfinite(ratio) else None for name, ratio in ratios.items()}


__all__ = [
    "IGNORE",
    "KB_CROP",
    "MAX_ASPECT_RATIO",
    "NO_DEPTH",
    "Cut",
    "DepthRMSE",
    "MeanIoU",
    "cityscapes_table",
    "compute_resize_sizes",
    "cut_frames",
    "cut_labels",
    "cut_of",
    "depth_label",
    "garg_mask",
    "join_halves",
    "kb_crop",
    "repeat_for_crops",
    "segment",
    "upsample_predictions",
    "vspw_table",
]


def segment(
    head: SegmentationHead, tokens: Tensor, *, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Classes int64 (B, *size) of patch tokens (B, N, D) of whole frames: argmax of the resized
    logits."""
    logits: Tensor = head(feature_map(tokens, grid=grid))
    return resize(logits, size).argmax(dim=1)


class MeanIoU:
    """Mean intersection over union of one confusion matrix over the whole set, over the classes
    that occur in predictions or labels; 0-1."""

    def __init__(self, *, num_classes: int) -> None:
        self._metric = MulticlassJaccardIndex(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """labels int64 (B, H, W); predictions the same (classes) or float (B, C, H, W) (logits)."""
        self._metric.to(labels.device).update(predictions, labels)

    def compute(self) -> Tensor:
        """The mean of everything so far, float32 scalar."""
        value: Tensor = self._metric.compute()
        return value

    def confusion(self) -> Tensor:
        """int64 (C, C) pixels so far; rows are labels, columns predictions."""
        counts: Tensor = self._metric.confmat
        return counts


class DepthRMSE:
    """Root mean squared error in metres over all valid pixels of the whole set together."""

    def __init__(self) -> None:
        self._metric = MeanSquaredError(squared=False)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """predictions float (B, 1, H, W) or (B, H, W), labels float (B, H, W); metres, labels with
        NO_DEPTH where there is no value."""
        valid = labels > NO_DEPTH
        predicted = predictions.reshape(labels.shape)[valid]
        self._metric.to(labels.device).update(predicted, labels[valid])

    def compute(self) -> Tensor:
        """The error of everything so far, float32 scalar."""
        value: Tensor = self._metric.compute()
        return value


FILE_NAME = "sequences.jsonl"
ROOT_METRICS = ("rmse",)
"""Metrics that are the square root of a mean."""

MAX_CLASSES = 65_536
"""No head has more; a larger number in a file is damage."""
MAX_SUM = 1e100
"""So that sums of them are finite; a larger number in a file is damage."""


class Score(NamedTuple):
    """Which number of a report."""

    horizon: str
    row: str
    metric: str


Record = Callable[[Score, str, ArrayLike, ArrayLike], None]
"""Takes what something adds to a score of one sequence: score, sequence, sums, counts."""


class Sums(NamedTuple):
    """One number of a report, by sequence; float64 (Q, C) both."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass
class SequenceScores:
    """Takes in the parts of every score; one seed's or, read from a file, several seeds'."""

    parts: dict[Score, dict[int, dict[str, NDArray[np.float64]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    """Score -> seed -> sequence -> (2, C) sums and counts."""
    windows: Counter[str] = field(default_factory=Counter)
    """Sequence -> windows; in the order of the cache."""
    labels: dict[str, int] = field(default_factory=dict)
    """Sequence -> CRC-32 of the labels of its target frames; empty without labels."""

    def add(
        self, score: Score, seed: int, sequence: str, sums: ArrayLike, counts: ArrayLike
    ) -> None:
        """Add to the sums and counts (C,) of a score in one sequence."""
        part = np.array([np.atleast_1d(sums), np.atleast_1d(counts)], dtype=np.float64)
        held = self.parts[score][seed]
        held[sequence] = held[sequence] + part if sequence in held else part

    def add_label(self, sequence: str, label: NDArray[Any]) -> None:
        """Take in one target frame's label, once."""
        self.labels[sequence] = zlib.crc32(label.tobytes(), self.labels.get(sequence, 0))

    def merge(self, other: "SequenceScores") -> None:
        """Take in the scores of other seeds."""
        for score, seeds in other.parts.items():
            self.parts[score].update(seeds)

    def by_seed(self, score: Score, sequences: Iterable[str]) -> dict[int, Sums]:
        """Seed -> sums of a score in these sequences, zero where one has none."""
        names = list(sequences)
        found = {}
        for seed, held in sorted(self.parts.get(score, {}).items()):
            size = max(part.shape[1] for part in held.values())
            nothing = np.zeros((2, size))
            stacked = np.stack([_padded(held.get(name, nothing), size) for name in names], axis=1)
            found[seed] = Sums(stacked[0], stacked[1])
        return found


def class_counts(
    classes: Tensor, label: Tensor, *, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of intersection and of union of every class, (C,) each, of maps int64 of one shape;
    pixels whose label is 255 count nowhere."""
    counted = label != IGNORE
    pairs = label[counted] * num_classes + classes[counted]
    confusion = torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, -1)
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return both.cpu().numpy(), either.cpu().numpy()


def squared_errors(metres: Tensor, label: Tensor) -> tuple[float, int]:
    """Summed squared error and number of the pixels that have a depth; metres (P, 1, h, w), label
    (P, h, w)."""
    valid = label > NO_DEPTH
    errors = metres.reshape(label.shape)[valid].double() - label[valid]
    return float(errors.square().sum()), int(valid.sum())


def values(metric: str, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> Any:
    """The metric float64 (...) from sums and counts (..., C) of the whole set; nan of nothing."""
    known = counts > 0
    ratios = np.where(known, sums / np.where(known, counts, 1), 0).sum(axis=-1)
    number = known.sum(axis=-1)
    mean = np.where(number > 0, ratios / np.maximum(number, 1), np.nan)
    return np.sqrt(mean) if metric in ROOT_METRICS else mean


def sequences_jsonl(scores: SequenceScores) -> bytes:
    """The bytes of sequences.jsonl."""
    lines = []
    for sequence, windows in scores.windows.items():
        found: dict[str, Any] = {}
        for (horizon, row, metric), seeds in scores.parts.items():
            place = found.setdefault(horizon, {}).setdefault(row, {}).setdefault(metric, {})
            for seed, held in seeds.items():
                if sequence in held:
                    place[str(seed)] = _classes(held[sequence])
        line = {"sequence": sequence, "windows": windows, "scores": found}
        label = {"labels": scores.labels[sequence]} if sequence in scores.labels else {}
        lines.append({**line, **label})
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()


def read_sequences(folder: Path) -> SequenceScores:
    """The sequences.jsonl of a report folder; UsageError where it is none."""
    path = folder / FILE_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); evaluate again") from None
    scores = SequenceScores()
    for number, text in enumerate(lines, start=1):
        try:
            _add_line(scores, json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UsageError(
                f"{path}: line {number} is no sequence's scores ({error!r}); evaluate again"
            ) from None
    if not scores.windows:
        raise UsageError(f"{path}: no sequences; evaluate again")
    return scores


def _add_line(scores: SequenceScores, line: Mapping[str, Any]) -> None:
    sequence, windows = str(line["sequence"]), int(line["windows"])
    if sequence in scores.windows:
        raise ValueError(f"{sequence!r} a second time")
    if windows < 1:
        raise ValueError(f"{windows} windows")
    scores.windows[sequence] = windows
    if "labels" in line:
        scores.labels[sequence] = int(line["labels"])
    for horizon, rows in line["scores"].items():
        for row, metrics in rows.items():
            for metric, seeds in metrics.items():
                for seed, classes in seeds.items():
                    numbers = [int(entry[0]) for entry in classes]
                    if not all(0 <= number < MAX_CLASSES for number in numbers):
                        raise ValueError(f"classes of {row} {metric}")
                    part = np.zeros((2, 1 + max(numbers, default=0)))
                    for index, total, count in classes:
                        part[:, int(index)] = float(total), float(count)
                    if not (np.abs(part) < MAX_SUM).all() or (part[1] < 0).any():
                        raise ValueError(f"sums or counts of {row} {metric}")
                    scores.parts[Score(horizon, row, metric)][int(seed)][sequence] = part


def _classes(part: NDArray[np.float64]) -> list[list[float]]:
    return [
        [index, _plain(part[0, index]), _plain(part[1, index])]
        for index in np.flatnonzero(part[1]).tolist()
    ]


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _padded(part: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    return np.pad(part, ((0, 0), (0, size - part.shape[1])))


Head = SegmentationHead | DepthHead
Label = NDArray[np.uint8] | NDArray[np.float32]
"""(H, W): classes with IGNORE, or metres with NO_DEPTH."""
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


class LabelScores:
    """The metrics of every row and horizon against the labels, of one head."""

    def __init__(self, head: Head, *, grid: tuple[int, int], record: Record) -> None:
        """`record`: takes what each frame adds to a score, by sequence."""
        self._head = head
        self._record = record
        self._grid = grid
        self._miou: dict[tuple[str, str], MeanIoU] = {}
        self._rmse: dict[tuple[str, str], DepthRMSE] = defaultdict(DepthRMSE)

    @property
    def metric(self) -> str:
        """`miou` or `rmse`."""
        return "miou" if isinstance(self._head, SegmentationHead) else "rmse"

    def add(
        self, horizon: str, rows: Mapping[str, Tensor], frames: Sequence[LabelledFrame]
    ) -> None:
        """Take in rows (B, H, N, D) by name, whose last step is that of the labelled frames."""
        for frame in frames:
            places = list(frame.positions)
            for name, row in rows.items():
                self._update((horizon, name), row[places, -1], frame)

    def values(self) -> dict[tuple[str, str], float]:
        """(Horizon, row name) -> mIoU (0-1) or RMSE (metres)."""
        metrics = self._miou if self.metric == "miou" else self._rmse
        return {key: float(metric.compute()) for key, metric in metrics.items()}

    def per_class(self) -> dict[tuple[str, str], list[float | None]]:
        """(Horizon, row name) -> IoU (0-1) of every class, None for one that occurs in neither
        labels nor predictions. {} of depth."""
        return {key: class_ious(metric.confusion()) for key, metric in self._miou.items()}

    def _update(self, key: tuple[str, str], tokens: Tensor, frame: LabelledFrame) -> None:
        label = torch.from_numpy(frame.label)[None].to(tokens.device)
        halves = cut_labels(label, frame.cut)
        size = (halves.shape[-2], halves.shape[-1])
        maps = read_maps(self._head, tokens, grid=self._grid, cut=frame.cut, size=size)
        score = Score(*key, self.metric)
        if isinstance(self._head, DepthHead):
            self._rmse[key].update(maps, halves)
            self._record(score, frame.sequence, *squared_errors(maps, halves))
            return
        num_classes = self._head.config.num_classes
        if key not in self._miou:
            self._miou[key] = MeanIoU(num_classes=num_classes)
        classes, label = maps.argmax(dim=1), halves.long()
        self._miou[key].update(classes, label)
        found = class_counts(classes, label, num_classes=num_classes)
        self._record(score, frame.sequence, *found)


def read_maps(
    head: Head, tokens: Tensor, *, grid: tuple[int, int], cut: Cut, size: tuple[int, int]
) -> Tensor:
    """Logits (P, C, *size) or metres (P, 1, *size) from features (P, N, D) of a frame's crops, at
    the size of the cut label. In float32 whatever the autocast: logits of bfloat16 tie often, and
    ties go to the first class."""
    with torch.autocast(tokens.device.type, enabled=False):
        return upsample_predictions(head(feature_map(tokens.float(), grid=grid)), cut, size=size)


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


def class_ious(confusion: Tensor) -> list[float | None]:
    """IoU of every class of a confusion matrix (C, C); None where a class never occurs."""
    counts = confusion.cpu().double()
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    return [
        (shared / union) if union else None
        for shared, union in zip(both.tolist(), either.tolist(), strict=True)
    ]


def label_of_crop(label: Label, crops: NDArray[np.float32], which: int) -> Label:
    """Label (H, W) of a whole frame -> (h, w), what crop number `which` shows.

    crops: float32 (P, 4) top, left, height, width in source pixels, together the whole frame.
    """
    corner = crops[:, :2].min(axis=0)
    extent = (crops[:, :2] + crops[:, 2:]).max(axis=0) - corner
    scale = np.array(label.shape) / extent
    first = np.rint((crops[which, :2] - corner) * scale).astype(int)
    last = np.rint((crops[which, :2] + crops[which, 2:] - corner) * scale).astype(int)
    part: Label = label[first[0] : last[0], first[1] : last[1]]
    return part


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
