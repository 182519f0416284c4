"""Where the time goes, and the progress line that says so.

The main thread of an extraction waits for decoded clips, makes pixels, waits for the backbone and
waits for a free writer, one after the other; the stage it spends most of its time at is the
slowest. Called by making.py.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

from tqdm import tqdm

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
    """The line on a terminal: clips, rate, time left, quarantine, slowest stage."""

    def __init__(self, clock: StageClock, *, num_clips: int, num_before: int) -> None:
        """num_before: clips that earlier runs have dealt with."""
        self._clock = clock
        self._start_s = time.monotonic()
        self._num_frames = 0
        self._num_quarantined = 0
        self._line = tqdm(  # disable=None: no line where nobody looks
            total=num_clips, initial=num_before, unit="clip", desc="extract", disable=None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._line.close()

    def add_clip(self, num_frames: int) -> None:
        """One more clip is through, with this many frames; 0: quarantined."""
        self._num_frames += num_frames
        self._num_quarantined += num_frames == 0
        rate = self._num_frames / max(time.monotonic() - self._start_s, 1e-9)
        self._line.set_postfix_str(
            f"{rate:.1f} frames/s, {self._num_quarantined} quarantined, "
            f"slowest: {self._clock.slowest()}",
            refresh=False,
        )
        self._line.update()

    def add_elsewhere(self, num_clips: int) -> None:
        """Other processes have dealt with this many more clips."""
        self._line.update(num_clips)
