"""The verdict on one clip: it gives no windows, and why.

Raised wherever a clip is opened, decoded or sampled; `pool.py` turns it into a line of
quarantine.jsonl. One bad clip never stops the run.
"""

from typing import Literal

from ..shards.errors import DeltatokError

Stage = Literal["open", "decode", "sample"]


class UnusableClip(DeltatokError):
    """A clip that gives no windows; the text is the reason a reader of the quarantine sees."""

    def __init__(self, reason: str, *, stage: Stage) -> None:
        super().__init__(reason)
        self.stage: Stage = stage
        """Where it failed: opening the file, decoding it, or drawing windows from it."""
