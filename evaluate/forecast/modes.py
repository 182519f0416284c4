"""Mode recall, mode precision and frequencies: forecasts held against all possible futures.

    mode_recall            share of the possible futures that some forecast hits
    mode_recall_weighted   the same, each future counting as much as it is probable
    mode_precision         share of the forecasts that are a possible future

and how often each future is hit, against its probability:

    frequency_distance     total variation distance of the forecasts' frequencies from the
                           probabilities: impossible_mass + excess_mass
    impossible_mass        share of the forecasts that are no possible future: 1 - precision
    excess_mass            by how much possible futures are hit more often than they are probable
    likeliest_share        share of the hits that are of the most probable future of their window
    likeliest_probability  what that share would be if the same hits fell by the probabilities

With q the shares of a window's forecasts that hit each mode, q0 that of those that hit none, and p
the probabilities, q0 + sum(q) = sum(p) = 1, so what is too much is as much as what is missing, and

    (sum |q - p| + q0) / 2 = q0 + sum max(q - p, 0)

(Levin, Peres and Wilmer, "Markov Chains and Mixing Times", 2009, proposition 4.2 and remark 4.3).
The likeliest shares are of the hits of all windows together: sum(n q_1) / sum(n sum(q)) beside
sum(n p_1 sum(q)) / sum(n sum(q)), where mode 1 is the most probable one and n the number of
forecasts. A single forecast is right to be the likeliest future, n samples are not.

Averaged over windows; a single forecast's recall is at most 1 / (number of its futures). What a
forecast shows is what the segmentation head reads from its features. Futures whose class maps look
alike are one mode with the sum of their probabilities. A forecast *hits* the mode of the future it
looks most like, where it looks like it at all: where the overlap of the two class maps is at least
a threshold (0.5).

Any data set whose future is known (a simulator, a game) can supply its futures, as the little world
does:

    DIR/CLIP_KEY.npz     no pickle; F futures of one clip, those of one frame pair side by side; for
                         the targets of an evaluation cache TARGET_KEY.npz or SEQUENCE.npz
        context_frame    int32 (F,)        last frame seen, index in presentation order
        target_frame     int32 (F,)        the frame they are pictures of
        probability      float32 (F,)      of each future; those of one frame pair add up to 1
        classes          uint8 (F, H, W)   class map of the target frame, 255 = counts nowhere
        background       int32 ()          class that is not looked at, -1: none

Frames are numbered, and class maps cut into the halves of two crops, as the labels of the cache;
each crop's forecasts are held against its half.

Letters: M futures, G modes, S forecasts, H, W pixels.
"""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...shards.errors import UsageError
from ...shards.evaluation.labels import IGNORE
from ...shards.files import open_file, partial_path, publish
from ...shards.patches.reader import PatchShards
from ...train.data.order import seed_for
from ...train.heads.crops import cut_labels
from ...train.models.heads import SegmentationHead
from ..report.rows import HORIZONS, MODE_METRICS, MODE_ROWS, SAMPLES_ROW
from .config import ForecastConfig
from .rollout import HorizonForecast, WindowBatch
from .scores import class_maps
from .sequences import Score, SequenceScores
from .windows import WindowArrangement

