"""VSPW's layout, targets and labels."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deltatok.extract.datasets.registry import find_targets
from deltatok.extract.sources.clip import TargetFrames, Unreadable
from deltatok.shards.errors import UsageError


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(b""))
)
"""A PNG that says it has 60,000 x 60,000 pixels."""


@pytest.fixture
def vspw(tmp_path, write_vspw):
    return write_vspw(tmp_path / "VSPW", {"1_abc": 45, "2_def": 20, "3_short": 19})


def test_every_20th_frame_is_a_target_with_frames_3_apart(vspw, config):
    policy, clips = find_targets(config("vspw", vspw))
    assert [clip.key for clip in clips] == ["1_abc/00000019", "1_abc/00000039", "2_def/00000019"]
    assert clips[1].source == TargetFrames(
        numbers=(21, 24, 27, 30, 33, 36, 39),
        names=tuple(f"data/1_abc/origin/{i:08d}.jpg" for i in range(21, 40, 3)),
    )
    assert (policy.fps, policy.stride_s, policy.num_frames, policy.num_context) == (15, 0.2, 7, 4)


def test_targets_tell_their_labels(vspw, config):
    _, clips = find_targets(config("vspw", vspw))
    target = clips[0].target
    assert target.label == "data/1_abc/mask/00000019.png"
    assert (target.label_size, target.kind, target.sequence) == ((24, 40), "segmentation", "1_abc")
    assert (target.rule.name, clips[0].split) == ("vspw", "val")
    assert target.frames == clips[0].source.names


def test_frames_count_by_place_not_by_number(tmp_path, write_vspw, config):
    root = write_vspw(tmp_path / "VSPW", {"a": 20})
    for folder, suffix in (("origin", ".jpg"), ("mask", ".png")):
        for number in reversed(range(20)):
            path = root / "data/a" / folder / f"{number:08d}{suffix}"
            path.rename(path.with_name(f"{100 + 2 * number:08d}{suffix}"))
    _, (clip,) = find_targets(config("vspw", root))
    assert clip.key == "a/00000138"
    assert clip.source.numbers == (1, 4, 7, 10, 13, 16, 19)


def test_names_that_begin_with_a_dot_are_no_frames(vspw, config):
    (vspw / "data/1_abc/origin/._00000000.jpg").write_bytes(b"resource fork")
    _, clips = find_targets(config("vspw", vspw))
    assert clips[0].key == "1_abc/00000019"
    assert clips[0].source.names[0] == "data/1_abc/origin/00000001.jpg"


def test_a_missing_frame_costs_its_targets_only(vspw, config):
    (vspw / "data/1_abc/origin/00000022.jpg").unlink()  # in no window: only its place counts
    (vspw / "data/1_abc/origin/00000024.jpg").unlink()
    _, clips = find_targets(config("vspw", vspw))
    by_key = {clip.key: clip for clip in clips}
    assert by_key["1_abc/00000039"].source == Unreadable(
        "data/1_abc/origin/00000024.jpg is missing"
    )
    assert isinstance(by_key["1_abc/00000019"].source, TargetFrames)


def test_an_unlabelled_target_is_out(vspw, config):
    (vspw / "data/2_def/mask/00000019.png").unlink()
    _, clips = find_targets(config("vspw", vspw))
    assert clips[-1].source == Unreadable("data/2_def/mask/00000019.png is missing")
    assert clips[-1].target is None


def test_a_label_of_another_size_is_out_by_name(vspw, config):
    Image.fromarray(np.zeros((24, 38), np.uint8)).save(vspw / "data/2_def/mask/00000019.png")
    _, clips = find_targets(config("vspw", vspw))
    assert "mask/00000019.png has 24 x 38 pixels" in clips[-1].source.reason
    assert "24 x 40" in clips[-1].source.reason


@pytest.mark.parametrize("shape", [(24, 39), (25, 40), (23, 41)])
def test_a_label_one_pixel_off_is_taken_as_it_is(vspw, config, shape):
    Image.fromarray(np.zeros(shape, np.uint8)).save(vspw / "data/2_def/mask/00000019.png")
    _, clips = find_targets(config("vspw", vspw))
    assert clips[-1].target.label_size == shape


def test_a_turned_photograph_counts_as_it_is_shown(vspw, config):
    path = vspw / "data/2_def/origin/00000019.jpg"
    with Image.open(path) as image:
        turned = image.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    _, clips = find_targets(config("vspw", vspw))
    assert clips[-1].target.label_size == (24, 40)


def test_labels_that_are_pictures_are_out(vspw, config, write_image):
    write_image(vspw / "data/2_def/mask/00000019.png")
    _, clips = find_targets(config("vspw", vspw))
    assert "mode RGB" in clips[-1].source.reason


def test_a_label_that_links_out_of_the_data_set_is_out(vspw, config, tmp_path):
    label = vspw / "data/2_def/mask/00000019.png"
    label.rename(tmp_path / "elsewhere.png")
    label.symlink_to(tmp_path / "elsewhere.png")
    _, clips = find_targets(config("vspw", vspw))
    assert "link that leads out" in clips[-1].source.reason


def test_links_below_a_linked_top_folder_must_stay_in_it(vspw, config, tmp_path):
    (vspw / "data").rename(tmp_path / "other-disk")
    (vspw / "data").symlink_to(tmp_path / "other-disk")
    label = tmp_path / "other-disk" / "2_def/mask/00000019.png"
    label.rename(tmp_path / "elsewhere.png")
    label.symlink_to(tmp_path / "elsewhere.png")
    _, clips = find_targets(config("vspw", vspw))
    bad = [clip.key for clip in clips if not clip.size_bytes]
    assert bad == ["2_def/00000019"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: os.mkfifo(path), "is no file"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
        (lambda path: path.write_bytes(b""), "no image that can be read: no PNG, BMP, TIFF"),
        (lambda path: path.write_bytes(BOMB), "decompression bomb"),
    ],
)
def test_what_is_no_label_is_named_without_being_waited_for(vspw, config, spoil, reason):
    label = vspw / "data/2_def/mask/00000019.png"
    label.unlink()
    spoil(label)
    _, clips = find_targets(config("vspw", vspw))
    assert clips[-1].source.reason.startswith("data/2_def/mask/00000019.png ")
    assert reason in clips[-1].source.reason
    assert str(vspw) not in clips[-1].source.reason


def test_a_listed_video_that_is_not_there_is_named(vspw, config):
    (vspw / "val.txt").write_text("1_abc\nnowhere\n\n")
    _, clips = find_targets(config("vspw", vspw))
    assert clips[-1].key == "nowhere/missing"
    assert "data/nowhere/origin holds no frames" in clips[-1].source.reason


def test_the_training_split_gives_single_frames(vspw, config):
    (vspw / "train.txt").write_text("2_def\n")
    policy, (clip,) = find_targets(config("vspw", vspw, split="train"))
    assert clip.source == TargetFrames((19,), ("data/2_def/origin/00000019.jpg",))
    assert (policy.num_frames, policy.num_context, clip.split) == (1, 0, "train")


def test_every_and_split_file_choose_other_targets(vspw, config, tmp_path):
    (tmp_path / "mine.txt").write_text("2_def\n")
    chosen = config("vspw", vspw, split_file=str(tmp_path / "mine.txt"), every=10, num_frames=4)
    _, clips = find_targets(chosen)
    assert [clip.key for clip in clips] == ["2_def/00000009", "2_def/00000019"]


def test_another_layout_says_what_was_expected_and_found(tmp_path, config):
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match=r"has no data; wanted val\.txt, data/VIDEO.*found images"):
        find_targets(config("vspw", tmp_path))
    with pytest.raises(UsageError, match="no such folder; wanted"):
        find_targets(config("vspw", tmp_path / "nowhere"))


def test_no_target_at_all_is_refused(tmp_path, write_vspw, config):
    root = write_vspw(tmp_path / "VSPW", {"a": 18})
    with pytest.raises(
        UsageError, match=r"no labelled frame of vspw.*18 in videos of fewer than 20 frames"
    ):
        find_targets(config("vspw", root))


def test_no_usable_target_is_refused_by_name(vspw, config):
    for mask in vspw.glob("data/*/mask/*.png"):
        mask.unlink()
    with pytest.raises(UsageError, match=r"none of the 3 targets.*00000019\.png is missing"):
        find_targets(config("vspw", vspw))


def test_an_empty_list_is_refused(vspw, config):
    (vspw / "val.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"val\.txt: is empty"):
        find_targets(config("vspw", vspw))
