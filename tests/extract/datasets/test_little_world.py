"""The little world's layout as a data set: what is said where it is not whole."""

import json

import numpy as np
import pytest

from deltatok.extract.datasets.registry import find_targets
from deltatok.extract.sources.clip import TargetFrames
from deltatok.shards.errors import UsageError


@pytest.fixture
def world(tmp_path):
    """Two clips that are never decoded, and their labels of 35 frames at 25 a second."""
    root = tmp_path / "world"
    for folder in ("val", "labels/val"):
        (root / folder).mkdir(parents=True)
    settings = {"fps": 25, "tick_s": 0.2}
    (root / "world.json").write_text(json.dumps({"settings": settings}))
    for name in ("0000.mp4", "0001.mp4"):
        (root / "val" / name).write_bytes(b"a clip")
        np.save(root / "labels/val" / f"{name}.npy", np.zeros((35, 8, 8), np.uint8))
    return root


def test_windows_begin_with_the_clip_a_tick_apart(world, config):
    policy, clips = find_targets(config("little-world", world))
    assert [clip.key for clip in clips] == ["0000/000030", "0001/000030"]
    assert clips[0].source == TargetFrames(numbers=(0, 5, 10, 15, 20, 25, 30))
    assert clips[0].path == world / "val/0000.mp4"
    assert (clips[0].target.rule.frame, clips[0].target.label_size) == (30, (8, 8))
    assert (policy.fps, policy.stride_s) == (25.0, 0.2)


def test_labels_that_end_too_soon_are_named(world, config):
    np.save(world / "labels/val/0001.mp4.npy", np.zeros((30, 8, 8), np.uint8))
    _, clips = find_targets(config("little-world", world))
    assert "labels/val/0001.mp4.npy has shape (30, 8, 8)" in clips[1].source.reason


def test_a_missing_label_file_is_named(world, config):
    (world / "labels/val/0000.mp4.npy").unlink()
    _, clips = find_targets(config("little-world", world))
    assert clips[0].source.reason == "labels/val/0000.mp4.npy is missing"


def test_pickled_labels_are_not_read(world, config):
    np.save(world / "labels/val/0000.mp4.npy", np.array([{}] * 3), allow_pickle=True)
    _, clips = find_targets(config("little-world", world))
    assert "is no array that can be read" in clips[0].source.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"settings": 3}',
        '{"settings": {"fps": 25}}',
        '{"settings": {"fps": 0, "tick_s": 0.2}}',
    ],
)
def test_a_world_file_that_says_no_clock_is_refused(world, config, text):
    (world / "world.json").write_text(text)
    with pytest.raises(UsageError, match=r"world\.json: not the file of a little world"):
        find_targets(config("little-world", world))


def test_a_world_without_heads_clips_says_what_is_there(world, config):
    with pytest.raises(UsageError, match=r"has no head; wanted world\.json, head/.*found labels"):
        find_targets(config("little-world", world, split="train"))
