"""A clip in an archive decodes as outside of it; bombs, damage and changes cost that clip only."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deltatok.extract.decoding import images
from deltatok.extract.decoding.clip import DecodedClip, decode_clip
from deltatok.extract.decoding.pool import DecodePool
from deltatok.extract.sources.clip import Clip, FrameFolder, TarVideo, Unreadable
from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import ClipError
from deltatok.shards.records import Quarantined
from deltatok.shards.sampling import SamplingPolicy

Decode = Callable[..., DecodedClip]
SECONDS = ["0.00", "0.04", "0.08", "0.13", "0.16", "0.2", "0.24", "0.28", "0.32", "0.36"]


@pytest.fixture
def decode(make_policy: Callable[..., SamplingPolicy]) -> Decode:
    def call(clip: Clip, **options: Any) -> DecodedClip:
        policy = make_policy(time_stride_range=(0.02, 0.06), num_frames=4)
        return decode_clip(replace(clip, key="k"), policy=policy, **options)

    return call


def _image(level: int, *, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(data, kind)
    return data.getvalue()


def _frames(*, start_s: float = 0.0) -> dict[str, bytes]:
    """File name -> PNG whose red is 10 times the frame's number."""
    return {
        f"{i:06d}_{float(text) + start_s:.3f}.png": _image(10 * i) for i, text in enumerate(SECONDS)
    }


def _folder(path: Path, images: dict[str, bytes]) -> Clip:
    path.mkdir()
    for name, data in images.items():
        (path / name).write_bytes(data)
    (clip,) = find_clips([path])
    return clip