_DTYPES = {
    "context_frame": np.int32,
    "target_frame": np.int32,
    "probability": np.float32,
    "classes": np.uint8,
    "background": np.int32,
}
_NPZ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise for damaged files; RuntimeError is that of encrypted members."""
_SUM_TOLERANCE = 1e-3
"""Probabilities are float32 and may have been written with few digits."""


@dataclass(frozen=True, kw_only=True)
class KnownFutures:
    """What can be at one target frame after one context."""

    probability: NDArray[np.float64]
    """(M,), adds up to 1."""
    classes: NDArray[np.uint8]
    """(M, H, W), 255 = counts nowhere."""
    background: int
    """Class that is not looked at, -1: none."""


def write_futures(
    folder: Path, key: str, futures: Mapping[tuple[int, int], KnownFutures], *, background: int
) -> None:
    """Write the futures of the clip `key`, by (last frame seen, target frame); same bytes for the
    same values."""
    path = folder / f"{key}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [pair for pair, found in futures.items() for _ in found.probability]
    frames = np.array(pairs, np.int32).reshape(-1, 2)
    partial = partial_path(path)
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            context_frame=frames[:, 0],
            target_frame=frames[:, 1],
            probability=np.concatenate([f.probability for f in futures.values()], dtype=np.float32),
            classes=np.concatenate([f.classes for f in futures.values()]),
            background=np.array(background, np.int32),
        )
    publish(partial, path)


class FutureFolder:
    """Reads the futures of single windows; a clip's file is read when it is first asked for."""

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise UsageError(f"--futures {folder}: no such folder")
        self._folder = Path(folder)
        self._read: tuple[str, dict[str, NDArray[np.generic]]] = ("", {})

    def has(self, key: str) -> bool:
        """Whether there are futures of a clip."""
        return (self._folder / f"{key}.npz").is_file()

    def window(self, key: str, context_frame: int, target_frame: int) -> KnownFutures:
        """What can be at `target_frame` of clip `key` after `context_frame`, the last one seen.

        Raises:
            UsageError: no file, one of another layout, or no futures of these frames.
        """
        if self._read[0] != key:
            self._read = (key, _load(self._folder, key))
        arrays = self._read[1]
        pairs = np.stack([arrays["context_frame"], arrays["target_frame"]], axis=1)
        rows = (pairs == (context_frame, target_frame)).all(axis=1)
        if not rows.any():
            known = ", ".join(f"{a} -> {b}" for a, b in np.unique(pairs, axis=0).tolist())
            raise UsageError(
                f"clip {key}: no futures of frame {target_frame} after frame {context_frame}, only "
                f"{known or 'none'}; evaluate with the context and steps they were made for"
            )
        probability = np.asarray(arrays["probability"][rows], np.float64)
        is_one = abs(probability.sum() - 1) <= _SUM_TOLERANCE  # not of nan
        if not is_one or probability.min() < 0:
            raise UsageError(
                f"clip {key}: probabilities of the futures of frame {target_frame} after frame "
                f"{context_frame} add up to {probability.sum():.4g}, wanted 1 and none below 0"
            )
        return KnownFutures(
            probability=probability / probability.sum(),
            classes=np.asarray(arrays["classes"][rows], np.uint8),
            background=int(arrays["background"]),
        )


def _load(folder: Path, key: str) -> dict[str, NDArray[np.generic]]:
    path = folder / f"{key}.npz"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"clip {key}: its name leaves the folder of futures {folder}")
    try:
        with open_file(path) as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _DTYPES}
    except FileNotFoundError:
        raise UsageError(
            f"clip {key}: no futures, {path} does not exist; write it (see "
            "evaluate/forecast/modes.py) or leave --futures out"
        ) from None
    except KeyError as error:
        raise UsageError(f"clip {key}: {path} has no array {error}") from None
    except _NPZ_ERRORS as error:
        raise UsageError(f"clip {key}: {path} cannot be read as .npz ({error})") from None
    count = arrays["context_frame"].shape
    for name, array in arrays.items():
        dims = {"classes": 3, "background": 0}.get(name, 1)
        fits = array.dtype == _DTYPES[name] and array.ndim == dims
        if not fits or array.shape[:1] != count[:dims] or 0 in array.shape[1:]:
            raise UsageError(
                f"clip {key}: {name} of {path} is {array.dtype} {array.shape}; see "
                "evaluate/forecast/modes.py for what it has to be"
            )
    return arrays


NO_MODE = -1
"""What a forecast hits that looks like no possible future."""


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The modes of one window."""

    probability: NDArray[np.float64]
    """(G,), adds up to 1, largest first."""
    mode_of: NDArray[np.int64]
    """(M,): the mode of each future."""
    futures: KnownFutures
    threshold: float
    """Overlap from which on two class maps look alike."""


def overlap(
    ours: NDArray[np.uint8], theirs: NDArray[np.uint8], *, background: int
) -> NDArray[np.float64]:
    """How much class maps (S, H, W) look like class maps (M, H, W): float64 (S, M), 0 to 1.

    Pixels where both have the same class, over pixels where either has one; `background` is no
    class, and where either is 255 nothing counts. With one shape before a background this is the
    IoU of the shape, 0 for the wrong shape. 1 where both are empty.
    """
    found = np.empty((len(ours), len(theirs)))
    is_ours = ours != background
    for column, other in enumerate(theirs):
        counted = (ours != IGNORE) & (other != IGNORE)
        either = ((is_ours | (other != background)) & counted).sum(axis=(1, 2))
        both = ((ours == other) & is_ours & counted).sum(axis=(1, 2))
        found[:, column] = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return found


def find_modes(futures: KnownFutures, *, threshold: float) -> Modes:
    """Merge what looks alike: from the most probable future on, each joins the most alike of the
    modes that were begun before it, or begins one."""
    order = np.argsort(-futures.probability, kind="stable")
    alike = overlap(futures.classes, futures.classes, background=futures.background)
    mode_of = np.empty(len(order), np.int64)
    firsts: list[int] = []
    for future in order.tolist():
        nearest = int(np.argmax(alike[future, firsts])) if firsts else 0
        if not firsts or alike[future, firsts[nearest]] < threshold:
            nearest = len(firsts)
            firsts.append(future)
        mode_of[future] = nearest
    probability = np.zeros(len(firsts))
    np.add.at(probability, mode_of, futures.probability)
    by_size = np.argsort(-probability, kind="stable")
    return Modes(
        probability=probability[by_size],
        mode_of=np.argsort(by_size, kind="stable")[mode_of],
        futures=futures,
        threshold=threshold,
    )


def hits(modes: Modes, classes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The mode that each forecast (S, H, W) is, int64 (S,); NO_MODE: no possible future."""
    alike = overlap(classes, modes.futures.classes, background=modes.futures.background)
    nearest = alike.argmax(axis=1)
    is_hit = alike[np.arange(len(classes)), nearest] >= modes.threshold
    return np.where(is_hit, modes.mode_of[nearest], NO_MODE)


