"""What the tables of a report say, in a sentence or two each, made from their numbers.

At the mid horizon where there are two. A sentence that has no numbers is empty.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..forecast.diagnosis import NO_BETTER, STUCK
from ..forecast.intervals import Resamples
from ..forecast.sequences import Score, SequenceScores
from .ensemble import expected_outside
from .paper_rows import METRICS as PAPER_METRICS
from .paper_rows import PAPER_ROWS, PaperComparison
from .rows import (
    FREQUENCY_METRICS,
    HORIZONS,
    METRICS,
    PERCENT,
    ROW_LABELS,
    SAMPLES_ROW,
    ReportRow,
    find_row,
    find_value,
    mode_pairs,
    rows_by_name,
    show,
    show_interval,
    show_row,
)

CHOSEN = ("dinoworld_best", "predictions_best", "regressor_null", "best")
"""Forecasts of which the truth chooses the best one."""
SINGLE = ("copy_last", "dinoworld", "dinoworld_mean", "predictions_mean", "discriminative", "mean")
"""Forecasts that are one answer."""
_METRIC_WORDS = {"miou": "mIoU %", "rmse": "RMSE m", "feature_loss": "feature loss"}


def read_scores(rows: Sequence[ReportRow], scores: SequenceScores, *, seed: int = 0) -> str:
    """Which forecast wins, by how much, and whether the interval of its lead allows to say so.

    scores: of the sequences, which are drawn again for both rows of a pair alike.
    """
    metric = next((name for name in METRICS if any(row.metric == name for row in rows)), "")
    by_name = rows_by_name(rows, "mid", metric)
    resamples = Resamples(len(scores.windows), seed=seed) if scores.windows else None

    def lead(names: Iterable[str]) -> str:
        """`Best sample wins with 63.4 [..], 12.0 points [..] ahead of Discriminative, 51.4 [..]`"""
        sign = -1.0 if metric == "miou" else 1.0
        found = [by_name[name] for name in names if name in by_name]
        found = [row for row in found if math.isfinite(row.value)]
        found.sort(key=lambda row: sign * row.value)
        if not found:
            return ""
        first = found[0]
        name, value = ROW_LABELS[first.row], show_row(first)
        if len(found) == 1:
            return f"{name} alone was scored, {value}"
        second = found[1]
        shown = show(first.value, metric)
        same = [ROW_LABELS[row.row] for row in found if show(row.value, metric) == shown]
        if len(same) > 1:
            return f"a tie, {', '.join(same[:-1])} and {same[-1]} have the same {value}"
        low = high = None
        by_seed = [scores.by_seed(Score("mid", r.row, metric), scores.windows) for r in found[:2]]
        if resamples is not None and all(by_seed):
            drawn, other = (resamples.resampled(metric, sums) for sums in by_seed)
            estimate = resamples.interval(first.value - second.value, drawn - other)
            low, high = estimate.low, estimate.high
        text = f"{name} wins with {value}, {_gap(first.value - second.value, metric)}"
        if low is None or high is None:
            return f"{text} ahead of {ROW_LABELS[second.row]}, {show_row(second)}"
        near, far = sorted((-sign * low, -sign * high))
        unsure = "; that is not sure, the interval of the lead holds 0" if near <= 0 else ""
        bounds = show_interval(near, far, metric)
        return f"{text}{bounds} ahead of {ROW_LABELS[second.row]}, {show_row(second)}{unsure}"

    everything = lead((*CHOSEN, *SINGLE))
    if not everything:
        return ""
    text = f"{_METRIC_WORDS[metric]}, mid: {everything}."
    single = lead(SINGLE) if any(name in by_name for name in CHOSEN) else ""
    return f"{text} Of the forecasts that are one answer: {single}." if single else text


def _gap(difference: float, metric: str) -> str:
    """A difference without its sign."""
    if metric in PERCENT:
        return f"{100 * abs(difference):.1f} points"
    return f"{abs(difference):.3g}{' m' if metric == 'rmse' else ''}"


def read_paper(rows: Sequence[ReportRow], comparison: PaperComparison) -> str:
    """How the best sample stands to the paper's; of another protocol, how the paper's rows do."""
    metric = PAPER_METRICS[comparison.dataset]
    scale = 100 if metric == "miou" else 1
    paper = {name: float(mid) / scale for _, name, (_, mid) in PAPER_ROWS[comparison.dataset]}
    released = "DeltaWorld, released, best"
    ours = find_value(rows, horizon="mid", row="best", metric=metric)
    if comparison.differences:
        first, other, name = (
            paper[released],
            paper["DINO-world (paper's)"],
            f"The paper's {released}",
        )
        text = "No row of this run may stand beside them. "
        rival = "its DINO-world"
    elif ours is None:
        return "This run has no best sample to hold against the paper's."
    else:
        first, other, name, text = ours, paper[released], "This run's best sample", ""
        rival = f"the paper's {released}"
    numbers = f"{show(first, metric)} against {show(other, metric)} of {rival}"
    if first == other:
        return f"{text}{name} is equal at mid: {numbers}."
    better = (first > other) == (metric == "miou")
    word = "better" if better else "worse"
    return f"{text}{name} is {_gap(first - other, metric)} {word} at mid: {numbers}."


def read_classes(per_class: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """What the best sample (else the last forecast) sees best and worst, and where it gains."""
    by_row = {entry["row"]: entry["iou"] for entry in per_class if entry["horizon"] == "mid"}
    row = next((name for name in (*CHOSEN[::-1], *SINGLE[::-1]) if name in by_row), None)
    if row is None:
        return ""

    def class_name(number: int) -> str:
        return names[number] if number < len(names) else f"class {number}"

    known = {number: iou for number, iou in enumerate(by_row[row]) if iou is not None}
    if not known:
        return ""
    best, worst = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    text = f"{ROW_LABELS[row]} is best on {class_name(best)} ({show(known[best], 'miou')})"
    text += f" and worst on {class_name(worst)} ({show(known[worst], 'miou')})"
    rival = next((name for name in SINGLE[::-1] if name in by_row and name != row), None)
    if rival is not None:
        gains = {
            n: iou - by_row[rival][n] for n, iou in known.items() if by_row[rival][n] is not None
        }
        most = max(gains, key=gains.__getitem__, default=None)
        if most is not None and gains[most] > 0:
            gain = _gap(gains[most], "miou")
            text += f"; it gains most over {ROW_LABELS[rival]} on {class_name(most)}, {gain}"
        elif most is not None:
            text += f"; it gains on no class over {ROW_LABELS[rival]}"
    return text + "."


def read_modes(rows: Sequence[ReportRow], found: Mapping[str, Any], *, num_samples: int) -> str:
    """How many of the possible futures are hit, beside how many of the forecasts are one."""
    pairs = {pair.row: pair for pair in mode_pairs(rows) if pair.horizon == "mid"}
    texts = {
        "samples": "the samples",
        "discriminative": "the discriminative forecast",
        "present": "the true frames as the head reads them",
    }
    parts = [f"{text} {pairs[name].text()}" for name, text in texts.items() if name in pairs]
    if parts and "mid" in found:
        drawn = found["mid"]["true_draws"]
        recall, precision = (show(drawn[m], m) for m in ("mode_recall", "mode_precision"))
        parts.append(f"{num_samples} true draws {recall} | {precision}")
    if not parts:
        return ""
    return (
        f"Mid, % of the possible futures hit | of the forecasts that are one: {'; '.join(parts)}."
    )


def read_frequencies(
    rows: Sequence[ReportRow], found: Mapping[str, Any], *, num_samples: int
) -> str:
    """In what the samples' frequencies are off, and whether the likeliest future comes as often as
    it should."""
    samples = {
        metric: row
        for metric in FREQUENCY_METRICS
        if (row := find_row(rows, horizon="mid", row="samples", metric=metric)) is not None
    }
    if "frequency_distance" not in samples:
        return ""
    text = (
        f"Mid: the samples' frequencies are {show_row(samples['frequency_distance'])} % off; "
        f"{show_row(samples['impossible_mass'])} % of the samples are no possible future, and "
        f"possible ones have {show_row(samples['excess_mass'])} % too much"
    )
    if "mid" in found:
        chance = show(found["mid"]["frequency_distance_of_true_draws"], "excess_mass")
        text += f" (chance alone gives {num_samples} true draws {chance} %)"
    if {"likeliest_share", "likeliest_probability"} <= samples.keys():
        share, wanted = samples["likeliest_share"], samples["likeliest_probability"]
        word = "too rarely" if share.value < wanted.value else "often enough"
        text += (
            f". The likeliest future comes {word}: it is {show_row(share)} % of the hits, by the "
            f"probabilities it would be {show_row(wanted)} %"
        )
    return f"{text}."


def read_calibration(found: Mapping[str, Any]) -> str:
    """Whether the samples' frequencies are as far from the probabilities as chance leaves them."""
    parts = []
    for horizon in (name for name in HORIZONS if name in found):
        ours, drawn = (
            found[horizon][key]
            for key in ("frequency_distance", "frequency_distance_of_true_draws")
        )
        word = "further than" if ours > drawn else "no further than"
        parts.append(f"{horizon}: {word} chance alone would leave them ({ours:.2g}, {drawn:.2g})")
    return f"The frequencies are from the probabilities, {'; '.join(parts)}." if parts else ""


