"""Tars and npy headers that someone else made: refused with the reason, never followed."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatok.shards import DamagedShard
from deltatok.shards.deltas.reader import read_members
from deltatok.shards.npy import npy_bytes, parse_npy, read_npy

FLOAT16 = np.dtype("<f2")


def member(name: str, size: int = 4, **changes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in changes.items():
        setattr(info, field, value)
    return info


def tar_of(path: Path, *members: tarfile.TarInfo, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info in members:
            tar.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
    return path


def test_members_lie_where_tarfile_says(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "x.tar", member("000000.tokens.npy", 700), member("000000.windows.json")
    )
    with tarfile.open(path) as tar:
        wanted = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(found.name, found.offset, found.size) for found in read_members(path)] == wanted


@pytest.mark.parametrize(
    "name",
    [
        "/etc/000000.tokens.npy",
        "../000000.tokens.npy",
        "a/../../000000.tokens.npy",
        "a/000000.tokens.npy",
        "000000.tokens.pkl",
        "000000.tokens.npy\n",
    ],
)
def test_names_that_are_not_ours_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedShard, match=r"wanted NNNNNN\.tokens\.npy"):
        read_members(tar_of(tmp_path / "x.tar", member(name)))


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        b"S",
    ],
)
def test_members_that_are_no_regular_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = member("000000.tokens.npy", 0, type=kind, linkname="/etc/passwd")
    with pytest.raises(DamagedShard, match="no regular file"):
        read_members(tar_of(tmp_path / "x.tar", info))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extended_headers_are_refused(tmp_path: Path, format: int) -> None:
    info = member("x" * 200)
    with pytest.raises(DamagedShard, match="no regular file"):
        read_members(tar_of(tmp_path / "x.tar", info, format=format))


def with_size_field(path: Path, field: bytes) -> Path:
    """Overwrites the size of the first member and mends the checksum."""
    data = bytearray(path.read_bytes())
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (b"77777777777\0", "does not fit into the file"),
        (b"00000100000\0", "does not fit into the file"),
        (b"\x80" + bytes(4) + b"\x01" + bytes(6), "does not fit into the file"),
        (b"\xff" * 12, "no regular file"),
        (b"-0000000001\0", "no regular file"),
        (b"0x000000010\0", "no tar header"),
        (b"000 0000004\0", "no tar header"),
    ],
)
def test_sizes_beyond_the_file_or_unreadable_are_refused(
    tmp_path: Path, field: bytes, words: str
) -> None:
    path = with_size_field(tar_of(tmp_path / "x.tar", member("000000.tokens.npy")), field)
    with pytest.raises(DamagedShard, match=words):
        read_members(path)


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    info = member("000000.tokens.npy")
    with pytest.raises(DamagedShard, match="a second time"):
        read_members(tar_of(tmp_path / "x.tar", info, info))


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 1025, 1536])
def test_a_tar_without_its_end_mark_is_refused(tmp_path: Path, keep: int) -> None:
    path = tar_of(tmp_path / "x.tar", member("000000.tokens.npy"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedShard, match=r"ends at byte|end mark|does not fit"):
        read_members(path)


def test_a_missing_tar_is_a_damaged_shard(tmp_path: Path) -> None:
    with pytest.raises(DamagedShard, match="cannot be opened"):
        read_members(tmp_path / "x.tar")


def test_a_changed_header_is_refused_at_every_byte(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", member("000000.tokens.npy"))
    data = path.read_bytes()
    for position in range(512):
        changed = bytearray(data)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        try:
            found = read_members(path)
        except DamagedShard:
            continue
        # Only the padding of the checksum's own field may change unnoticed.
        assert position in (154, 155), position
        assert [(info.name, info.size) for info in found] == [("000000.tokens.npy", 4)]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=600))
def test_random_bytes_are_refused_as_a_tar(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(data)
    with pytest.raises(DamagedShard):
        read_members(path)


def test_npy_comes_back() -> None:
    values = np.arange(24, dtype=FLOAT16).reshape(2, 3, 4)
    got = read_npy(npy_bytes(values), dtype=FLOAT16, num_axes=3, where="here")
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("num_axes", [1, 2, 4])
def test_npy_of_any_number_of_axes_is_parsed(num_axes: int) -> None:
    values = np.zeros((2,) * num_axes, dtype=FLOAT16)
    data = npy_bytes(values)
    shape, _ = parse_npy(data, size=len(data), dtype=FLOAT16, num_axes=num_axes, where="here")
    assert shape == values.shape


def saved(values: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=pickled)
    return buffer.getvalue()


GOOD = saved(np.zeros((2, 3), dtype=FLOAT16))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: saved(np.array([[{}]], dtype=object), pickled=True), "npy header"),
        (lambda: saved(np.zeros((2, 3), dtype=">f2")), "npy header"),
        (lambda: saved(np.zeros((2, 3), dtype="f4")), "npy header"),
        (lambda: saved(np.zeros((2, 3), dtype=[("a", "f2")])), "npy header"),
        (lambda: saved(np.asfortranarray(np.zeros((2, 3), dtype="f2"))), "npy header"),
        (lambda: saved(np.zeros((2, 3, 4), dtype="f2")), "wanted 2 axes"),
        (lambda: GOOD[:-1], "139 bytes for shape"),
        (lambda: GOOD + b"\0", "141 bytes for shape"),
        (lambda: GOOD.replace(b"(2, 3)", b"(9, 9)"), "140 bytes for shape"),
        (lambda: GOOD.replace(b"(2, 3)", b"(2,-3)"), "npy header"),
        (lambda: GOOD.replace(b"False", b"None "), "npy header"),
        (lambda: GOOD.replace(b"{'descr'", b"exit() #"), "npy header"),
        (lambda: GOOD.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x03"), "wanted an npy file"),
        (lambda: GOOD[:8] + b"\xff\xff" + GOOD[10:], "npy header of at most 4096 bytes"),
        (lambda: b"", "wanted an npy file"),
        (lambda: GOOD[:11], "wanted an npy file"),
        (lambda: b"PK\x03\x04" + bytes(100), "wanted an npy file"),
    ],
)
def test_npy_that_is_not_what_is_asked_for_is_refused(
    make: Callable[[], bytes], words: str
) -> None:
    with pytest.raises(DamagedShard, match=f"here: .*{words}"):
        read_npy(make(), dtype=FLOAT16, num_axes=2, where="here")


@settings(max_examples=300, deadline=None)
@given(prefix=st.binary(max_size=60), keep=st.integers(0, 140))
def test_random_bytes_are_refused_as_npy(prefix: bytes, keep: int) -> None:
    data = prefix + GOOD[keep:]
    if data == GOOD:
        return
    try:
        got = read_npy(data, dtype=FLOAT16, num_axes=2, where="here")
    except DamagedShard:
        return
    assert got.size * 2 <= len(data)
