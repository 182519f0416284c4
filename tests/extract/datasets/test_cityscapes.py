"""Cityscapes' layout, targets and labels."""

import pytest

from deltatok.extract.datasets.registry import find_targets
from deltatok.extract.sources.clip import TargetFrames, Unreadable
from deltatok.shards.errors import UsageError

SNIPPETS = [("frankfurt", 1, 17101), ("ulm", 0, 19)]


@pytest.fixture
def cityscapes(tmp_path, write_cityscapes):
    return write_cityscapes(tmp_path / "cityscapes", SNIPPETS)


def test_the_labelled_frame_ends_a_window_with_frames_3_apart(cityscapes, config):
    policy, clips = find_targets(config("cityscapes", cityscapes))
    assert [clip.key for clip in clips] == [
        "frankfurt_000001/frankfurt_000001_017101_leftImg8bit",
        "ulm_000000/ulm_000000_000019_leftImg8bit",
    ]
    assert clips[0].source == TargetFrames(
        numbers=tuple(range(17083, 17102, 3)),
        names=tuple(
            f"leftImg8bit_sequence/val/frankfurt/frankfurt_000001_{i:06d}_leftImg8bit.png"
            for i in range(17083, 17102, 3)
        ),
    )
    assert (policy.fps, policy.stride_s) == (16.0, 0.1875)


def test_only_label_ids_are_labels(cityscapes, config):
    _, clips = find_targets(config("cityscapes", cityscapes))
    assert clips[1].target.label == "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    assert (clips[1].target.rule.name, clips[1].target.sequence) == ("cityscapes", "ulm_000000")


def test_a_missing_frame_costs_its_target(cityscapes, config):
    folder = cityscapes / "leftImg8bit_sequence/val/ulm"
    (folder / "ulm_000000_000007_leftImg8bit.png").unlink()
    _, clips = find_targets(config("cityscapes", cityscapes))
    assert isinstance(clips[1].source, Unreadable)
    assert "ulm_000000_000007_leftImg8bit.png is missing" in clips[1].source.reason


def test_a_label_too_early_in_its_sequence_is_out(cityscapes, config):
    folder = cityscapes / "gtFine/val/ulm"
    old = folder / "ulm_000000_000019_gtFine_labelIds.png"
    old.rename(folder / "ulm_000000_000004_gtFine_labelIds.png")
    _, clips = find_targets(config("cityscapes", cityscapes))
    assert clips[1].source == Unreadable("its window begins before frame 0")


def test_the_training_split_takes_the_single_images(tmp_path, write_cityscapes, config):
    root = write_cityscapes(tmp_path / "cityscapes", [("aachen", 0, 19)], split="train")
    (root / "leftImg8bit_sequence").rename(root / "leftImg8bit")
    policy, (clip,) = find_targets(config("cityscapes", root, split="train"))
    name = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert clip.source == TargetFrames((19,), (name,))
    assert policy.num_frames == 1


def test_whole_windows_need_the_sequences(cityscapes, config):
    (cityscapes / "leftImg8bit_sequence").rename(cityscapes / "leftImg8bit")
    with pytest.raises(UsageError, match=r"has no leftImg8bit_sequence/val; wanted.*found gtFine"):
        find_targets(config("cityscapes", cityscapes))


def test_names_of_another_kind_are_refused(cityscapes, config):
    folder = cityscapes / "gtFine/val/ulm"
    old = folder / "ulm_000000_000019_gtFine_labelIds.png"
    old.rename(folder / "ulm_0_19_gtFine_labelIds.png")
    with pytest.raises(UsageError, match="two numbers of 6 digits"):
        find_targets(config("cityscapes", cityscapes))


def test_options_of_other_data_sets_are_refused(config, tmp_path):
    with pytest.raises(UsageError, match="every: got 5 with dataset cityscapes"):
        config("cityscapes", tmp_path, every=5)
