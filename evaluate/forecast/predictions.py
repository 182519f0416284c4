"""Frames that any other model predicted, scored as a world model's samples are.

    DIR/CLIP_KEY/HORIZON-TARGET/SAMPLE      HORIZON: short or mid; TARGET: index of the target frame
                                            in the clip, six digits (a.mp4/mid-000036/0)

SAMPLE is one predicted future, its frames from the first after the context to the target, one for
every step of the horizon: a folder of images (names in order of time), a `.npy` uint8 (steps, H, W,
3), or a video. A frame shows what the cache's windows show of a frame (all of it; KITTI's benchmark
crop), at any size of about that shape. All sequences have the same number of samples. Where
sequences are missing, OUT/predictions-wanted.jsonl says what a model has to predict, and from which
frames.

Frames are resized and cut exactly as the frames in the cache were, and go through the cache's own
backbone: rows `predictions_best` and `predictions_mean`. B windows, S samples, H steps, N patch
tokens, D channels.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...extract.backbone import Autocast, Backbone
from ...extract.pixels import resize_bilinear
from ...extract.sources.clip import VIDEO_SUFFIXES, Clip, stored_size
from ...shards.cache import pca_of
from ...shards.errors import ClipError, UsageError
from ...shards.evaluation.geometry import (
    compute_resize_sizes,
    frame_shape,
    square_corners,
)
from ...shards.evaluation.targets import windows_of_clips
from ...shards.files import open_file, write_bytes
from ...shards.npy import map_npy
from ...shards.patches.projection import read_projection
from ...shards.patches.reader import PatchShards
from ..inference.footage import decode_frames
from ..inference.parts import check_same_features
from ..report.rows import HORIZONS
from .config import ForecastConfig
from .rollout import best_sample, mean_sample

WANTED_FILE = "predictions-wanted.jsonl"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
ASPECT_SLACK = 0.05
"""Part by which a predicted frame's shape may differ from the region's: models predict at sizes of
their own (1280 x 704 for 16:9 is 2 % off), crops and bars are further off (a guess)."""
FRAMES_AT_ONCE = 32  # through the backbone
_NAMED = 5  # sequences named in a message

Frames = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a model has to predict for one target at one horizon. Times: seconds in the clip."""

    folder: str
    """CLIP_KEY/HORIZON-TARGET."""
    clip: str
    context_frames: tuple[int, ...]
    context_times_s: tuple[float, ...]
    target_frames: tuple[int, ...]
    """One for every step."""
    target_times_s: tuple[float, ...]


class PredictionFolder:
    """Knows what is there when it is made; reads frames when they are asked for."""

    def __init__(self, config: ForecastConfig, cache: PatchShards) -> None:
        """Look through `config.predictions` for what the windows of `cache` need.

        Raises:
            UsageError: no such folder; sequences without predictions (unless
                `config.predictions_subset`), all of them, or with another number of samples; a
                sample that is seen to be of no use without decoding it.
        """
        self.root = Path(str(config.predictions))
        if not self.root.is_dir():
            raise UsageError(f"--predictions {self.root}: no such folder")
        self._wanted = wanted(config, cache)
        self._samples: dict[str, list[Path]] = {}
        folders = {one.folder: one for one in self._wanted.values()}
        for one in folders.values():
            if found := _samples(self.root, one.folder):
                self._samples[one.folder] = found
                for path in found:
                    _check_sample(path, len(one.target_frames))
        missing = [folder for folder in folders if folder not in self._samples]
        if missing and not (config.predictions_subset and self.windows()):
            lines = [json.dumps(asdict(one), sort_keys=True) for one in folders.values()]
            listing = Path(config.out) / WANTED_FILE
            write_bytes(listing, "".join(f"{line}\n" for line in lines).encode())
            shown = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise UsageError(
                f"--predictions {self.root}: nothing for {len(missing)} of {len(folders)} sequences"
                f" ({shown}); {listing} lists what is wanted; predict them, or pass "
                "--predictions-subset to score only targets that have both horizons"
            )
        first, *rest = self._samples
        self.num_samples = len(self._samples[first])
        for folder in rest:
            if len(self._samples[folder]) != self.num_samples:
                raise UsageError(
                    f"--predictions {self.root}: {len(self._samples[folder])} samples in {folder}, "
                    f"{self.num_samples} in {first}: best of more is better, so all sequences need "
                    "as many"
                )
        self._last: tuple[str, list[Frames]] | None = None

    def windows(self) -> list[int]:
        """The windows that have predictions at every horizon, in order."""
        return sorted(
            window
            for window in {window for window, _ in self._wanted}
            if all(self._wanted[window, name].folder in self._samples for name in HORIZONS)
        )

    def frames(self, window: int, horizon: str) -> list[Frames]:
        """Every sample's frames (steps, H, W, 3).

        Raises UsageError for one that cannot be read or has another number of frames.
        """
        one = self._wanted[window, horizon]
        if self._last is None or self._last[0] != one.folder:  # both crops of a target ask for it
            steps = len(one.target_frames)
            read = [_read_sample(path, steps) for path in self._samples[one.folder]]
            self._last = (one.folder, read)
        return self._last[1]

    def folder(self, window: int, horizon: str) -> Path:
        """Where the predictions of a window lie."""
        return self.root / self._wanted[window, horizon].folder


