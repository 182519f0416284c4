"""How many of the clips `--plan` expects to be good, and how many windows they give.

A seeded sample of the clips is counted (extract/counting.py): all of them in a small data set. The
others are taken to be like these on average, and how far that may be off is said. Called by
plan.py.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..extract.config import ExtractConfig
from ..extract.counting import count_windows
from ..extract.sources.clip import Clip
from ..shards.plan import PlanEntry, clips_by_shard
from ..shards.records import Quarantined
from .plan_bytes import ShardPlan

MAX_COUNTED = 1000
"""Clips that are counted: of a share of 1 % in quarantine so many tell within 0.3 %."""
COUNT_BUDGET_S = 60.0
"""No more clips are counted after this long, but at least MIN_COUNTED."""
MIN_COUNTED = 100


@dataclass(frozen=True, kw_only=True)
class ClipSample:
    """Some of the clips, a random sample, and what each of them gives."""

    num_clips: int
    """All of them."""
    windows: dict[str, int]
    """Clip of the sample -> its windows, 0 if it would go to quarantine."""
    quarantined: dict[str, Quarantined]

    @property
    def share_quarantined(self) -> float:
        """0..1 of the clips, as estimated."""
        return sum(not count for count in self.windows.values()) / len(self.windows)

    @property
    def share_error(self) -> float:
        """Standard error of `share_quarantined`; 0 where all clips were looked at.

        Agresti and Coull's: two failures and two successes are added, so that a sample without
        any failure is not taken for proof that there is none.
        """
        size = len(self.windows) + 4
        share = (self.share_quarantined * len(self.windows) + 2) / size
        return self._unseen * math.sqrt(share * (1 - share) / size)

    @property
    def windows_expected(self) -> float:
        """Of all clips."""
        return self.num_clips * sum(self.windows.values()) / len(self.windows)

    @property
    def windows_error(self) -> float:
        """Standard error of `windows_expected`: of the quarantined share, and, where clips give
        different numbers of windows, of their mean."""
        good = [count for count in self.windows.values() if count]
        if not good:
            return 0.0
        mean = sum(good) / len(good)
        spread = sum((count - mean) ** 2 for count in good) / max(1, len(good) - 1)
        of_mean = self._unseen * math.sqrt(spread / len(good)) * (1 - self.share_quarantined)
        return self.num_clips * math.hypot(of_mean, mean * self.share_error)

    @property
    def _unseen(self) -> float:
        """What drawing without replacement leaves of an error."""
        rest = self.num_clips - len(self.windows)
        return math.sqrt(rest / max(1, self.num_clips - 1))

    def shards(self, entries: Sequence[PlanEntry]) -> list[ShardPlan]:
        """The shards to be: counted clips as they were, all others as these on average."""
        share = 1 - self.share_quarantined
        expected = self.windows_expected / self.num_clips
        shards = []
        for part in clips_by_shard(entries).values():
            unknown = [entry.key for entry in part if entry.key not in self.windows]
            known = {entry.key: self.windows.get(entry.key, 0) for entry in part}
            keys = [key for key, count in known.items() if count]
            keys += unknown[: max(1, round(share * len(unknown)))] if unknown else []
            num_windows = sum(known.values()) + expected * len(unknown)
            shards.append(ShardPlan(keys=keys, num_windows=num_windows))
        return shards

    def quarantine_bytes(self) -> float:
        """Of quarantine.jsonl."""
        lines = [json.dumps(asdict(entry)) for entry in self.quarantined.values()]
        return sum(len(line) + 1 for line in lines) * self.num_clips / len(self.windows)


def sample_clips(
    config: ExtractConfig, clips: Sequence[Clip], *, max_counted: int = MAX_COUNTED
) -> ClipSample:
    """Counts the first of `clips`, which are in a random order."""
    chosen = clips[:max_counted]
    end_s = time.monotonic() + COUNT_BUDGET_S
    num_counted = 0

    def within() -> bool:
        nonlocal num_counted
        num_counted += 1
        return num_counted < MIN_COUNTED or time.monotonic() < end_s

    windows, quarantined = count_windows(config, chosen, within=within)
    return ClipSample(
        num_clips=len(clips),
        windows=windows,
        quarantined={entry.clip: entry for entry in quarantined},
    )


def with_probed(
    sample: ClipSample, windows: dict[str, int], quarantined: Sequence[Quarantined]
) -> ClipSample:
    """`sample` with what decoding some of its clips whole showed."""
    decoded = {entry.clip: entry for entry in quarantined}
    kept = {key: entry for key, entry in sample.quarantined.items() if key not in windows}
    return ClipSample(
        num_clips=sample.num_clips,
        windows=sample.windows | windows,
        quarantined=kept | decoded,
    )