def _zip(path: Path, images: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Clip:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in images.items():
            archive.writestr(f"c/{name}", data)
    (clip,) = find_clips([path])
    return clip


def _same(one: DecodedClip, other: DecodedClip) -> bool:
    return (
        one.windows == other.windows
        and one.frames.keys() == other.frames.keys()
        and all(np.array_equal(one.frames[i], other.frames[i]) for i in one.frames)
    )


INNER = [("in.mp4", "libx264", "decord"), ("in.avi", "mpeg4", "pyav")]


@pytest.mark.parametrize(("name", "codec", "decoder"), INNER)
def test_video_in_a_tar_decodes_as_the_file(
    videos: Any, decode: Decode, tmp_path: Path, name: str, codec: str, decoder: str
) -> None:
    path = videos.write(name, codec=codec)
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(path, arcname="before.mp4")
        tar.add(path, arcname=name)
    plain = decode(Clip("k", path, path.stat().st_size))
    for clip in find_clips([tmp_path / "w.tar"]):
        inside = decode(clip)
        assert inside.decoder == plain.decoder == decoder
        assert _same(inside, plain)
        assert _same(decode(clip, decoder="pyav"), decode(clip))


def _zip_videos(path: Path, videos: dict[str, bytes], method: int) -> dict[str, Clip]:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in videos.items():
            archive.writestr(name, data)
    return {clip.key: clip for clip in find_clips([path])}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(("name", "codec", "decoder"), INNER)
def test_video_in_a_zip_decodes_as_outside(
    videos: Any,
    decode: Decode,
    tmp_path: Path,
    name: str,
    codec: str,
    decoder: str,
    method: int,
) -> None:
    path = videos.write(name, codec=codec)
    plain = decode(Clip("k", path, path.stat().st_size))
    data = path.read_bytes()
    clip = _zip_videos(tmp_path / "w.zip", {"before.mp4": data, f"a/{name}": data}, method)[
        f"a/{name}"
    ]
    inside = decode(clip)
    assert inside.decoder == plain.decoder == decoder
    assert _same(inside, plain)
    whole = (tmp_path / "w.zip").read_bytes()
    for i in range(0, len(whole), 1000):
        (tmp_path / f"s.zip.part{i // 1000:03d}").write_bytes(whole[i : i + 1000])
    split = {clip.key: clip for clip in find_clips([tmp_path / "s.zip"])}
    assert _same(decode(split[f"a/{name}"], decoder="pyav"), plain)


@pytest.mark.parametrize(
    ("at", "pack", "value", "words"),
    [
        (8, "<H", 1, r"x\.mp4 is encrypted"),
        (10, "<H", 12, r"x\.mp4 .*compressed in another way \(12\)"),
        (16, "<I", 0, r"x\.mp4 is not what its checksum says"),
        (24, "<I", 9, r"x\.mp4 is not what its checksum says"),
        (24, "<I", 2**31, r"x\.mp4 would unpack from \d+ to 2147483648 bytes, no video"),
        (42, "<I", 7, r"x\.mp4 does not lie where the archive says"),
        (20, "<I", 10**6, r"x\.mp4 (is cut short|cannot be unpacked|is not what its checksum)"),
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hostile_video_in_a_zip_costs_its_clip(
    tmp_path: Path, decode: Decode, method: int, at: int, pack: str, value: int, words: str
) -> None:
    _zip_videos(tmp_path / "w.zip", {"x.mp4": bytes(2**12) + os.urandom(2**12)}, method)
    raw = bytearray((tmp_path / "w.zip").read_bytes())
    struct.pack_into(pack, raw, raw.index(b"PK\1\2") + at, value)
    (tmp_path / "w.zip").write_bytes(raw)
    (clip,) = find_clips([tmp_path / "w.zip"])
    if value == 2**31 and method == zipfile.ZIP_STORED:
        words = "is not what its checksum says"
    with pytest.raises(ClipError, match=words):
        decode(clip)


def test_video_bomb_in_a_zip_is_not_unpacked(tmp_path: Path, decode: Decode) -> None:
    videos = {"x.mp4": bytes(8 * 2**20)}
    clip = _zip_videos(tmp_path / "w.zip", videos, zipfile.ZIP_DEFLATED)["x.mp4"]
    with pytest.raises(ClipError, match=r"would unpack from \d+ to 8388608 bytes, no video"):
        decode(clip)


def test_nothing_of_a_deflated_video_stays_on_the_disk(
    videos: Any, decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    data = {"v.mp4": videos.write("v.mp4").read_bytes()}
    clip = _zip_videos(tmp_path / "w.zip", data, zipfile.ZIP_DEFLATED)["v.mp4"]
    seen: list[list[Path]] = []
    decode(clip, starting=lambda name: seen.append(list((tmp_path / "temporary").iterdir())))
    assert seen
    assert not any(seen)


def test_playlist_is_no_video(videos: Any, decode: Decode, tmp_path: Path) -> None:
    path = videos.write("target.ts")
    playlist = f"ffconcat version 1.0\nfile {path.name}\n".encode()
    liar = path.with_name("liar.mp4")
    liar.write_bytes(playlist)
    with pytest.raises(ClipError, match="a playlist of others"):
        decode(Clip("k", liar, len(playlist)))
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(liar, arcname="liar.mp4")
    liar.unlink()
    (clip,) = find_clips([tmp_path / "w.tar"])
    with pytest.raises(ClipError, match="cannot be opened"):
        decode(clip)


def test_frames_have_the_times_of_their_names(tmp_path: Path, decode: Decode) -> None:
    clip = _folder(tmp_path / "c", _frames(start_s=7.0))
    decoded = decode(clip)
    assert decoded.decoder == "frames"
    for window in decoded.windows:
        assert window.timestamps_s == tuple(float(SECONDS[i]) for i in window.frame_index)
    for index, pixels in decoded.frames.items():
        assert pixels.shape == (16, 24, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == [10 * index, 0, 0]).all()


def test_frames_are_ordered_by_time_and_not_by_name() -> None:
    names, times_s = images.in_time_order(["f_10.0.jpg", "f_9.5.jpg", "x.jpg", "f_9.jpg"])
    assert names == ["f_9.jpg", "f_9.5.jpg", "f_10.0.jpg"]
    assert times_s.tolist() == [0.0, 0.5, 1.0]
    long = images.in_time_order(["a_0.0.jpg", "b_0.033333333333333333.jpg", "c_1e-05.png"])
    assert long[1].tolist() == [0.0, 1e-05, 0.033333333333333333]
    tenths = images.in_time_order([f"f_{i / 10}.jpg" for i in range(1, 9)])[1]
    assert tenths.tolist() == [i / 10 for i in range(8)]  # 0.8 - 0.1 in floats is not 0.7


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_of_frames_decodes_as_the_folder(tmp_path: Path, decode: Decode, method: int) -> None:
    folder = decode(_folder(tmp_path / "c", _frames()))
    assert _same(decode(_zip(tmp_path / "f.zip", _frames(), method)), folder)
    data = (tmp_path / "f.zip").read_bytes()
    for i in range(0, len(data), 300):
        (tmp_path / f"g.zip.part{i // 300:03d}").write_bytes(data[i : i + 300])
    (clip,) = find_clips([tmp_path / "g.zip"])
    assert _same(decode(clip), folder)


def test_scattered_frames_are_read_past_those_of_other_clips(
    tmp_path: Path, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltatok.extract.sources.zips.MAX_RUNS", 3)
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        for name, data in _frames().items():
            archive.writestr(f"c/{name}", data)
            archive.writestr(f"d/{name}", _image(255))
    clip = find_clips([tmp_path / "f.zip"])[0]
    assert _same(decode(clip), decode(_folder(tmp_path / "c", _frames())))


def test_exif_rotation_is_applied(tmp_path: Path, decode: Decode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {}
    for text in SECONDS:
        data = io.BytesIO()
        Image.new("RGB", (24, 16)).save(data, "JPEG", exif=exif)
        images[f"f_{text}.jpg"] = data.getvalue()
    decoded = decode(_folder(tmp_path / "c", images))
    assert {frame.shape for frame in decoded.frames.values()} == {(24, 16, 3)}


def _huge_png(width: int, height: int) -> bytes:
    """A PNG whose header says width x height; some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"000000_0.000.png": _huge_png(10000, 9000)}, "10000x9000 pixels, more than"),
        ({"000000_0.000.png": _huge_png(60000, 60000)}, "decompression bomb"),
        ({"000000_0.000.png": b"no image"}, "000000_0.000.png cannot be decoded"),
        ({f"{i:06d}_{float(t):.3f}.png": _image(1)[:60] for i, t in enumerate(SECONDS)}, "cannot"),
        ({"000000_0.000.png": _image(1, kind="GIF")}, "cannot be decoded"),
        ({"000000_0.000.png": _image(1, size=(40, 40))}, "changes its size"),
        ({"x_99999999.5.png": _image(1)}, "timestamps make no sense"),
    ],
)
def test_images_that_make_no_sense_cost_their_clip(
    tmp_path: Path, decode: Decode, change: dict[str, bytes], words: str
) -> None:
    clip = _folder(tmp_path / "c", _frames() | change)
    with pytest.raises(ClipError, match=words):
        decode(clip)


@pytest.fixture
def zipped(tmp_path: Path) -> Callable[..., Clip]:
    """A clip of one frame name repeated in a zip, its directory entries changed."""

    def make(data: bytes, *, at: int = 0, pack: str = "", value: int = 0) -> Clip:
        images = {f"f_{text}.jpg": data for text in SECONDS}
        _zip(tmp_path / "f.zip", images)
        raw = bytearray((tmp_path / "f.zip").read_bytes())
        record = raw.find(b"PK\1\2")
        while pack and record >= 0:
            struct.pack_into(pack, raw, record + at, value)
            record = raw.find(b"PK\1\2", record + 4)
        (tmp_path / "f.zip").write_bytes(raw)
        (clip,) = find_clips([tmp_path / "f.zip"])
        return clip

    return make


def test_zip_bomb_is_not_unpacked(zipped: Callable[..., Clip], decode: Decode) -> None:
    with pytest.raises(ClipError, match=r"would unpack from \d+ to 8388608 bytes, no frame"):
        decode(zipped(bytes(8 * 2**20)))


def test_zip_that_unpacks_to_more_than_it_says_is_stopped(
    zipped: Callable[..., Clip], decode: Decode
) -> None:
    with pytest.raises(ClipError, match="is not what its checksum says"):
        decode(zipped(bytes(8 * 2**20), at=24, pack="<I", value=1000))


@pytest.mark.parametrize(
    ("at", "pack", "value", "words"),
    [
        (8, "<H", 1, "is encrypted"),
        (10, "<H", 12, r"compressed in another way \(12\)"),
        (16, "<I", 0, "is not what its checksum says"),
        (42, "<I", 7, "does not lie where the archive says"),
        (20, "<I", 10**6, "cut short|no frame"),
    ],
)
def test_zip_entry_that_is_damaged_costs_its_clip(
    zipped: Callable[..., Clip], decode: Decode, at: int, pack: str, value: int, words: str
) -> None:
    with pytest.raises(ClipError, match=words):
        decode(zipped(_image(1), at=at, pack=pack, value=value))


def test_video_that_was_changed_is_not_used(videos: Any, decode: Decode, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(videos.write("v.mp4").read_bytes())
    (clip,) = find_clips([path])
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ClipError, match=r"was changed: had \d+ bytes when it was found, now"):
        decode(clip)


def test_video_that_changes_while_it_is_decoded_is_not_used(
    videos: Any, decode: Decode, tmp_path: Path
) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(videos.write("v.mp4").read_bytes())
    (clip,) = find_clips([path])
    with pytest.raises(ClipError, match="was changed since it was opened: written to"):
        decode(clip, starting=lambda name: path.write_bytes(path.read_bytes()))


def test_archive_that_was_changed_is_not_used(videos: Any, decode: Decode, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(videos.write("t.mp4"), arcname="t.mp4")
    zipped, (tarred,) = _zip(tmp_path / "f.zip", _frames()), find_clips([tmp_path / "w.tar"])
    for clip in (tarred, zipped):
        clip.path.write_bytes(clip.path.read_bytes() + b"0")
        with pytest.raises(ClipError, match=r"was changed since it was opened: had \d+ bytes"):
            decode(clip)


def test_folder_that_was_changed_is_not_used(decode: Decode, tmp_path: Path) -> None:
    clip = _folder(tmp_path / "c", _frames())
    next(clip.path.iterdir()).unlink()
    with pytest.raises(ClipError, match="was changed: had"):
        decode(clip)


def test_processes_decode_archived_clips(
    videos: Any, make_policy: Callable[..., SamplingPolicy], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(videos.write("p.mp4"), arcname="p.mp4")
    clips = [*find_clips([tmp_path / "w.tar"]), _zip(tmp_path / "f.zip", _frames())]
    clips += [_folder(tmp_path / "c", _frames()), Clip("cut", tmp_path, 5, Unreadable("cut short"))]
    policy = make_policy(num_windows=1)
    with DecodePool(policy, num_workers=1, timeout_s=60) as pool:
        results = list(pool.decode(clips))
    decoders = [clip.decoder for clip in results if isinstance(clip, DecodedClip)]
    assert decoders == ["decord", "frames", "frames"]
    assert results[-1] == Quarantined(clip="cut", stage="open", reason="cut short", attempts=1)


def test_request_larger_than_a_pipe_arrives(
    make_policy: Callable[..., SamplingPolicy], tmp_path: Path
) -> None:
    clips = [Clip(str(i), tmp_path, 5, Unreadable("x" * 300_000)) for i in range(3)]
    with DecodePool(make_policy(), num_workers=1, timeout_s=60) as pool:
        results = list(pool.decode(clips))
    assert [len(clip.reason) for clip in results if isinstance(clip, Quarantined)] == [300_000] * 3


def test_frame_folder_may_not_be_a_tar_slice_beyond_the_file(
    decode: Decode, tmp_path: Path
) -> None:
    (tmp_path / "w.tar").write_bytes(b"short")
    status = (tmp_path / "w.tar").stat()
    source = TarVideo(10**6, (status.st_size, status.st_mtime_ns))
    with pytest.raises(ClipError, match="cannot be opened"):
        decode(Clip("k", tmp_path / "w.tar", 100, source))
    with pytest.raises(ClipError, match="cannot be opened"):
        decode(Clip("k", tmp_path / "nowhere", 0, FrameFolder()))
