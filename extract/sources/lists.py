"""Lists of videos (.txt, .csv, .jsonl) -> clips.

    .txt     a path a line
    .csv     a header with `path`, or with Kinetics' `youtube_id,time_start,time_end`; `label` and
             `split` where they are there
    .jsonl   objects with the same names

Paths are relative to the root, and stay in it whatever a list says. A path may be the address of a
video in a store: below the root, where that is an address too; else its key is all of the address
but the scheme. A row of Kinetics means the
clip of that trimmed name, `<youtube_id>_<start, 6 digits>_<end, 6 digits>`, anywhere in the root.
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ...shards.errors import UsageError
from ...shards.files import check_address, is_address, local_path, read_text
from .clip import (
    ClipCandidate,
    StoredVideo,
    exists,
    is_plain_name,
    raise_unreadable,
    shown_name,
    without_suffix,
)
from .stored import LIST_SUFFIXES, file_of, is_archive, split_address, stored_videos

logger = logging.getLogger(__name__)

KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
_WANTED = (
    "wanted path, or Kinetics' youtube_id, time_start and time_end; and, if known, label and split"
)
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_Found = tuple[str, list[ClipCandidate]]
"""A line's name in the root, and the clips there."""
Search = Callable[[Path | str], Iterable[ClipCandidate]]


def find_in_list(path: Path, *, root: Path | str, search: Search) -> Iterator[ClipCandidate]:
    """What the list names, in its order.

    Args:
        root: what its paths are relative to; absolute, or an address.
        search: gives everything in a path; Kinetics' names are looked up in `search(root)`.

    Raises:
        UsageError: a list that cannot be read, lacks columns, or names something outside of root.
    """
    rows = list(_read_rows(path))
    if rows and "path" not in rows[0][1] and path.suffix.lower() != ".txt":
        yield from _find_kinetics(path, rows, root=root, search=search)
        return
    texts = [(where, _text(row, "path", where=where)) for where, row in rows]
    places = dict(_find_stored(texts, root=root))
    if isinstance(root, Path):
        on_disk = [(where, text) for where, text in texts if where not in places]
        places |= _find_on_disk(on_disk, root=root, search=search)
    for where, row in rows:
        name, found = places[where]
        label, split = (_text(row, field, where=where) or None for field in ("label", "split"))
        for clip in found:
            yield replace(
                clip,
                name="/".join(filter(None, (name, clip.name))),
                label=label or clip.label,
                split=split or clip.split,
            )


def _find_stored(
    texts: Iterable[tuple[str, str]], *, root: Path | str
) -> Iterator[tuple[str, _Found]]:
    """Those of the lines (place, text) that name a video in a store."""
    addresses = {}
    for where, text in texts:
        is_file = isinstance(root, Path) and text.startswith("file:")
        if not is_file and (is_address(text) or isinstance(root, str)):
            addresses[where] = text if is_address(text) else f"{root}/{text}"
            _check_video_address(where, addresses[where], root=root)
    videos = stored_videos(list(addresses.values()))
    for (where, address), video in zip(addresses.items(), videos, strict=True):
        below = f"{root}/" if isinstance(root, str) else f"{address.partition('://')[0]}://"
        yield where, (address.removeprefix(below), [video])


def _check_video_address(where: str, address: str, *, root: Path | str) -> None:
    try:
        check_address(address)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    _, name = split_address(address)
    if not is_plain_name(address) or {"", ".", ".."} & set(name.split("/")):
        raise UsageError(
            f"{where}: got the address {shown_name(address)}, wanted that of a video, like "
            "s3://bucket/folder/video.mp4: correct it"
        )
    if isinstance(root, str) and not address.startswith(f"{root}/"):
        raise UsageError(
            f"{where}: {address} leaves {root}, the address that its paths are relative to: pass "
            "--root with one that all of the videos are below, or none if all are addresses"
        )
    if is_archive(name) or PurePosixPath(name).suffix.lower() in LIST_SUFFIXES:
        raise UsageError(
            f"{where}: {address}: from a store only videos are taken: copy it to a disk, or name "
            "its videos here"
        )


def _find_on_disk(
    texts: Iterable[tuple[str, str]], *, root: Path, search: Search
) -> Iterator[tuple[str, _Found]]:
    """What the lines (place, text) name in a folder or an archive."""
    real_root = root.resolve()
    archive = None if root.is_dir() else {clip.name: clip for clip in search(root)}
    for where, text in texts:
        file = _resolve_in_root(where, text, root=root, real_root=real_root)
        name = "" if file == root else file.relative_to(root).as_posix()
        missing = [ClipCandidate("", file)]
        if archive is not None:
            found = [replace(archive[name], name="")] if name in archive else missing
        else:
            found = list(search(file)) if exists(file) else missing
        if not found:
            raise UsageError(f"{where}: {file}: no video in it: take the line out, or name a video")
        yield where, (name, found)


