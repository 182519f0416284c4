"""Evaluation caches: what is stored of a target, held against the pixels, and how a run ends."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deltatok.extract.datasets.base import DatasetConfig
from deltatok.extract.datasets.registry import run_dataset
from deltatok.extract.pixels import resize_bilinear
from deltatok.shards.errors import CacheMismatch, TooManyQuarantined
from deltatok.shards.evaluation.geometry import compute_resize_sizes, cut_of
from deltatok.shards.evaluation.labels import kb_crop
from deltatok.shards.evaluation.targets import (
    cut_of_crops,
    load_label,
    read_targets,
    windows_of_clips,
)
from deltatok.shards.patches.reader import PatchShards
from deltatok.shards.tools.verify import verify_cache
from deltatok.train.heads.crops import cut_frames

TINY = {"frame_size": 32, "workers": 1, "batch_frames": 14, "max_quarantined": 0.5}


@pytest.fixture
def extract(config, backbone):
    """Runs an extraction; gives the cache."""

    def run(dataset: str, root: Path, **changes) -> PatchShards:
        settings = config(dataset, root, **TINY | changes)
        run_dataset(settings, backbone=backbone)
        return PatchShards(settings.out)

    return run


def _expected(backbone, root: Path, names, *, crop=lambda image: image):
    """float32 (windows, T, N, D): the protocol's own steps on the frames, one after the other."""
    frames = np.stack([crop(np.asarray(Image.open(root / name).convert("RGB"))) for name in names])
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = resize_bilinear(planes, compute_resize_sizes(*planes.shape[-2:], 32))
    squares = cut_frames(resized[None], cut_of(*resized.shape[-2:]))
    return torch.stack([backbone.tokens(window) for window in squares]).numpy()


SHAPES = [(24, 40), (24, 41), (40, 24), (27, 54), (20, 50), (50, 20), (24, 24), (32, 56)]


@pytest.fixture(scope="module")
def vspw(tmp_path_factory, write_vspw, backbone):
    """Root and cache of a video of one target for each of SHAPES; not to be changed."""
    folder = tmp_path_factory.mktemp("vspw")
    for height, width in SHAPES:
        root = write_vspw(folder / "VSPW", {f"{height}x{width}": 20}, shape=(height, width))
    (root / "val.txt").write_text("".join(f"{h}x{w}\n" for h, w in SHAPES))
    cache = folder / "cache"
    run_dataset(
        DatasetConfig(dataset="vspw", root=str(root), out=str(cache), **TINY), backbone=backbone
    )
    return root, PatchShards(cache)


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_are_the_protocols_squares_of_whole_frames(vspw, backbone, shape):
    root, cache = vspw
    video = f"{shape[0]}x{shape[1]}"
    windows = windows_of_clips(cache)[f"{video}/00000019"]
    names = [f"data/{video}/origin/{number:08d}.jpg" for number in range(1, 20, 3)]
    expected = _expected(backbone, root, names)
    np.testing.assert_allclose(cache.tokens(windows), expected, atol=0.01)
    assert cut_of_crops(cache.crop[windows]) == cut_of(*compute_resize_sizes(*shape, 32))


def test_kitti_windows_are_of_the_benchmark_crop(tmp_path, write_kitti, extract, backbone):
    root = write_kitti(tmp_path / "kitti", {2: [21]}, shape=(370, 1226))
    drive = "2011_09_26/2011_09_26_drive_0002_sync"
    (tmp_path / "eigen.txt").write_text(f"{drive} 0000000021 l\n")
    cache = extract("kitti", root, split_file=str(tmp_path / "eigen.txt"))
    (windows,) = windows_of_clips(cache).values()
    names = [f"{drive}/image_02/data/{number:010d}.png" for number in range(9, 22, 2)]
    expected = _expected(backbone, root, names, crop=kb_crop)
    np.testing.assert_allclose(cache.tokens(windows), expected, atol=0.01)
    # 352 x 1216 is squeezed to 1:2: each square shows half of it, 18 rows down, 5 columns in.
    assert cache.crop[windows].tolist() == [[18, 5, 352, 608], [18, 613, 352, 608]]
    label = load_label(next(iter(read_targets(cache.folder).values())), root)
    assert label.dtype == np.float32 and label.shape == (352, 1216)
    assert 0 < label.max() < 80


def test_times_and_frames_are_those_of_the_sequence(tmp_path, write_cityscapes, extract):
    root = write_cityscapes(tmp_path / "cs", [("ulm", 1, 17101)])
    cache = extract("cityscapes", root)
    frames = np.arange(17083, 17102, 3)
    for window in range(2):
        np.testing.assert_array_equal(cache.frame_index([window])[0], frames)
        np.testing.assert_array_equal(cache.timestamps_s([window])[0], np.float32(frames / 16.0))
    assert not cache.flipped.any()


def test_the_identity_tells_the_protocol(vspw):
    sampling = dict(vspw[1].info.identity["sampling"])
    assert sampling.pop("crops").startswith("frame resized so that the short side")
    assert sampling == {
        "policy": "evaluation",
        "dataset": "vspw",
        "num_frames": 7,
        "num_context": 4,
        "stride_s": 0.2,
        "fps": 15.0,
        "max_aspect_ratio": 2.0,
        "seed": 0,
    }


def test_no_path_of_the_machine_is_in_the_identity_or_the_targets(vspw):
    root, cache = vspw
    assert str(root) not in json.dumps(cache.info.identity)
    labels = {target.label for target in read_targets(cache.folder).values()}
    assert labels == {f"data/{h}x{w}/mask/00000019.png" for h, w in SHAPES}


