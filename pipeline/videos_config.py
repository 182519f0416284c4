"""What `deltatok-extract --videos` is told: an extraction, and a tokenizer to encode with at once.

Nothing heavy is imported here: `--help` reads it.
"""

from dataclasses import dataclass
from typing import Literal

from ..extract.config import ExtractConfig
from ..shards.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class VideosConfig(ExtractConfig):
    """Videos in; a patch-token cache out, or, with a tokenizer, a delta-token cache."""

    tokenizer: str | None = None
    """Model folder of a tokenizer: delta-token shards are written straight from the videos, the
    patch tokens are never stored."""
    tokenizer_autocast: Literal["auto", "float32", "bfloat16"] | None = None
    """Arithmetic of the tokenizer, only with one; auto, also where none is given: bfloat16 on
    cuda, float32 on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            if self.tokenizer_autocast is not None:
                raise UsageError(
                    f"tokenizer_autocast: got {self.tokenizer_autocast!r} without a tokenizer, "
                    "which is all that it concerns: give --tokenizer DIR, or leave it out"
                )
            return
        if self.sampling != "windows":
            raise UsageError(
                f"sampling: got {self.sampling!r} with --tokenizer, wanted 'windows': delta tokens "
                "are for training; extract the uniform frames without --tokenizer, then draw "
                "windows among them with --patches and --tokenizer"
            )
        if self.dtype != "float16":
            raise UsageError(
                f"dtype: got {self.dtype!r} with --tokenizer, wanted 'float16': patch tokens are "
                "rounded to float16 before they are encoded; for another dtype extract first, "
                "then encode with --patches and --tokenizer"
            )
