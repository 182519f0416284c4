"""What the searches of sources.py have in common: a thing found, and names that are refused."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..shards.errors import UsageError
from .clips import FrameFolder, Source
from .frame_names import frame_seconds

_DRIVE = re.compile(r"\A[A-Za-z]:/")


@dataclass(frozen=True)
class Found:
    """A clip before it has its key."""

    name: str
    """Its path inside what was searched; empty for that itself."""
    path: Path
    source: Source | None = None
    size_bytes: int | None = None
    """None: to be asked of the disk, if the clip is taken."""
    label: str | None = None
    split: str | None = None


def check_member(name: str, archive: Path) -> None:
    """Refuses an archive with a name that leads out of it: it was made to do harm."""
    parts = _DRIVE.sub("/", name.replace("\\", "/")).split("/")
    if not name or not parts[0] or ".." in parts or "\0" in name:
        raise UsageError(
            f"{archive}: holds {name[:200]!r}, a path that leaves the archive: make the archive "
            "again with relative names, or do not use it"
        )


def stored_size(path: Path, source: Source | None) -> int:
    """Bytes of the video, or of all frames of the folder; 0 where it is not there or not ours to
    read (decoding it will say so)."""
    try:
        if isinstance(source, FrameFolder):
            return sum(size for _, size in list_frames(path))
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def is_there(path: Path) -> bool:
    """Whether there is something; False too for a name that no file can have."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def list_frames(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the frames of a folder, unordered; OSError where it cannot be read."""
    with os.scandir(folder) as entries:
        return [
            (entry.name, entry.stat().st_size)
            for entry in entries
            if frame_seconds(entry.name) is not None and entry.is_file()
        ]


def refuse_unreadable(error: OSError) -> NoReturn:
    """UsageError for something that cannot be read."""
    raise UsageError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions")
