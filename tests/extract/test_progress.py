"""What a run says of itself: on a terminal one line, elsewhere now and then in the log."""

import io
import logging
import re
from types import SimpleNamespace

import pytest

from deltatok.extract import progress as progress_module
from deltatok.extract.progress import LOG_EVERY_S, Progress
from deltatok.shards.running.stopwatch import Stopwatch


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of progress.py, moved by hand."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


@pytest.fixture
def stages() -> Stopwatch:
    watch = Stopwatch()
    watch.add("decode", 3.0)
    watch.add("backbone", 1.0)
    return watch


def test_log_has_all_facts_where_there_is_no_terminal(
    now: SimpleNamespace, stages: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Progress(stages, num_clips=100, num_before=28) as progress:
        progress.add_written(300_000_000)
        progress.add_clip(num_frames=0)
        now.s += LOG_EVERY_S
        progress.add_clip(num_frames=60)
        assert caplog.messages == [
            "extract: 30 of 100 clips, 17:30 left, 2.0 frames/s, 10.0 MB/s written, "
            "1 quarantined, slowest: decode 75 %"
        ]


def test_log_comes_now_and_then_and_at_the_end(
    now: SimpleNamespace, stages: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Progress(stages, num_clips=100, num_before=0) as progress:
        for _ in range(100):
            now.s += 0.7 * LOG_EVERY_S / 10
            progress.add_clip(num_frames=8)
    done = [int(re.findall(r"\d+", message)[0]) for message in caplog.messages]
    assert done == [15, 30, 45, 60, 75, 90, 100]


def test_terminal_shows_one_line_with_all_facts(
    now: SimpleNamespace,
    stages: Stopwatch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    caplog.set_level(logging.INFO)
    with Progress(stages, num_clips=2, num_before=0) as progress:
        now.s += 4
        progress.add_clip(num_frames=8)
        progress.add_written(8_000_000)
        progress.add_clip(num_frames=0)
    last = terminal.getvalue().split("\r")[-1]
    assert "2/2" in last
    assert "2.0 frames/s, 2.0 MB/s written, 1 quarantined, slowest: decode 75 %" in last
    assert not caplog.messages
