"""The zip of a patch shard: its bytes, its readers, and zips that are cut or made to harm."""

import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from deltatok.shards import DamagedShard, PatchShards
from deltatok.shards.files import ReadOnlyFile
from deltatok.shards.patches.archive import ShardFile, write_archive
from deltatok.shards.patches.layout import TOKENS_CHUNK, member_names
from deltatok.shards.patches.reader import TokenReader
from deltatok.shards.tools.verify import verify_cache

NAMES = member_names("float16")
ZIP = "shards/000000.zarr.zip"


def shard_file(path: Path) -> ShardFile:
    return ShardFile(path, NAMES)


def zipped(members: dict[str, bytes], **changes: Any) -> bytes:
    """A zip of these members by the standard library; changes: of the ZipInfo of crop/c/0/0."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            for field, value in changes.items() if name == "crop/c/0/0" else ():
                setattr(info, field, value)
            archive.writestr(info, data)
    return file.getvalue()


def is_refused(cache: Any, data: bytes, words: str) -> None:
    """By the reader and by verify, also where the done-record says that all is well."""
    (cache.folder / ZIP).write_bytes(data)
    cache.reseal()
    with pytest.raises(DamagedShard, match=f"000000.zarr.zip: .*{words}"):
        PatchShards(cache.folder).tokens([0])
    problems = verify_cache(cache.folder, deep=True).problems
    assert any("000000.zarr.zip" in problem.text for problem in problems)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_members_are_stored_in_order_and_aligned(little: Any, tmp_path: Path, dtype: str) -> None:
    path = little.make_patches(tmp_path / "cache", dtype=dtype).folder / ZIP
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        assert archive.testzip() is None
        assert archive.comment == b""
    assert [member.filename for member in members] == member_names(dtype)
    assert members[-1].filename == TOKENS_CHUNK
    for member in members:
        assert member.compress_type == zipfile.ZIP_STORED
        assert member.date_time == (1980, 1, 1, 0, 0, 0)
        assert (member.flag_bits, member.extra, member.comment) == (0, b"", b"")
        assert member.external_attr >> 16 == stat.S_IFREG | 0o644
        offset, _ = little.place(path, member.filename)
        assert offset % (4096 if member.filename == TOKENS_CHUNK else 64) == 0
    found = ShardFile(path, member_names(dtype)).members
    places = {name: (member.offset, member.size) for name, member in found.items()}
    assert places == {name: little.place(path, name) for name in member_names(dtype)}


def test_a_zip_of_the_standard_library_is_read(patches: Any, little: Any) -> None:
    """Padding is no promise to a reader, nor is the order."""
    wanted = PatchShards(patches.folder).load()
    members = little.read_members(patches.folder / ZIP)
    (patches.folder / ZIP).write_bytes(zipped(dict(reversed(members.items()))))
    patches.reseal()
    np.testing.assert_array_equal(PatchShards(patches.folder).load(), wanted)


def test_two_reads_open_a_shard(patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = ReadOnlyFile.read

    def counting(self: ReadOnlyFile, offset: int, size: int) -> bytes:
        reads.append(size)
        return real(self, offset, size)

    path = patches.folder / ZIP  # as if the tokens were large: the tail begins among them
    tail_bytes = path.stat().st_size - shard_file(path).members[TOKENS_CHUNK].offset - 300
    monkeypatch.setattr("deltatok.shards.patches.archive._TAIL_BYTES", tail_bytes)
    monkeypatch.setattr(ReadOnlyFile, "read", counting)
    reader = PatchShards(patches.folder)
    reader.tokens([0])
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compress_type": zipfile.ZIP_DEFLATED}, "has method 8"),
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "is no plain file"),
        ({"external_attr": (stat.S_IFIFO | 0o600) << 16}, "is no plain file"),
        ({"comment": b"x"}, "is no plain file"),
        ({"extra": struct.pack("<2H4s", 0x7855, 4, b"abcd")}, "unknown fields"),
    ],
)
def test_a_member_that_is_no_stored_file_is_refused(
    little: Any, patches: Any, change: dict[str, Any], words: str
) -> None:
    members = little.read_members(patches.folder / ZIP)
    is_refused(patches, zipped(members, **change), words)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "../outside",
        "/etc/passwd",
        "a/../crop/c/0/0",
        "crop/c/0/0/",
        "token_scale/zarr.json",
        "crop\\c\\0\\0",
        "\u00e9",
        "",
    ],
)
def test_a_member_of_another_name_is_refused(little: Any, patches: Any, name: str) -> None:
    members = little.read_members(patches.folder / ZIP)
    is_refused(
        patches, zipped({**members, name: b"x"}), "which no shard has|has method 0 and flags"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_member_is_refused_by_its_name(little: Any, patches: Any, name: str) -> None:
    members = little.read_members(patches.folder / ZIP)
    del members[name]
    is_refused(patches, zipped(members), f"no member {name}")


def test_a_member_that_is_there_twice_is_refused(little: Any, patches: Any) -> None:
    file = io.BytesIO(zipped(little.read_members(patches.folder / ZIP)))
    with (
        zipfile.ZipFile(file, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("zarr.json", b"{}")
    is_refused(patches, file.getvalue(), "member 'zarr.json', a second time")


def test_sizes_behind_the_data_are_refused(little: Any, patches: Any) -> None:
    class Stream(io.RawIOBase):
        """What cannot be gone back in gets data descriptors."""

        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in little.read_members(patches.folder / ZIP).items():
            archive.writestr(name, data)
    is_refused(patches, stream.data, "flags 0x8")


def with_comment(data: bytes) -> bytes:
    return data[:-2] + b"\x01\0x"


def behind_another(data: bytes) -> bytes:
    """As the parts of a program that unpacks itself: zipfile corrects all places."""
    file = io.BytesIO(b"#!/bin/sh\n")
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "a") as archive:
        for name in source.namelist():
            archive.writestr(zipfile.ZipInfo(name), source.read(name))
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data + b"\0", "was cut off or added to"),
        (lambda data: data + data, "a central directory of"),
        (lambda data: b"\0" + data, "a central directory of"),
        (behind_another, "does not fill the place"),
        (with_comment, "was cut off or added to"),
        (lambda data: with_comment(data)[:-1], "is a part of several, or has a comment"),
        (lambda data: b"", "no end of a zip"),
        (lambda data: b"PK\5\6" + bytes(18), "0 members"),
        (lambda data: bytes(200), "no end of a zip"),
    ],
)
def test_anything_before_between_or_behind_is_refused(
    patches: Any, change: Callable[[bytes], bytes], words: str
) -> None:
    is_refused(patches, change((patches.folder / ZIP).read_bytes()), words)


def test_bytes_between_two_members_are_refused(little: Any, patches: Any) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in little.read_members(patches.folder / ZIP).items():
            archive.writestr(zipfile.ZipInfo(name), data)
            if name == "crop/c/0/0":
                file.write(b"hidden")
                archive.start_dir = file.tell()
    is_refused(patches, file.getvalue(), "says something else than the central directory")


def test_an_enormous_central_directory_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(5_000):
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    with pytest.raises(
        DamagedShard, match=r"a central directory of 2\d+ bytes at byte \d+, wanted at most"
    ):
        shard_file(path)


def test_an_enormous_member_is_refused_unread(little: Any, patches: Any, tmp_path: Path) -> None:
    """3 GB of a hole: the directory is right, the metadata says that there are a few bytes."""
    path = tmp_path / "x.zarr.zip"
    members: dict[str, Any] = little.read_members(patches.folder / ZIP)
    sparse_zip(path, {**members, "zarr.json": 3 * 10**9, "crop/c/0/0": 10**9})
    file = shard_file(path)
    with pytest.raises(DamagedShard, match=r"zarr.json: 3000000000 bytes, wanted at most"):
        file.read_member("zarr.json")
    with pytest.raises(DamagedShard, match=r"crop/c/0/0: 1000000000 bytes, wanted 84"):
        file.read_member("crop/c/0/0", size=84)
    assert file.read_member("clip/c/0") == members["clip/c/0"]


def sparse_zip(path: Path, members: dict[str, Any]) -> None:
    """A zip with holes, of so many bytes, in place of some members; their checksums are wrong."""
    directory = b""
    with path.open("wb") as file:
        for name, data in members.items():
            size = data if isinstance(data, int) else len(data)
            crc = 0 if isinstance(data, int) else zipfile.crc32(data)
            common = struct.pack("<5H3L", 20, 0, 0, 0, 33, crc, size, size)
            place = file.tell()
            file.write(b"PK\3\4" + common + struct.pack("<2H", len(name), 0) + name.encode())
            directory += b"PK\1\2" + struct.pack("<H", 20) + common
            directory += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, place) + name.encode()
            if isinstance(data, int):
                file.seek(data, io.SEEK_CUR)
            else:
                file.write(data)
        start, count = file.tell(), len(members)
        end = struct.pack("<4H2LH", 0, 0, count, count, len(directory), start, 0)
        file.write(directory + b"PK\5\6" + end)


@pytest.fixture
def zip64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything above 100 bytes counts as large, for the writer."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)


@pytest.mark.usefixtures("zip64")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_zip64_is_read_by_all_readers(little: Any, tmp_path: Path, dtype: str) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="another reader, not a dependency")
    cache = little.make_patches(tmp_path / "cache", dtype=dtype)
    path = cache.folder / ZIP
    assert path.read_bytes()[-42:-38] == b"PK\6\7"
    wanted = PatchShards(cache.folder).stored_tokens(np.arange(5))
    np.testing.assert_array_equal(zarr.open_group(ZipStore(path), mode="r")["tokens"][...], wanted)
    base = {"driver": "file", "path": str(path)}
    spec = {"driver": "zarr3", "kvstore": {"driver": "zip", "base": base, "path": "tokens/"}}
    got = tensorstore.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(got, wanted)
    assert little.place(path, TOKENS_CHUNK)[0] % 4096 == 0
    assert verify_cache(cache.folder, deep=True).problems == []


def fixed_bytes(path: Path) -> list[int]:
    """The bytes of the headers, the directory and the ends; not padding, the version that made it
    and the mode."""
    data, found = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        members, position = archive.infolist(), archive.start_dir
    for member in members:
        at = member.header_offset
        found += range(at, at + 30 + len(member.filename))
    while data[position : position + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<2H", data, position + 28)
        end = position + 46 + sum(lengths)
        ignored = {4, 5, *range(36, 42)}
        found += [at for at in range(position, end) if at - position not in ignored]
        position = end
    return found + list(range(position, len(data)))


def test_every_byte_of_headers_and_directory_matters(patches: Any) -> None:
    path = patches.folder / ZIP
    data, places = bytearray(path.read_bytes()), fixed_bytes(path)
    assert len(places) > 1200
    for place in places:
        data[place] ^= 0x80
        path.write_bytes(data)
        data[place] ^= 0x80
        with pytest.raises(DamagedShard):
            shard_file(path)


def test_a_shard_cut_off_anywhere_is_refused(patches: Any) -> None:
    path = patches.folder / ZIP
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedShard):
            shard_file(path)


def test_damaged_metadata_is_told_by_its_checksum(little: Any, patches: Any) -> None:
    """A space for a line break: still the same JSON."""
    path = patches.folder / ZIP
    data = bytearray(path.read_bytes())
    offset, size = little.place(path, "tokens/zarr.json")
    data[offset + data[offset : offset + size].index(b"\n")] = ord(" ")
    path.write_bytes(data)
    with pytest.raises(DamagedShard, match=r"tokens/zarr\.json: wrong checksum"):
        shard_file(path).read_member("tokens/zarr.json")


class _SparseFile(io.FileIO):
    """Leaves holes where zeros are written."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), 2**20):
            piece = view[start : start + 2**20]
            if np.frombuffer(piece, np.uint8).any():
                super().write(piece)
            else:
                self.seek(len(piece), io.SEEK_CUR)
        return len(view)


