"""Zip archives of frame folders -> clips. Called by sources.py.

Only the directory of an archive is read here, once and in order; a clip keeps the places of its
part of it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..shards.errors import UsageError
from .clips import ZipFolder
from .found import Found, check_member
from .frame_names import FRAME_NAME, WANTED_FRAMES, warn_whole_numbers
from .suffixes import VIDEO_SUFFIXES
from .zip_directory import BadZip, entry_name, find_directory, read_entries
from .zip_parts import ZipParts

logger = logging.getLogger(__name__)

MAX_RUNS = 1000
"""Parts of the directory a clip may be spread over before all between them counts as its part too
(the part is then read and the entries of other clips passed over)."""


@dataclass
class _Folder:
    """What is known of one folder of the archive so far."""

    stored_bytes: int = 0
    has_seconds: bool = False
    """One of its names has a decimal point."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first byte, end)"""


def find_in_zip(archive: Path) -> Iterator[Found]:
    """The frame folders of the archive.

    Raises UsageError for an archive that is cut short, lacks a part, or has an entry whose name
    leads out of the archive.
    """
    try:
        with ZipParts(archive) as parts:
            folders, num_videos = _read_folders(parts, archive)
            stamp = parts.stamp
    except OSError as error:
        raise UsageError(f"{archive}: cannot be read ({error.strerror}): check it") from error
    except BadZip as error:
        raise UsageError(f"{archive}: {error}: get it again, and all parts of it") from error
    if num_videos:
        logger.warning(
            "%s: %d videos in it are not read: from a zip only %s are; unpack it, or make a tar",
            archive,
            num_videos,
            WANTED_FRAMES,
        )
    for raw in sorted(folders):
        folder, name = folders[raw], entry_name(raw)
        if not folder.has_seconds:
            warn_whole_numbers(f"{archive}: {name}")
            continue
        source = ZipFolder(folder=name, runs=_joined(folder.runs), stamp=stamp)
        yield Found(_without_dots(name), archive, source, size_bytes=folder.stored_bytes)


def _read_folders(parts: ZipParts, archive: Path) -> tuple[dict[bytes, _Folder], int]:
    """Every folder that has frames, and how many videos there are beside them."""
    directory = find_directory(parts)
    folders: dict[bytes, _Folder] = {}
    num_entries = num_videos = 0
    current, folder = b"", _Folder()
    for entry in read_entries(parts, directory.offset, directory.size):
        num_entries += 1
        parent, _, name = entry.name.rpartition(b"/")
        match = FRAME_NAME.fullmatch(name)
        if match is None or name.startswith(b"."):
            num_videos += PurePosixPath(entry_name(name)).suffix.lower() in VIDEO_SUFFIXES
            check_member(entry_name(entry.name), archive)
            continue
        if parent != current or num_entries == 1:
            check_member(entry_name(entry.name), archive)
            current, folder = parent, folders.setdefault(parent, _Folder())
        folder.stored_bytes += entry.stored_bytes
        folder.has_seconds = folder.has_seconds or match[2] is not None
        start, end = entry.record_offset, entry.record_offset + entry.record_bytes
        if folder.runs and folder.runs[-1][1] == start:
            start = folder.runs.pop()[0]
        folder.runs.append((start, end))
    if num_entries != directory.num_entries:
        raise BadZip(f"lists {num_entries} entries, its end says {directory.num_entries}")
    return folders, num_videos


def _joined(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(first byte, bytes)"""
    if len(runs) > MAX_RUNS:
        runs = [(runs[0][0], runs[-1][1])]
    return tuple((start, end - start) for start, end in runs)


def _without_dots(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
