"""A disk that is full, or refuses for another reason, while a run writes. Used by loop.py, logs.py
and checkpoints.py."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..shards.errors import DeltatokError


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """DeltatokError naming `what` if writing it, inside, fails: no traceback, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DeltatokError(
            f"{what}: could not be written ({reason}). The checkpoints that were there before are "
            "whole: make room on the disk and run the same command again"
        ) from error
