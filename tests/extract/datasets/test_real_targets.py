"""Targets of real labelled frames: CamVid at 15 Hz, DAVIS, 7-Scenes depth, a Cityscapes pair.

The files are not part of the repository; without them these tests are skipped.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deltatok.extract.datasets.registry import find_targets, run_dataset
from deltatok.extract.pixels import resize_bilinear
from deltatok.shards.errors import UsageError
from deltatok.shards.evaluation.geometry import compute_resize_sizes, cut_of
from deltatok.shards.evaluation.targets import (
    cut_of_crops,
    load_label,
    read_targets,
    windows_of_clips,
)
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.heads.crops import cut_frames, cut_labels

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "eval"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real labelled frames at {FOLDER}")

CAMVID = {
    "name": "camvid",
    "images": "images/*.png",
    "labels": "labels/*.png",
    "fps": 15.0,
    "ignore": (11,),
}
DAVIS = {
    "name": "davis",
    "images": "JPEGImages/480p/*/*.jpg",
    "labels": "Annotations/480p/*/*.png",
    "fps": 24.0,
    "binary": True,
    "every": 20,
}
SCENES = {
    "name": "7-scenes",
    "images": "frame-*.color.jpg",
    "labels": "frame-*.depth.png",
    "fps": 10.0,
    "kind": "depth",
    "steps_per_m": 1000.0,
    "ignore": (65535,),
}


@pytest.fixture
def extract(config, backbone):
    def run(root: Path, **changes) -> PatchShards:
        settings = config("sequences", root, frame_size=32, workers=1, **changes)
        run_dataset(settings, backbone=backbone)
        return PatchShards(settings.out)

    return run


def _tokens(backbone, frames: list[Path]) -> np.ndarray:
    planes = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in frames])
    pixels = torch.from_numpy(planes).permute(0, 3, 1, 2)
    resized = resize_bilinear(pixels, compute_resize_sizes(*pixels.shape[-2:], 32))
    squares = cut_frames(resized[None], cut_of(*resized.shape[-2:]))
    return torch.stack([backbone.tokens(window) for window in squares]).numpy()


def test_camvid_windows_and_labels(extract, backbone):
    root = FOLDER / "camvid_0016E5_15hz"
    frames = sorted((root / "images").iterdir())
    cache = extract(root, **CAMVID)
    targets = read_targets(cache.folder)
    assert sorted(targets) == [f"camvid_0016E5_15hz/{path.stem}" for path in frames[18:]]
    windows = windows_of_clips(cache)
    for number in (18, 25):
        key = f"camvid_0016E5_15hz/{frames[number].stem}"
        expected = _tokens(backbone, frames[number - 18 : number + 1 : 3])
        np.testing.assert_allclose(cache.tokens(windows[key]), expected, atol=0.01)
        stored = np.asarray(Image.open(root / "labels" / frames[number].name))
        wanted = np.where(stored == 11, 255, stored)
        np.testing.assert_array_equal(load_label(targets[key], root), wanted)


def test_davis_sequences_and_masks(extract, backbone):
    root = FOLDER / "davis2016"
    cache = extract(root, **DAVIS, num_frames=4)
    windows, targets = windows_of_clips(cache), read_targets(cache.folder)
    names = [
        f"{name}/{number:05d}" for name in ("car-shadow", "motocross-jump") for number in (19, 39)
    ]
    assert sorted(windows) == names
    frames = [root / f"JPEGImages/480p/car-shadow/{number:05d}.jpg" for number in (4, 9, 14, 19)]
    stored = cache.tokens(windows["car-shadow/00019"])
    np.testing.assert_allclose(stored, _tokens(backbone, frames), atol=0.01)
    for key in names:
        label = load_label(targets[key], root)
        assert set(np.unique(label)) == {0, 1}
        assert 0.001 < label.mean() < 0.5


def test_7_scenes_depth(extract):
    root = FOLDER / "rgbd_7scenes"
    cache = extract(root, **SCENES)
    targets = read_targets(cache.folder)
    assert sorted(targets) == [f"rgbd_7scenes/{number:06d}" for number in (36, 39, 42, 45)]
    label = load_label(targets["rgbd_7scenes/000045"], root)
    stored = np.asarray(Image.open(root / "frame-000045.depth.png"))
    np.testing.assert_array_equal(label == 0, (stored == 0) | (stored == 65535))
    assert 0.2 < label[label > 0].min() < label.max() < 10
    assert cut_of_crops(cache.crop[windows_of_clips(cache)["rgbd_7scenes/000045"]]).overlap


def test_a_real_label_one_pixel_off_is_cut_at_its_own_middle(extract):
    root = FOLDER / "davis2017_judo"
    patterns = {"name": "judo", "images": "images/*.jpg", "labels": "masks/*.png", "fps": 24.0}
    cache = extract(root, **patterns, num_frames=6, stride_s=1 / 24)
    (target,) = read_targets(cache.folder).values()
    assert target.label_size == (480, 853)
    label = load_label(target, root)
    cut = cut_of_crops(cache.crop[windows_of_clips(cache)[target.key]])
    first, second = cut_labels(torch.from_numpy(label)[None], cut).numpy()
    np.testing.assert_array_equal(first[:, :426], label[:, :426])
    assert (first[:, 426] == 255).all()
    np.testing.assert_array_equal(second, label[:, 426:])


def test_a_real_cityscapes_pair_is_a_training_target(config):
    root = FOLDER / "cityscapes"
    _, (clip,) = find_targets(config("cityscapes", root, split="train"))
    assert clip.target.label_size == (1024, 2048)
    assert clip.source.names[0].startswith("leftImg8bit/train/aachen/")


def test_real_cityscapes_frames_without_their_label_are_no_target(config):
    with pytest.raises(UsageError, match=r"has no gtFine/val; wanted .*found gtFine, leftImg8bit"):
        find_targets(config("cityscapes", FOLDER / "cityscapes"))