def read_bins(found: Mapping[str, Any]) -> str:
    """The bin that is farthest from its probability."""
    bins = [(h, part) for h in HORIZONS if h in found for part in found[h]["reliability"]]
    if not bins:
        return ""
    horizon, part = max(bins, key=lambda one: abs(one[1]["frequency"] - one[1]["probability"]))
    return (
        f"Farthest off, {horizon}: modes that {100 * part['frequency']:.1f} % of the samples hit "
        f"have a probability of {100 * part['probability']:.1f} %."
    )


def read_energy(rows: Sequence[ReportRow]) -> str:
    """Whether samples tell more of what comes than one answer does."""
    found = rows_by_name(rows, "mid", "energy_score")
    samples = found.get(SAMPLES_ROW)
    rivals = [found[name] for name in SINGLE if name in found]
    if samples is None or not rivals:
        return ""
    rival = min(rivals, key=lambda row: row.value)
    word = "better" if samples.value < rival.value else "no better"
    return (
        f"Mid: the samples together, {show_row(samples)}, are {word} than the best single answer, "
        f"{ROW_LABELS[rival.row]}, {show_row(rival)}."
    )


def read_spread(rows: Sequence[ReportRow], *, num_samples: int) -> str:
    """Whether the samples differ as much as they are off."""
    spread, outside = (
        find_row(rows, horizon="mid", row=SAMPLES_ROW, metric=metric)
        for metric in ("spread_skill", "outside_share")
    )
    if spread is None or outside is None:
        return ""
    low, high = (
        spread.value if b is None else b for b in (spread.interval_low, spread.interval_high)
    )
    word = "too little" if high < 1 else "too much" if low > 1 else "about as much as they should"
    return (
        f"Mid: the samples differ {word} (spread over skill {show_row(spread)}); of "
        f"{show_row(outside)} % of the channels the truth is outside all of them, "
        f"{100 * expected_outside(num_samples):.1f} % would be if it could be one of them."
    )


