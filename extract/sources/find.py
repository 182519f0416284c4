"""Paths a user gives -> the clips in them, each under a key that survives moving the videos.

    a video                      the clip itself                  known by its name
    a folder                     videos, frame folders, archives  known by their path inside it
    .txt, .csv, .jsonl           what it names                    known by their path in the root
    .tar                         its videos                       known by their path in it
    .zip, .zip.part000, ...      its videos and frame folders     known by their path in it
    s3://..., hf://datasets/...  its videos                       known by their path below it

The key is what the plan, the shards and the seeds of the windows know a clip by. It never holds a
path of the machine. An archive is like the folder it would unpack to, and gives the same keys.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...shards.errors import UsageError
from ...shards.files import check_address, is_address, local_path
from .archive import archive_of, find_parts
from .clip import (
    VIDEO_SUFFIXES,
    WANTED_FRAMES,
    Clip,
    ClipCandidate,
    FrameFolder,
    StoredVideo,
    exists,
    holds_frames,
    raise_unreadable,
    stored_size,
    without_suffix,
)
from .lists import find_in_list
from .stored import LIST_SUFFIXES, file_of, find_in_store
from .tars import find_in_tar
from .zips import find_in_zip

logger = logging.getLogger(__name__)

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_clips(paths: Sequence[str | Path], *, root: str | Path | None = None) -> list[Clip]:
    """The clips in `paths`, sorted by key.

    Folders are searched recursively, through links, without hidden names. With several paths the
    keys of a folder, an archive or a list start with its name (without .tar, .zip, .txt, ...).

    Args:
        root: the folder (or archive, or address) that the paths in lists are relative to and that
            Kinetics' names are looked up in; by default each list's own folder.

    Raises:
        UsageError: a path that is not there or cannot be read, no video at all, two that would
            get the same key, or an archive or list that is damaged or leads out of its folder.
        DeltatokError: a store that cannot be reached.
    """
    clips: dict[str, Clip] = {}
    places = map(_place, paths)
    given = list(dict.fromkeys(_archive_of(place) or place for place in places))
    base = None if root is None else _place(root)
    if isinstance(base, Path):
        base = Path(os.path.normpath(base))
    if isinstance(base, Path) and not exists(base) and not find_parts(base):
        raise UsageError(f"{root}: no such folder: check --root")
    for path in given:
        found, prefix = _search_given(path, root=base)
        for clip in found:
            parts = (prefix if len(given) > 1 else "", clip.name)
            key = "/".join(filter(None, parts)) or Path(path).resolve().name
            size = clip.size_bytes
            made = Clip(
                key=key,
                path=clip.path,
                size_bytes=stored_size(clip.path, clip.source) if size is None else size,
                source=clip.source,
                label=clip.label,
                split=clip.split,
            )
            if key in clips:
                raise UsageError(
                    f"{made.origin} and {clips[key].origin}: both would be clip {key!r}: "
                    "rename one, or give one folder that holds both"
                )
            clips[key] = made
    if not clips:
        searched = ", ".join(map(str, paths))
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        raise UsageError(
            f"{searched}: no video found, wanted files that end in {suffixes}, {WANTED_FRAMES}, "
            "or tars or zips of these"
        )
    _check_missing(clips)
    return [clips[key] for key in sorted(clips)]


def _place(given: str | Path) -> Path | str:
    """What a user gave: an absolute path, or the address of a store."""
    text = os.fspath(given)
    if not is_address(text):
        return local_path(text).absolute()
    check_address(text)
    return file_of(text) if text.startswith("file:") else text.rstrip("/")


def _archive_of(place: Path | str) -> Path | None:
    return archive_of(place) if isinstance(place, Path) else None


def _search_given(
    path: Path | str, *, root: Path | str | None
) -> tuple[Iterable[ClipCandidate], str]:
    """What is in a place that the user gave, and what keys start with among several of them."""
    if isinstance(path, str):
        name = PurePosixPath(path).name
        return find_in_store(path), name if without_suffix(name) == name else ""
    if path.is_dir():
        return _search_folder(path), path.resolve().name
    if archive_of(path) == path and find_parts(path):
        return find_in_zip(path), path.stem
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder: check the path of the videos")
    if path.suffix.lower() in LIST_SUFFIXES:
        folder = root or Path(os.path.normpath(path.parent))
        return find_in_list(path, root=folder, search=_search_listed), path.stem
    if path.suffix.lower() == ".tar":
        return find_in_tar(path), path.stem
    if path.name.lower().endswith(_COMPRESSED):
        raise UsageError(f"{path}: a compressed tar cannot be read in place: uncompress it")
    return [ClipCandidate(path.name, path)], ""


def _search_listed(path: Path | str) -> Iterable[ClipCandidate]:
    """What is in a path that a list names, or in its root."""
    if isinstance(path, str):
        return find_in_store(path)
    if path.is_file() and path.suffix.lower() != ".tar" and archive_of(path) != path:
        return [ClipCandidate("", path)]
    return _search_given(path, root=None)[0]


def _search_folder(root: Path) -> Iterator[ClipCandidate]:
    """Every video, frame folder and archive below; a folder reached twice is read once."""
    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(root, onerror=raise_unreadable, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen:
            subfolders.clear()
            continue
        seen.add(here.resolve())
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = here.relative_to(root)
        if holds_frames(names, folder=str(here)):
            yield ClipCandidate("" if here == root else inside.as_posix(), here, FrameFolder())
        archives = set()
        for name in sorted(names):
            file = here / name
            suffix = file.suffix.lower()
            if name.startswith(".") or file.is_dir():
                continue
            if suffix in VIDEO_SUFFIXES:
                yield ClipCandidate((inside / name).as_posix(), file)
            elif suffix == ".tar":
                yield from _search_archive((inside / file.stem).as_posix(), find_in_tar(file), file)
            elif (archive := archive_of(file)) is not None and archive not in archives:
                archives.add(archive)
                below = (inside / archive.stem).as_posix()
                yield from _search_archive(below, find_in_zip(archive), archive)
            elif name.lower().endswith(_COMPRESSED):
                logger.warning("%s: a compressed tar cannot be read in place; left out", file)


def _search_archive(
    name: str, found: Iterable[ClipCandidate], archive: Path
) -> Iterator[ClipCandidate]:
    """What an archive in a folder holds, as if it were a folder called `name`."""
    empty = True
    for clip in found:
        empty = False
        yield replace(clip, name=f"{name}/{clip.name}" if clip.name else name)
    if empty:
        logger.warning("%s: holds no clips; left out", archive)


def _check_missing(clips: dict[str, Clip]) -> None:
    """Refuses a list none of whose files is there; a few missing ones are only quarantined."""
    missing = [
        clip
        for clip in clips.values()
        if clip.size_bytes == 0
        and (
            isinstance(clip.source, StoredVideo) or (clip.source is None and not exists(clip.path))
        )
    ]
    if len(missing) == len(clips):
        raise UsageError(
            f"{missing[0].origin}: no such file, nor any other of the {len(clips)} listed: "
            "lines of a list are relative to --root, or without it to the list's own folder"
        )
    if missing:
        first = missing[0].origin
        logger.warning("%d of %d clips are not there, first %s", len(missing), len(clips), first)
