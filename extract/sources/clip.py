"""What a clip is: its name, and where its bytes lie, also inside an archive.

A clip is a video file, or a folder of images named `<anything>_<seconds>.jpg`, as the released code
stores pre-extracted Kinetics. At least one name of such a folder has a decimal point:
`img_00001.jpg` counts frames, and taking such numbers for seconds would be silently wrong.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NoReturn

from ...shards.errors import UsageError
from ...shards.evaluation.labels import PlanTarget
from ...shards.files import open_file

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [
        *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
        *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
    ]
)
"""What counts as a video in a folder or an archive, in any case. A file that is named itself is
always taken."""


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
class ZipVideo:
    """A video in a zip archive, which may be split."""

    record: tuple[int, int]
    """First byte and bytes of its record in the archive's directory."""
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
class StoredVideo:
    """A video in a store; the clip's path is its name there."""

    store: str
    """The store's address."""
    name: str
    stamp: str
    """The store's own mark of the version that was found (an ETag); empty: it has none."""

    @property
    def address(self) -> str:
        """The store's and the name."""
        return f"{self.store}/{self.name}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A clip that is known by name only; it goes to quarantine for this reason."""

    reason: str


ClipSource = TarVideo | FrameFolder | ZipFolder | ZipVideo | TargetFrames | StoredVideo | Unreadable


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

    @property
    def origin(self) -> str:
        """Where it is read from: its path, or its address."""
        return self.source.address if isinstance(self.source, StoredVideo) else str(self.path)


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


class SampleMetadata:
    """What the other members of the samples of an archive say of their videos: label and split."""

    SUFFIXES = frozenset([".json", ".cls"])
    MAX_BYTES = 2**20

    def __init__(self, path: Path) -> None:
        """path: of the archive."""
        self._path = path
        self._fields: dict[str, dict[str, Any]] = {}
        self._bad: list[str] = []

    def read(self, name: str, content: bytes | None) -> None:
        """Takes what a member of this name says; notes it where that is nothing, or where there is
        no content to be had (None)."""
        try:
            if content is None:
                raise ValueError("no content")
            if name.lower().endswith(".cls"):
                fields: Any = {"label": content.decode().strip()}
            else:
                fields = json.loads(content)
            known = {key: fields[key] for key in ("label", "split") if fields.get(key) is not None}
        except (ValueError, RecursionError, AttributeError):
            known = {"label": None}
        if not all(isinstance(v, str | int) and not isinstance(v, bool) for v in known.values()):
            self._bad.append(name)
            return
        texts = {key: str(value) for key, value in known.items() if value != ""}
        self._fields.setdefault(_sample(name), {}).update(texts)

    def add_to(self, clips: Iterable[ClipCandidate]) -> Iterator[ClipCandidate]:
        """The clips with what is known of them; says which members gave nothing."""
        if self._bad:
            first, count = self._bad[0], len(self._bad)
            logger.warning("%s: %d members give no metadata, first %s", self._path, count, first)
        for clip in clips:
            yield replace(clip, **self._fields.get(_sample(clip.name), {}))


def _sample(name: str) -> str:
    """What the members of one sample have in common: the name up to its first dot."""
    path = PurePosixPath(name)
    return (path.parent / path.name.partition(".")[0]).as_posix()


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


def is_valid_unicode(text: str) -> bool:
    """Whether a cache can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain_name(name: str) -> bool:
    """Whether it is one line of text, as the name of a file need not be."""
    return is_valid_unicode(name) and not set(name) & set("\0\n\r")


def shown_name(name: str) -> str:
    """A name for people, quoted: one that is no text as the bytes that it is on the disk."""
    if is_valid_unicode(name):
        return repr(name)
    try:
        return repr(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return ascii(name)


def check_writable(clips: Iterable[Clip]) -> None:
    """Raises UsageError for a clip of which a cache could not hold all that it keeps: the one door
    for what becomes of names on disks, in lists and in archives."""
    for clip in clips:
        target = clip.target
        of_target = () if target is None else (target.label, target.sequence, *target.frames)
        bad = [name for name in (clip.key, clip.origin, *of_target) if not is_plain_name(name)]
        bad += [text for text in (clip.label, clip.split) if text and not is_valid_unicode(text)]
        if bad:
            raise UsageError(
                f"{shown_name(bad[0])}: a name that a cache cannot hold, wanted one line of "
                "valid UTF-8: rename the file, or correct the list or archive"
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
