"""Paths a user gives -> the clips in them, each under a key that survives moving the videos.

The key is what the plan, the shards and the seeds of the windows know a clip by. It never holds a
path of the machine: a clip in a folder is known by its path inside that folder, a single file by
its name, a line of a .txt list by the path written there.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..shards.errors import UsageError

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
"""What counts as a video in a folder, in any case. A file that is named itself is always taken."""


@dataclass(frozen=True)
class Clip:
    """One video file."""

    key: str
    """Its name in every cache: a posix path without root, valid Unicode."""
    path: Path
    """Absolute."""
    size_bytes: int
    """0 for a listed file that is not there (it will be quarantined)."""


def find_clips(paths: Sequence[str | Path]) -> list[Clip]:
    """The clips in `paths` (files, folders, .txt lists), sorted by key.

    Folders are searched recursively, through links, without hidden names. A list names one file a
    line, relative to the list's own folder; empty lines and lines that start with # are skipped.
    With several paths the keys of a folder start with the folder's name, those of a list with the
    list's name without .txt.

    Raises:
        UsageError: a path that is not there or cannot be read, no video at all, or two files that
            would get the same key.
    """
    clips: dict[str, Clip] = {}
    for given in map(Path, paths):
        path = given.absolute()
        if path.is_dir():
            found, prefix = _in_folder(path), path.resolve().name
        elif not path.is_file():
            raise UsageError(f"{given}: no such file or folder: check the path of the videos")
        elif path.suffix.lower() == ".txt":
            found, prefix = _in_list(path), path.stem
        else:
            found, prefix = iter([(path.name, path)]), ""
        for name, file in found:
            key = _readable(f"{prefix}/{name}" if prefix and len(paths) > 1 else name)
            if key in clips:
                raise UsageError(
                    f"{file} and {clips[key].path}: both would be clip {key!r}: "
                    "rename one, or give one folder that holds both"
                )
            clips[key] = Clip(key, file, _size(file))
    if not clips:
        searched = ", ".join(map(str, paths))
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        raise UsageError(f"{searched}: no video found, wanted files that end in {suffixes}")
    _check_missing(clips)
    return [clips[key] for key in sorted(clips)]


def _in_folder(root: Path) -> Iterator[tuple[str, Path]]:
    """(path inside `root`, file) of every video below; a folder reached twice is read once."""
    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(root, onerror=_refuse, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen:
            subfolders.clear()
            continue
        seen.add(here.resolve())
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            file = here / name
            hidden = name.startswith(".")
            if not hidden and file.suffix.lower() in VIDEO_SUFFIXES and not file.is_dir():
                yield file.relative_to(root).as_posix(), file


def _in_list(path: Path) -> Iterator[tuple[str, Path]]:
    """(key, file) of every line of the list."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        _refuse(error)
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        file = path.parent / line
        if Path(line).is_absolute():
            inside = file.is_relative_to(path.parent)
            yield (file.relative_to(path.parent).as_posix() if inside else file.name), file
        else:
            parts = PurePosixPath(os.path.normpath(line)).parts
            yield "/".join(part for part in parts if part != ".."), file


def _check_missing(clips: dict[str, Clip]) -> None:
    """Refuses a list none of whose files is there; a few missing ones are only quarantined."""
    missing = [clip for clip in clips.values() if not clip.path.exists()]
    if len(missing) == len(clips):
        raise UsageError(
            f"{missing[0].path}: no such file, nor any other of the {len(clips)} listed: "
            "lines of a list are relative to the list's own folder"
        )
    if missing:
        first = missing[0].path
        logger.warning("%d of %d clips are not there, first %s", len(missing), len(clips), first)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # not there, or not ours to read: decoding it will say so
        return 0


def _readable(name: str) -> str:
    """`name` with every byte that is no UTF-8 written as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse(error: OSError) -> None:
    raise UsageError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions")