def recall_of_draws(probability: NDArray[np.float64], num_draws: int) -> tuple[float, float]:
    """Share of the modes that `num_draws` draws from their probabilities (G,) hit, expected; and
    the same with each mode counting as much as it is probable."""
    hit = 1 - (1 - probability) ** num_draws
    return float(hit.mean()), float(hit @ probability)


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
        """Plain JSON values; report/modes.py has the words."""
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
        windows: WindowArrangement,
    ) -> None:
        """Raises UsageError where `config.futures` is no folder or a clip has none in it."""
        assert config.futures is not None
        self._config, self._cache, self._head, self._windows = config, cache, head, windows
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
            size = (futures.classes.shape[1], futures.classes.shape[2])
            crop, sequence = self._windows.crop(index), self._windows.sequence(index)
            for name, features in rows.items():
                tokens = features[position]
                found = hits(
                    modes,
                    class_maps(self._head, tokens, grid=self._cache.grid, size=size, crop=crop),
                )
                if name == SAMPLES_ROW:
                    draws = seed_for("true draws", self._config.seed, horizon, index)
                    self._calibration.setdefault(horizon, Calibration()).add(modes, found, draws)
                for metric, value in zip(MODE_METRICS, mode_values(modes, found), strict=True):
                    scores.add(Score(horizon, name, metric), seed, sequence, value, 1)
                for metric, part in frequency_parts(modes, found).items():
                    scores.add(Score(horizon, name, metric), seed, sequence, *part)

    def probes(self) -> dict[str, Any]:
        """{"modes": {"overlap", horizon: calibration}}, without samples only the overlap."""
        found = {horizon: part.summary() for horizon, part in self._calibration.items()}
        return {"modes": {"overlap": self._config.mode_overlap, **found}}

    def _futures(self, horizon: str, index: int) -> KnownFutures:
        """What can be at the window's target, in the part of the frame that it shows."""
        config = self._config
        frames = self._cache.frame_index([index])[0, : config.num_frames].tolist()
        seen = frames[config.context_start(horizon) + config.num_context - 1]
        names = self._windows.future_names(index)
        key = next(filter(self._folder.has, names), names[0])
        futures = self._folder.window(key, seen, frames[-1])
        known = futures.classes[futures.classes != IGNORE]
        if known.size and int(known.max()) >= self._head.config.num_classes:
            raise UsageError(
                f"clip {key}: its futures have class {int(known.max())}, the head knows 0 to "
                f"{self._head.config.num_classes - 1} (255 = counts nowhere)"
            )
        cut, second = self._windows.crop(index)
        if cut.wide is None:
            return futures
        halves = cut_labels(torch.from_numpy(futures.classes), cut).numpy()
        return replace(futures, classes=np.split(halves, 2)[second])


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


def frequency_parts(modes: Modes, found: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """The FREQUENCY_METRICS of one window, each as (sum, count), from the modes (S,) that its
    forecasts hit; what they are stands at the top of this file."""
    num_forecasts, true = len(found), modes.probability
    hits_by_mode = np.bincount(found[found != NO_MODE], minlength=len(true))
    num_hits = int(hits_by_mode.sum())
    impossible = (num_forecasts - num_hits) / num_forecasts
    excess = float(np.maximum(hits_by_mode / num_forecasts - true, 0).sum())
    return {
        "frequency_distance": (impossible + excess, 1),
        "impossible_mass": (impossible, 1),
        "excess_mass": (excess, 1),
        "likeliest_share": (int(hits_by_mode[0]), num_hits),
        "likeliest_probability": (num_hits * float(true[0]), num_hits),
    }


def _recalls(found: list[tuple[float, float]]) -> dict[str, float]:
    plain, weighted = np.mean(found, axis=0).tolist()
    return {"mode_recall": plain, "mode_precision": 1.0, "mode_recall_weighted": weighted}