def test_labels_are_those_of_the_last_frame(vspw):
    root, cache = vspw
    for key, target in read_targets(cache.folder).items():
        video, name = key.split("/")
        stored = np.asarray(Image.open(root / "data" / video / "mask" / f"{name}.png"))
        wanted = np.where(stored == 0, 255, stored - 1)
        np.testing.assert_array_equal(load_label(target, root), wanted)


def test_a_finished_cache_verifies_and_is_left_alone(vspw, backbone):
    root, cache = vspw
    before = {p: p.read_bytes() for p in cache.folder.rglob("*") if p.is_file()}
    settings = DatasetConfig(dataset="vspw", root=str(root), out=str(cache.folder), **TINY)
    assert run_dataset(settings, backbone=backbone).shards_done_now == 0
    assert before == {p: p.read_bytes() for p in cache.folder.rglob("*") if p.is_file()}
    assert not verify_cache(cache.folder).problems


def test_another_protocol_is_not_mixed_in(vspw, backbone):
    root, cache = vspw
    settings = DatasetConfig(
        dataset="vspw", root=str(root), out=str(cache.folder), num_frames=4, **TINY
    )
    with pytest.raises(CacheMismatch, match=r"sampling\.num_context|num_frames"):
        run_dataset(settings, backbone=backbone)


def test_another_label_rule_is_not_mixed_in(tmp_path, write_image, write_label, extract):
    for number in range(19):
        write_image(tmp_path / f"set/images/{number}.png")
        write_label(tmp_path / f"set/labels/{number}.png")
    own = {"name": "mine", "images": "images/*.png", "labels": "labels/*.png", "fps": 15.0}
    extract("sequences", tmp_path / "set", **own)
    with pytest.raises(CacheMismatch, match=r"target\.rule is .*stored.*now .*ignore.*5"):
        extract("sequences", tmp_path / "set", **own, ignore=(5,))


def test_broken_frames_are_quarantined_by_name(tmp_path, write_vspw, write_image, extract):
    root = write_vspw(tmp_path / "VSPW", dict.fromkeys("abcdef", 20))
    write_image(root / "data/c/origin/00000010.jpg", (24, 38))
    (root / "data/a/origin/00000004.jpg").write_bytes(b"no image")
    (root / "data/b/origin/00000019.jpg").unlink()
    cache = extract("vspw", root)
    lines = (cache.folder / "quarantine.jsonl").read_text().splitlines()
    reasons = {entry["clip"]: entry["reason"] for entry in map(json.loads, lines)}
    no_image = "data/a/origin/00000004.jpg cannot be decoded: is no JPEG or PNG image"
    assert reasons["a/00000019"] == no_image
    assert "data/b/origin/00000019.jpg is missing" in reasons["b/00000019"]
    assert "00000010.jpg has 38x24 pixels, the target 40x24" in reasons["c/00000019"]
    assert {key[0] for key in cache.keys} == {"d", "e", "f"}


def test_a_mended_target_is_taken_in_by_a_retry(tmp_path, write_vspw, extract):
    root = write_vspw(tmp_path / "VSPW", dict.fromkeys("abcd", 20))
    frame, mask = root / "data/a/origin/00000019.jpg", root / "data/b/mask/00000019.png"
    kept = {path: path.read_bytes() for path in (frame, mask)}
    few = {"frames_per_shard": 28}  # two shards
    for path in kept:
        path.unlink()
    assert len(extract("vspw", root, **few).keys) == 2
    for path, data in kept.items():
        path.write_bytes(data)
    with pytest.raises(CacheMismatch, match=r"had 0 bytes .*add --retry-quarantined"):
        extract("vspw", root, **few)
    cache = extract("vspw", root, **few, retry_quarantined=True)
    assert len(cache.keys) == 4
    assert set(read_targets(cache.folder)) == set(cache.keys)
    assert not verify_cache(cache.folder).problems
    whole = extract("vspw", root, **few, out=str(tmp_path / "whole"))
    names = [path.relative_to(whole.folder) for path in whole.folder.rglob("*") if path.is_file()]
    names.remove(Path("timings.jsonl"))
    for name in names:
        assert (cache.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_too_many_incomplete_targets_fail_the_run(tmp_path, write_vspw, extract):
    root = write_vspw(tmp_path / "VSPW", {"a": 20, "b": 20, "c": 20})
    for video in "ab":
        (root / f"data/{video}/mask/00000019.png").unlink()
    with pytest.raises(TooManyQuarantined):
        extract("vspw", root)


def test_a_training_split_has_the_labelled_frame_alone(tmp_path, write_vspw, extract, backbone):
    root = write_vspw(tmp_path / "VSPW", {"a": 20}, split="train")
    cache = extract("vspw", root, split="train")
    assert cache.shape[0] == 1
    windows = windows_of_clips(cache)["a/00000019"]
    expected = _expected(backbone, root, ["data/a/origin/00000019.jpg"])
    np.testing.assert_allclose(cache.tokens(windows), expected, atol=0.01)
    assert next(iter(read_targets(cache.folder).values())).split == "train"


def test_int8_and_a_limit(tmp_path, write_vspw, extract, backbone):
    root = write_vspw(tmp_path / "VSPW", {"a": 20, "b": 20})
    cache = extract("vspw", root, dtype="int8", limit=1)
    (key,) = cache.keys
    names = [f"data/{key[0]}/origin/{number:08d}.jpg" for number in range(1, 20, 3)]
    expected = _expected(backbone, root, names)
    stored = cache.tokens(windows_of_clips(cache)[key])
    assert np.abs(stored - expected).mean() < 0.02 * np.abs(expected).mean()
