"""Possible futures: delta tokens, what is read from them when it is asked for, and their pictures.

S samples, H steps, N patch tokens of a frame, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...shards.errors import UsageError
from ...shards.files import local_path, make_folder, write_bytes
from ...train.models.heads import feature_map
from ..forecast.rollout import decode_rollout
from ..report.animation import draw_moments, gif_bytes, write_mp4
from ..report.panels import most_diverse, read_tile
from ..report.pictures import (
    Panel,
    Strip,
    Tile,
    fit_pca_colours,
    heat_tile,
    panel_image,
    png_bytes,
    resize_tile,
)
from .parts import Parts

PCA_TOKENS = 20_000
"""Tokens that the colours are fitted on, at most (a guess; 3 numbers are fitted for each of D)."""
EMPTY = 225
"""Grey of a tile without a picture."""

Draw = Callable[[Tensor], Tile]
"""Features (N, D) -> a tile of TILE_HEIGHT."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Futures:
    """S futures of one video. `tokens` is there; the rest is computed when first asked for."""

    tokens: Tensor
    """(S, H, D) float32 delta tokens."""
    times_s: tuple[float, ...]
    """H times, seconds after the last frame seen."""
    seen_s: tuple[float, ...]
    """C times of the frames seen, the last one 0."""
    seen: NDArray[np.uint8]
    """(C, H, W, 3) the frames seen."""
    came: NDArray[np.uint8]
    """The frames that really came at the first of `times_s`, where they are known."""
    last: Tensor
    """(N, D) features of the last frame seen."""
    parts: Parts
    samples_at_once: int

    def __len__(self) -> int:
        """S."""
        return len(self.tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns: N is their product."""
        return self.parts.grid

    @cached_property
    def features(self) -> Tensor:
        """(S, H, N, D) float32 patch tokens of every sample; decoded at the first use."""
        with self.parts.inference_mode():
            decoded = [
                decode_rollout(self.parts.tokenizer, tokens[None], self.last[None], grid=self.grid)[
                    0
                ].float()
                for tokens in torch.split(self.tokens, self.samples_at_once)
            ]
        return torch.cat(decoded)

    @cached_property
    def mean(self) -> Tensor:
        """(H, N, D): the samples' features averaged."""
        return self.features.mean(dim=0)

    @cached_property
    def spread(self) -> Tensor:
        """(H, h, w): standard deviation of the samples, root mean square over channels."""
        variance = self.features.var(dim=0, correction=0).mean(dim=-1)
        return variance.sqrt().reshape(-1, *self.grid)

    @cached_property
    def outputs(self) -> Tensor:
        """What the head reads from every sample: (S, H, K, h, w) class logits or metres (K = 1), or
        pictures (S, H, 3, pixels, pixels), about 0-1. UsageError without a head."""
        rows = [self.read(sample) for sample in self.features]
        return torch.stack(rows)

    @cached_property
    def mean_output(self) -> Tensor:
        """What the head reads from the mean features: (H, K, h, w)."""
        return self.read(self.mean)

    def read(self, features: Tensor) -> Tensor:
        """The head's output (B, K, h, w) for features (B, N, D), in float32."""
        head = self.parts.head
        if head is None:
            raise UsageError("no head: pass head=FOLDER to DeltaWorld.from_pretrained")
        with torch.no_grad():
            output: Tensor = head(feature_map(features.float(), grid=self.grid))
        return output

    def most_diverse(self, count: int) -> list[int]:
        """Numbers of the samples that differ most at the last step, the most typical first."""
        return most_diverse(self.features[:, -1], count)

    def save_grid(self, path: str | Path, *, num_samples: int = 4, show: str | None = None) -> Path:
        """A PNG: the frames seen, what came (where known), the samples that differ most, mean and
        spread. show: "features" (colours) or "head" (what it reads); by default the head's if
        there is one. Gives the path."""
        path = local_path(path)
        strips = [
            Strip(label="video", alt="Frames seen, and those that came.", tiles=_video(self)),
            *(
                Strip(label=label, alt=label, tiles=tiles)
                for label, tiles in _rows(self, num_samples, show)
            ),
        ]
        if len(self) > 1:
            strips.append(Strip(label="spread", alt="spread of the samples", tiles=_spread(self)))
        columns = tuple(map(_seconds, (*self.seen_s, *self.times_s)))
        panel = Panel(title="", columns=columns, strips=tuple(strips))
        return _write(path, png_bytes(panel_image(panel)))

    def save_mp4(self, path: str | Path, *, num_samples: int = 4, show: str | None = None) -> Path:
        """The same as a video, samples side by side, in real time; ends in .gif: a GIF."""
        path = local_path(path)
        kind = path.suffix.lower()
        if kind not in (".mp4", ".gif"):
            raise UsageError(f"{path}: wanted a name that ends in .mp4 or .gif")
        video = _video(self)
        seen = video[: len(self.seen)]
        cells = [Strip(label="video", alt="", tiles=video)]
        for label, tiles in _rows(self, num_samples, show):
            cells.append(Strip(label=label, alt="", tiles=(*seen, *tiles)))
        captions = [f"seen {_seconds(time_s)}" for time_s in self.seen_s]
        captions += [f"forecast {_seconds(time_s)}" for time_s in self.times_s]
        columns = 3 if len(cells) > 4 else len(cells)
        pictures = draw_moments(cells, captions, columns=columns, first_future=len(seen))
        step_s = self.times_s[0]
        if kind == ".gif":
            return _write(path, gif_bytes(pictures, step_s=step_s))
        write_mp4(path, pictures, step_s=step_s)
        return path


def _rows(
    futures: Futures, num_samples: int, show: str | None
) -> list[tuple[str, tuple[Tile, ...]]]:
    """(label, H tiles) of the samples that differ most and of the mean."""
    draw = _drawing(futures, show)
    rows = []
    if len(futures) > 1:
        for number in futures.most_diverse(num_samples):
            tiles = tuple(draw(features) for features in futures.features[number])
            rows.append((f"sample {number + 1}", tiles))
    label = "mean" if len(futures) > 1 else "forecast"
    return [*rows, (label, tuple(draw(features) for features in futures.mean))]


def _drawing(futures: Futures, show: str | None) -> Draw:
    head = futures.parts.head
    kind = show or ("features" if head is None else "head")
    if kind not in ("features", "head"):
        raise UsageError(f'show: got {show!r}, wanted "features" or "head"')
    grid, aspect = futures.grid, futures.seen.shape[2] / futures.seen.shape[1]
    if kind == "head":
        top = float(futures.read(futures.last[None]).max())  # of depths: one scale for all tiles
        assert head is not None  # read has refused
        return partial(read_tile, head, grid=grid, aspect=aspect, top=top)
    tokens = np.concatenate(
        [_array(futures.last), _array(futures.features).reshape(-1, futures.last.shape[1])]
    )
    colours = fit_pca_colours(tokens[:: -(-len(tokens) // PCA_TOKENS)])
    return lambda features: resize_tile(
        colours(_array(features), grid), aspect=aspect, smooth=False
    )


def _video(futures: Futures) -> tuple[Tile, ...]:
    """C + H tiles: seen, came, and empty ones where nobody knows."""
    aspect = futures.seen.shape[2] / futures.seen.shape[1]
    frames = [*futures.seen, *futures.came][: len(futures.seen) + len(futures.times_s)]
    tiles = [resize_tile(frame, aspect=aspect, smooth=True) for frame in frames]
    missing = len(futures.seen) + len(futures.times_s) - len(tiles)
    return (*tiles, *[np.full_like(tiles[0], EMPTY)] * missing)


def _spread(futures: Futures) -> tuple[Tile, ...]:
    values = _array(futures.spread)
    aspect = futures.seen.shape[2] / futures.seen.shape[1]
    heat = [heat_tile(one, top=float(values.max())) for one in values]
    return tuple(resize_tile(tile, aspect=aspect, smooth=False) for tile in heat)


def _seconds(time_s: float) -> str:
    return "0 s" if abs(time_s) < 0.005 else f"{time_s:+.2g} s"


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array


def _write(path: Path, data: bytes) -> Path:
    make_folder(path.parent)
    try:
        write_bytes(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error}); give another file") from error
    return path
