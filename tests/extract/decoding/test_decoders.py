"""The frame stored is the frame shown at the stored time, whichever decoder read it.

Every frame of the videos here carries its number, so no decoder has to be trusted to judge another.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from deltatok.extract.decoding.clip import DecodedClip, decode_clip
from deltatok.extract.sources.clip import Clip, stored_size
from deltatok.shards.errors import ClipError
from deltatok.shards.sampling import SamplingPolicy

MakePolicy = Callable[..., SamplingPolicy]
UNEVEN = [4 * i + (0, 1, 3, 1)[i % 4] for i in range(40)]
"""Ticks of 1/100 s with gaps of 3, 5, 6 and 2: a variable frame rate."""


@pytest.fixture
def decode(make_policy: MakePolicy) -> Callable[..., DecodedClip]:
    def call(path: Path, **changes: Any) -> DecodedClip:
        options = {k: changes.pop(k) for k in ("decoder", "max_bytes") if k in changes}
        clip = Clip("k", path, stored_size(path, None))
        return decode_clip(clip, policy=make_policy(**changes), **options)

    return call


def _check_numbers(videos: Any, decoded: DecodedClip, times_s: list[float]) -> None:
    """Every frame shows its index, every window has the true times of its frames."""
    assert {index: videos.number(rgb) for index, rgb in decoded.frames.items()} == {
        index: index for index in decoded.frames
    }
    for window in decoded.windows:
        assert set(window.frame_index) <= decoded.frames.keys()
        assert window.timestamps_s == pytest.approx([times_s[i] for i in window.frame_index])


OPEN_GOP = {"g": "8", "bf": "3", "x264-params": "open-gop=1"}
X265 = {"x265-params": "log-level=none:keyint=8:bframes=3"}
ALT_REF = {"g": "16", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}
AV1 = {"preset": "10", "crf": "1"}
CODECS = [
    ("x264.mp4", "libx264", {"g": "12"}, "decord"),
    ("open_gop.mp4", "libx264", OPEN_GOP, "decord"),
    ("open_gop.mkv", "libx264", OPEN_GOP, "decord"),
    ("intra.mp4", "libx264", {"g": "1"}, "decord"),
    ("x265.mp4", "libx265", X265, "decord"),
    ("vp9.webm", "libvpx-vp9", ALT_REF, "decord"),
    ("vp8.webm", "libvpx", ALT_REF, "pyav"),
    ("av1.mkv", "libsvtav1", AV1, "pyav"),
    ("mpeg4.mp4", "mpeg4", {"g": "12"}, "pyav"),
    ("x264.ts", "libx264", {"g": "12"}, "pyav"),
]


@pytest.mark.parametrize(("name", "codec", "options", "decoder"), CODECS)
@pytest.mark.parametrize("choice", ["auto", "pyav"])
def test_every_codec_gives_the_numbered_frames(
    videos: Any, decode: Any, name: str, codec: str, options: dict, decoder: str, choice: str
) -> None:
    path = videos.folder / name
    if not path.exists():
        videos.write(name, codec=codec, options=options)
    decoded = decode(path, decoder=choice)
    assert decoded.decoder == (decoder if choice == "auto" else "pyav")
    _check_numbers(videos, decoded, [i / 25 for i in range(40)])


@pytest.mark.parametrize("choice", ["auto", "pyav"])
def test_variable_frame_rate_keeps_its_true_times(videos: Any, decode: Any, choice: str) -> None:
    path = videos.write("uneven.mkv", ticks=UNEVEN)
    decoded = decode(path, decoder=choice)
    _check_numbers(videos, decoded, [tick / 100 for tick in UNEVEN])


def test_decoders_agree_to_the_bit(videos: Any, decode: Any) -> None:
    path = videos.write("agree.mp4", options=OPEN_GOP)
    fast, plain = decode(path), decode(path, decoder="pyav")
    assert (fast.decoder, plain.decoder) == ("decord", "pyav")
    assert fast.windows == plain.windows
    assert all(np.array_equal(fast.frames[i], plain.frames[i]) for i in fast.frames)


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv422p", "yuv420p10le"])
def test_other_pixel_formats_are_left_to_pyav(videos: Any, decode: Any, pixel_format: str) -> None:
    path = videos.write(f"{pixel_format}.mp4", pixel_format=pixel_format)
    assert decode(path).decoder == "pyav"


def test_interlaced_video_is_left_to_pyav(videos: Any, decode: Any) -> None:
    path = videos.write("interlaced.mp4", options={"x264-params": "tff=1"}, tall=64)
    assert decode(path).decoder == "pyav"


def test_avi_without_presentation_times_is_counted(videos: Any, decode: Any) -> None:
    path = videos.write("b_frames.avi", codec="mpeg4", options={"bf": "2", "g": "12"})
    with av.open(str(path)) as container:
        pts = [frame.pts for frame in container.decode(video=0)]
    assert len(set(np.diff(pts))) > 1  # what FFmpeg guesses is not the constant rate
    decoded = decode(path)
    assert decoded.decoder == "pyav"
    _check_numbers(videos, decoded, [i / 25 for i in range(40)])


def test_edit_list_hides_frames(videos: Any, decode: Any) -> None:
    path = videos.write("edited.mp4", options={"g": "40", "bf": "0"})
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12  # version and flags, count, then duration and first time
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    struct.pack_into(">i", data, entry + 4, 10 * timescale // 25)
    path.write_bytes(data)
    decoded = decode(path)
    assert decoded.decoder == "pyav"
    numbers = {index: videos.number(rgb) for index, rgb in decoded.frames.items()}
    assert numbers == {index: index + 10 for index in decoded.frames}
    times_s = [i / 25 for i in range(30)]
    for window in decoded.windows:
        assert window.timestamps_s == pytest.approx([times_s[i] for i in window.frame_index])


def test_damaged_packet_costs_its_frame_only(videos: Any, decode: Any) -> None:
    path = videos.write("damaged.mkv", options={"g": "1"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(p for p in container.demux(video=0) if p.pts == 800)
        start = data.index(bytes(packet))
    data[start : start + 32] = bytes(32)
    path.write_bytes(data)
    decoded = decode(path, num_windows=12)
    assert decoded.decoder == "pyav"
    kept = [i for i in range(40) if i != 20]
    assert {videos.number(rgb) for rgb in decoded.frames.values()} == {
        kept[index] for index in decoded.frames
    }
    for window in decoded.windows:
        true_times_s = [kept[i] / 25 for i in window.frame_index]
        assert window.timestamps_s == pytest.approx(true_times_s)


@pytest.mark.parametrize("choice", ["auto", "pyav"])
@pytest.mark.parametrize(
    ("matrix", "quarters"),
    [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)],
    ids=["90", "180", "270"],
)
def test_rotation_is_applied(
    videos: Any, decode: Any, matrix: tuple, quarters: int, choice: str
) -> None:
    path = videos.write(f"rotated{quarters}.mp4", options={"g": "12"}, tall=64)
    plain = decode(path)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned = decode(path, decoder=choice)
    assert turned.decoder == ("decord" if choice == "auto" else "pyav")
    for index, rgb in plain.frames.items():
        clockwise = np.rot90(rgb, -quarters)
        if index in turned.frames:
            assert np.array_equal(turned.frames[index], clockwise)
    height, width = next(iter(turned.frames.values())).shape[:2]
    assert (height, width) == ((64, 128) if quarters == 2 else (128, 64))
    assert all(w.crop[0] + w.crop[2] <= height for w in turned.windows)


def test_only_the_frames_of_windows_are_kept(videos: Any, decode: Any) -> None:
    decoded = decode(videos.write("kept.mp4"), num_windows=1, num_frames=3)
    assert decoded.frames.keys() == set(decoded.windows[0].frame_index)


def test_uniform_sampling_goes_through_the_whole_clip(videos: Any, decode: Any) -> None:
    path = videos.write("uniform.mp4", num_frames=100)
    decoded = decode(path, policy="uniform", fps=5.0, num_frames=7)
    numbers = [videos.number(decoded.frames[i]) for w in decoded.windows for i in w.frame_index]
    assert numbers == list(range(0, 70, 5))


def test_metadata_that_is_not_utf8_is_no_obstacle(videos: Any, decode: Any) -> None:
    path = videos.folder / "latin1.mkv"
    plain = videos.write("utf8.mkv")
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        target.metadata["title"] = "cafe!"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"cafe!", b"caf\xe9!"))
    assert len(decode(path).windows) == 4


def _joined_ts(videos: Any, second_height: int) -> Path:
    """Two transport streams one after the other: the second starts at time 0 again."""
    first = videos.write("first.ts", num_frames=20)
    second = videos.write("second.ts", num_frames=20, tall=second_height)
    path: Path = videos.folder / f"joined{second_height}.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


def _sound_only(videos: Any) -> Path:
    path: Path = videos.folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _file(videos: Any, name: str, data: bytes) -> Path:
    path: Path = videos.folder / name
    path.write_bytes(data)
    return path


UNUSABLE = [
    (lambda v: _file(v, "empty.mp4", b""), "open", "cannot be opened: the file is empty"),
    (lambda v: _file(v, "text.mp4", b"hello\n" * 99), "open", "cannot be opened: Invalid data"),
    (lambda v: v.folder / "gone.mp4", "open", "cannot be opened: No such file"),
    (_sound_only, "open", "holds no video stream"),
    (lambda v: v.write("one.mp4", num_frames=1), "sample", "shows 1 frame; a window needs at"),
    (lambda v: _joined_ts(v, 48), "decode", r"timestamps go backward: frame 19 at 0\.760 s"),
    (lambda v: _joined_ts(v, 64), "decode", "changes its size at frame 20: from 128x48 to 128x64"),
]


@pytest.mark.parametrize(("make", "stage", "words"), UNUSABLE)
def test_unusable_clip_says_why(
    videos: Any, decode: Any, make: Callable[[Any], Path], stage: str, words: str
) -> None:
    with pytest.raises(ClipError, match=words) as caught:
        decode(make(videos))
    assert caught.value.stage == stage


def test_truncated_file_without_its_index_is_refused(videos: Any, decode: Any) -> None:
    data = videos.write("whole.mp4").read_bytes()
    path = _file(videos, "cut.mp4", data[: data.index(b"moov")])
    with pytest.raises(ClipError, match="cannot be opened: Invalid data found"):
        decode(path)


def test_clip_of_too_many_bytes_is_refused(videos: Any, decode: Any) -> None:
    path = videos.write("large.mp4")
    words = r"use \d+ frames of 128x48, 0\.0 GB at once, more than 0\.0 GB: cut it into shorter"
    with pytest.raises(ClipError, match=words):
        decode(path, max_bytes=128 * 48 * 3)


def test_reason_names_no_path(videos: Any, decode: Any) -> None:
    with pytest.raises(ClipError) as caught:
        decode(videos.folder / "gone.mp4")
    assert str(videos.folder) not in str(caught.value)
