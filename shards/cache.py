"""cache.json: what made a cache, its fingerprint, and the refusal of any other cache.

    {"format": "deltatok-patches", "format_version": 1, "fingerprint": "sha256:...",
     "parent_fingerprint": null, "shape": {...}, "identity": {...}, "backbone": {...},
     "licence": "...", "software": {...}, "counts": {...}, "files": {...}, "complete": true}

`identity` holds everything that changes a stored number, and only that; the fingerprint is its
hash. Called by every writer (`open_cache`, `finish_cache`) and every reader (`read_cache_info`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cache_info import (
    BLACK,
    CHANNEL_SCALE,
    DELTAS,
    FORMAT_VERSION,
    MAX_AXIS,
    PATCHES,
    CacheInfo,
    CacheShape,
    parse_cache_info,
)
from .errors import CacheMismatch, UsageError
from .files import (
    create_bytes,
    is_partial,
    json_bytes,
    sha256_file,
    write_bytes,
    write_json,
)
from .identity import canonical_json, checksum, compare, fingerprint, plain
from .index import INDEX, index_bytes
from .notice import NOTICE, notice_bytes
from .plan import PLAN, num_shards, read_plan
from .records import read_all_clips
from .strict_json import read_json

__all__ = [
    "BLACK",
    "CHANNEL_SCALE",
    "DELTAS",
    "FORMAT_VERSION",
    "MAX_AXIS",
    "PATCHES",
    "CacheInfo",
    "CacheShape",
    "canonical_json",
    "compare",
    "fingerprint",
    "finish_cache",
    "open_cache",
    "read_cache_info",
    "reopen_cache",
]

FINISHED_FILES = (PLAN, BLACK, CHANNEL_SCALE, NOTICE, INDEX)
"""Files beside the shards whose size and SHA-256 `finish_cache` records, where they exist."""


def read_cache_info(folder: Path | str, *, format: str | None = None) -> CacheInfo:
    """What the cache.json of `folder` says.

    Raises UsageError if there is no such folder, CacheMismatch if it is no cache, a newer one, or
    another `format` than asked, DamagedShard if cache.json contradicts itself.
    """
    folder = Path(folder)
    path = folder / "cache.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: give the folder of a cache")
    if not path.is_file():
        raise CacheMismatch(f"{folder}: not a deltatok cache (it has no cache.json)")
    info = parse_cache_info(read_json(path), where=str(path))
    if format is not None and info.format != format:
        raise CacheMismatch(f"{folder}: is a {info.format} cache, wanted a {format} cache")
    return info


def open_cache(folder: Path | str, info: CacheInfo) -> CacheInfo:
    """Makes `folder` a cache of this identity, or checks that it is one; gives its cache.json.

    Raises CacheMismatch naming the first field that differs, or when the folder holds something
    else; UsageError when it cannot be written.
    """
    folder = Path(folder)
    path = folder / "cache.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            strangers = [child for child in sorted(folder.iterdir()) if not _ours(child, info)]
            # cache.json comes first: what another process has just begun is no stranger.
            if strangers and not path.exists():
                raise CacheMismatch(
                    f"{folder}: not a deltatok cache, and it holds {strangers[0].name!r}: "
                    "give a new or empty folder"
                )
            create_bytes(path, json_bytes(_to_json(info)))
        (folder / "shards").mkdir(exist_ok=True)
        _write_notice(folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}): give another folder"
        ) from error
    stored = read_cache_info(folder)
    compare(
        _compared(stored), _compared(info), what_got=str(folder), what_wanted="the settings given"
    )
    return stored


def reopen_cache(folder: Path | str) -> CacheInfo:
    """Takes `complete` back, before shards join or are made again; gives the new cache.json."""
    folder = Path(folder)
    info = replace(read_cache_info(folder), counts={}, files={}, complete=False)
    write_json(folder / "cache.json", _to_json(info))
    return info


def finish_cache(folder: Path | str, counts: Mapping[str, int]) -> CacheInfo:
    """Marks the cache complete; gives its new cache.json.

    Writes index.jsonl. Records `counts`, to which "shards" and "windows" are added from the
    done-records, and the hashes of the files beside the shards. Raises CacheMismatch if a shard of
    the plan is not done.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    records = read_all_clips(folder)
    wanted = num_shards(read_plan(folder)) if (folder / PLAN).is_file() else len(records)
    if [record.shard for record in records] != list(range(wanted)):
        raise CacheMismatch(
            f"{folder}: {len(records)} shards are done, wanted the {wanted} of the plan: "
            "run the command that makes this cache again"
        )
    _write_notice(folder)
    write_bytes(folder / INDEX, index_bytes(folder, records))
    totals = {"shards": len(records), "windows": sum(record.rows for record in records)}
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in FINISHED_FILES
        if (folder / name).is_file()
    }
    finished = replace(info, counts={**counts, **totals}, files=files, complete=True)
    write_json(folder / "cache.json", _to_json(finished))
    return finished


