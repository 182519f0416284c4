"""What a preview shows of delta tokens: colours, norms over time and against the gap, a map."""

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..evaluate.report.pictures import (
    IGNORE_COLOUR,
    TILE_HEIGHT,
    Panel,
    Strip,
    Tile,
    fit_pca_colours,
    heat_tile,
)
from ..evaluate.report.plots import COLOURS, Plot, draw_plot
from ..shards.deltas.reader import DeltaShards
from .preview import (
    MAX_COLUMNS,
    Section,
    aspect_of,
    columns_of,
    frame_strips,
    norm_fact,
    sample_windows,
    window_titles,
)
from .preview_times import plot_times

SAMPLE_WINDOWS = 2_000
"""Windows behind the plots; fewer than 20,000 tokens of 8-frame windows."""
BAR_HEIGHT = 28
"""Pixels of a coloured bar; one token is one colour."""
MAX_BINS = 12
FLOOR = 0.25
"""Of the range of distances: the lowest one is not black, which a dark page would swallow."""

PANELS_TEXT = (
    "Each delta token leads from the frame before to the frame above it. Tokens as colours: the "
    "three main directions of a sample of the cache are red, green and blue. Distance: from the "
    "average token of the sample, from dark (1st percentile) to bright (99th). The first token "
    "leads from a black frame, is unlike all others, and is left out (grey)."
)
TIMES_TEXT = "Dots are frames, in seconds from the window's first frame."
NORMS_TEXT = (
    "Above: norms. Below: distances from the average token, which tell tokens apart where the "
    "tokenizer gives all the same norm. Left: of the windows shown, over time. Right: of the "
    "sample, against the gap that a token bridges, with the median of equally large groups."
)
MAP_TEXT = (
    "Tokens of the sample on their two main directions, coloured by the gap they bridge. The "
    "first tokens of the windows are left out."
)


def delta_sections(
    reader: DeltaShards, windows: Sequence[int], *, videos: Sequence[str], seed: int
) -> tuple[Section, ...]:
    """The sections of a delta cache's preview."""
    sample = sample_windows(reader, SAMPLE_WINDOWS, seed=seed)
    times = plot_times(reader, windows, sample)
    panels = _panels(reader, windows, sample, videos)
    sections = [
        Section(title="Windows", text=PANELS_TEXT, panels=panels),
        Section(title="Times", text=TIMES_TEXT, plots=(times,)),
    ]
    if reader.shape[0] > 1:
        sections += [
            Section(title="Norms", text=NORMS_TEXT, plots=_plot_norms(reader, windows, sample)),
            Section(title="Map", text=MAP_TEXT, plots=(_plot_map(reader, sample),)),
        ]
    return tuple(sections)


