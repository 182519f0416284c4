"""The progress line of an extraction, which says where the time goes.

All stages of an extraction work at once, in processes and threads of their own; the main thread
hands over from one to the next. It waits for decoded clips, for pixels (on the CPU it makes them
itself), for the backbone and for a free writer: the stage it spends most of its time at is the one
that all others wait for, the slowest.
"""

import logging
import time
from typing import Self

from tqdm import tqdm

from ..shards.running.stopwatch import Stopwatch

_LOGGER = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Progress:
    """The line on a terminal: clips, rates, time left, quarantine, slowest stage.

    Where there is no terminal, the log says the same every LOG_EVERY_S and once at the end.
    """

    def __init__(self, watch: Stopwatch, *, num_clips: int, num_before: int) -> None:
        """watch: of the main thread. num_clips: of this process's part; num_before: those of
        them that earlier runs have dealt with."""
        self._watch = watch
        self._start_s = self._logged_s = time.monotonic()
        self._num_clips = num_clips
        self._num_dealt_with = self._num_before = num_before
        self._num_frames = 0
        self._num_bytes = 0
        self._num_quarantined = 0
        self._actors = ""
        self._line = tqdm(  # disable=None: no line where nobody looks
            total=num_clips, initial=num_before, unit="clip", desc="extract", disable=None
        )
        self._logs = bool(self._line.disable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._line.set_postfix_str(self._facts(), refresh=False)
        self._line.close()
        if self._logs:
            self._log()

    def add_clip(self, num_frames: int) -> None:
        """One more clip is through, with this many frames; 0: quarantined."""
        self._num_quarantined += num_frames == 0
        self.add_clips(1, num_frames=num_frames)

    def add_clips(self, num_clips: int, *, num_frames: int) -> None:
        """So many more clips are through, with so many frames in all."""
        self._num_frames += num_frames
        self._num_dealt_with += num_clips
        self._line.set_postfix_str(self._facts(), refresh=False)
        self._line.update(num_clips)
        if self._logs and time.monotonic() - self._logged_s >= LOG_EVERY_S:
            self._log()

    def add_written(self, num_bytes: int) -> None:
        """A shard of this process is on the disk."""
        self._num_bytes += num_bytes

    def set_actors(self, num_actors: int) -> None:
        """How many work on it, where that is not this process alone."""
        self._actors = f"{num_actors} actors, "

    def _facts(self) -> str:
        """Rates are means since the start, of this process, or of all actors."""
        spent_s = max(time.monotonic() - self._start_s, 1e-9)
        return (
            f"{self._actors}{self._num_frames / spent_s:.1f} frames/s, "
            f"{self._num_bytes / spent_s / 1e6:.1f} MB/s written, "
            f"{self._num_quarantined} quarantined, slowest: {self._watch.slowest()}"
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
