"""torchcodec seeks, and shows what an in-order decode shows: per container and codec.

Skipped where torchcodec, or FFmpeg's libraries that it needs, are not installed; what happens then
is tested everywhere.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.extract.decoding.backends import decode_fast
from deltatok.extract.decoding.clip import DecodedClip, decode_clip
from deltatok.extract.sources.archive import FileSlice
from deltatok.extract.sources.clip import Clip
from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import ClipError
from deltatok.shards.sampling import SamplingPolicy

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "videos"


def _why_not() -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"torchcodec cannot be imported: {str(error).splitlines()[0]}"
    return None


WHY_NOT = _why_not()
needs_torchcodec = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

OPEN_GOP = {"g": "8", "bf": "3", "x264-params": "open-gop=1"}
CODECS = [  # name, codec, its options: seeking is exact in these
    ("x264.mp4", "libx264", {"g": "12"}),
    ("open_gop.mp4", "libx264", OPEN_GOP),
    ("open_gop.mkv", "libx264", OPEN_GOP),
    ("x265.mp4", "libx265", {"x265-params": "log-level=none:keyint=8:bframes=3"}),
    ("x265.mkv", "libx265", {"x265-params": "log-level=none:keyint=8:bframes=3"}),
    ("vp9.webm", "libvpx-vp9", {"g": "16", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("av1.mkv", "libsvtav1", {"preset": "10", "crf": "1"}),
    ("av1.mp4", "libsvtav1", {"preset": "10", "crf": "1"}),
]


@pytest.fixture
def decode(make_policy: Callable[..., SamplingPolicy]) -> Callable[..., DecodedClip]:
    def call(path: Path, choice: str, **changes: Any) -> DecodedClip:
        policy = make_policy(num_windows=3, **changes)
        clip = Clip("k", path, path.stat().st_size)
        return decode_clip(clip, policy=policy, decoder=choice)  # type: ignore[arg-type]

    return call


@needs_torchcodec
@pytest.mark.parametrize(("name", "codec", "options"), CODECS)
def test_seeking_gives_the_numbered_frames(
    videos: Any, decode: Any, name: str, codec: str, options: dict[str, str]
) -> None:
    path = videos.write(f"tc_{name}", codec=codec, options=options)
    got, plain = decode(path, "torchcodec"), decode(path, "pyav")
    assert got.decoder == "torchcodec"
    assert got.windows == plain.windows
    assert {index: videos.number(rgb) for index, rgb in got.frames.items()} == {
        index: index for index in plain.frames
    }
    assert all(np.array_equal(got.frames[index], plain.frames[index]) for index in plain.frames)


@needs_torchcodec
@pytest.mark.parametrize("name", ["x264.avi", "vp8.webm", "mpeg4.mp4"])
def test_other_files_are_left_to_pyav(videos: Any, decode: Any, name: str) -> None:
    codec = {"vp8.webm": "libvpx", "mpeg4.mp4": "mpeg4"}.get(name, "libx264")
    assert decode(videos.write(f"tc_{name}", codec=codec), "torchcodec").decoder == "pyav"


@needs_torchcodec
def test_video_inside_a_tar_is_read_in_place(
    videos: Any, make_policy: Callable[..., SamplingPolicy]
) -> None:
    from deltatok.extract.decoding.container import read_index
    from deltatok.shards.sampling import draw_windows

    path = videos.write("tc_inner.mp4", options={"g": "12"})
    outer = videos.folder / "outer.bin"
    outer.write_bytes(b"x" * 1000 + path.read_bytes() + b"y" * 1000)
    part = FileSlice(outer, 1000, path.stat().st_size)
    index = read_index(part)

    def draw(times_s: Any, height: int, width: int) -> Any:
        return draw_windows(make_policy(), "k", times_s, height, width)

    _, frames = decode_fast("torchcodec", part, index=index, draw=draw, threads=1)
    assert {videos.number(rgb) for rgb in frames.values()} == set(frames)


@pytest.mark.slow
@needs_torchcodec
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real videos at {FOLDER}")
def test_real_files_give_the_frames_shown(decode: Any) -> None:
    served = set()
    for clip in find_clips([FOLDER]):
        try:
            got, plain = decode(clip.path, "torchcodec"), decode(clip.path, "pyav")
        except ClipError:
            continue
        assert got.windows == plain.windows, clip.key
        same = all(np.array_equal(got.frames[i], plain.frames[i]) for i in plain.frames)
        assert same, clip.key
        if got.decoder == "torchcodec":
            served.add(clip.key)
    assert {"cot_cat.mp4", "psd_issue-134-rotate.mp4", "mpy_no_duration.webm"} <= served
    assert not served & {"cve_vid1.mp4", "tc_testsrc2_odd_hw_vp9.mp4", "decord_corrupted.mp4"}


def test_without_torchcodec_pyav_reads_the_file(
    videos: Any, decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert decode(videos.write("tc_missing.mp4"), "torchcodec").decoder == "pyav"
