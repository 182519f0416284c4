"""WindowColumns: windows of several shards as one table, and what a writer refuses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deltatok.shards import CacheMismatch
from deltatok.shards.windows import COLUMNS, ShardRows, WindowColumns


def test_windows_of_several_shards_are_one_table(little: Any) -> None:
    parts = [little.patch_rows(2, ["a", "b"], seed=0), little.patch_rows(3, ["c"], seed=1)]
    table = WindowColumns.concatenate([WindowColumns.empty(3), *parts])
    assert (len(table), table.keys) == (5, ["a", "b", "c"])
    for window in range(5):
        part, number = (parts[0], window) if window < 2 else (parts[1], window - 2)
        assert table.describe(window) == part.describe(number)
    for name in COLUMNS:
        assert getattr(table, name).dtype == getattr(parts[0], name).dtype


def test_some_windows_of_rows_are_columns_without_tokens(little: Any) -> None:
    rows = little.patch_rows(4, ["a", "b"], seed=0)
    some = rows.take(np.array([3, 1]))
    assert not isinstance(some, ShardRows)
    assert [some.describe(0), some.describe(1)] == [rows.describe(3), rows.describe(1)]


def test_times_from_the_first_frame_leave_the_rest(little: Any) -> None:
    rows = little.patch_rows(4, ["a"], seed=0)
    moved = rows.from_first_frame()
    assert (moved.timestamps_s[:, 0] == 0).all()
    assert moved.tokens is rows.tokens
    np.testing.assert_array_equal(
        moved.timestamps_s, rows.timestamps_s - rows.timestamps_s[:, :1], strict=True
    )


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_another_shape_or_dtype_is_named(little: Any, name: str) -> None:
    rows = little.patch_rows(4, ["a"], seed=0)
    column = getattr(rows, name)
    for wrong in (column[:3], column.astype(np.float64)):
        with pytest.raises(CacheMismatch, match=f"here: {name} is"):
            replace(rows, **{name: wrong}).check_columns(num_windows=4, num_frames=3, where="here")
