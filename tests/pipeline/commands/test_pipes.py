"""Pipes in place of what the commands read by name: an error at once, never waited for."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import pytest

from deltatok.extract.backbone import find_folder
from deltatok.extract.decoding.container import open_video
from deltatok.extract.sources.find import find_clips
from deltatok.pipeline.commands import evaluate, extract, pipeline, shards
from deltatok.shards import DeltatokError
from deltatok.shards.errors import ClipError
from deltatok.shards.evaluation.labels import ClipLabels
from deltatok.train.engine.logs import _drop_after
from deltatok.train.engine.run_folder import _lock
from deltatok.train.models.deltatok import DeltaTok

Main = Callable[[list[str]], int]


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        pytest.fail("waited 20 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (extract.main, ["--config", "pipe"]),
        (extract.main, ["--videos", "pipe", "--out", "out"]),
        (extract.main, ["--videos", "pipe.txt", "--out", "out"]),
        (extract.main, ["--videos", "pipe.tar", "--out", "out"]),
        (extract.main, ["--videos", "archives", "--out", "out"]),
        (evaluate.main, ["compare", "report", "report", "--names", "a", "b", "--out", "out"]),
        (shards.main, ["info", "cache"]),
        (pipeline.main, ["run", "pipe"]),
        (pipeline.main, ["import-official", "pipe", "--out", "out"]),
        (pipeline.main, ["export-official", "model", "--out", "out.bin"]),
    ],
)
def test_no_command_waits_for_a_pipe(
    main: Main,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        *("pipe", "pipe.txt", "pipe.tar", "archives/a.tar"),
        *("report/report.json", "cache/cache.json", "model/config.json"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    assert main(words) in (1, 2, 4)
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_no_part_of_a_model_is_waited_for(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        os.mkfifo(folder / name)
        for load in (DeltaTok.from_pretrained, lambda folder: find_folder(str(folder))):
            with pytest.raises(DeltatokError):
                load(folder)


def test_no_clip_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.mp4")
    assert [clip.key for clip in find_clips([tmp_path])] == ["clip.mp4"]
    with pytest.raises(ClipError, match="no regular file"), open_video(tmp_path / "clip.mp4"):
        pass


def test_no_file_of_a_run_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock")
    with pytest.raises(DeltatokError, match=r"cannot be written"):
        _lock(tmp_path, ExitStack())
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        _drop_after(tmp_path / "log.jsonl", 3)


def test_no_label_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.npy")
    with pytest.raises(DeltatokError, match=r"clip\.npy"):
        ClipLabels(tmp_path, last_frames={"clip": 0}, num_classes=2)
