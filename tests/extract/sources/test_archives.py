"""Tars and zips: every clip is found or named, nothing leaves the archive."""

import io
import logging
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatok.extract.sources.clip import (
    FrameFolder,
    TarVideo,
    Unreadable,
    ZipFolder,
    ZipVideo,
)
from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import UsageError

Write = Callable[..., Path]
VIDEOS = {
    "a/one.mp4": b"1" * 700,
    "a/one.json": b'{"label": "run", "split": "train", "fps": 25}',
    "a/two.webm": b"22",
    "a/two.cls": b"jump\n",
    "readme.txt": b"hello",
    "._one.mp4": b"resource fork",
}
FRAMES = {f"train/run/{clip}/{i:06d}_{i / 25}.jpg": b"x" * 9 for clip in "ab" for i in range(3)}


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def _negative_size() -> bytes:
    return _header("x.mp4", -512) + bytes(2048)


def _chained_headers() -> bytes:
    return (_header("a", 1, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")) * 3000


def _huge_unknown() -> bytes:
    return _header("x.mp4", 2**80, b"Z") + bytes(2048)


def test_tar_gives_its_videos_with_class_and_split(write_tar: Write) -> None:
    path = write_tar("w.tar", VIDEOS)
    clips = find_clips([path])
    assert [(c.key, c.size_bytes, c.label, c.split, c.path) for c in clips] == [
        ("a/one.mp4", 700, "run", "train", path),
        ("a/two.webm", 2, "jump", None, path),
    ]
    for clip in clips:
        assert isinstance(clip.source, TarVideo)
        data = path.read_bytes()[clip.source.offset :][: clip.size_bytes]
        assert data == VIDEOS[clip.key]


def test_long_names_and_pax_headers_are_read(tmp_path: Path) -> None:
    name = f"{'deep/' * 40}caf\u00e9.mp4"
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=layout) as tar:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        (clip,) = find_clips([tmp_path / "long.tar"])
        assert clip.key == name
        assert isinstance(clip.source, TarVideo)
        assert (tmp_path / "long.tar").read_bytes()[clip.source.offset :][:3] == b"abc"


def test_folder_with_archives_is_like_one_where_they_are_unpacked(
    write_tar: Write, write_zip: Write, tmp_path: Path
) -> None:
    write_tar("w-0.tar", {"one.mp4": b"1"})
    write_tar("empty.tar", {"readme.md": b""})
    write_zip("frames.zip", FRAMES)
    (tmp_path / "three.mp4").write_bytes(b"")
    assert [clip.key for clip in find_clips([tmp_path])] == [
        "frames/train/run/a",
        "frames/train/run/b",
        "three.mp4",
        "w-0/one.mp4",
    ]


def test_cut_short_tar_names_the_video_that_is_cut(
    write_tar: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1", "two.mp4": b"2" * 900, "three.mp4": b"3"})
    path.write_bytes(path.read_bytes()[: 3 * 512 + 400])
    with caplog.at_level(logging.WARNING):
        one, two = find_clips([path])
    assert (one.key, type(one.source)) == ("one.mp4", TarVideo)
    assert two.key == "two.mp4"
    assert isinstance(two.source, Unreadable)
    assert "cut short: 400 of the 900 bytes" in two.source.reason
    assert "cut short" in caplog.text


@pytest.mark.parametrize("size", [2 * 512 + 100, 512 + 100])
def test_tar_cut_where_no_name_is_left_is_refused(write_tar: Write, size: int) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1" * 512, "two.mp4": b"2"})
    data = path.read_bytes()
    path.write_bytes(data[:size] if size > 1024 else data[:512] + data[512:1024] + data[1024:1200])
    with pytest.raises(UsageError, match="cut short at byte 1024"):
        find_clips([path])


def test_tar_without_its_end_mark_is_used_and_said(
    write_tar: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1" * 512})
    path.write_bytes(path.read_bytes()[:1024])
    with caplog.at_level(logging.WARNING):
        assert len(find_clips([path])) == 1
    assert "no end mark" in caplog.text


def test_damaged_header_in_the_middle_of_a_tar_is_refused(write_tar: Write) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1", "two.mp4": b"2"})
    data = bytearray(path.read_bytes())
    data[1024 + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="damaged or cut short at byte 1024"):
        find_clips([path])


def test_two_tars_in_one_file_are_refused(write_tar: Write) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1"})
    path.write_bytes(path.read_bytes() + path.read_bytes())
    with pytest.raises(UsageError, match="two tars in one file"):
        find_clips([path])


@pytest.mark.parametrize(
    "name", ["../x.mp4", "/x.mp4", "a/../../x.mp4", "a\\..\\..\\x.mp4", "C:\\x.mp4"]
)
def test_tar_with_a_path_that_leaves_it_is_refused(write_tar: Write, name: str) -> None:
    with pytest.raises(UsageError, match="a path that leaves the archive"):
        find_clips([write_tar("w.tar", {"one.mp4": b"1", name: b"2"})])


@pytest.mark.parametrize("make", [_negative_size, _chained_headers, _huge_unknown])
def test_tar_made_to_hang_its_reader_is_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "w.tar").write_bytes(make())
    with pytest.raises(UsageError, match=r"damaged or cut short|cannot be read as an uncompressed"):
        find_clips([tmp_path / "w.tar"])


def test_colon_in_a_name_is_no_drive(write_tar: Write) -> None:
    (clip,) = find_clips([write_tar("w.tar", {"Rome: a walk.mp4": b""})])
    assert clip.key == "Rome: a walk.mp4"


def test_link_in_a_tar_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "soft.mp4"), (tarfile.LNKTYPE, "hard.mp4")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    for clip in find_clips([tmp_path / "w.tar"]):
        assert isinstance(clip.source, Unreadable)
        assert "a link" in clip.source.reason


def test_metadata_that_is_no_json_is_said_and_the_video_kept(
    write_tar: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1", "one.json": b"{", "two.mp4": b"", "two.cls": b"2"})
    with caplog.at_level(logging.WARNING):
        assert [clip.label for clip in find_clips([path])] == [None, "2"]
    assert "1 members give no metadata, first one.json" in caplog.text


@pytest.mark.parametrize("name", ["two.cls", "two.json"])
def test_metadata_that_cannot_be_read_is_said_and_the_video_kept(
    write_zip: Write, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = write_zip("w.zip", {"one.mp4": b"1", "one.cls": b"1", "two.mp4": b"2", name: b'"2"'})
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset + 30 + len(name)
    data = bytearray(path.read_bytes())
    data[start] ^= 0xFF  # the deflated bytes are damaged
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert [clip.label for clip in find_clips([path])] == ["1", None]
    assert f"1 members give no metadata, first {name}" in caplog.text


def test_large_metadata_in_a_tar_is_said(
    write_tar: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar("w.tar", {"one.mp4": b"1", "one.cls": b"x" * (2**20 + 1)})
    with caplog.at_level(logging.WARNING):
        assert [clip.label for clip in find_clips([path])] == [None]
    assert "1 members give no metadata, first one.cls" in caplog.text


@pytest.mark.parametrize("name", ["w.tar.gz", "w.tgz"])
def test_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="compressed tar"):
        find_clips([tmp_path / name])


def test_compressed_tar_in_a_folder_is_said_to_be_left_out(
    write_tar: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar("w.tar", VIDEOS)
    (tmp_path / "x.tar.gz").write_bytes(b"1")
    with caplog.at_level(logging.WARNING):
        clips = find_clips([tmp_path])
    assert len(clips) == 2
    assert "x.tar.gz: a compressed tar cannot be read in place; left out" in caplog.text


def test_tar_of_frames_alone_is_refused(write_tar: Write) -> None:
    path = write_tar("w.tar", {"a/0_0.0.jpg": b"x", "a/1_0.04.jpg": b"x"})
    with pytest.raises(UsageError, match="no video"):
        find_clips([path])


def test_zip_gives_its_frame_folders(write_zip: Write) -> None:
    path = write_zip("frames.zip", FRAMES | {"train/run/notes.txt": b"", "train/thumb_1.jpg": b""})
    clips = find_clips([path])
    assert [clip.key for clip in clips] == ["train/run/a", "train/run/b"]
    with zipfile.ZipFile(path) as archive:
        stored = sum(i.compress_size for i in archive.infolist() if "/a/" in i.filename)
    assert clips[0].size_bytes == stored
    assert isinstance(clips[0].source, ZipFolder)
    assert len(clips[0].source.runs) == 1


def test_frames_of_a_clip_may_be_scattered_over_a_zip(write_zip: Write) -> None:
    names = sorted(FRAMES, key=lambda name: name.rpartition("/")[2])  # a, b, a, b, ...
    clips = find_clips([write_zip("frames.zip", dict.fromkeys(names, b"12"))])
    assert [clip.key for clip in clips] == ["train/run/a", "train/run/b"]
    assert all(isinstance(c.source, ZipFolder) and len(c.source.runs) > 1 for c in clips)


def test_zip_and_folder_give_the_same_keys(write_zip: Write, tmp_path: Path) -> None:
    path = write_zip("frames.zip", FRAMES)
    zipfile.ZipFile(path).extractall(tmp_path / "unpacked")
    folders = find_clips([tmp_path / "unpacked"])
    assert [clip.key for clip in folders] == [clip.key for clip in find_clips([path])]
    assert [(clip.source, clip.size_bytes) for clip in folders] == [(FrameFolder(), 27)] * 2


@pytest.mark.parametrize("names", ["frames.zip.part{:03d}", "frames.zip.{:03d}"])
@pytest.mark.parametrize("given", ["all", "first", "archive", "folder"])
def test_split_zip_is_read_in_place(
    write_zip: Write, tmp_path: Path, names: str, given: str
) -> None:
    whole = write_zip("frames.zip", FRAMES)
    expected = [(clip.key, clip.size_bytes) for clip in find_clips([whole])]
    (tmp_path / "parts").mkdir()
    data = whole.read_bytes()
    first = 1 if names.endswith(".{:03d}") else 0
    cuts = range(0, len(data), 100)
    parts = [tmp_path / "parts" / names.format(i) for i in range(first, first + len(cuts))]
    for part, start in zip(parts, cuts, strict=True):
        part.write_bytes(data[start : start + 100])
    folder = tmp_path / "parts"
    paths = {"all": parts, "first": parts[:1], "archive": [folder / "frames.zip"]}
    prefix = "frames/" if given == "folder" else ""
    clips = find_clips(paths.get(given, [folder]))
    assert [(clip.key, clip.size_bytes) for clip in clips] == [(prefix + k, n) for k, n in expected]


def test_split_zip_without_one_part_is_refused(write_zip: Write, tmp_path: Path) -> None:
    data = write_zip("frames.zip", FRAMES).read_bytes()
    (tmp_path / "frames.zip").unlink()
    for i in (0, 1, 3):
        (tmp_path / f"frames.zip.part{i:03d}").write_bytes(data[i * 100 : i * 100 + 100])
    with pytest.raises(UsageError, match="part 2 is missing"):
        find_clips([tmp_path / "frames.zip"])


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_cut_short_zip_is_refused(write_zip: Write, keep: float) -> None:
    path = write_zip("frames.zip", FRAMES)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UsageError, match="no directory at its end: it is cut short"):
        find_clips([path])


def test_zip_with_its_start_missing_is_refused(write_zip: Write) -> None:
    path = write_zip("frames.zip", FRAMES)
    path.write_bytes(path.read_bytes()[100:])
    with pytest.raises(UsageError, match="a part is missing"):
        find_clips([path])


def test_zip_that_says_another_number_of_entries_is_refused(write_zip: Write) -> None:
    path = write_zip("frames.zip", FRAMES)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<2H", data, end + 8, 5, 5)
    path.write_bytes(data)
    with pytest.raises(UsageError, match="lists 6 entries, its end says 5"):
        find_clips([path])


@pytest.mark.parametrize("name", ["../b/f_0.1.jpg", "/b/f_0.1.jpg", "a/../../f_0.1.jpg", "../x"])
def test_zip_with_a_path_that_leaves_it_is_refused(write_zip: Write, name: str) -> None:
    with pytest.raises(UsageError, match="a path that leaves the archive"):
        find_clips([write_zip("frames.zip", FRAMES | {name: b""})])


def test_zip_of_more_than_65535_entries_is_zip64(write_zip: Write, tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(65600):
            archive.writestr(zipfile.ZipInfo(f"c/{i:05d}_{i}.0.jpg"), b"")
    (clip,) = find_clips([path])
    assert clip.key == "c"


def test_zip_gives_its_videos_as_a_tar_does(write_zip: Write, write_tar: Write) -> None:
    path, tar = write_zip("w.zip", VIDEOS), write_tar("w.tar", VIDEOS)
    clips = find_clips([path])
    assert all(isinstance(clip.source, ZipVideo) and clip.path == path for clip in clips)
    fields = [(clip.key, clip.size_bytes, clip.label, clip.split) for clip in clips]
    assert fields == [(c.key, c.size_bytes, c.label, c.split) for c in find_clips([tar])]


def test_zip_of_videos_and_frames_gives_both(write_zip: Write, tmp_path: Path) -> None:
    write_zip("w.zip", FRAMES | {"x.mp4": b"1"})
    keys = ["w/train/run/a", "w/train/run/b", "w/x.mp4"]
    (tmp_path / "other.mp4").write_bytes(b"")
    assert [clip.key for clip in find_clips([tmp_path])] == ["other.mp4", *keys]


def test_split_zip_gives_its_videos(write_zip: Write, tmp_path: Path) -> None:
    data = write_zip("w.zip", VIDEOS).read_bytes()
    expected = [(clip.key, clip.size_bytes) for clip in find_clips([tmp_path / "w.zip"])]
    (tmp_path / "w.zip").unlink()
    for i in range(0, len(data), 100):
        (tmp_path / f"w.zip.part{i // 100:03d}").write_bytes(data[i : i + 100])
    found = find_clips([tmp_path / "w.zip"])
    assert [(clip.key, clip.size_bytes) for clip in found] == expected


@pytest.mark.parametrize("name", ["../x.mp4", "/x.mp4", "a/../../x.mp4", "C:\\x.mp4"])
def test_zip_with_a_video_that_leaves_it_is_refused(write_zip: Write, name: str) -> None:
    with pytest.raises(UsageError, match="a path that leaves the archive"):
        find_clips([write_zip("w.zip", VIDEOS | {name: b"2"})])


def test_video_that_is_twice_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("x.mp4", b"1")
        archive.writestr("x.mp4", b"2")
    with pytest.raises(UsageError, match=r"both would be clip 'x\.mp4'"):
        find_clips([tmp_path / "w.zip"])


def test_videos_that_share_bytes_of_a_zip_are_named(write_zip: Write) -> None:
    """As in archives that unpack to a thousand times their size."""
    path = write_zip("w.zip", {f"{letter}.mp4": b"12345" for letter in "abcd"})
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    struct.pack_into("<I", data, second + 42, 3)  # where its data is said to begin
    path.write_bytes(data)
    a, b, c, d = find_clips([path])
    assert isinstance(a.source, Unreadable)
    assert isinstance(b.source, Unreadable)
    assert "b.mp4 shares bytes of the archive with a.mp4" in b.source.reason
    assert isinstance(c.source, ZipVideo)
    assert isinstance(d.source, ZipVideo)


def test_images_numbered_by_frame_are_no_clip_and_said(
    tmp_path: Path, write_zip: Write, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        find_clips([write_zip("frames.zip", FRAMES | {"n/x_1.jpg": b"", "n/x_2.jpg": b""})])
    assert "frames.zip: n: left out: its images have whole numbers only" in caplog.text
    (tmp_path / "frames.zip").unlink()
    (tmp_path / "c").mkdir()
    for i in range(3):
        (tmp_path / "c" / f"img_{i:05d}.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no video found, .* named \*_<seconds>\.jpg, like"):
        find_clips([tmp_path])


def test_folder_of_frames_itself_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "f_0.5.jpg").write_bytes(b"1")
    (clip,) = find_clips([tmp_path / "clip"])
    assert (clip.key, clip.path) == ("clip", tmp_path / "clip")
