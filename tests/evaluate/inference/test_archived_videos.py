"""Pictures of a report take their frames from archives as well."""

import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from deltatok.evaluate.report.frames import clips_by_key, read_frames


@pytest.fixture
def video(tmp_path: Path) -> Path:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(10):
            picture = np.full((32, 32, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return tmp_path / "v.mp4"


def test_frames_of_a_video_in_a_tar_are_those_of_the_file(video: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(video, arcname="v.mp4")
    inside = read_frames(clips_by_key([str(tmp_path / "w.tar")])["v.mp4"], [7, 2])
    plain = read_frames(clips_by_key([str(video)])["v.mp4"], [7, 2])
    assert inside is not None
    assert plain is not None
    assert np.array_equal(inside, plain)
    assert plain[0].mean() > plain[1].mean()


def test_clip_that_cannot_be_read_has_no_frames(video: Path) -> None:
    clip = clips_by_key([str(video)])["v.mp4"]
    video.write_bytes(b"short")
    assert read_frames(clip, [0]) is None