@pytest.mark.slow
def test_a_shard_of_more_than_4_gb_is_written_and_read(little: Any, tmp_path: Path) -> None:
    """2,100 frames of 2^20 channels, nearly all zeros, in files with holes."""
    import json
    from dataclasses import replace

    rows, channels = 2100, 2**20
    chunk_bytes = channels * 2 + 4
    data_bytes = rows * chunk_bytes
    with (tmp_path / "tokens").open("wb") as file:
        file.truncate(data_bytes + 16 * rows + 4)
    data = np.memmap(tmp_path / "tokens", np.uint8, "r+")
    chunks = data[:data_bytes].reshape(rows, chunk_bytes)
    empty = google_crc32c.value(bytes(channels * 2)).to_bytes(4, "little")
    chunks[:, -4:] = np.frombuffer(empty, np.uint8)
    last = np.zeros(channels, np.float16)
    last[[0, -1]] = 1.5, -2.0
    chunks[-1, :-4] = last.view(np.uint8)
    chunks[-1, -4:] = np.frombuffer(
        google_crc32c.value(last.tobytes()).to_bytes(4, "little"), np.uint8
    )
    index = np.array([[row * chunk_bytes, chunk_bytes] for row in range(rows)], "<u8").tobytes()
    crc = google_crc32c.value(index).to_bytes(4, "little")
    data[data_bytes:] = np.frombuffer(index + crc, np.uint8)

    cache = little.make_patches(tmp_path / "cache")
    members: dict[str, Any] = little.read_members(cache.folder / ZIP)
    metadata = json.loads(members["tokens/zarr.json"])
    shape = [rows, 1, 1, channels]
    metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
    metadata["codecs"][0]["configuration"]["chunk_shape"] = [1, 1, 1, channels]
    members |= {"tokens/zarr.json": json.dumps(metadata).encode(), TOKENS_CHUNK: data}
    path = tmp_path / "large.zarr.zip"
    with _SparseFile(path, "w+") as file:
        write_archive(file, members.items(), last=TOKENS_CHUNK)
    assert path.stat().st_size > 2**32
    shape = replace(cache.info.shape, num_frames=1, num_tokens=1, grid=(1, 1), hidden_size=channels)
    reader = TokenReader(shard_file(path), replace(cache.info, shape=shape), rows=rows)
    stored = reader.new_frames(1)
    for window, wanted in ((rows - 1, last), (rows - 2, np.zeros_like(last))):
        reader.read_stored(reader.open(), window, [0], out=stored)
        np.testing.assert_array_equal(stored[0, 0], wanted)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo(TOKENS_CHUNK).file_size == data.size
        assert archive.infolist()[-1].filename == TOKENS_CHUNK
