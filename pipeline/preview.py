"""deltatok-shards preview: some windows of a cache as pictures, in one HTML page or one PNG.

    panels   a window each: its frames (with --videos), tokens as colours, change or distance
    plots    times and gaps, norms
    facts    what the cache is

Everything comes from the cache, and from the videos if they are given.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from ..evaluate.report.frames import clips_by_key, read_frames
from ..evaluate.report.html import render_page
from ..evaluate.report.pictures import (
    IGNORE_COLOUR,
    TILE_HEIGHT,
    Panel,
    Strip,
    Tile,
    fit_pca_colours,
    heat_tile,
    panel_image,
    png_bytes,
    resize_tile,
)
from ..evaluate.report.plots import COLOURS, Plot, draw_plot
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import UsageError
from ..shards.files import size_text
from ..shards.patches.reader import PatchShards
from ..shards.tools.info import describe_cache

Reader = PatchShards | DeltaShards

MAX_COLUMNS = 12  # frames of a window that are shown; more would be too small
SAMPLE_WINDOWS = 2_000  # behind the plots over many windows
MAX_FITTED = 20_000  # patch tokens that colours are fitted on (a guess: plenty for 3 directions)
MAX_BINS = 12  # groups of gaps whose median norm is drawn
TOP_PERCENTILE = 99.0  # of the changes; what is above is as bright
BAR_HEIGHT = 28  # pixels of a delta token's bar
FLOOR = 0.25  # of the range of distances: the least is not black, which a dark page would swallow
PNG_MARGIN = 24  # pixels around everything


@dataclass(frozen=True, kw_only=True)
class Preview:
    """All that is shown, from above to below; the template has the words."""

    title: str
    summary: str
    of_patches: bool
    panels: Sequence[Panel]
    times: Plot
    norms: Sequence[Plot]
    facts: Mapping[str, Any]


def make_preview(
    reader: Reader, *, num_windows: int, videos: Sequence[str] = (), seed: int = 0
) -> Preview:
    """`num_windows` windows that `seed` chooses; for `preview_html` or `preview_png`.

    videos: where the frames are, as deltatok-extract was told. Raises UsageError where there is
    nothing to show, and if no window shown is of a clip in `videos`.
    """
    windows = choose_windows(reader, num_windows, seed=seed)
    sample = np.random.default_rng((seed, 1)).permutation(reader.num_windows)[:SAMPLE_WINDOWS]
    sample.sort()
    frames = frame_strips(reader, windows, videos)
    if isinstance(reader, PatchShards):
        strips, norms = _draw_patches(reader, windows)
    else:
        strips, norms = _draw_deltas(reader, windows, sample)
    return Preview(
        title=f"{'Patch' if isinstance(reader, PatchShards) else 'Delta'} tokens in "
        f"{reader.folder.resolve().name}",
        summary=f"{len(windows)} of {reader.num_windows} windows, of {len(reader.keys)} clips; "
        f"seed {seed}",
        of_patches=isinstance(reader, PatchShards),
        panels=[
            _panel(reader, number, window, [*frames.get(window, ()), *own])
            for number, (window, own) in enumerate(zip(windows, strips, strict=True), start=1)
        ],
        times=_plot_times(reader, windows, sample),
        norms=norms,
        facts=cache_facts(reader),
    )


def choose_windows(reader: Reader, count: int, *, seed: int) -> list[int]:
    """Up to `count` random windows, ascending; of different clips as long as there are some."""
    if count < 1:
        raise UsageError(f"--windows {count}: wanted 1 or more")
    if not reader.num_windows:
        raise UsageError(f"{reader.folder}: has no windows to show: all clips are in quarantine")
    order = np.random.default_rng(seed).permutation(reader.num_windows)
    clips = reader.clip_index[order]
    by_clip = np.argsort(clips, kind="stable")
    starts = np.searchsorted(clips[by_clip], clips[by_clip])
    rank = np.empty(len(order), dtype=np.int64)  # how many windows of its clip come before each
    rank[by_clip] = np.arange(len(order)) - starts
    return sorted(order[np.argsort(rank, kind="stable")][:count].tolist())


def frame_strips(
    reader: Reader, windows: Sequence[int], videos: Sequence[str]
) -> dict[int, list[Strip]]:
    """Window -> its frames as the backbone saw them, cropped and flipped, where `videos` have it.

    Raises UsageError if there are videos but none of any shown clip.
    """
    clips = clips_by_key(videos) if videos else {}
    strips = {}
    for window in windows:
        known = reader.window(window)
        clip = clips.get(known["clip"])
        frames = None if clip is None else read_frames(clip, known["frames"][:MAX_COLUMNS])
        if frames is None:
            continue
        top, left, height, width = map(round, known["crop"])
        seen = [frame[top : top + height, left : left + width] for frame in frames]
        seen = [frame[:, ::-1] if known["flipped"] else frame for frame in seen]
        alt = f"Frames of {known['clip']}, cropped as for the backbone."
        strips[window] = [_strip(reader, window, "video", alt, seen, smooth=True)]
    if videos and not strips:
        shown = sorted({reader.window(window)["clip"] for window in windows})
        raise UsageError(
            f"--videos: none of the clips shown is among them, first {shown[0]!r}: give the paths "
            "as they were given to deltatok-extract"
        )
    return strips


def cache_facts(reader: Reader) -> dict[str, Any]:
    """What the cache is."""
    found = describe_cache(reader.folder)
    _, patches, *_ = found["provenance"]
    names = (
        *("format", "windows", "clips", "quarantined", "shards", "frames_per_window"),
        *("tokens_per_frame", "channels", "dtype", "abs_max", "licence", "fingerprint"),
    )
    facts = {
        "size": size_text(found["bytes"]),
        **{name.replace("_", " "): found[name] for name in names},
        "sampling": patches["sampling"],
        "backbone": found["backbone"].get("name"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _panel(reader: Reader, number: int, window: int, strips: Sequence[Strip]) -> Panel:
    known, times = reader.window(window), reader.timestamps_s([window])[0, :MAX_COLUMNS]
    label = reader.labels[int(reader.clip_index[window])]
    top, left, height, width = map(round, known["crop"])
    return Panel(
        title=f"{number}. {known['clip']}{f' ({label})' if label else ''}: crop {width} x {height} "
        f"at ({left}, {top}){', flipped' if known['flipped'] else ''}",
        columns=("0 s", *(f"+{time - times[0]:.2f}" for time in times[1:])),
        strips=tuple(strips),
    )


def _strip(
    reader: Reader, window: int, label: str, alt: str, tiles: Sequence[Tile], *, smooth: bool
) -> Strip:
    """The tiles in the shape of the window's crop."""
    aspect = _aspect(reader, window)
    resized = tuple(resize_tile(tile, aspect=aspect, smooth=smooth) for tile in tiles)
    return Strip(label=label, alt=alt, tiles=resized, blocks=not smooth)


