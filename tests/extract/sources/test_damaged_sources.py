"""Whatever is wrong with a list or an archive, it ends in an error that says so, or in fewer clips:
never in a traceback, a hang, or frames of another clip."""

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatok.extract.decoding.clip import opened_clip
from deltatok.extract.decoding.container import VideoFile
from deltatok.extract.sources.archive import FileSlice
from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import ClipError, UsageError

Write = Callable[..., Path]
IMAGES = {f"{c}/{i}_{i / 10}.jpg": c.encode() * 300 + bytes([i]) for c in "abc" for i in range(4)}
VIDEOS = {"a.mp4": b"a" * 700, "a.json": b'{"label": "x"}', "b.mp4": b"b" * 9, "b.cls": b"3"}
CSV = b'label,youtube_id,time_start,time_end,split\nrun,abc,1,2,train\n"ju mp",abd,3,4,val\n'
JSONL = b'{"path": "v.mp4", "label": "a"}\n{"path": "w.mp4", "split": "val"}\n'


def _damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(changed))
        kind = rng.random()
        if kind < 0.7:
            changed[place] = rng.randrange(256)
        elif kind < 0.8:
            del changed[max(1, place) :]
        elif kind < 0.9:
            del changed[place + 1 : place + rng.randrange(600)]
        else:
            changed[place:place] = rng.randbytes(20)
    return bytes(changed)


@pytest.fixture
def write_source(write_tar: Write, write_zip: Write, tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        if name in ("l.csv", "l.jsonl"):
            (tmp_path / name).write_bytes(CSV if name == "l.csv" else JSONL)
            return tmp_path / name
        return write_tar(name, VIDEOS) if name == "w.tar" else write_zip(name, IMAGES)

    return write


@pytest.mark.parametrize("name", ["w.tar", "f.zip", "l.csv", "l.jsonl"])
def test_damage_ends_in_an_error_or_in_fewer_clips(
    write_source: Callable[[str], Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    path = write_source(name)
    whole = path.read_bytes()
    (path.parent / "v.mp4").write_bytes(b"v")
    (path.parent / "abc_000001_000002.mp4").write_bytes(b"v")
    rng = random.Random(0)
    outcomes = set()
    for _ in range(150):
        path.write_bytes(_damaged(whole, rng))
        try:
            clips = find_clips([path])
        except UsageError as error:
            outcomes.add("refused")
            assert str(path) in str(error) or "no such file" in str(error)
            continue
        for clip in clips:
            try:
                with opened_clip(clip) as found:
                    _check_content(found)
                outcomes.add("read")
            except ClipError:
                outcomes.add("unusable")
    assert {"refused", "read"} <= outcomes


def _check_content(found: object) -> None:
    """Frames are those of one clip, whole; a video lies within its tar."""
    if isinstance(found, VideoFile):
        if isinstance(found, FileSlice):
            assert len(found.read()) == found.size
        return
    letters = set()
    for name in found.names:  # type: ignore[attr-defined]
        data = found.read(name)  # type: ignore[attr-defined]
        assert len(data) == 301
        letters.add(data[0])
    assert len(letters) <= 1