def _ours(child: Path, info: CacheInfo) -> bool:
    """Whether a writer of this cache leaves it in the folder before cache.json: int8 scales are
    agreed on first, because cache.json names their hash."""
    storage = info.identity.get("storage")
    int8 = isinstance(storage, dict) and storage.get("dtype") == "int8"
    return is_partial(child) or (int8 and child.name == CHANNEL_SCALE)


def refresh_derived(folder: Path | str) -> list[str]:
    """Writes NOTICE.txt and, in a finished cache, index.jsonl again where they are missing or not
    what they were; gives their names.

    A finished cache whose done-records no longer give the index that cache.json tells of is
    finished no more: `complete` is taken back.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    written = []
    wanted = notice_bytes(info.licence, info.backbone)
    if not _is_same(folder / NOTICE, info, wanted):
        write_bytes(folder / NOTICE, wanted)
        written.append(NOTICE)
    if info.complete and INDEX in info.files:
        index = index_bytes(folder, read_all_clips(folder))
        if hashlib.sha256(index).hexdigest() != info.files[INDEX]["sha256"]:
            reopen_cache(folder)
        elif not _is_same(folder / INDEX, info, index):
            write_bytes(folder / INDEX, index)
            written.append(INDEX)
    return written


def _is_same(path: Path, info: CacheInfo, wanted: bytes) -> bool:
    """Whether the file is as `wanted`, or at least as it was when the cache was finished."""
    if path.is_symlink() or not path.is_file():
        return False
    known = info.files.get(path.name, {}).get("sha256")
    return sha256_file(path) in (known, hashlib.sha256(wanted).hexdigest())


def _compared(info: CacheInfo) -> dict[str, Any]:
    shape = info.shape
    return {
        "format": info.format,
        "format_version": info.format_version,
        "identity": info.identity,
        "shape": {
            "num_frames": shape.num_frames,
            "num_tokens": shape.num_tokens,
            "grid": None if shape.grid is None else list(shape.grid),
            "hidden_size": shape.hidden_size,
        },
        "parent_fingerprint": info.parent_fingerprint,
    }


def _write_notice(folder: Path) -> None:
    if not (folder / NOTICE).exists():
        info = read_cache_info(folder)
        create_bytes(folder / NOTICE, notice_bytes(info.licence, info.backbone))


def _to_json(info: CacheInfo) -> dict[str, Any]:
    value = {
        **_compared(info),
        "identity": plain(info.identity),
        "fingerprint": info.fingerprint,
        "backbone": info.backbone,
        "licence": info.licence,
        "software": info.software,
        "counts": info.counts,
        "files": info.files,
        **({"exported_from": info.exported_from} if info.exported_from else {}),
        "complete": info.complete,
    }
    return {**value, "checksum": checksum(value)}
