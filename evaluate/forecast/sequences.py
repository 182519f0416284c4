"""Scores by sequence (clip): what intervals and comparisons are made from.

Every metric of a report is a function of two sums over sequences, so that any choice of sequences
can be scored again from their sums alone:

    value = mean over classes with count > 0 of (sum of sums / sum of counts)

    miou            sums: intersection, counts: union, pixels, of each class
    feature_loss    sums: loss, counts: windows; one class. So with modes and the energy score.
    rmse            sums: squared error, counts: pixels; and a square root at the end
    delta1          sums: pixels of a near depth, counts: pixels
    spread_skill    sums: variance of samples, counts: squared error of their mean; the same

    OUT/sequences.jsonl    a line for each sequence:
        {"sequence": KEY, "windows": W, "labels": CRC-32 of its target frames' labels,
         "scores": {HORIZON: {ROW: {METRIC: {SEED: [[class, sum, count], ...]}}}}}
        classes without a count are left out, as is "labels" without labels

Letters: Q sequences, C classes, K seeds.
"""

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...shards.errors import UsageError
from ...shards.files import read_text

FILE_NAME = "sequences.jsonl"
ROOT_METRICS = ("rmse", "spread_skill")
"""Metrics that are the square root of a ratio."""

MAX_CLASSES = 65_536
"""No head has more; a larger number in a file is damage."""
MAX_SUM = 1e100
"""So that sums of them are finite; a larger number in a file is damage."""


class Score(NamedTuple):
    """Which number of a report."""

    horizon: str
    row: str
    metric: str


class Sums(NamedTuple):
    """One number of a report: float64 (Q, C) both, or (C,) of the whole set."""

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

    def total(self, score: Score, seed: int) -> Sums:
        """Sums and counts (C,) of a score over all sequences."""
        total = np.sum([*self.parts[score][seed].values()], axis=0)
        return Sums(total[0], total[1])

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
        lines = read_text(path).splitlines()
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
