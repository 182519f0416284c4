"""What a preview shows of patch tokens: colours, change from frame to frame, norms, channels."""

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..evaluate.report.pictures import (
    IGNORE_COLOUR,
    Panel,
    Strip,
    Tile,
    fit_pca_colours,
    heat_tile,
    resize_tile,
)
from ..evaluate.report.plots import COLOURS, Plot, draw_plot
from ..shards.patches.reader import PatchShards
from ..shards.records import read_all_done
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

MAX_FITTED = 20_000
"""Tokens that the colours are fitted on (a guess: plenty for three directions)."""
SAMPLE_TIMES = 2_000
"""Windows whose gaps are counted."""
TOP_PERCENTILE = 99.0

PANELS_TEXT = (
    "Patch tokens as colours: the three main directions of all tokens shown are red, green and "
    "blue, the same for every frame and window, so equal colours are equal features. Change: how "
    "far each token is from the one at its place in the frame before, from black (not at all) to "
    "bright (99th percentile of all shown); grey in the first frame."
)
TIMES_TEXT = "Dots are frames, at their time in the clip."
NORMS_TEXT = (
    "Left: lengths of the tokens shown; a few much longer ones are artefacts of the backbone. "
    "Right: standard deviation of every channel over the whole cache, largest first; a channel far "
    "above the others dominates distances."
)


def patch_sections(
    reader: PatchShards, windows: Sequence[int], *, videos: Sequence[str], seed: int
) -> tuple[Section, ...]:
    """The sections of a patch cache's preview."""
    tokens = reader.tokens(list(windows))[:, :MAX_COLUMNS]
    sample = sample_windows(reader, SAMPLE_TIMES, seed=seed)
    return (
        Section(
            title="Windows",
            text=PANELS_TEXT,
            panels=_panels(reader, windows, tokens, videos),
        ),
        Section(title="Times", text=TIMES_TEXT, plots=(plot_times(reader, windows, sample),)),
        Section(title="Norms", text=NORMS_TEXT, plots=(_plot_norms(reader, tokens),)),
    )


def _panels(
    reader: PatchShards,
    windows: Sequence[int],
    tokens: NDArray[np.float32],
    videos: Sequence[str],
) -> tuple[Panel, ...]:
    flat = tokens.reshape(-1, tokens.shape[-1])
    chosen = np.linspace(0, len(flat) - 1, min(MAX_FITTED, len(flat))).astype(np.int64)
    colours = fit_pca_colours(flat[chosen])
    changes = np.linalg.norm(np.diff(tokens, axis=1), axis=-1)
    top = float(np.percentile(changes, TOP_PERCENTILE)) if changes.size else 1.0
    frames = frame_strips(reader, windows, videos)
    still = np.full((*reader.grid, 3), IGNORE_COLOUR, dtype=np.uint8)
    panels = []
    titles = window_titles(reader, windows)
    for window, title, own, moved in zip(windows, titles, tokens, changes, strict=True):
        aspect = aspect_of(reader, window)
        heat = [heat_tile(row.reshape(reader.grid), top=top) for row in moved]
        spoken = ", ".join(f"{row.mean():.3g}" for row in moved)
        strips = [frames[window]] if window in frames else []
        strips += [
            _strip(
                "tokens",
                f"Tokens of window {title} as colours.",
                [colours(frame, reader.grid) for frame in own],
                aspect,
            ),
            _strip(
                "change",
                f"Change from frame to frame in window {title}: {spoken} on average.",
                [still, *heat],
                aspect,
            ),
        ]
        panels.append(Panel(title=title, columns=columns_of(reader, window), strips=tuple(strips)))
    return tuple(panels)


def _strip(label: str, alt: str, tiles: Sequence[Tile], aspect: float) -> Strip:
    resized = tuple(resize_tile(tile, aspect=aspect, smooth=False) for tile in tiles)
    return Strip(label=label, alt=alt, tiles=resized)


def _plot_norms(reader: PatchShards, tokens: NDArray[np.float32]) -> Plot:
    norms: NDArray[np.float32] = np.linalg.norm(tokens, axis=-1).ravel()
    std = _channel_std(reader)
    largest = np.argsort(-std)[:3].tolist()
    alt = (
        f"Token norms: {norm_fact(norms)}. Channels: median standard deviation "
        f"{np.median(std):.3g}, largest "
        f"{', '.join(f'{std[channel]:.3g} (channel {channel})' for channel in largest)}."
    )
    return draw_plot(functools.partial(_draw_norms, norms=norms, std=std), alt=alt)


def _channel_std(reader: PatchShards) -> NDArray[np.float64]:
    """(D,): of all shards together, from the statistics of their done-records."""
    records = [record for record in read_all_done(reader.folder) if record.rows]
    weights = np.array([record.rows for record in records], dtype=np.float64)
    means = np.array([record.statistics["channel_mean"] for record in records])
    stds = np.array([record.statistics["channel_std"] for record in records])
    mean = np.average(means, axis=0, weights=weights)
    square = np.average(stds**2 + (means - mean) ** 2, axis=0, weights=weights)
    result: NDArray[np.float64] = np.sqrt(square)
    return result


def _draw_norms(
    figure: Figure, ink: dict[str, str], *, norms: NDArray[np.float32], std: NDArray[np.float64]
) -> None:
    left, right = figure.subplots(1, 2)
    left.hist(norms, bins=60, color=COLOURS[0])
    left.set(xlabel="token norm", ylabel="tokens", title="Norms", yscale="log")
    right.plot(np.arange(1, len(std) + 1), np.sort(std)[::-1], color=COLOURS[1], linewidth=1.8)
    right.set(xlabel="channel, by rank", title="Standard deviation of channels")
    if (std > 0).all():
        right.set_yscale("log")
