"""deltatok-shards preview: some windows of a cache as pictures, in one HTML page or one PNG.

    panels   a window each: its frames (with --videos), tokens as colours, change or distance
    plots    times and gaps, norms; of patch tokens the channels, of delta tokens a map
    facts    what the cache is

Everything comes from the cache, and from the videos if they are given.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from ..evaluate.report.frames import clips_by_key, read_frames
from ..evaluate.report.html import render_page, value_text
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
from ..shards.records import read_all_done
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
PNG_LINE = 120  # characters

PATCHES_TEXT = (
    "Patch tokens as colours: the three main directions of all tokens shown are red, green and "
    "blue, the same for every frame and window, so equal colours are equal features. Change: how "
    "far each token is from the one at its place in the frame before, from black (not at all) to "
    "bright (99th percentile of all shown); grey in the first frame."
)
DELTAS_TEXT = (
    "Each delta token leads from the frame before to the frame above it. Tokens as colours: the "
    "three main directions of a sample of the cache are red, green and blue. Distance: from the "
    "average token of the sample, from dark (1st percentile) to bright (99th). The first token "
    "leads from a black frame, is unlike all others, and is left out (grey)."
)
PATCH_NORMS_TEXT = (
    "Left: lengths of the tokens shown; a few much longer ones are artefacts of the backbone. "
    "Right: standard deviation of every channel over the whole cache, largest first; a channel far "
    "above the others dominates distances."
)
DELTA_NORMS_TEXT = (
    "Above: norms. Below: distances from the average token, which tell tokens apart where the "
    "tokenizer gives all the same norm. Left: of the windows shown, over time. Right: of the "
    "sample, against the gap that a token bridges, with the median of equally large groups."
)
MAP_TEXT = (
    "Tokens of the sample on their two main directions, coloured by the gap they bridge. The "
    "first tokens of the windows are left out."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what to see, and pictures."""

    title: str
    text: str
    panels: tuple[Panel, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preview:
    """All that is shown, from above to below."""

    title: str
    summary: str
    sections: Sequence[Section]
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
        kind, sections = "Patch", _patch_sections(reader, windows, sample, frames)
    else:
        kind, sections = "Delta", _delta_sections(reader, windows, sample, frames)
    return Preview(
        title=f"{kind} tokens in {reader.folder.resolve().name}",
        summary=f"{len(windows)} of {reader.num_windows} windows, of {len(reader.keys)} clips; "
        f"seed {seed}",
        sections=sections,
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


def frame_strips(reader: Reader, windows: Sequence[int], videos: Sequence[str]) -> dict[int, Strip]:
    """Window -> its frames as the backbone saw them, cropped and flipped, where `videos` have it.

    Raises UsageError if there are videos but none of any shown clip.
    """
    if not videos:
        return {}
    clips, strips = clips_by_key(videos), {}
    for window in windows:
        known = reader.window(window)
        clip = clips.get(known["clip"])
        frames = None if clip is None else read_frames(clip, known["frames"][:MAX_COLUMNS])
        if frames is None:
            continue
        top, left, height, width = map(round, known["crop"])
        seen = [frame[top : top + height, left : left + width] for frame in frames]
        seen = [frame[:, ::-1] if known["flipped"] else frame for frame in seen]
        aspect = _aspect(reader, window)
        strips[window] = Strip(
            label="video",
            alt=f"Frames of {known['clip']}, cropped as for the backbone.",
            tiles=tuple(resize_tile(frame, aspect=aspect, smooth=True) for frame in seen),
        )
    if not strips:
        shown = sorted({reader.window(window)["clip"] for window in windows})
        raise UsageError(
            f"--videos: none of the clips shown is among them, first {shown[0]!r}: give the paths "
            "as they were given to deltatok-extract"
        )
    return strips


def cache_facts(reader: Reader) -> dict[str, Any]:
    """What the cache is."""
    found, info = describe_cache(reader.folder), reader.info
    sampling = info.identity.get("sampling") or info.identity.get("patches", {}).get("sampling")
    facts = {
        "format": found["format"],
        "size": size_text(found["bytes"]),
        "windows": found["windows"],
        "clips": found["clips"],
        "clips in quarantine": found["quarantined"],
        "shards": found["shards"],
        "frames per window": found["frames_per_window"],
        "tokens per frame": found["tokens_per_frame"],
        "channels": found["channels"],
        "dtype": found["dtype"],
        "largest value": found["abs_max"],
        "sampling": sampling if isinstance(sampling, Mapping) else None,
        "backbone": info.backbone.get("name"),
        "licence": info.licence,
        "fingerprint": found["fingerprint"],
    }
    return {name: value for name, value in facts.items() if value is not None}


def _panel(reader: Reader, number: int, window: int, strips: Sequence[Strip | None]) -> Panel:
    known, times = reader.window(window), reader.timestamps_s([window])[0, :MAX_COLUMNS]
    label = reader.labels[int(reader.clip_index[window])]
    top, left, height, width = map(round, known["crop"])
    return Panel(
        title=f"{number}. {known['clip']}{f' ({label})' if label else ''}: crop {width} x {height} "
        f"at ({left}, {top}){', flipped' if known['flipped'] else ''}",
        columns=("0 s", *(f"+{time - times[0]:.2f}" for time in times[1:])),
        strips=tuple(strip for strip in strips if strip is not None),
    )


def _aspect(reader: Reader, window: int) -> float:
    """Width / height of the window's crop."""
    _, _, height, width = reader.window(window)["crop"]
    return float(width) / max(float(height), 1.0)


def _numbers(values: ArrayLike) -> str:
    return ", ".join(f"{value:.3g}" for value in np.asarray(values))


def _norm_text(norms: NDArray[np.float32]) -> str:
    low, middle, high = np.percentile(norms, (1, 50, 99))
    return f"median {middle:.4g}; 98 % within {low:.4g} and {high:.4g}; largest {norms.max():.4g}"


def _patch_sections(
    reader: PatchShards, windows: Sequence[int], sample: NDArray[Any], frames: Mapping[int, Strip]
) -> list[Section]:
    tokens = reader.tokens(windows)[:, :MAX_COLUMNS]  # float32 (W, T, N, D)
    flat = tokens.reshape(-1, tokens.shape[-1])
    fitted = np.linspace(0, len(flat) - 1, min(MAX_FITTED, len(flat))).astype(np.int64)
    colours = fit_pca_colours(flat[fitted])
    changes = np.linalg.norm(np.diff(tokens, axis=1), axis=-1)  # (W, T - 1, N)
    top = float(np.percentile(changes, TOP_PERCENTILE)) if changes.size else 1.0
    still = np.full((*reader.grid, 3), IGNORE_COLOUR, dtype=np.uint8)

    def strip(label: str, alt: str, tiles: Sequence[Tile], window: int) -> Strip:
        aspect = _aspect(reader, window)
        resized = tuple(resize_tile(tile, aspect=aspect, smooth=False) for tile in tiles)
        return Strip(label=label, alt=alt, tiles=resized)

    panels = []
    for i, window in enumerate(windows):
        seen = [colours(frame, reader.grid) for frame in tokens[i]]
        heat = [heat_tile(change.reshape(reader.grid), top=top) for change in changes[i]]
        spoken = f"{_numbers(changes[i].mean(axis=-1))} on average"
        strips = (
            frames.get(window),
            strip("tokens", f"Tokens of window {i + 1} as colours.", seen, window),
            strip(
                "change",
                f"Change from frame to frame in window {i + 1}: {spoken}.",
                [still, *heat],
                window,
            ),
        )
        panels.append(_panel(reader, i + 1, window, strips))
    return [
        Section(title="Windows", text=PATCHES_TEXT, panels=tuple(panels)),
        _times_section(reader, windows, sample, "at their time in the clip"),
        Section(title="Norms", text=PATCH_NORMS_TEXT, plots=(_patch_norms_plot(reader, tokens),)),
    ]


def _delta_sections(
    reader: DeltaShards, windows: Sequence[int], sample: NDArray[Any], frames: Mapping[int, Strip]
) -> list[Section]:
    sampled = reader.tokens(sample).astype(np.float32)  # (n, T, D)
    fitted = sampled[:, 1:] if sampled.shape[1] > 1 else sampled
    colours, mean = fit_pca_colours(fitted.reshape(-1, fitted.shape[-1])), fitted.mean(axis=(0, 1))
    low, high = np.percentile(np.linalg.norm(fitted - mean, axis=-1), (1, 99))
    floor = FLOOR * float(high - low)
    tokens = reader.tokens(windows).astype(np.float32)
    panels = []
    for i, window in enumerate(windows):
        own = tokens[i, :MAX_COLUMNS]
        distances = np.linalg.norm(own - mean, axis=-1)
        rows = {
            "tokens": colours(own, (1, len(own))),
            "distance": heat_tile((distances - low)[None] + floor, top=float(high - low) + floor),
        }
        spoken = f"{_numbers(distances[1:])}. Norm of the first: {np.linalg.norm(own[0]):.3g}."
        alts = {
            "tokens": f"Tokens of window {i + 1} as colours.",
            "distance": f"Distance from the average token in window {i + 1}, from the second "
            f"token on: {spoken}",
        }
        size = (BAR_HEIGHT, round(TILE_HEIGHT * min(max(_aspect(reader, window), 0.5), 2.0)), 1)
        strips = [frames.get(window)]
        for label, row in rows.items():
            row[0, 0] = IGNORE_COLOUR
            tiles = tuple(np.tile(colour, size) for colour in row[0])
            strips.append(Strip(label=label, alt=alts[label], tiles=tiles))
        panels.append(_panel(reader, i + 1, window, strips))
    sections = [
        Section(title="Windows", text=DELTAS_TEXT, panels=tuple(panels)),
        _times_section(reader, windows, sample, "in seconds from the window's first frame"),
    ]
    if reader.shape[0] > 1:
        times, gaps = reader.timestamps_s(windows), np.diff(reader.timestamps_s(sample), axis=1)
        plots = tuple(
            _delta_norms_plot(what, centre, tokens[:, 1:], times[:, 1:], sampled, gaps)
            for what, centre in (("norm", np.zeros_like(mean)), ("distance", mean))
        )
        sections += [
            Section(title="Norms", text=DELTA_NORMS_TEXT, plots=plots),
            Section(title="Map", text=MAP_TEXT, plots=(_map_plot(sampled[:, 1:], gaps),)),
        ]
    return sections


def _times_section(
    reader: Reader, windows: Sequence[int], sample: NDArray[Any], axis: str
) -> Section:
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
        if gaps.size:
            right.hist(1000 * gaps, bins=40, color=COLOURS[0])
        right.set(xlabel="gap between frames, ms", ylabel="gaps", title="Gaps")

    return Section(
        title="Times", text=f"Dots are frames, {axis}.", plots=(draw_plot(draw, alt=alt),)
    )


def _patch_norms_plot(reader: PatchShards, tokens: NDArray[np.float32]) -> Plot:
    norms, std = np.linalg.norm(tokens, axis=-1).ravel(), _channel_std(reader.folder)
    largest = ", ".join(
        f"{std[channel]:.3g} (channel {channel})" for channel in np.argsort(-std)[:3]
    )
    alt = (
        f"Token norms: {_norm_text(norms)}. Channels: median standard deviation "
        f"{np.median(std):.3g}, largest {largest}."
    )

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        left, right = figure.subplots(1, 2)
        left.hist(norms, bins=60, color=COLOURS[0])
        left.set(xlabel="token norm", ylabel="tokens", title="Norms", yscale="log")
        right.plot(np.arange(1, len(std) + 1), np.sort(std)[::-1], color=COLOURS[1], linewidth=1.8)
        right.set(xlabel="channel, by rank", title="Standard deviation of channels")
        if (std > 0).all():
            right.set_yscale("log")

    return draw_plot(draw, alt=alt)


def _channel_std(folder: Path) -> NDArray[np.float64]:
    """(D,): of all shards together, from the statistics of their done-records."""
    records = [record for record in read_all_done(folder) if record.rows]
    weights = np.array([record.rows for record in records], dtype=np.float64)
    means = np.array([record.statistics["channel_mean"] for record in records])
    stds = np.array([record.statistics["channel_std"] for record in records])
    mean = np.average(means, axis=0, weights=weights)
    square = np.average(stds**2 + (means - mean) ** 2, axis=0, weights=weights)
    return np.asarray(np.sqrt(square), dtype=np.float64)


def _delta_norms_plot(
    what: str,
    centre: NDArray[np.float32],
    shown: NDArray[np.float32],
    times: NDArray[np.float32],
    sampled: NDArray[np.float32],
    gaps: NDArray[np.float32],
) -> Plot:
    """shown (W, T - 1, D) at `times` (W, T - 1); sampled (n, T, D) over `gaps` (n, T - 1), s."""
    own = np.linalg.norm(shown - centre, axis=-1)
    norms = np.linalg.norm(sampled[:, 1:] - centre, axis=-1).ravel()
    gaps = gaps.ravel()
    alt = f"Token {what}s of {len(sampled)} windows: {_norm_text(norms)}."
    if np.ptp(gaps) > 0 and np.ptp(norms) > 0:
        alt += f" Correlation with the gap: {np.corrcoef(gaps, norms)[0, 1]:.2f}."
    if what == "norm":
        first = np.linalg.norm(sampled[:, 0], axis=-1)
        alt += f" Of the first tokens, from black: {_norm_text(first)}."

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        left, right = figure.subplots(1, 2)
        for i, (seconds, lengths) in enumerate(zip(times, own, strict=True)):
            left.plot(seconds, lengths, "o-", color=COLOURS[i % len(COLOURS)], ms=2.5, lw=1.2)
        left.set(
            xlabel="seconds from the first frame", ylabel=what, title=f"{what.title()} over time"
        )
        right.plot(1000 * gaps, norms, ".", color=COLOURS[0], ms=2, alpha=0.25)
        groups = np.array_split(np.argsort(gaps, kind="stable"), min(MAX_BINS, len(gaps)))
        medians = [(1000 * np.median(gaps[group]), np.median(norms[group])) for group in groups]
        right.plot(*zip(*medians, strict=True), color=COLOURS[1], linewidth=2)
        right.set(xlabel="gap, ms", title=f"{what.title()} against the gap")
        for axes in (left, right):
            axes.ticklabel_format(axis="y", useOffset=False)

    return draw_plot(draw, alt=alt)


def _map_plot(tokens: NDArray[np.float32], gaps: NDArray[np.float32]) -> Plot:
    """tokens (n, T - 1, D), and the seconds they bridge (n, T - 1)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat / max(1, len(flat) - 1))
    share = 100 * values[::-1][:2] / max(float(values.sum()), 1e-12)
    x, y = (flat @ vectors[:, ::-1][:, :2]).T
    alt = (
        f"{len(flat)} delta tokens on two directions that hold {share[0]:.0f} % and "
        f"{share[1]:.0f} % of their variance."
    )

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        axes = figure.add_subplot()
        dots = axes.scatter(x, y, c=1000 * gaps.ravel(), s=4, cmap="viridis", alpha=0.7)
        xlabel = f"direction 1 ({share[0]:.0f} % of the variance)"
        axes.set(xlabel=xlabel, ylabel=f"direction 2 ({share[1]:.0f} %)", title="Delta tokens")
        figure.colorbar(dots, ax=axes, label="gap, ms")

    return draw_plot(draw, alt=alt)


def preview_html(preview: Preview) -> str:
    """The page: one file, pictures inside, light and dark by the reader's setting."""
    values = {"title": preview.title, "preview": preview}
    return render_page("preview.html.j2", values, package=__package__)


def preview_png(preview: Preview) -> bytes:
    """The same as one tall picture on white."""
    parts = [_text_image(preview.title, size=26), _text_image(preview.summary, size=15)]
    for section in preview.sections:
        parts.append(_text_image(section.title, size=20))
        parts += [_text_image(line, size=14) for line in textwrap.wrap(section.text, PNG_LINE)]
        for panel in section.panels:
            parts += [_text_image(panel.title, size=15), panel_image(panel)]
        for plot in section.plots:
            image = Image.open(io.BytesIO(plot.light)).convert("RGBA")
            parts.append(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))
    for name, value in preview.facts.items():
        parts.append(
            _text_image(textwrap.shorten(f"{name}: {value_text(value)}", PNG_LINE), size=13)
        )
    gap = PNG_MARGIN // 2
    width = max(part.width for part in parts) + 2 * PNG_MARGIN
    height = sum(part.height + gap for part in parts) + 2 * PNG_MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    top = PNG_MARGIN
    for part in parts:
        canvas.paste(part, (PNG_MARGIN, top))
        top += part.height + gap
    return png_bytes(canvas)


def _text_image(text: str, *, size: int) -> Image.Image:
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (int(font.getlength(text)) + 4, round(size * 1.6)), "white")
    ImageDraw.Draw(image).text((0, size * 0.8), text, fill="black", font=font, anchor="lm")
    return image
