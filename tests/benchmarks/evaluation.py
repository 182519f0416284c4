"""How long an evaluation from a cache takes, against the same one from pixels.

    python tests/benchmarks/evaluation.py [--json FILE] [--targets 8] [--frame-size 128] [--small]

A made-up data set (sequences of 7 frames with labels) is extracted once; then it is evaluated
twice: from the cache, and with a reader that makes the same tokens from the images whenever they
are asked for, with the functions of extract/, rounded as the cache stores them. The numbers of both
reports must be equal. With all rows (20 samples), and with the bounds alone, where the backbone is
most of the work. Seconds are of the processor (all threads), those of reading by the clock. Weights
are random; times do not depend on them. --small: the sizes of the tests.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.write import Report
from deltatok.extract.backbone import Backbone
from deltatok.extract.datasets.base import DatasetConfig
from deltatok.extract.datasets.registry import find_targets, run_dataset
from deltatok.extract.decoding.images import decode_target_frames
from deltatok.extract.pixels import window_pixels
from deltatok.extract.sources.clip import Clip, TargetFrames
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.engine.model_folder import weights_sha256
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig

NUM_CLASSES = 19
FPS = 5.0
HEIGHT, WIDTH = 240, 400
"""Of frames and labels, pixels; two overlapping crops."""


def main() -> int:
    """Make everything, evaluate, print the figures; 1 if the two reports differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--frame-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments)
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return 0 if figures["largest_relative_difference"] < 1e-3 else 1


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one data set in `root`."""
    write_frames(root / "data", arguments.targets)
    width, layers = (32, 1) if arguments.small else (192, 12)
    config = DatasetConfig(
        dataset="sequences",
        name="moving",
        root=str(root / "data"),
        images="frames/*/*.jpg",
        labels="labels/*/*.png",
        fps=FPS,
        out=str(root / "patches"),
        backbone=str(write_backbone(root / "backbone", width, layers)),
        frame_size=arguments.frame_size,
        device="cpu",
        workers=1,
    )
    run_dataset(config)
    write_models(root, PatchShards(root / "patches").info.identity, width, layers)
    figures: dict[str, Any] = {
        "targets": arguments.targets,
        "frame_size": arguments.frame_size,
        "width": width,
        "layers": layers,
        "num_samples": arguments.num_samples,
        "threads": torch.get_num_threads(),
        "largest_relative_difference": 0.0,
    }
    for name, changes in (("bounds", {"world": None, "discriminative": None}), ("all_rows", {})):
        settings = forecast_config(root, num_samples=arguments.num_samples, **changes)
        from_cache, cache_s = timed(settings)
        with tokens_from_pixels(config):
            from_pixels, pixels_s = timed(settings)
        figures[name] = {
            "from_cache_s": round(cache_s, 3),
            "from_pixels_s": round(pixels_s, 3),
            "from_pixels_over_from_cache": round(pixels_s / cache_s, 3),
            "reading_from_cache_s": round(from_cache.seconds["read"], 3),
            "reading_from_pixels_s": round(from_pixels.seconds["read"], 3),
        }
        difference = largest_difference(from_cache, from_pixels)
        figures["largest_relative_difference"] = max(
            figures["largest_relative_difference"], difference
        )
    return figures


def timed(config: ForecastConfig) -> tuple[Report, float]:
    """The report, and the processor seconds that it took."""
    start = time.process_time()
    report = run_forecast(config)
    return report, time.process_time() - start


class PixelPatches(PatchShards):
    """A cache's windows, whose tokens are made from the images every time they are read."""

    def __init__(
        self, folder: Path | str, *, backbone: Backbone, config: DatasetConfig, **options: Any
    ) -> None:
        super().__init__(folder, **options)
        self._backbone = backbone
        self._root = Path(config.root)
        self._policy, clips = find_targets(config)
        self._targets: dict[str, Clip] = {clip.key: clip for clip in clips}
        self.windows = functools.lru_cache(maxsize=1)(self._windows)  # of both crops of a target

    def tokens(
        self,
        windows: ArrayLike,
        *,
        frames: ArrayLike | None = None,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """float32 (B, T, N, D), as the cache would give them."""
        if frames is not None or out is not None:
            raise NotImplementedError("an evaluation reads whole windows")
        made = []
        for number in np.atleast_1d(windows).tolist():
            by_crop = self.windows(self.keys[int(self.clip_index[number])])
            pixels = by_crop[tuple(self.crop[number].tolist())]
            with torch.inference_mode():
                made.append(self._backbone.tokens(pixels).numpy())
        return np.stack(made).astype(np.float16).astype(np.float32)

    def _windows(self, key: str) -> dict[tuple[float, ...], torch.Tensor]:
        """Crop in source pixels -> uint8 (T, 3, S, S), of all windows of a target."""
        source = self._targets[key].source
        assert isinstance(source, TargetFrames)
        numbers = source.numbers

        def draw(_: Any, height: int, width: int) -> Any:
            times_s = np.arange(numbers[-1] + 1) / self._policy.fps
            return self._policy.draw(numbers, times_s, height, width)

        draws, frames = decode_target_frames(_Files(self._root), source, draw=draw)
        stacked = np.stack([frames[number] for number in numbers])
        size, device = self._policy.frame_size, torch.device("cpu")
        return {
            tuple(np.float32(one.source_crop).tolist()): window_pixels(
                stacked, one, frame_size=size, device=device
            )
            for one in draws
        }


class _Files:
    """The images of a data set, as the decoders want them."""

    names: list[str] = []  # noqa: RUF012 - a target names its own

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


@contextmanager
def tokens_from_pixels(config: DatasetConfig) -> Iterator[None]:
    """Evaluations inside read their caches' tokens from the images."""
    backbone = Backbone.load(config.backbone, device=torch.device("cpu"))
    reader = functools.partial(PixelPatches, backbone=backbone, config=config)
    with mock.patch("deltatok.evaluate.forecast.run.PatchShards", reader):
        yield


def largest_difference(one: Report, other: Report) -> float:
    """Between the values of two reports, relative; the rows must be the same."""
    pairs = zip(one.rows, other.rows, strict=True)
    return max(
        _difference((a.row, a.metric, a.value), (b.row, b.metric, b.value)) for a, b in pairs
    )


def _difference(one: tuple[str, str, float], other: tuple[str, str, float]) -> float:
    if one[:2] != other[:2]:
        raise AssertionError(f"rows differ: {one} and {other}")
    size = max(abs(one[2]), abs(other[2]))
    return abs(one[2] - other[2]) / size if size else 0.0


def forecast_config(root: Path, **changes: Any) -> ForecastConfig:
    """All models of `root`, on its cache."""
    paths = {
        name: str(root / name)
        for name in ("patches", "tokenizer", "world", "discriminative", "head", "report")
    }
    paths["out"] = paths.pop("report")
    settings = {"labels": str(root / "data"), "num_pictures": 0, "device": "cpu"}
    return ForecastConfig(**paths | settings | changes)


def write_frames(root: Path, num_targets: int) -> None:
    """A sequence of 7 frames for each target, patterns that move; the last frame has a label."""
    rng = np.random.default_rng(0)
    for number in range(num_targets):
        blocks = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8 + 7, 3), dtype=np.uint8)
        picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
        for folder in ("frames", "labels"):
            (root / folder / f"s{number}").mkdir(parents=True)
        for step in range(7):
            frame = np.ascontiguousarray(picture[:, 8 * step : 8 * step + WIDTH])
            Image.fromarray(frame).save(root / "frames" / f"s{number}" / f"{step:03d}.jpg")
        label = rng.integers(0, NUM_CLASSES, (HEIGHT // 8, WIDTH // 8), dtype=np.uint8)
        path = root / "labels" / f"s{number}" / "006.png"
        Image.fromarray(label.repeat(8, axis=0).repeat(8, axis=1)).save(path)


def write_backbone(folder: Path, width: int, layers: int) -> Path:
    """A random DINOv3 of 3 heads (2 of a small one)."""
    heads = 2 if width < 64 else width // 64
    config = TinyBackboneConfig(
        out=str(folder),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return make_tiny_backbone(config)


def write_models(root: Path, patches: dict[str, Any], width: int, layers: int) -> None:
    """Tokenizer, world models and head with random weights."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 if width < 64 else width // 64
    tokenizer = DeltaTok(
        DeltaTokConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            layer_scale_init=0.5,
        ),
        generator=generator,
    ).eval()
    tokenizer.save_pretrained(root / "tokenizer", {"patches": patches})
    tokens = {"config": {}, "weights_sha256": weights_sha256(tokenizer)}
    for name, use_bom in (("world", True), ("discriminative", False)):
        config = DeltaWorldConfig(
            hidden_size=width,
            predictor_hidden_size=width,
            predictor_num_hidden_layers=layers,
            predictor_num_heads=heads,
            rope_axis_sizes=(width // heads - 4,),
            use_bom=use_bom,
            layer_scale_init=0.5,
        )
        world = DeltaWorldNetwork(config, generator=generator)
        deltas = {"patches": patches, "tokenizer": tokens}
        world.save_pretrained(root / name, {"deltas": deltas})
    head = SegmentationHead(
        SegmentationHeadConfig(in_size=width, num_classes=NUM_CLASSES), generator=generator
    )
    head.save_pretrained(root / "head", {"patches": patches})


if __name__ == "__main__":
    sys.exit(main())
