"""Targets of an evaluation cache and their labels: what is read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from deltatok.shards.cache import PATCHES, CacheInfo, CacheShape, open_cache
from deltatok.shards.errors import CacheMismatch, DamagedShard, UsageError
from deltatok.shards.evaluation.labels import LabelRule, apply_rule, is_inside, leads_out
from deltatok.shards.evaluation.targets import (
    Target,
    cut_of_crops,
    load_label,
    read_targets,
    windows_of_clips,
)
from deltatok.shards.patches.reader import PatchShards
from deltatok.shards.plan import Plan


@pytest.fixture
def evaluation(tmp_path, write_evaluation_cache):
    """cache, labels folder, targets."""
    cache, labels = tmp_path / "cache", tmp_path / "labels"
    return cache, labels, write_evaluation_cache(cache, labels)


def _target(label: str, size: tuple[int, int], rule: LabelRule | None = None, kind="segmentation"):
    return Target(
        key="a/0",
        sequence="a",
        split=None,
        kind=kind,
        label=label,
        label_size=size,
        rule=rule or LabelRule(),
    )


def test_targets_tell_key_sequence_split_and_label(evaluation):
    _, _, targets = evaluation
    assert list(targets) == ["a/000019", "a/000039", "town/b/000019", "town/b/000039"]
    target = targets["town/b/000039"]
    assert (target.sequence, target.split, target.kind) == ("town/b", "val", "segmentation")
    assert (target.label, target.label_size) == ("town/b/000039.png", (20, 34))


def test_labels_are_read_as_stored(evaluation):
    _, labels, targets = evaluation
    label = load_label(targets["a/000019"], labels)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, np.asarray(Image.open(labels / "a/000019.png")))


def test_depth_labels_are_metres(tmp_path, write_evaluation_cache):
    targets = write_evaluation_cache(tmp_path / "c", tmp_path / "l", kind="depth")
    label = load_label(targets["a/000019"], tmp_path / "l")
    assert label.dtype == np.float32
    assert set(np.unique(label)) <= {0.0, 2.0, 4.0, 6.0, 8.0}
    assert (label[0] == 0).all()


def test_windows_of_a_clip_come_first_crop_first(evaluation):
    cache, _, targets = evaluation
    shards = PatchShards(cache)
    windows = windows_of_clips(shards)
    assert windows.keys() == targets.keys()
    for first, second in windows.values():
        assert shards.crop[first, 1] == 0 < shards.crop[second, 1]
        cut = cut_of_crops(shards.crop[[first, second]])
        assert (cut.wide, cut.overlap) == (True, True)


@pytest.mark.parametrize(
    ("shape", "wide", "overlap"),
    [
        ((20, 40), True, False),
        ((50, 20), False, False),
        ((30, 20), False, True),
        ((8, 8), None, False),
    ],
)
def test_the_cut_can_be_told_from_the_crops(tmp_path, write_evaluation_cache, shape, wide, overlap):
    write_evaluation_cache(tmp_path / "c", tmp_path / "l", frame_shape=shape)
    shards = PatchShards(tmp_path / "c")
    windows = windows_of_clips(shards)["a/000019"]
    cut = cut_of_crops(shards.crop[windows])
    assert (cut.wide, cut.overlap) == (wide, overlap)


def test_another_cache_is_refused(tmp_path):
    info = CacheInfo(
        format=PATCHES,
        identity={"sampling": {"policy": "uniform"}},
        shape=CacheShape(num_frames=7, num_tokens=4, grid=(2, 2), hidden_size=8),
    )
    open_cache(tmp_path / "uniform", info)
    with pytest.raises(CacheMismatch, match=r"sampling\.policy"):
        read_targets(tmp_path / "uniform")


def test_a_changed_plan_is_refused(evaluation):
    cache, _, _ = evaluation
    (part,) = (cache / "plan").iterdir()
    for path in (part, cache / "plan.json"):
        path.write_text(f"{path.read_text()} ")
        with pytest.raises(DamagedShard, match=f"{path.name}: was changed since"):
            read_targets(cache)


@pytest.mark.parametrize(
    "label", ["/etc/passwd", "../a.png", "a/../../b.png", "a//b.png", "", "a\\b.png", "C:/a.png"]
)
def test_a_label_path_that_leaves_the_folder_is_a_damaged_plan(evaluation, edit_plan, label):
    cache, _, _ = evaluation
    assert not is_inside(label)
    edit_plan(cache, lambda lines: lines[0]["clips"][0]["target"].update(label=label))
    with pytest.raises(DamagedShard, match="inside the data set"):
        list(Plan.open(cache))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_size", [20]),
        ("label_size", [0, 4]),
        ("label_size", [2**20, 4]),
        ("kind", "panoptic"),
        ("sequence", 3),
        ("frames", ["a.png", "../b.png"]),
        ("frames", [3]),
        ("frames", "a.png"),
        ("rule", {"name": "newer"}),
        ("rule", {"name": "depth", "steps_per_m": 0}),
        ("rule", {"name": "stored", "ignore": [-1]}),
    ],
)
def test_a_malformed_target_is_a_damaged_plan(evaluation, edit_plan, field, value):
    cache, _, _ = evaluation
    edit_plan(cache, lambda lines: lines[0]["clips"][0]["target"].update({field: value}))
    with pytest.raises(DamagedShard, match=r"line 1: target"):
        list(Plan.open(cache))


def test_a_link_out_of_the_folder_is_refused(evaluation, tmp_path):
    _, labels, targets = evaluation
    secret = tmp_path / "secret.png"
    (labels / "a/000019.png").rename(secret)
    (labels / "a/000019.png").symlink_to(secret)
    with pytest.raises(UsageError, match="leads out"):
        load_label(targets["a/000019"], labels)


def test_a_label_at_the_top_may_not_lead_out(tmp_path):
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    secret.touch()
    (root / "label.png").symlink_to(secret)
    (root / "other.png").touch()
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    assert leads_out(root, "label.png")
    assert leads_out(root, "folder/../../secret.png")
    assert not leads_out(root, "other.png")
    assert not leads_out(root, "folder/label.png")


def test_a_folder_at_the_top_may_be_a_link(evaluation, tmp_path):
    _, labels, targets = evaluation
    wanted = load_label(targets["a/000019"], labels)
    (labels / "a").rename(tmp_path / "other-disk")
    (labels / "a").symlink_to(tmp_path / "other-disk")
    assert (load_label(targets["a/000019"], labels) == wanted).all()


def test_a_missing_label_and_folder_are_named(evaluation):
    _, labels, targets = evaluation
    with pytest.raises(UsageError, match="no such folder"):
        load_label(targets["a/000019"], labels / "nowhere")
    (labels / "a/000019.png").unlink()
    with pytest.raises(UsageError, match=r"a/000019\.png: no such label"):
        load_label(targets["a/000019"], labels)


def test_a_label_of_another_size_is_refused(evaluation):
    _, labels, targets = evaluation
    Image.fromarray(np.zeros((20, 33), np.uint8)).save(labels / "a/000019.png")
    with pytest.raises(UsageError, match="20 x 33 pixels, the cache was made with one of 20 x 34"):
        load_label(targets["a/000019"], labels)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"no image"), "no label that can be read"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "no label that can be read"),
        (
            lambda path: Image.fromarray(np.zeros((20, 34, 3), np.uint8)).save(path),
            "one whole number a pixel",
        ),
        (
            lambda path: Image.fromarray(np.full((20, 34), 999, np.uint16)).save(path),
            "is this a depth image",
        ),
    ],
)
def test_a_file_that_is_no_label_is_refused_by_name(evaluation, write, message):
    _, labels, targets = evaluation
    write(labels / "a/000019.png")
    with pytest.raises(UsageError, match=rf"(?s)000019\.png.*{message}"):
        load_label(targets["a/000019"], labels)


def test_palette_masks_are_read_as_their_indices(tmp_path):
    indices = np.array([[0, 1], [2, 3]], np.uint8)
    palette = Image.new("P", (2, 2))
    palette.putdata(indices.reshape(-1).tolist())
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 9, 9, 9])
    palette.save(tmp_path / "mask.png")
    label = load_label(_target("mask.png", (2, 2)), tmp_path)
    np.testing.assert_array_equal(label, indices)


def test_one_bit_masks_are_classes(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "mask.png")
    label = load_label(_target("mask.png", (1, 2), LabelRule(name="binary")), tmp_path)
    assert label.tolist() == [[1, 0]]


def test_one_frame_of_an_array_file(tmp_path):
    maps = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    np.save(tmp_path / "clip.npy", maps)
    rule = LabelRule(frame=3)
    np.testing.assert_array_equal(load_label(_target("clip.npy", (2, 3), rule), tmp_path), maps[3])
    with pytest.raises(UsageError, match="with frame 4"):
        load_label(_target("clip.npy", (2, 3), LabelRule(frame=4)), tmp_path)


@pytest.mark.parametrize(
    ("rule", "stored", "wanted"),
    [
        (LabelRule(), [0, 11, 254, 255], [0, 11, 254, 255]),
        (LabelRule(ignore=(11,)), [0, 11, 254, 255], [0, 255, 254, 255]),
        (LabelRule(name="binary"), [0, 1, 128, 255], [0, 1, 1, 1]),
        (LabelRule(name="binary", ignore=(128,)), [0, 1, 128, 255], [0, 1, 255, 1]),
        (LabelRule(name="vspw"), [0, 1, 124, 125, 254, 255], [255, 0, 123, 255, 255, 255]),
        (LabelRule(name="cityscapes"), [0, 7, 33, 34, 255], [255, 0, 18, 255, 255]),
        (LabelRule(name="depth", steps_per_m=1000.0), [0, 500, 65535], [0.0, 0.5, 65.535]),
        (
            LabelRule(name="depth", steps_per_m=1000.0, ignore=(65535,)),
            [0, 500, 65535],
            [0.0, 0.5, 0.0],
        ),
    ],
)
def test_label_rules(rule, stored, wanted):
    got = apply_rule(np.array([stored]), rule)
    np.testing.assert_allclose(got, [wanted], rtol=1e-6)