def _aspect(reader: Reader, window: int) -> float:
    """Width / height of the window's crop."""
    _, _, height, width = reader.window(window)["crop"]
    return float(width) / max(float(height), 1.0)


def _numbers(values: ArrayLike) -> str:
    return ", ".join(f"{value:.3g}" for value in np.asarray(values))


def _norm_text(norms: NDArray[np.float32]) -> str:
    low, middle, high = np.percentile(norms, (1, 50, 99))
    return f"median {middle:.4g}; 98 % within {low:.4g} and {high:.4g}; largest {norms.max():.4g}"


def _draw_patches(
    reader: PatchShards, windows: Sequence[int]
) -> tuple[list[list[Strip]], list[Plot]]:
    """Colours and changes of every window, and the plot of their norms."""
    tokens = reader.tokens(windows)[:, :MAX_COLUMNS]  # float32 (W, T, N, D)
    flat = tokens.reshape(-1, tokens.shape[-1])
    colours = fit_pca_colours(flat[:: -(-len(flat) // MAX_FITTED)])
    changes = np.linalg.norm(np.diff(tokens, axis=1), axis=-1)  # (W, T - 1, N)
    top = float(np.percentile(changes, TOP_PERCENTILE)) if changes.size else 1.0
    first = np.full((*reader.grid, 3), IGNORE_COLOUR, dtype=np.uint8)
    strips = []
    for i, window in enumerate(windows):
        seen = [colours(frame, reader.grid) for frame in tokens[i]]
        heat = [heat_tile(change.reshape(reader.grid), top=top) for change in changes[i]]
        spoken = f"{_numbers(changes[i].mean(axis=-1))} on average"
        rows = (
            ("tokens", f"Tokens of window {i + 1} as colours.", seen),
            (
                "change",
                f"Change from frame to frame in window {i + 1}: {spoken}.",
                [first, *heat],
            ),
        )
        strips.append([_strip(reader, window, *row, smooth=False) for row in rows])
    norms = np.linalg.norm(flat, axis=-1)

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        axes = figure.add_subplot()
        axes.hist(norms, bins=60, color=COLOURS[0])
        axes.set(xlabel="token norm", ylabel="tokens", yscale="log")

    return strips, [draw_plot(draw, alt=f"Token norms: {_norm_text(norms)}.")]


def _draw_deltas(
    reader: DeltaShards, windows: Sequence[int], sample: NDArray[Any]
) -> tuple[list[list[Strip]], list[Plot]]:
    """Colours and distances of every window, and the plot of norms and distances."""
    sampled = reader.tokens(sample).astype(np.float32)  # (n, T, D)
    fitted = sampled[:, 1:] if sampled.shape[1] > 1 else sampled
    colours, mean = fit_pca_colours(fitted.reshape(-1, fitted.shape[-1])), fitted.mean(axis=(0, 1))
    low, high = np.percentile(np.linalg.norm(fitted - mean, axis=-1), (1, 99))
    floor = FLOOR * float(high - low)
    tokens = reader.tokens(windows).astype(np.float32)
    strips: list[list[Strip]] = []
    for i, window in enumerate(windows):
        own = tokens[i, :MAX_COLUMNS]
        distances = np.linalg.norm(own - mean, axis=-1)
        spoken = f"{_numbers(distances[1:])}. Norm of the first: {np.linalg.norm(own[0]):.3g}."
        heat = heat_tile((distances - low)[None] + floor, top=float(high - low) + floor)
        rows = (
            ("tokens", f"Tokens of window {i + 1} as colours.", colours(own, (1, len(own)))),
            (
                "distance",
                f"Distance from the average token in window {i + 1}, from the second token on: "
                f"{spoken}",
                heat,
            ),
        )
        size = (BAR_HEIGHT, round(TILE_HEIGHT * min(max(_aspect(reader, window), 0.5), 2.0)), 1)
        strips.append([])
        for label, alt, row in rows:
            row[0, 0] = IGNORE_COLOUR
            tiles = tuple(np.tile(colour, size) for colour in row[0])
            strips[-1].append(Strip(label=label, alt=alt, tiles=tiles))
    gaps = np.diff(reader.timestamps_s(sample), axis=1)
    return strips, [_plot_norms(sampled, mean, gaps)] if gaps.size else []


def _plot_times(reader: Reader, windows: Sequence[int], sample: NDArray[Any]) -> Plot:
    times = reader.timestamps_s(windows).astype(np.float64)
    gaps = np.diff(reader.timestamps_s(sample).astype(np.float64), axis=1).ravel()
    spans = np.ptp(times, axis=1)
    alt = f"{len(windows)} windows, from {spans.min():.2f} to {spans.max():.2f} s long."
    if gaps.size:
        alt += (
            f" Gaps between frames of {len(sample)} windows: {gaps.min():.3f} to {gaps.max():.3f} "
            f"s, median {np.median(gaps):.3f} s."
        )

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        rows = np.arange(1, len(times) + 1)
        left.hlines(rows, times[:, 0], times[:, -1], color=ink["faint"], linewidth=1.5)
        left.plot(times.T, np.broadcast_to(rows, times.T.shape), "o", color=COLOURS[0], ms=3)
        left.set(xlabel="seconds", ylabel="window shown", title="Frames in time")
        left.set_ylim(len(times) + 0.6, 0.4)
        left.yaxis.get_major_locator().set_params(integer=True)
        right.hist(1000 * gaps, bins=40, color=COLOURS[0])
        right.set(xlabel="gap between frames, ms", ylabel="gaps", title="Gaps")

    return draw_plot(draw, alt=alt)


def _plot_norms(
    tokens: NDArray[np.float32], mean: NDArray[np.float32], gaps: NDArray[np.float32]
) -> Plot:
    """tokens (n, T, D), their `mean` (D,) without the first ones; over `gaps` (n, T - 1), s."""
    first = np.linalg.norm(tokens[:, 0], axis=-1)
    lengths = {
        "norm": np.linalg.norm(tokens[:, 1:], axis=-1).ravel(),
        "distance": np.linalg.norm(tokens[:, 1:] - mean, axis=-1).ravel(),
    }
    gaps_ms = 1000 * gaps.ravel()
    alt = f"Of {len(tokens)} windows."
    for what, values in lengths.items():
        alt += f" Token {what}s: {_norm_text(values)}."
        if np.ptp(gaps_ms) > 0 and np.ptp(values) > 0:
            alt += f" Correlation with the gap: {np.corrcoef(gaps_ms, values)[0, 1]:.2f}."
    alt += f" Norms of the first tokens, from black: {_norm_text(first)}."

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        groups = np.array_split(np.argsort(gaps_ms, kind="stable"), min(MAX_BINS, len(gaps_ms)))
        for axes, (what, values) in zip(figure.subplots(1, 2), lengths.items(), strict=True):
            axes.plot(gaps_ms, values, ".", color=COLOURS[0], ms=2, alpha=0.25)
            medians = [(np.median(gaps_ms[group]), np.median(values[group])) for group in groups]
            axes.plot(*zip(*medians, strict=True), color=COLOURS[1], linewidth=2)
            axes.set(xlabel="gap, ms", title=f"{what.title()} against the gap")
            axes.ticklabel_format(axis="y", useOffset=False)

    return draw_plot(draw, alt=alt)


def preview_html(preview: Preview) -> str:
    """The page: one file, pictures inside, light and dark by the reader's setting."""
    values = {"title": preview.title, "preview": preview}
    return render_page("preview.html.j2", values, package=__package__)


def preview_png(preview: Preview) -> bytes:
    """Titles, panels and plots as one tall picture on white."""
    parts = [_text_image(preview.title, size=26), _text_image(preview.summary, size=15)]
    for panel in preview.panels:
        parts += [_text_image(panel.title, size=15), panel_image(panel)]
    parts += [Image.open(io.BytesIO(plot.light)) for plot in (preview.times, *preview.norms)]
    gap = PNG_MARGIN // 2
    width = max(part.width for part in parts) + 2 * PNG_MARGIN
    height = sum(part.height + gap for part in parts) + 2 * PNG_MARGIN
    canvas = Image.new("RGBA", (width, height), "white")
    top = PNG_MARGIN
    for part in parts:
        canvas.alpha_composite(part.convert("RGBA"), (PNG_MARGIN, top))
        top += part.height + gap
    return png_bytes(canvas.convert("RGB"))


def _text_image(text: str, *, size: int) -> Image.Image:
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (int(font.getlength(text)) + 4, round(size * 1.6)), "white")
    ImageDraw.Draw(image).text((0, size * 0.8), text, fill="black", font=font, anchor="lm")
    return image
