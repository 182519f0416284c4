"""Real labelled frames, from images to figures: CamVid, DAVIS and 7-Scenes under a tiny random
backbone, `present` and `copy_last` against a second computation in NumPy.

The frames lie in ../shared/eval beside the repository; without them these tests are skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModel

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.rows import find_value
from deltatok.extract.datasets.base import DatasetConfig
from deltatok.extract.datasets.registry import run_dataset
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
)

FRAMES = Path(__file__).parents[4] / "shared" / "eval"
SIDE = 64
"""Pixels of the short side: 4 x 4 patches a crop."""
Map = NDArray[np.float64]


@dataclass(frozen=True)
class RealSet:
    """A folder of frames and labels, and how it is read."""

    folder: str
    images: str
    labels: str
    fps: float
    stride: int
    num_classes: int | None
    read: Callable[[Path], NDArray[Any]]
    """Label file -> classes with 255, or metres with 0."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return "rmse" if self.num_classes is None else "miou"


def read_camvid(path: Path) -> NDArray[Any]:
    stored = np.asarray(Image.open(path))
    return np.where(stored == 11, 255, stored)


SETS = {
    "camvid": RealSet(
        "camvid_0016E5_15hz", "images/*.png", "labels/*.png", 15, 3, 11, read_camvid,
        {"ignore": (11,)},
    ),
    "davis": RealSet(
        "davis2016", "JPEGImages/480p/*/*.jpg", "Annotations/480p/*/*.png", 24, 5, 2,
        lambda path: (np.asarray(Image.open(path)) > 0).astype(int), {"binary": True},
    ),
    "7scenes": RealSet(
        "rgbd_7scenes", "*.color.jpg", "*.depth.png", 10, 2, None,
        lambda path: np.asarray(Image.open(path)) / 1000,
        {"kind": "depth", "steps_per_m": 1000.0},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "backbone"
    config = TinyBackboneConfig(
        out=str(out), hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return make_tiny_backbone(config)


@pytest.mark.skipif(not FRAMES.is_dir(), reason="no ../shared/eval beside the repository")
@pytest.mark.parametrize(
    "name", ["camvid", "7scenes", pytest.param("davis", marks=pytest.mark.slow)]
)
def test_bounds_on_real_frames_equal_an_independent_computation(
    name: str, tmp_path: Path, backbone_folder: Path, make: Any
) -> None:
    real = SETS[name]
    root = FRAMES / real.folder
    cache = tmp_path / "cache"
    settings = {"images": real.images, "labels": real.labels, "fps": real.fps, **real.options}
    config = DatasetConfig(
        dataset="sequences", name=name, root=str(root), out=str(cache),
        backbone=str(backbone_folder),
        frame_size=SIDE, limit=2, workers=1, device="cpu", **settings,
    )  # fmt: skip
    run_dataset(config)
    shards = PatchShards(cache)
    make.write_models(tmp_path, shards.info.identity)
    head = write_head(tmp_path / "head", real, shards.info.identity)
    report = run_forecast(
        ForecastConfig(
            patches=str(cache), labels=str(root), tokenizer=str(tmp_path / "tokenizer"),
            world=str(tmp_path / "world"), discriminative=str(tmp_path / "discriminative"),
            head=str(tmp_path / "head"), out=str(tmp_path / "report"), num_samples=2,
            num_pictures=1, device="cpu",
        )
    )  # fmt: skip
    assert len(shards.keys) == 2
    plain = Plain(root, real, backbone_folder, head)
    for horizon, steps in (("short", 1), ("mid", 3)):
        for row, back in (("present", 0), ("copy_last", steps)):
            got = find_value(report.rows, horizon=horizon, row=row, metric=real.metric)
            assert got == pytest.approx(plain.figure(shards.keys, back), rel=1e-4), (horizon, row)
    # One frame off would be seen.
    assert plain.figure(shards.keys, 3) != pytest.approx(plain.figure(shards.keys, 0), rel=1e-3)


def write_head(folder: Path, real: RealSet, patches: Any) -> SegmentationHead | DepthHead:
    generator = torch.Generator().manual_seed(4)
    head: SegmentationHead | DepthHead
    if real.num_classes is None:
        head = DepthHead(DepthHeadConfig(in_size=32, max_depth=10.0), generator=generator)
    else:
        config = SegmentationHeadConfig(in_size=32, num_classes=real.num_classes)
        head = SegmentationHead(config, generator=generator)
    with torch.no_grad():
        head.head.weight.normal_(generator=generator)
        head.bn.running_mean.normal_(generator=generator)
    head.save_pretrained(folder, {"patches": patches})
    return head.eval()


class Plain:
    """Files -> pixels -> crops -> features -> head -> halves of the label, a step at a time."""

    def __init__(self, root: Path, real: RealSet, backbone: Path, head: Any) -> None:
        self.real, self.head = real, head
        self.backbone = AutoModel.from_pretrained(backbone).eval()
        images, labels = (sorted(root.glob(p)) for p in (real.images, real.labels))
        self.files: dict[str, list[tuple[Path, Path]]] = {}
        for image, label in zip(images, labels, strict=True):
            self.files.setdefault(image.parent.name, []).append((image, label))

    def figure(self, keys: list[str], back: int) -> float:
        """mIoU or RMSE over all targets, read from the frame `back` strides before each."""
        predicted, wanted = [], []
        for key in keys:
            label_path, image_path = self.find(key, back)
            label = self.real.read(label_path)
            valid = label > 0 if self.real.num_classes is None else label != 255
            predicted.append(self.predict(image_path, label.shape)[valid])
            wanted.append(label[valid])
        got, truth = np.concatenate(predicted), np.concatenate(wanted)
        if self.real.num_classes is None:
            return float(np.sqrt(np.mean((got - truth) ** 2)))
        ious = []
        for number in range(self.real.num_classes):
            is_got, is_true = got == number, truth == number
            if (is_got | is_true).any():
                ious.append((is_got & is_true).sum() / (is_got | is_true).sum())
        return float(np.mean(ious))

    def find(self, key: str, back: int) -> tuple[Path, Path]:
        """The label of a target, and the image of `back` strides before."""
        for files in self.files.values():
            for place, (image, label) in enumerate(files):
                name = "".join(part for part in key.split("/")[-1] if part.isdigit())
                parent = key.split("/")[-2] in (image.parent.name, image.parent.parent.name)
                if parent and name == "".join(c for c in image.name.split(".")[0] if c.isdigit()):
                    return label, files[place - back * self.real.stride][0]
        raise AssertionError(key)

    def predict(self, path: Path, size: tuple[int, ...]) -> NDArray[Any]:
        """What the head reads, at the size (H, W) of the label: all three sets are wide, their two
        crops overlap."""
        image = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
        small = opencv_resize(image, SIDE, round(image.shape[1] * SIDE / image.shape[0]))
        height, width = size
        left = enlarge(self.read(small[:, :SIDE]), height)
        right = enlarge(self.read(small[:, -SIDE:]), height)
        half = width // 2
        whole = np.concatenate([left[:, :, :half], right[:, :, half - width :]], axis=2)
        return whole[0] if self.real.num_classes is None else whole.argmax(axis=0)

    def read(self, pixels: NDArray[Any]) -> Map:
        """Logits (C, h, w) or metres (1, h, w) of a crop."""
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        values = torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32)
        with torch.no_grad():
            out = self.backbone(values.permute(2, 0, 1)[None]).last_hidden_state[0, 5:]
        x = out.half().double().numpy()
        weights = {n: t.detach().double().numpy() for n, t in self.head.state_dict().items()}
        spread = np.sqrt(weights["bn.running_var"] + 1e-5)
        x = (x - weights["bn.running_mean"]) / spread * weights["bn.weight"] + weights["bn.bias"]
        y = x @ weights["head.weight"][:, :, 0, 0].T + weights["head.bias"]
        if self.real.num_classes is None:
            y = np.maximum(y, 0) + 0.1
            y = (y @ np.linspace(0.001, 10, 256) / y.sum(axis=1))[:, None]
        return y.T.reshape(-1, SIDE // 16, SIDE // 16)


def enlarge(values: Map, side: int) -> Map:
    """(C, n, n) -> (C, side, side), bilinear, pixel centres, edges continued."""
    count = values.shape[1]
    at = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
    low = at.astype(int)
    high = np.minimum(low + 1, count - 1)
    part = at - low
    rows = values[:, low] * (1 - part)[:, None] + values[:, high] * part[:, None]
    return rows[:, :, low] * (1 - part) + rows[:, :, high] * part


def opencv_resize(image: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """OpenCV's bilinear resize of uint8: weights of 11 bits, columns first, 4 bits dropped."""

    def taps(old: int, new: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, old - 1), np.rint((at - low) * 2048).astype(int)

    left, right, along = taps(image.shape[1], width)
    columns = image[:, left] * (2048 - along)[:, None] + image[:, right] * along[:, None]
    columns >>= 4
    top, bottom, down = (values[..., None, None] for values in taps(image.shape[0], height))
    top, bottom = top[:, 0, 0], bottom[:, 0, 0]
    return ((columns[top] * (2048 - down) >> 16) + (columns[bottom] * down >> 16) + 2) >> 2
