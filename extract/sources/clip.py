"""What a clip is: its name, and where its bytes lie, also inside an archive.

A clip is a video file, or a folder of images named `<anything>_<seconds>.jpg`, as the released code
stores pre-extracted Kinetics. At least one name of such a folder has a decimal point:
`img_00001.jpg` counts frames, and taking such numbers for seconds would be silently wrong.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NoReturn

from ...shards.errors import UsageError
from ...shards.evaluation.labels import PlanTarget
from ...shards.files import open_file

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
"""What counts as a video in a folder or a tar, in any case. A file that is named itself is always
taken."""


FRAME_NAME = re.compile(
    rb".*_([0-9]{1,12}(\.[0-9]{0,40})?(?:e-[0-9]{1,2})?)\.(?:jpe?g|png)", re.IGNORECASE | re.DOTALL
)
"""Group 1: the seconds, as Python writes a float. Group 2: there is a decimal point."""

WANTED_FRAMES = "folders of images named *_<seconds>.jpg, like 000012_0.48.jpg"


_DRIVE = re.compile(r"\A[A-Za-z]:/")

Stamp = tuple[int, int]
"""Bytes and time of last change (ns) of an archive when it was searched: with another stamp it is
another archive, and positions in it mean nothing."""


@dataclass(frozen=True, slots=True)
class TarVideo:
    """A video in an uncompressed tar: `size_bytes` of the clip from `offset` on."""

    offset: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class FrameFolder:
    """A folder of images named `*_<seconds>.jpg`; the clip's path is the folder."""


@dataclass(frozen=True, slots=True)
class ZipFolder:
    """Such a folder in a zip archive, which may be split."""

    folder: str
    """Its name in the archive, without the last slash."""
    runs: tuple[tuple[int, int], ...]
    """(first byte, bytes) of the parts of the archive's directory in which its frames are listed;
    other entries may lie between them."""
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class TargetFrames:
    """The frames of one target of a data set, in order; the clip's path is the data set's folder,
    or the video that they are frames of."""

    numbers: tuple[int, ...]
    """Where they are in their sequence, from 0."""
    names: tuple[str, ...] = ()
    """Their image files below the folder; none: the path is a video."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A clip that is known by name only; it goes to quarantine for this reason."""

    reason: str


ClipSource = TarVideo | FrameFolder | ZipFolder | TargetFrames | Unreadable


@dataclass(frozen=True)
class Clip:
    """One video file, or what counts as one."""

    key: str
    """Its name in every cache: a posix path without root, valid Unicode."""
    path: Path
    """Absolute; the archive if it lies in one (of a split one: its name without the part)."""
    size_bytes: int
    """Of the video; of all its frames together, as stored; 0 for a listed file that is not there
    (it will be quarantined)."""
    source: ClipSource | None = None
    """None: `path` is the video."""
    label: str | None = None
    """Its class, where a list or an archive names one."""
    split: str | None = None
    """The part of the data set it belongs to, where a list or an archive names one."""
    target: PlanTarget | None = None
    """What its windows are evaluated on (evaluation caches)."""


@dataclass(frozen=True)
class ClipCandidate:
    """A clip before it has its key."""

    name: str
    """Its path inside what was searched; empty for that itself."""
    path: Path
    source: ClipSource | None = None
    size_bytes: int | None = None
    """None: to be asked of the disk, if the clip is taken."""
    label: str | None = None
    split: str | None = None


def without_suffix(name: str) -> str:
    """`name` without the suffix of a video, if it has one."""
    suffix = PurePath(name).suffix
    return name[: -len(suffix)] if suffix.lower() in VIDEO_SUFFIXES else name


def frame_seconds(name: str) -> str | None:
    """The decimal number of seconds in the name of a frame; None for another file."""
    match = FRAME_NAME.fullmatch(name.encode("utf-8", "surrogateescape"))
    return None if match is None or name.startswith(".") else match[1].decode()


def holds_frames(names: Iterable[str], *, folder: str) -> bool:
    """Whether these names of one folder make it a clip; says so if they nearly do."""
    numbers = [text for name in names if (text := frame_seconds(name)) is not None]
    if numbers and not any("." in text for text in numbers):
        warn_whole_numbers(folder)
        return False
    return bool(numbers)


def warn_whole_numbers(folder: str) -> None:
    """A folder is left out because its names may count frames."""
    logger.warning(
        "%s: left out: its images have whole numbers only, frames counted and not seconds; wanted "
        "%s",
        folder,
        WANTED_FRAMES,
    )


def list_frames(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the frames of a folder, unordered; OSError where it cannot be read."""
    with os.scandir(folder) as entries:
        return [
            (entry.name, entry.stat().st_size)
            for entry in entries
            if frame_seconds(entry.name) is not None and entry.is_file()
        ]


def check_member(name: str, archive: Path) -> None:
    """Refuses an archive with a name that leads out of it: it was made to do harm."""
    parts = _DRIVE.sub("/", name.replace("\\", "/")).split("/")
    if not name or not parts[0] or ".." in parts or "\0" in name:
        raise UsageError(
            f"{archive}: holds {name[:200]!r}, a path that leaves the archive: make the archive "
            "again with relative names, or do not use it"
        )


def stored_size(path: Path, source: ClipSource | None) -> int:
    """Bytes of the video, or of all frames of the folder; 0 where it is not there or not ours to
    read (decoding it will say so)."""
    try:
        if isinstance(source, FrameFolder):
            return sum(size for _, size in list_frames(path))
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def exists(path: Path) -> bool:
    """Whether there is a file or folder; False too for a name that no file can have."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def raise_unreadable(error: OSError) -> NoReturn:
    """UsageError for something that cannot be read."""
    raise UsageError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions")


def file_stamp(path: Path) -> Stamp:
    """The stamp of an archive in one file; OSError where it is not there."""
    with open_file(path) as file:
        status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
