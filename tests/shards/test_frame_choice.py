"""Some frames of some windows, straight from the files: what plain zarr gives, checked once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.storage import ZipStore

from deltatok.shards import DamagedShard, PatchShards
from deltatok.shards.patches import zarr_arrays as frame_file

QUIET = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def frame_choices() -> st.SearchStrategy[list[tuple[int, list[int]]]]:
    """(window, F frames) of the 11 windows of 3 frames, the same F for all."""
    return st.integers(1, 5).flatmap(
        lambda count: st.lists(
            st.tuples(
                st.integers(0, 10), st.lists(st.integers(0, 2), min_size=count, max_size=count)
            ),
            min_size=1,
            max_size=6,
        )
    )


@QUIET
@given(choice=frame_choices(), once=st.booleans())
def test_chosen_frames_are_those_of_plain_zarr(
    patches: Any, choice: list[tuple[int, list[int]]], once: bool
) -> None:
    paths = sorted(patches.folder.glob("shards/*.zarr.zip"))
    groups = [zarr.open_group(ZipStore(path), mode="r") for path in paths]
    plain = np.concatenate([np.asarray(group["tokens"][...]) for group in groups])
    windows = np.array([window for window, _ in choice])
    frames = np.array([numbers for _, numbers in choice])
    reader = PatchShards(patches.folder, check_once=once)
    for _ in range(2):  # the second time without checksums, where those are checked once
        got = reader.stored_tokens(windows, frames=frames)
        np.testing.assert_array_equal(got, plain[windows[:, None], frames])
        values = reader.tokens(windows, frames=frames)
        np.testing.assert_array_equal(values, plain[windows[:, None], frames].astype(np.float32))


@pytest.mark.parametrize("most", [1, 2])
def test_long_windows_are_read_in_several_stretches(
    patches: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    assert os.sysconf("SC_IOV_MAX") >= 2 * frame_file.MAX_STRETCH
    wanted = PatchShards(patches.folder).load()
    monkeypatch.setattr(frame_file, "MAX_STRETCH", most)
    np.testing.assert_array_equal(PatchShards(patches.folder).load(), wanted)


@pytest.mark.parametrize(
    "storage",
    [
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"dtype": "float16", "compression": "zstd"},
        {"dtype": "int8", "compression": "zstd"},
    ],
)
def test_chosen_frames_of_every_storage_are_those_of_whole_windows(
    little: Any, tmp_path: Path, storage: dict[str, str]
) -> None:
    made = little.make_patches(tmp_path / "patches", **storage)
    reader = PatchShards(made.folder)
    windows, frames = [9, 0, 3, 9], [[1, 2], [0, 2], [2, 1], [0, 0]]
    whole = reader.tokens(windows)
    wanted = np.stack([rows[chosen] for rows, chosen in zip(whole, frames, strict=True)])
    np.testing.assert_array_equal(reader.tokens(windows, frames=frames), wanted)
    if storage["dtype"] == "int8":
        scale = reader.token_scale(windows)
        wanted_scale = np.stack([rows[chosen] for rows, chosen in zip(scale, frames, strict=True)])
        np.testing.assert_array_equal(reader.token_scale(windows, frames=frames), wanted_scale)


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([[0, 3]], IndexError),
        ([[-1, 0]], IndexError),
        ([[0.5, 1.0]], TypeError),
        ([[0], [1]], ValueError),
        ([[]], ValueError),
        ([0, 1], ValueError),
    ],
)
def test_frames_that_cannot_be_are_refused(
    patches: Any, frames: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="frames"):
        PatchShards(patches.folder).tokens([0], frames=frames)


@pytest.mark.parametrize("once", [True, False])
def test_frame_damaged_after_its_first_reading(
    little: Any, patches: Any, flip: Callable[[Path, int], None], once: bool
) -> None:
    reader = PatchShards(patches.folder, check_once=once)
    reader.stored_tokens([0])
    path = patches.folder / "shards/000000.zarr.zip"
    flip(path, little.place(path, "tokens/c/0/0/0/0")[0] + 3)
    if once:
        reader.stored_tokens([0])
        with pytest.raises(DamagedShard, match=r"window 0, frame 0.*wrong checksum"):
            PatchShards(patches.folder).stored_tokens([0])
    else:
        with pytest.raises(DamagedShard, match=r"window 0, frame 0.*wrong checksum"):
            reader.stored_tokens([0])


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Changes one bit of a file."""

    def change(path: Path, position: int) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        with path.open("r+b") as file:  # the same file, as a bad disk would have it
            file.write(data)

    return change
