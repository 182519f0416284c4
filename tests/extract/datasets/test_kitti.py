"""KITTI's layout, Eigen's list in its published forms, targets and labels."""

import numpy as np
import pytest
from PIL import Image

from deltatok.extract.datasets.registry import find_targets
from deltatok.extract.sources.clip import TargetFrames, Unreadable
from deltatok.shards.errors import UsageError

DRIVE = "2011_09_26/2011_09_26_drive_0002_sync"
DEPTHS = "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02"


def _line(frame: int, depth: str | None = None) -> str:
    depth = f"{DEPTHS}/{frame:010d}.png" if depth is None else depth
    return f"{DRIVE}/image_02/data/{frame:010d}.png {depth} 721.5377\n"


@pytest.fixture(scope="module")
def drive(tmp_path_factory, write_kitti):
    """Not to be changed."""
    return write_kitti(tmp_path_factory.mktemp("kitti"), {2: [21, 25]}, shape=(370, 1226))


@pytest.fixture
def listed(tmp_path, config):
    """A config with a list of these lines."""

    def make(root, text, **changes):
        (tmp_path / "eigen.txt").write_text(text)
        return config("kitti", root, split_file=str(tmp_path / "eigen.txt"), **changes)

    return make


def test_targets_have_frames_2_apart_and_the_benchmark_crop(drive, listed):
    policy, clips = find_targets(listed(drive, _line(25) + _line(21)))
    assert [clip.key for clip in clips] == [
        "2011_09_26_drive_0002_sync/0000000021",
        "2011_09_26_drive_0002_sync/0000000025",
    ]
    names = tuple(f"{DRIVE}/image_02/data/{i:010d}.png" for i in range(13, 26, 2))
    assert clips[1].source == TargetFrames(tuple(range(13, 26, 2)), names)
    assert (policy.fps, policy.stride_s, policy.region) == (10.0, 0.2, "kb")


def test_drives_and_depth_of_two_downloads_may_be_linked_together(drive, listed, tmp_path):
    root = tmp_path / "kitti"
    root.mkdir()
    for folder in drive.iterdir():
        (root / folder.name).symlink_to(folder)
    _, (clip,) = find_targets(listed(root, _line(21)))
    _, (wanted,) = find_targets(listed(drive, _line(21)))
    assert clip.target == wanted.target


def test_labels_are_depth_after_the_crop(drive, listed):
    _, (clip,) = find_targets(listed(drive, _line(21)))
    assert clip.target.label == f"val/{DEPTHS}/0000000021.png"
    assert (clip.target.kind, clip.target.rule.name) == ("depth", "kitti")
    assert clip.target.label_size == (352, 1216)


def test_frames_without_depth_and_before_frame_19_are_left_out(drive, listed, caplog):
    caplog.set_level("INFO")
    _, clips = find_targets(listed(drive, _line(18) + _line(25, "None") + _line(21)))
    assert [clip.key[-2:] for clip in clips] == ["21"]
    assert "1 labelled frames left out: without depth" in caplog.text
    assert "1 labelled frames left out: before frame 19" in caplog.text


def test_the_other_published_form_of_the_list(drive, listed):
    _, clips = find_targets(listed(drive, f"{DRIVE} 0000000021 l\n{DRIVE} 0000000025 l\n"))
    assert [clip.key[-2:] for clip in clips] == ["21", "25"]


def test_lists_that_name_no_depth_leave_frames_without_it_out(drive, listed, caplog):
    caplog.set_level("INFO")
    right = f"{DRIVE}/image_03/data/0000000023.png"
    lines = f"{DRIVE} 0000000021 l\n{DRIVE} 0000000021 r\n{DRIVE}/image_02/data/0000000025.png\n"
    lines += f"{DRIVE}/image_02/data/0000000023.png {right}\n{DRIVE} 0000000022 l\n"
    _, clips = find_targets(listed(drive, lines))
    assert [clip.key[-2:] for clip in clips] == ["21", "25"]
    assert "2 labelled frames left out: without depth" in caplog.text
    assert "1 labelled frames left out: of the right camera" in caplog.text


def test_a_named_depth_image_that_is_not_there_is_incomplete(drive, listed):
    _, clips = find_targets(listed(drive, _line(21) + _line(23)))
    assert clips[1].source == Unreadable(f"val/{DEPTHS}/0000000023.png is missing")


def test_the_depth_may_be_in_the_training_part(tmp_path, write_kitti, listed):
    root = write_kitti(tmp_path / "kitti", {2: [21]}, shape=(352, 1216), split="train")
    (root / "val").mkdir()
    _, (clip,) = find_targets(listed(root, _line(21)))
    assert clip.target.label.startswith("train/")


def test_a_drive_without_depth_is_named(drive, listed):
    other = _line(21).replace("_0002_", "_0009_")
    _, clips = find_targets(listed(drive, _line(21) + other))
    assert clips[1].source == Unreadable("no depth of drive 2011_09_26_drive_0009_sync in val")


def test_the_training_split_takes_early_frames_too(tmp_path, write_kitti, listed):
    root = write_kitti(tmp_path / "kitti", {2: [3]}, shape=(352, 1216), split="train")
    policy, (clip,) = find_targets(listed(root, _line(3), split="train"))
    assert (clip.source.numbers, policy.num_frames) == ((3,), 1)


@pytest.mark.parametrize(
    "line", ["2011_09_26_drive_0002_sync 21", "a b c", _line(21).replace("image_02", "image_03")]
)
def test_a_line_of_another_form_is_refused_by_number(drive, listed, line):
    with pytest.raises(UsageError, match=r"line 2 is .* wanted"):
        find_targets(listed(drive, _line(21) + line))


def test_the_list_must_be_given(drive, config):
    with pytest.raises(UsageError, match="split_file: not given"):
        find_targets(config("kitti", drive))


def test_another_layout_says_what_was_expected_and_found(tmp_path, listed):
    root = tmp_path / "kitti"
    (root / "training").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"has no val; wanted DATE/DRIVE.*found training"):
        find_targets(listed(root, _line(21)))


def test_depth_of_another_size_is_out(tmp_path, write_kitti, listed):
    root = write_kitti(tmp_path / "kitti", {2: [21, 25]}, shape=(352, 1216))
    Image.fromarray(np.zeros((352, 1200), np.uint16)).save(root / f"val/{DEPTHS}/0000000021.png")
    _, clips = find_targets(listed(root, _line(21) + _line(25)))
    assert "has 352 x 1200 pixels" in clips[0].source.reason
