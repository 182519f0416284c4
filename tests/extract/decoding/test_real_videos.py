"""What happens to each of 24 real files, and that the frames taken are the frames shown.

The files are not part of the repository; without them these tests are skipped. What decoding must
give is written here once more, straight on PyAV: in order, damaged packets skipped, turned by the
file's display matrix.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.decoding.pool import DecodePool
from deltatok.extract.sources.find import find_clips
from deltatok.shards.records import Quarantined
from deltatok.shards.sampling import SamplingPolicy

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "videos"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real videos at {FOLDER}")

Results = dict[str, DecodedClip | Quarantined]

EXPECTED = {  # file: (decoder, height, width of the shown frame)
    "cot_cat.mp4": ("decord", 480, 368),
    "cve_vid1.mp4": ("pyav", 360, 640),  # edit list
    "decord_corrupted.mp4": ("pyav", 720, 1280),  # a damaged packet
    "decord_flipping_a_pancake.mkv": ("decord", 240, 426),
    "decord_video_90.mov": ("decord", 568, 320),  # rotated; 3 frames
    "mma_demo.mp4": ("decord", 256, 340),
    "mma_demo_spatiotemporal_det.mp4": ("decord", 256, 340),
    "mpy_big_buck_bunny_432_433.webm": ("pyav", 720, 1280),  # VP8 can hide frames
    "mpy_no_duration.webm": ("pyav", 720, 1280),  # decord cannot open it
    "psd_goldeneye-vfr-drop3.mp4": ("decord", 544, 1280),  # variable frame rate
    "psd_issue-134-rotate.mp4": ("decord", 1280, 544),  # rotated
    "sam2_720px_dark.mp4": ("decord", 1200, 1200),
    "tc_av1_video.mkv": ("pyav", 360, 640),  # decord knows no AV1
    "tc_h265_video.mp4": ("decord", 128, 128),
    "tc_nasa_13013.mp4": ("decord", 270, 480),  # two video streams
    "tc_test_non_zero_start.mp4": ("decord", 112, 200),
    "tc_testsrc2_odd_hw_vp9.mp4": ("pyav", 241, 321),  # decord's colours differ at odd sizes
    "tv_hmdb51_RATRACE_wave.avi": ("pyav", 240, 560),
    "tv_kinetics_R6llTwEh07w.mp4": ("decord", 256, 340),
    "tv_kinetics_WUzgd7C1pWA.mp4": ("decord", 256, 340),
    "tv_ucf101_SoccerJuggling_g23_c01.avi": ("pyav", 240, 320),
}
UNUSABLE = {  # file: (stage, reason)
    "mp4p_bbb_mp4v_1f.mp4": ("sample", "shows 1 frame; a window needs at least 2"),
    "mp4p_zero_empty_stsc.mp4": (
        "decode",
        "none of its 2 packets gives a frame: Invalid data found when processing input",
    ),
    "mpy_result_zero_bytes.webm": ("open", "cannot be opened: the file is empty"),
}
WITHOUT_DECORD = """
import dataclasses, sys
from deltatok.extract.decoding import worker
def decode(request, starting):
    return worker.decode_request(dataclasses.replace(request, decoder="pyav"), starting)
worker.main(sys.argv[1:], decode=decode)
"""


@pytest.fixture(scope="module")
def results(make_policy: Callable[..., SamplingPolicy]) -> Results:
    """Every file through two processes."""
    clips = find_clips([FOLDER])
    with DecodePool(make_policy(), num_workers=2, timeout_s=120) as pool:
        return {clip.key: result for clip, result in zip(clips, pool.decode(clips), strict=True)}


@pytest.fixture(scope="module")
def pyav_results(
    make_policy: Callable[..., SamplingPolicy], tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """The files decord reads, with PyAV instead."""
    script = tmp_path_factory.mktemp("child") / "without_decord.py"
    script.write_text(WITHOUT_DECORD)
    clips = [c for c in find_clips([FOLDER]) if EXPECTED.get(c.key, ("",))[0] == "decord"]
    command = [sys.executable, "-P", str(script)]
    with DecodePool(make_policy(), num_workers=2, timeout_s=120, worker_command=command) as pool:
        return {clip.key: result for clip, result in zip(clips, pool.decode(clips), strict=True)}


def _shown(path: Path, wanted: set[int]) -> tuple[list[float], dict[int, np.ndarray]]:
    """Seconds since the first frame of every shown frame, and RGB of the wanted ones."""
    times_s: list[float] = []
    pixels: dict[int, np.ndarray] = {}
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # what is made up for damage depends on it
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if len(times_s) in wanted:
                    pixels[len(times_s)] = _turned(frame)
                times_s.append(frame.time)
    return [time_s - times_s[0] for time_s in times_s], pixels


def _turned(frame: av.VideoFrame) -> np.ndarray:
    """The frame with the quarter turn of its display matrix carried out, axis by axis."""
    rgb = frame.to_ndarray(format="rgb24")
    matrices = [bytes(side) for side in frame.side_data if side.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return rgb
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5] >> 16
    if a == d == 0:  # x of the picture goes along b down the screen, y along c across it
        return rgb.transpose(1, 0, 2)[:: int(b), :: int(c)]
    return rgb[:: int(d), :: int(a)]


def test_every_file_is_spoken_for(results: Results) -> None:
    assert set(results) == set(EXPECTED) | set(UNUSABLE)


@pytest.mark.parametrize("name", EXPECTED)
def test_file_gives_windows_of_the_frames_shown(results: Results, name: str) -> None:
    decoder, height, width = EXPECTED[name]
    clip = results[name]
    assert isinstance(clip, DecodedClip), clip
    assert clip.decoder == decoder
    assert len(clip.windows) == 4
    wanted = {index for window in clip.windows for index in window.frame_index}
    times_s, pixels = _shown(FOLDER / name, wanted)
    if name == "tv_hmdb51_RATRACE_wave.avi":  # no presentation times in it: a constant 30 a second
        times_s = [index / 30 for index in range(len(times_s))]
    for window in clip.windows:
        expected_s = [times_s[index] for index in window.frame_index]
        assert window.timestamps_s == pytest.approx(expected_s, abs=1e-9)
        for frame, index in zip(clip.frames_of(window), window.frame_index, strict=True):
            assert frame.shape == (height, width, 3)
            assert np.array_equal(frame, pixels[index]), f"frame {index}"


@pytest.mark.parametrize("name", UNUSABLE)
def test_file_without_windows_says_why(results: Results, name: str) -> None:
    stage, reason = UNUSABLE[name]
    wanted = Quarantined(clip=name, stage=stage, reason=reason, attempts=1)
    assert results[name] == wanted


@pytest.mark.parametrize("name", [name for name, row in EXPECTED.items() if row[0] == "decord"])
def test_both_decoders_give_identical_windows(
    results: Results, pyav_results: Results, name: str
) -> None:
    fast, plain = results[name], pyav_results[name]
    assert isinstance(fast, DecodedClip)
    assert isinstance(plain, DecodedClip)
    assert (fast.decoder, plain.decoder) == ("decord", "pyav")
    assert fast.windows == plain.windows
    assert fast.frames.keys() == plain.frames.keys()
    assert all(np.array_equal(fast.frames[index], plain.frames[index]) for index in fast.frames)


def test_windows_of_a_long_clip_lie_all_over_it(results: Results) -> None:
    clip = results["sam2_720px_dark.mp4"]
    assert isinstance(clip, DecodedClip)
    starts_s = [window.timestamps_s[0] for window in clip.windows]
    assert max(starts_s) - min(starts_s) > 3