def read_ranks(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The form of the rank histogram, mid."""
    shares = [entry["share"] for entry in ranks if entry["horizon"] == "mid"]
    if len(shares) < 3:
        return ""
    even = 1 / len(shares)
    first, last = shares[0] > even, shares[-1] > even
    form = (
        "both ends are high, the samples differ too little or miss a part of what comes"
        if first and last
        else "both ends are low, the samples differ too much"
        if not first and not last
        else f"only the {'lower' if first else 'upper'} end is high, the samples are too "
        f"{'high' if first else 'low'}"
    )
    return (
        f"Mid: {form} (rank 0 {100 * shares[0]:.1f} %, rank {len(shares) - 1} "
        f"{100 * shares[-1]:.1f} %, even {100 * even:.1f} %)."
    )


def read_steps(by_row: Mapping[str, Sequence[float]]) -> str:
    """How the loss of the best sample, and of copying, goes from the first step to the last."""
    parts = [
        f"{ROW_LABELS[name]} {losses[0]:.3g} to {losses[-1]:.3g}"
        + (f" ({losses[-1] / losses[0]:.1f} times)" if losses[0] > 0 else "")
        for name, losses in by_row.items()
        if name in ("best", "discriminative", "copy_last") and losses
    ]
    return f"From the first step to the last: {', '.join(parts)}." if parts else ""


def read_probes(probes: Mapping[str, Any]) -> str:
    """Whether the tokenizer uses its token, and reconstructs better than copying."""
    swap, copy, parts = probes.get("z_swap_ratio"), probes.get("copy_last_ratio"), []
    if swap is not None:
        word = "ignores its" if swap < STUCK else "needs the right"
        parts.append(f"the decoder {word} delta token (another's makes the loss {swap:.2f} times)")
    if copy is not None:
        word = "better" if copy < NO_BETTER else "no better"
        parts.append(f"the tokenizer is {word} than copying ({copy:.2f} of its loss)")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def read_best_of_k(curve: Sequence[Mapping[str, Any]]) -> str:
    """What many samples gain over one, and with how many half of that is there."""
    points = [(point["k"], point["feature_loss"]) for point in curve if point["horizon"] == "mid"]
    if len(points) < 2:
        return ""
    (_, first), (count, last) = points[0], points[-1]
    mean = next(p["mean_feature_loss"] for p in curve if (p["horizon"], p["k"]) == ("mid", count))
    if not first > last:
        return f"Mid: {count} samples are no better than one: they are all alike."
    half = next(k for k, loss in points if loss <= (first + last) / 2)
    return (
        f"Mid: the best of {count} has {100 * (1 - last / first):.0f} % less loss than one sample; "
        f"half of that is there with {half}. Their mean, which no truth chooses, has "
        f"{100 * (1 - mean / first):.0f} % less."
    )
