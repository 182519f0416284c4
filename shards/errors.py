"""The errors a user can cause or meet, each with the exit code its command ends with.

Every message says what was got, what was wanted, and what to do about it. The commands in
`pipeline/` print the message and exit with `exit_code`; everybody else only raises.
"""

from typing import Literal


class DeltatokError(ValueError):
    """Anything that stops a command for a reason the user can act on."""

    exit_code = 1


class UsageError(DeltatokError):
    """A path, flag or configuration value that cannot be used as given."""

    exit_code = 2


class TooManyQuarantined(DeltatokError):
    """The run finished, but more clips than allowed are in quarantine."""

    exit_code = 3


class CacheMismatch(DeltatokError):
    """A cache is sound but is not the one that is asked for; names the field that differs."""

    exit_code = 4


class DamagedShard(DeltatokError):
    """A cache file is missing, truncated, changed or not what its format says."""

    exit_code = 1


SHARD_ADVICE = (
    "run `deltatok-shards verify` on the cache, then delete the shard's done-record "
    "(shards/NNNNNN.json) and make the shard again"
)


def damaged_shard(text: str) -> DamagedShard:
    """The error for a file of a shard: `text`, which names it, and what to do."""
    return DamagedShard(f"{text}: {SHARD_ADVICE}")


class Stopped(BaseException):
    """The run was asked to stop and did so, with what is finished in place.

    As KeyboardInterrupt no Exception: a signal may raise it anywhere, also while a library imports
    or loads something and takes any Exception for a file or a package that does not work.
    """

    exit_code = 75


ClipStage = Literal["open", "decode", "sample"]


class ClipError(DeltatokError):
    """A clip that gives no windows; the text is the reason a reader of the quarantine sees. One bad
    clip never stops the run."""

    def __init__(self, reason: str, *, stage: ClipStage) -> None:
        super().__init__(reason)
        self.stage: ClipStage = stage
        """Where it failed: opening the file, decoding it, or drawing windows from it."""