def wanted(config: ForecastConfig, cache: PatchShards) -> dict[tuple[int, str], Wanted]:
    """(window, horizon) -> what is wanted; the crops of a target want the same."""
    frames = cache.table().frame_index[:, : config.num_frames]
    times = cache.table().timestamps_s[:, : config.num_frames]
    found = {}
    for window, (row, row_s) in enumerate(zip(frames.tolist(), times.tolist(), strict=True)):
        clip = cache.keys[int(cache.clip_index[window])]
        for horizon in HORIZONS:
            start = config.context_start(horizon)
            now = start + config.num_context
            found[window, horizon] = Wanted(
                folder=f"{clip}/{horizon}-{row[-1]:06d}",
                clip=clip,
                context_frames=tuple(row[start:now]),
                context_times_s=tuple(row_s[start:now]),
                target_frames=tuple(row[now:]),
                target_times_s=tuple(row_s[now:]),
            )
    return found


def _samples(root: Path, folder: str) -> list[Path]:
    """The samples in a sequence's folder, in natural order; none if it is not there."""
    place = root / folder
    if not place.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"clip {folder}: its name leaves the folder of predictions {root}")
    try:
        inside = list(place.iterdir())
    except OSError:
        return []
    kept = (path for path in inside if not path.name.startswith("."))
    suffixes = VIDEO_SUFFIXES | {".npy"}
    samples = (path for path in kept if path.is_dir() or path.suffix.lower() in suffixes)
    return sorted(samples, key=_natural)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts by name, numbers in it by value: frame-2 comes before frame-10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _check_sample(path: Path, steps: int) -> None:
    """Check what is known of a sample without decoding it; raises as `_read_sample`."""
    if path.is_dir():
        _check_count(path, len(_images(path)), steps)
    elif path.suffix.lower() == ".npy":
        _check_frames(path, _map(path), steps)


def _read_sample(path: Path, steps: int) -> Frames:
    if path.is_dir():
        frames = _read_images(path)
    elif path.suffix.lower() == ".npy":
        frames = _map(path)
    else:
        frames = _read_video(path)
    _check_frames(path, frames, steps)
    return np.array(frames)


def _check_frames(path: Path, frames: Frames, steps: int) -> None:
    right = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
    if not (right and frames.size):
        raise UsageError(
            f"{path}: holds {frames.dtype} {frames.shape}, wanted uint8 (steps, H, W, 3)"
        )
    _check_count(path, len(frames), steps)


def _check_count(path: Path, count: int, steps: int) -> None:
    if count != steps:
        raise UsageError(
            f"{path}: {count} frames, wanted {steps}: one for every step, the last one at the "
            "target"
        )


