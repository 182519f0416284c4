"""map_npy: arrays that other programs wrote, and all that can be wrong with such a file."""

import io
from pathlib import Path

import numpy as np
import pytest

from deltatok.shards.npy import map_npy


def test_any_plain_array_is_mapped(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for name, written in (("c", values), ("fortran", np.asfortranarray(values))):
        np.save(tmp_path / f"{name}.npy", written)
        found = map_npy(tmp_path / f"{name}.npy")
        assert (found == values).all()
        assert found.dtype == np.int16
        assert not found.flags.writeable


def damaged() -> dict[str, bytes]:
    buffer, archive, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(buffer, np.zeros((3, 4, 5), np.uint8))
    np.savez(archive, values=np.zeros(3))
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    whole = buffer.getvalue()
    return {
        "empty": b"",
        "text": b"no array",
        "archive": archive.getvalue(),
        "pickled": pickled.getvalue(),
        "cut off": whole[:-1],
        "cut off in the header": whole[:30],
        "open bracket": whole.replace(b"(3, 4, 5)", b"(3, 4, 5 "),
        "no text": whole.replace(b"'shape'", b"'sha\x00e'"),
        "more than there is": whole.replace(b"(3, 4, 5), }" + b" " * 8, b"(999999999, 4, 5), }"),
        "beyond any number": whole.replace(
            b"(3, 4, 5), }" + b" " * 24, b"(999999999999999999999999999, 4, 5), }"
        ),
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_a_value_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "values.npy"
    path.write_bytes(damaged()[name])
    with pytest.raises(ValueError):
        map_npy(path)


def test_a_missing_file_and_a_folder_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        map_npy(tmp_path / "none.npy")
    with pytest.raises(OSError):
        map_npy(tmp_path)
