"""Archives and lists of pretended videos: searching reads names and sizes only."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Members = Mapping[str, bytes]


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """A tar of these members under tmp_path."""

    def write(name: str, members: Members) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return write


@pytest.fixture
def write_zip(tmp_path: Path) -> Callable[..., Path]:
    """A zip of these members under tmp_path."""

    def write(name: str, members: Members) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return tmp_path / name

    return write


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    """A folder of three trimmed clips of two classes."""
    root = tmp_path / "k700"
    for name in (
        "train/arm wrestling/aaaaaaaaaaa_000001_000011.mp4",
        "train/zumba/bbbbbbbbbbb_000100_000110.mp4",
        "val/zumba/-c_ccccccccc_000007_000017.mp4",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    return root
