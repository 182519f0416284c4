"""ClipLabels: one label file a clip, by its key, and never one outside of the folder."""

from pathlib import Path

import numpy as np
import pytest

from deltatok.shards.errors import UsageError
from deltatok.shards.evaluation.labels import ClipLabels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """labels/sub/a.mp4.npy, three frames of 4 x 6 pixels, and the same beside the folder."""
    labels = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 6), np.uint8)
    (tmp_path / "labels/sub").mkdir(parents=True)
    for name in ("labels/sub/a.mp4.npy", "outside.npy"):
        np.save(tmp_path / name, labels)
    return tmp_path / "labels"


def test_a_frame_is_found_by_key_and_number(folder: Path) -> None:
    labels = ClipLabels(folder, last_frames={"sub/a.mp4": 2}, num_classes=3)
    assert labels.size("sub/a.mp4") == (4, 6)
    frame = labels.frame("sub/a.mp4", 2)
    assert (frame.shape, frame.dtype, frame.flags.writeable) == ((4, 6), np.uint8, True)
    assert (frame == 2).all()


def test_a_key_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "link.npy").symlink_to(outside.with_suffix(".npy"))
    for key in ("../outside", "sub/../../outside", str(outside), "link"):
        with pytest.raises(UsageError, match=f"clip {key}: its name leads out"):
            ClipLabels(folder, last_frames={key: 0}, num_classes=3)


def test_what_does_not_fit_names_the_clip(folder: Path) -> None:
    for last_frames, num_classes, words in (
        ({"none.mp4": 0}, 3, "clip none.mp4: no labels"),
        ({"sub/a.mp4": 3}, 3, "clip sub/a.mp4: its labels have 3 frames"),
        ({"sub/a.mp4": 2}, 2, "clip sub/a.mp4: .* class 2: wanted 0 to 1"),
    ):
        with pytest.raises(UsageError, match=words):
            ClipLabels(folder, last_frames=last_frames, num_classes=num_classes).frame(
                "sub/a.mp4", 2
            )
    with pytest.raises(UsageError, match="no such folder"):
        ClipLabels(folder / "none", last_frames={}, num_classes=2)
