"""Uncompressed tars of videos, as WebDataset has them -> clips, which are read where they lie.

    NAME.mp4      the video
    NAME.json     optional: an object with `label` and `split` (texts)
    NAME.cls      optional: the label

What is lost is named, or the tar is refused: a video that the end of the file cuts off is a clip
that goes to quarantine; where not even a name is left, nothing of the tar is used.
"""

import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ...shards.errors import UsageError
from .clip import (
    VIDEO_SUFFIXES,
    ClipCandidate,
    SampleMetadata,
    Stamp,
    TarVideo,
    Unreadable,
    check_member,
    file_stamp,
)

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 512
_READ_BYTES = 2**20


def find_in_tar(path: Path) -> Iterator[ClipCandidate]:
    """The videos of a tar, with their class and split where it names them.

    Raises UsageError for a tar that is compressed, damaged or cut short within a header, and for
    a member whose name leads out of it.
    """
    videos: list[ClipCandidate] = []
    metadata = SampleMetadata(path)
    try:
        stamp = file_stamp(path)
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar, path, size=stamp[0]):
                name = PurePosixPath(member.name)
                if name.suffix.lower() in VIDEO_SUFFIXES and not member.isdir():
                    videos.append(_video(path, name.as_posix(), member, stamp))
                elif name.suffix.lower() in SampleMetadata.SUFFIXES and member.isreg():
                    small = member.size <= SampleMetadata.MAX_BYTES
                    file = tar.extractfile(member) if small else None
                    metadata.read(name.as_posix(), None if file is None else file.read())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): check it") from error
    except UsageError:
        raise
    except (tarfile.TarError, RecursionError, OverflowError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read as an uncompressed tar ({error}): get it again; unpack a "
            "compressed one"
        ) from error
    yield from metadata.add_to(videos)


def _members(tar: tarfile.TarFile, path: Path, *, size: int) -> Iterator[tarfile.TarInfo]:
    """The members in order, hidden ones left out. A video that the end of the file cuts off is
    the last one; UsageError where something else is cut off, or the tar does not end there."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
        check_member(member.name, path)
        if member.size < 0:  # `tarfile` would go back, and round for ever
            raise _cut_short(path, member.offset, size)
        if member.isreg() and member.offset_data + member.size > size:
            if PurePosixPath(member.name).suffix.lower() not in VIDEO_SUFFIXES:
                raise _cut_short(path, member.offset, size)
            yield member
            return
        if not PurePosixPath(member.name).name.startswith("."):
            yield member
    _check_end(path, tar.offset, size)


def _video(path: Path, name: str, member: tarfile.TarInfo, stamp: Stamp) -> ClipCandidate:
    reason = None
    if not member.isreg() or member.issparse():
        reason = "is no plain file in its tar, but a link or a sparse one"
    elif member.offset_data + member.size > stamp[0]:
        there = max(0, stamp[0] - member.offset_data)
        reason = (
            f"{path.name} is cut short: {there} of the {member.size} bytes of this member are "
            "there, and nothing that came after it"
        )
        logger.warning("%s: %s", name, reason)
    if reason is not None:
        return ClipCandidate(name, path, Unreadable(reason), size_bytes=member.size)
    return ClipCandidate(name, path, TarVideo(member.offset_data, stamp), size_bytes=member.size)


def _check_end(path: Path, end: int, size: int) -> None:
    """Refuses a tar that goes on after the place where `tarfile` takes it to end."""
    if end >= size:
        logger.warning("%s: has no end mark; if it was cut short, what came after is lost", path)
        return
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK_BYTES)
        if block.strip(b"\0") or len(block) < _BLOCK_BYTES:
            raise _cut_short(path, end, size)
        while rest := file.read(_READ_BYTES):
            if rest.strip(b"\0"):
                raise UsageError(
                    f"{path}: has its end mark at byte {end}, but more follows: two tars in one "
                    "file? take them apart"
                )


def _cut_short(path: Path, position: int, size: int) -> UsageError:
    return UsageError(
        f"{path}: damaged or cut short at byte {position} of {size}: which videos came after "
        "cannot be told: get it again"
    )