def _map(path: Path) -> Frames:
    try:
        return map_npy(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as .npy ({error})") from None


def _images(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UsageError(f"{folder}: no image in it, wanted PNG or JPEG files, one for each step")
    return sorted(files, key=_natural)


def _read_images(folder: Path) -> Frames:
    images = []
    for file in _images(folder):
        try:
            with (
                open_file(file) as data,
                Image.open(data, formats=("PNG", "JPEG")) as image,
            ):
                images.append(np.asarray(image.convert("RGB"), np.uint8))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{file}: cannot be read as an image ({error})") from None
    if len({image.shape for image in images}) > 1:
        raise UsageError(f"{folder}: images of different sizes; wanted one size in a sample")
    return np.stack(images)


def _read_video(path: Path) -> Frames:
    try:
        clip = Clip(path.name, path, stored_size(path, None))
        return decode_frames(clip, lambda times_s: list(range(len(times_s))))[0]
    except ClipError as error:
        raise UsageError(f"{path}: cannot be decoded: {error}") from error


@dataclass(frozen=True, kw_only=True)
class View:
    """What a window shows of a frame: `region` is resized to `resized`, then cut at `corner`."""

    region: tuple[float, float]
    """Height and width in source pixels; only their ratio matters."""
    resized: tuple[int, int]
    corner: tuple[int, int]


class PredictionRows:
    """Scores a PredictionFolder beside the forecasts of a cache."""

    def __init__(self, config: ForecastConfig, cache: PatchShards, device: torch.device) -> None:
        """Open folder and backbone.

        Raises:
            CacheMismatch: a backbone that did not make the cache; names both fingerprints.
            UsageError: predictions missing, or no such backbone.
        """
        assert config.backbone is not None  # the config wants both or neither
        identity = cache.info.identity
        self.folder = PredictionFolder(config, cache)
        autocast: Autocast = identity["autocast_dtype"]
        self._backbone = Backbone.load(
            config.backbone,
            device=device,
            autocast=autocast,
            layers=identity["backbone"].get("layers", ()),
        )
        if pca_of(identity) is not None:
            projection = read_projection(cache.folder, cache.info)
            self._backbone = replace(self._backbone, projection=projection)
        check_same_features(
            self._backbone,
            identity,
            what_got=f"--backbone {config.backbone}",
            what_wanted=f"--patches {config.patches}",
        )
        self._shape = frame_shape(identity["preprocessing"]["frame_size"])
        self._views = _views(cache, self._shape)

    def provenance(self) -> dict[str, Any]:
        """What the report says of them."""
        return {
            "folder": self.folder.root.resolve().name,
            "num_samples": self.folder.num_samples,
            "backbone": self._backbone.name,
        }

    def rows(self, windows: list[int], horizon: str, truth: Tensor) -> dict[str, Tensor]:
        """Row name -> (B, H, N, D) of the windows of a batch; truth (B, H, N, D)."""
        samples = torch.stack([self._samples(window, horizon) for window in windows])
        best, _ = best_sample(samples, truth)
        return {"predictions_best": best, "predictions_mean": mean_sample(samples)}

    def _samples(self, window: int, horizon: str) -> Tensor:
        """Features (S, H, N, D) float32 of a window's predictions."""
        folder = self.folder.folder(window, horizon)
        view = self._views[window]
        samples = self.folder.frames(window, horizon)
        squares = torch.cat([self._squares(frames, view, folder) for frames in samples])
        with torch.autocast(squares.device.type, enabled=False):  # the backbone has its own
            tokens = torch.cat(
                [self._backbone.tokens(x) for x in torch.split(squares, FRAMES_AT_ONCE)]
            )
        return tokens.reshape(len(samples), -1, *tokens.shape[1:])

    def _squares(self, frames: Frames, view: View, folder: Path) -> Tensor:
        """uint8 (H, 3, height, width) as the window's own frames were made."""
        height, width = frames.shape[1:3]
        ratio = (width / height) / (view.region[1] / view.region[0])
        if abs(np.log(ratio)) > np.log1p(ASPECT_SLACK):
            raise UsageError(
                f"{folder}: frames of {width}x{height} pixels, the windows show "
                f"{view.region[1]:g}x{view.region[0]:g}: predict the whole of it, at any size of "
                "that shape, without bars or crop"
            )
        planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        resized = resize_bilinear(planes.to(self._backbone.device), view.resized)
        top, left = view.corner
        height, width = self._shape
        return resized[..., top : top + height, left : left + width]


def _views(cache: PatchShards, shape: tuple[int, int]) -> list[View]:
    """The view of every window of a uniform or evaluation cache of frames (height, width)."""
    crops = cache.crop
    is_square = shape[0] == shape[1]
    if cache.info.identity["sampling"]["policy"] != "evaluation" or not is_square:
        return [
            View(region=(height, width), resized=shape, corner=(0, 0))
            for _, _, height, width in crops.tolist()
        ]
    views: dict[int, View] = {}
    for windows in windows_of_clips(cache).values():
        low = crops[windows, :2].min(axis=0)
        high = (crops[windows, :2] + crops[windows, 2:]).max(axis=0)
        height, width = (float(x) for x in np.rint(high - low))  # of whole frames: whole pixels
        resized = compute_resize_sizes(int(height), int(width), shape[0])
        for window, corner in zip(windows, square_corners(*resized), strict=True):
            views[window] = View(region=(height, width), resized=resized, corner=corner)
    return [views[window] for window in range(len(views))]