def _changes(
    reader: DeltaShards, windows: Sequence[int] | NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tokens but the first, float32 (n, T - 1, D), and the gaps they bridge, s (n, T - 1)."""
    tokens = reader.tokens(windows)[:, 1:].astype(np.float32)
    return tokens, np.diff(reader.timestamps_s(windows), axis=1)


def _panels(
    reader: DeltaShards,
    windows: Sequence[int],
    sample: NDArray[np.int64],
    videos: Sequence[str],
) -> tuple[Panel, ...]:
    fitted = _changes(reader, sample)[0].reshape(-1, reader.shape[1])
    if not len(fitted):  # windows of one frame
        fitted = reader.tokens(sample).astype(np.float32).reshape(-1, reader.shape[1])
    colours, mean = fit_pca_colours(fitted), fitted.mean(axis=0)
    low, high = np.percentile(np.linalg.norm(fitted - mean, axis=-1), (1, 99))
    frames = frame_strips(reader, windows, videos)
    panels = []
    for window, title in zip(windows, window_titles(reader, windows), strict=True):
        tokens = reader.tokens([window])[0, :MAX_COLUMNS].astype(np.float32)
        norms = np.linalg.norm(tokens, axis=-1)
        distances = np.linalg.norm(tokens - mean, axis=-1)
        size = (BAR_HEIGHT, round(TILE_HEIGHT * min(max(aspect_of(reader, window), 0.5), 2.0)))
        first = _bar(np.array(IGNORE_COLOUR, np.uint8), size)
        bars = [_bar(colours(token[None], (1, 1))[0, 0], size) for token in tokens[1:]]
        span = float(high - low)
        shades = heat_tile((distances - low)[None] + FLOOR * span, top=(1 + FLOOR) * span)[0]
        far = [_bar(shade, size) for shade in shades[1:]]
        spoken = ", ".join(f"{distance:.3g}" for distance in distances[1:])
        strips = [frames[window]] if window in frames else []
        strips += [
            Strip(
                label="tokens", alt=f"Tokens of window {title} as colours.", tiles=(first, *bars)
            ),
            Strip(
                label="distance",
                alt=f"Distance from the average token in window {title}, from the second token "
                f"on: {spoken}. Norm of the first: {norms[0]:.3g}.",
                tiles=(first, *far),
            ),
        ]
        panels.append(Panel(title=title, columns=columns_of(reader, window), strips=tuple(strips)))
    return tuple(panels)


def _bar(colour: NDArray[np.uint8], size: tuple[int, int]) -> Tile:
    return np.tile(colour, (*size, 1))


def _plot_norms(
    reader: DeltaShards, windows: Sequence[int], sample: NDArray[np.int64]
) -> tuple[Plot, Plot]:
    times = reader.timestamps_s(windows)[:, 1:]
    shown, (tokens, gaps) = _changes(reader, windows)[0], _changes(reader, sample)
    first = np.linalg.norm(reader.tokens(sample)[:, 0].astype(np.float32), axis=-1)
    mean = tokens.mean(axis=(0, 1))
    plots = []
    for what, centre in (("norm", np.zeros_like(mean)), ("distance", mean)):
        lengths = np.linalg.norm(tokens - centre, axis=-1).ravel()
        own = np.linalg.norm(shown - centre, axis=-1)
        alt = f"Token {what}s of {len(sample)} windows: {norm_fact(lengths)}."
        if np.ptp(gaps) > 0 and np.ptp(lengths) > 0:
            alt += f" Correlation with the gap: {np.corrcoef(gaps.ravel(), lengths)[0, 1]:.2f}."
        if what == "norm":
            alt += f" Of the first tokens, from black: {norm_fact(first)}."
        draw = functools.partial(
            _draw_norms, what=what, times=times, shown=own, gaps=gaps.ravel(), norms=lengths
        )
        plots.append(draw_plot(draw, alt=alt))
    return plots[0], plots[1]


def _draw_norms(
    figure: Figure,
    ink: dict[str, str],
    *,
    what: str,
    times: NDArray[np.float32],
    shown: NDArray[np.float32],
    gaps: NDArray[np.float32],
    norms: NDArray[np.float32],
) -> None:
    left, right = figure.subplots(1, 2)
    for i, (seconds, lengths) in enumerate(zip(times, shown, strict=True)):
        left.plot(
            seconds, lengths, "o-", color=COLOURS[i % len(COLOURS)], markersize=2.5, linewidth=1.2
        )
    left.set(xlabel="seconds from the first frame", ylabel=what, title=f"{what.title()} over time")
    right.plot(1000 * gaps, norms, ".", color=COLOURS[0], markersize=2, alpha=0.25)
    groups = np.array_split(np.argsort(gaps, kind="stable"), min(MAX_BINS, len(gaps)))
    right.plot(
        [1000 * float(np.median(gaps[group])) for group in groups],
        [float(np.median(norms[group])) for group in groups],
        color=COLOURS[1],
        linewidth=2,
    )
    right.set(xlabel="gap, ms", title=f"{what.title()} against the gap")
    for axes in (left, right):
        axes.ticklabel_format(axis="y", useOffset=False)


def _plot_map(reader: DeltaShards, sample: NDArray[np.int64]) -> Plot:
    tokens, gaps = _changes(reader, sample)
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat / max(1, len(flat) - 1))
    share = 100 * values[::-1][:2] / max(float(values.sum()), 1e-12)
    places = flat @ vectors[:, ::-1][:, :2]
    alt = (
        f"{len(flat)} delta tokens on two directions that hold {share[0]:.0f} % and "
        f"{share[1]:.0f} % of their variance."
    )
    draw = functools.partial(_draw_map, places=places, gaps=gaps.ravel(), share=share)
    return draw_plot(draw, alt=alt)


def _draw_map(
    figure: Figure,
    ink: dict[str, str],
    *,
    places: NDArray[np.float64],
    gaps: NDArray[np.float32],
    share: NDArray[np.float64],
) -> None:
    axes = figure.add_subplot()
    dots = axes.scatter(places[:, 0], places[:, 1], c=1000 * gaps, s=4, cmap="viridis", alpha=0.7)
    axes.set(
        xlabel=f"direction 1 ({share[0]:.0f} % of the variance)",
        ylabel=f"direction 2 ({share[1]:.0f} %)",
        title="Delta tokens",
    )
    figure.colorbar(dots, ax=axes, label="gap, ms")
