"""Data sets in the exact layouts they are published in, in kilobytes, of random pixels."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deltatok.extract.datasets.base import DatasetConfig

Shape = tuple[int, int]


@pytest.fixture(scope="session")
def write_image() -> Callable[..., np.ndarray]:
    """Writes a frame of smooth random colours; gives its pixels uint8 (H, W, 3)."""
    return _write_image


@pytest.fixture(scope="session")
def write_label() -> Callable[..., np.ndarray]:
    """Writes a label of blocks of random values below `high`; gives it, (H, W)."""
    return _write_label


@pytest.fixture(scope="session")
def write_vspw() -> Callable[..., Path]:
    """Writes VSPW: video -> number of frames."""
    return _write_vspw


@pytest.fixture(scope="session")
def write_cityscapes() -> Callable[..., Path]:
    """Writes Cityscapes: snippets (city, sequence, labelled frame)."""
    return _write_cityscapes


@pytest.fixture(scope="session")
def write_kitti() -> Callable[..., Path]:
    """Writes KITTI raw data and depth: drive number -> number of frames."""
    return _write_kitti


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """A config that writes to tmp_path/cache."""

    def make(dataset: str, root: Path, **changes: Any) -> DatasetConfig:
        settings = {"dataset": dataset, "root": str(root), "out": str(tmp_path / "cache")}
        return DatasetConfig(**settings | changes)

    return make


def _rng(path: Path) -> np.random.Generator:
    return np.random.default_rng(list(path.as_posix()[-40:].encode()))


def _write_image(path: Path, shape: Shape = (24, 40)) -> np.ndarray:
    coarse = _rng(path).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BILINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)
    return np.asarray(picture)


def _write_label(
    path: Path, shape: Shape = (24, 40), *, high: int = 6, dtype: Any = np.uint8
) -> np.ndarray:
    blocks = _rng(path).integers(0, high, (-(-shape[0] // 5), -(-shape[1] // 5)))
    label = blocks.repeat(5, 0).repeat(5, 1)[: shape[0], : shape[1]].astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path, compress_level=1)
    return label


def _write_vspw(
    root: Path, videos: dict[str, int], *, shape: Shape = (24, 40), split: str = "val"
) -> Path:
    for video, num_frames in videos.items():
        for number in range(num_frames):
            folder = root / "data" / video
            _write_image(folder / "origin" / f"{number:08d}.jpg", shape)
            _write_label(folder / "mask" / f"{number:08d}.png", shape)
    (root / f"{split}.txt").write_text("".join(f"{video}\n" for video in videos))
    return root


def _write_cityscapes(
    root: Path,
    snippets: Iterable[tuple[str, int, int]],
    *,
    shape: Shape = (32, 64),
    split: str = "val",
) -> Path:
    for city, sequence, labelled in snippets:
        for number in range(labelled - 19, labelled + 11):
            name = f"{city}_{sequence:06d}_{number:06d}_leftImg8bit.png"
            if number % 3 == labelled % 3:  # the others are in no window
                _write_image(root / "leftImg8bit_sequence" / split / city / name, shape)
        name = f"{city}_{sequence:06d}_{labelled:06d}_gtFine"
        _write_label(root / "gtFine" / split / city / f"{name}_labelIds.png", shape, high=34)
        _write_label(root / "gtFine" / split / city / f"{name}_color.png", shape)
    return root


def _write_kitti(
    root: Path, drives: dict[int, Sequence[int]], *, shape: Shape = (375, 1242), split: str = "val"
) -> Path:
    """Drive number -> targets: their depth, and the frames before them at a stride of 2."""
    for drive, targets in drives.items():
        name = f"2011_09_26_drive_{drive:04d}_sync"
        depths = root / split / name / "proj_depth" / "groundtruth" / "image_02"
        for target in targets:
            for number in range(target - 12, target + 1, 2):
                data = root / "2011_09_26" / name / "image_02" / "data"
                if number >= 0 and not (data / f"{number:010d}.png").exists():
                    _write_image(data / f"{number:010d}.png", shape)
            _write_label(depths / f"{target:010d}.png", shape, high=2**15, dtype=np.uint16)
    return root