def _resolve_in_root(where: str, text: str, *, root: Path, real_root: Path) -> Path:
    """The file of that path, as written and behind all links inside of the root: a list from
    elsewhere reads nothing but the videos."""
    try:
        text = str(file_of(text)) if text.startswith("file://") else text
        local_path(text)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if not text or not is_plain_name(text):
        raise UsageError(
            f"{where}: got the path {shown_name(text)}, wanted that of a video, valid UTF-8: "
            "correct it, or rename the file"
        )
    if PurePosixPath(text).suffix.lower() in LIST_SUFFIXES:
        raise UsageError(
            f"{where}: {text} is a list itself, and lists cannot be nested: give both lists, or "
            "name its videos here"
        )
    file = Path(os.path.normpath(root / text))
    real = Path(os.path.realpath(file))  # unlike Path.resolve it takes a loop of links
    if not file.is_relative_to(root) or not real.is_relative_to(real_root):
        raise UsageError(
            f"{where}: {text} leaves {root}, the folder that its paths are relative to: pass "
            "--root with a folder that holds all of the videos"
        )
    return file


def _find_kinetics(
    path: Path, rows: list[tuple[str, dict[str, Any]]], *, root: Path | str, search: Search
) -> Iterator[ClipCandidate]:
    """The clips of an annotation file of Kinetics; one that is not there is named all the same."""
    by_name: dict[str, list[ClipCandidate]] = {}
    for clip in search(root):
        by_name.setdefault(without_suffix(PurePosixPath(clip.name).name), []).append(clip)
    taken: dict[str, str | None] = {}
    repeated = 0
    for where, row in rows:
        name = _trimmed_name(row, where=where)
        label, split = (_text(row, field, where=where) or None for field in ("label", "split"))
        if name in taken:
            repeated += 1
            if taken[name] != label:
                logger.warning(
                    "%s: %s is %s and %s: kept as the first", where, name, taken[name], label
                )
            continue
        taken[name] = label
        chosen = _choose(by_name.get(name, []), label=label, split=split, where=where)
        clip = chosen or _missing(f"{name}.mp4", root)
        yield replace(clip, label=label or clip.label, split=split or clip.split)
    if repeated:
        logger.warning("%s: %d of %d rows name a clip again", path, repeated, len(rows))


def _missing(name: str, root: Path | str) -> ClipCandidate:
    if isinstance(root, Path):
        return ClipCandidate(name, root / name)
    return ClipCandidate(name, Path(name), StoredVideo(root, name, ""), size_bytes=0)


def _choose(
    found: list[ClipCandidate], *, label: str | None, split: str | None, where: str
) -> ClipCandidate | None:
    """The one of several clips of this name that lies in a folder of its class and split."""
    if len(found) < 2:
        return found[0] if found else None
    for wanted in ({label, split}, {label}, {split}):
        folders = {str(name).replace(" ", "_") for name in wanted if name}
        inside = [
            clip
            for clip in found
            if folders and folders <= {part.replace(" ", "_") for part in clip.name.split("/")}
        ]
        if len(inside) == 1:
            return inside[0]
    raise UsageError(
        f"{where}: {found[0].name} and {found[1].name}: both have its name: move one out of the "
        "root, or give a root that holds one of them"
    )


def _trimmed_name(row: Mapping[str, Any], *, where: str) -> str:
    video = _text(row, "youtube_id", where=where)
    if not _YOUTUBE_ID.fullmatch(video):
        raise UsageError(
            f"{where}: youtube_id is {video!r}, wanted letters, digits, - and _: correct the line"
        )
    times = []
    for field in ("time_start", "time_end"):
        text = _text(row, field, where=where)
        try:
            time_s = float(text)
        except ValueError:
            time_s = -1.0
        if not (0 <= time_s < 1e6 and time_s.is_integer()):
            raise UsageError(
                f"{where}: {field} is {text!r}, wanted whole seconds, 0 to 999999: correct the line"
            )
        times.append(int(time_s))
    return f"{video}_{times[0]:06d}_{times[1]:06d}"


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, fields) of every line that is not empty."""
    try:
        text = read_text(path, encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise_unreadable(error)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _read_csv(path, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        line, where = line.strip(), f"{path}: line {number}"
        if not line or (suffix == ".txt" and line.startswith("#")):
            continue
        if suffix == ".txt":
            yield where, {"path": line}
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: no JSON ({error}): wanted one object a line") from error
        if not isinstance(fields, dict):
            raise UsageError(f"{where}: got {line[:80]}, wanted a JSON object: correct the line")
        _check_columns(fields, where=where)
        yield where, fields


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        _check_columns(columns, where=str(path))
        reader.fieldnames = columns
        for row in reader:
            yield f"{path}: line {reader.line_num}", row
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num}: no CSV ({error}): correct it") from error


def _check_columns(columns: Iterable[str], *, where: str) -> None:
    names = list(columns)
    if "path" in names or set(KINETICS_COLUMNS) <= set(names):
        return
    missing = [name for name in KINETICS_COLUMNS if name not in names]
    lacks = f"lacks {', '.join(missing)}" if len(missing) < 3 else "lacks path"
    raise UsageError(
        f"{where}: {lacks}: got the columns {', '.join(names)[:300] or '(none)'}; {_WANTED}"
    )


def _text(row: Mapping[str, Any], name: str, *, where: str) -> str:
    """A field as text without surrounding spaces; empty where there is none."""
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:g}" if isinstance(value, float) else str(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is {value!r}, wanted text: correct the line")
    return value.strip()
