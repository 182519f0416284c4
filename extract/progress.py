"""Where the time goes, and the progress line that says so.

All stages of an extraction work at once, in processes and threads of their own; the main thread
hands over from one to the next. It waits for decoded clips, for pixels (on the CPU it makes them
itself), for the backbone and for a free writer: the stage it spends most of its time at is the one
that all others wait for, the slowest.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

from tqdm import tqdm

_LOGGER = logging.getLogger(__name__)

LOG_EVERY_S = 30.0

Stage = Literal["decode", "pixels", "backbone", "write"]


class StageClock:
    """Seconds that the main thread spent at each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def at(self, stage: Stage) -> Iterator[None]:
        """Counts the time within for `stage`."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            spent_s = time.monotonic() - start_s
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent_s

    def slowest(self) -> str | None:
        """Like "decode 71 %": the stage with most time and its share; None before there is any."""
        total_s = sum(self.seconds.values())
        if not total_s:
            return None
        stage = max(self.seconds, key=lambda name: self.seconds[name])
        return f"{stage} {100 * self.seconds[stage] / total_s:.0f} %"


class Progress:
    """The line on a terminal: clips, rates, time left, quarantine, slowest stage.

    Where there is no terminal, the log says the same every LOG_EVERY_S and once at the end.
    """

    def __init__(self, clock: StageClock, *, num_clips: int, num_before: int) -> None:
        """num_before: clips that earlier runs have dealt with."""
        self._clock = clock
        self._start_s = self._logged_s = time.monotonic()
        self._num_clips = num_clips
        self._num_dealt_with = self._num_before = num_before
        self._num_frames = 0
        self._num_bytes = 0
        self._num_quarantined = 0
        self._line = tqdm(  # disable=None: no line where nobody looks
            total=num_clips, initial=num_before, unit="clip", desc="extract", disable=None
        )
        self._logs = bool(self._line.disable)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._line.set_postfix_str(self._facts(), refresh=False)
        self._line.close()
        if self._logs:
            self._log()

    def add_clip(self, num_frames: int) -> None:
        """One more clip is through, with this many frames; 0: quarantined."""
        self._num_frames += num_frames
        self._num_quarantined += num_frames == 0
        self._add_clips(1)

    def add_elsewhere(self, num_clips: int) -> None:
        """Other processes have dealt with this many more clips."""
        self._add_clips(num_clips)

    def add_written(self, num_bytes: int) -> None:
        """A shard of this process is on the disk."""
        self._num_bytes += num_bytes

    def _add_clips(self, count: int) -> None:
        self._num_dealt_with += count
        self._line.set_postfix_str(self._facts(), refresh=False)
        self._line.update(count)
        if self._logs and time.monotonic() - self._logged_s >= LOG_EVERY_S:
            self._log()

    def _facts(self) -> str:
        """Rates are means since the start, of this process alone."""
        spent_s = max(time.monotonic() - self._start_s, 1e-9)
        return (
            f"{self._num_frames / spent_s:.1f} frames/s, "
            f"{self._num_bytes / spent_s / 1e6:.1f} MB/s written, "
            f"{self._num_quarantined} quarantined, slowest: {self._clock.slowest()}"
        )

    def _log(self) -> None:
        self._logged_s = time.monotonic()
        left = self._num_clips - self._num_dealt_with
        pace = (self._num_dealt_with - self._num_before) / max(self._logged_s - self._start_s, 1e-9)
        time_left = tqdm.format_interval(left / pace) if pace else "?"
        _LOGGER.info(
            "extract: %d of %d clips, %s left, %s",
            self._num_dealt_with,
            self._num_clips,
            time_left,
            self._facts(),
        )
