"""cache.json: what made a cache, its fingerprint, and the refusal of any other cache.

    {"format": "deltatok-patches", "format_version": 1, "fingerprint": "sha256:...",
     "parent_fingerprint": null, "shape": {...}, "identity": {...}, "backbone": {...},
     "licence": "...", "software": {...}, "counts": {...}, "files": {...}, "complete": true}

`identity` holds everything that changes a stored number, and only that; the fingerprint is its
hash. Called by every writer (`open_cache`, `finish_cache`) and every reader (`read_cache_info`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .checked import Fields, shown
from .errors import CacheMismatch, DamagedShard, UsageError
from .files import create_bytes, is_partial, json_bytes, read_json, sha256_file, write_json
from .identity import canonical_json, compare, fingerprint, plain
from .plan import PLAN, num_shards, read_plan
from .records import read_all_done

__all__ = [
    "BLACK",
    "CHANNEL_SCALE",
    "DELTAS",
    "FORMAT_VERSION",
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

PATCHES = "deltatok-patches"
DELTAS = "deltatok-deltas"
BLACK = "black.npy"
CHANNEL_SCALE = "channel_scale.npy"
FORMAT_VERSION = 1

MAX_AXIS = 2**20
"""No axis of a cache (frames, tokens, channels) is longer: a guard against absurd values."""

FINISHED_FILES = (PLAN, BLACK, CHANNEL_SCALE)
"""Files beside the shards whose size and SHA-256 `finish_cache` records, where they exist."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """The axes that all windows of a cache share."""

    num_frames: int
    """T, frames a window; delta caches: T delta tokens a window."""
    num_tokens: int | None
    """N, patch tokens a frame; None in delta caches."""
    grid: tuple[int, int] | None
    """(h, w) of the patches, N = h * w; None in delta caches."""
    hidden_size: int
    """D, channels a token."""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The contents of a cache.json."""

    format: str
    """`deltatok-patches` or `deltatok-deltas`."""
    identity: dict[str, Any]
    """All that determines the stored numbers, as plain JSON values (see FORMAT.md)."""
    shape: CacheShape
    parent_fingerprint: str | None = None
    """Delta caches: the fingerprint of the patch cache they were made from."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """Name and licence notice of the backbone, for people; not part of the identity."""
    licence: str = ""
    """The licence that the stored features are under."""
    software: dict[str, str] = field(default_factory=dict)
    """Versions of what made the cache; not part of the identity."""
    counts: dict[str, int] = field(default_factory=dict)
    """Totals, known when the cache is complete."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{"bytes", "sha256"} of FINISHED_FILES, known when the cache is complete."""
    exported_from: dict[str, Any] = field(default_factory=dict)
    """Caches made by `export`: the caches and the selection that its windows come from."""
    complete: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """ "sha256:" + hash of the canonical JSON of [format, format_version, identity]."""
        return fingerprint(self.format, self.format_version, self.identity)


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
    info = _parse(read_json(path), where=str(path))
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
            strangers = [child for child in sorted(folder.iterdir()) if not is_partial(child)]
            # cache.json comes first: what another process has just begun is no stranger.
            if strangers and not path.exists():
                raise CacheMismatch(
                    f"{folder}: not a deltatok cache, and it holds {strangers[0].name!r}: "
                    "give a new or empty folder"
                )
            create_bytes(path, json_bytes(_to_json(info)))
        (folder / "shards").mkdir(exist_ok=True)
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

    Records `counts`, to which "shards" and "windows" are added from the done-records, and the
    hashes of the files beside the shards. Raises CacheMismatch if a shard of the plan is not done.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    records = read_all_done(folder)
    wanted = num_shards(read_plan(folder)) if (folder / PLAN).is_file() else len(records)
    if [record.shard for record in records] != list(range(wanted)):
        raise CacheMismatch(
            f"{folder}: {len(records)} shards are done, wanted the {wanted} of the plan: "
            "run the command that makes this cache again"
        )
    totals = {"shards": len(records), "windows": sum(record.rows for record in records)}
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in FINISHED_FILES
        if (folder / name).is_file()
    }
    finished = replace(info, counts={**counts, **totals}, files=files, complete=True)
    write_json(folder / "cache.json", _to_json(finished))
    return finished


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


def _to_json(info: CacheInfo) -> dict[str, Any]:
    return {
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


def _parse(value: object, *, where: str) -> CacheInfo:
    fields = Fields(value, where=where)
    name = fields.text("format")
    if name not in (PATCHES, DELTAS):
        raise CacheMismatch(
            f"{where}: not a deltatok cache (format {shown(name)}, known: {PATCHES}, {DELTAS})"
        )
    version = fields.integer("format_version", low=1)
    if version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{where}: format_version {version}, this release reads up to {FORMAT_VERSION}: "
            "update deltatok"
        )
    info = CacheInfo(
        format=name,
        format_version=version,
        identity=fields.mapping("identity"),
        shape=_parse_shape(fields.mapping("shape"), patches=name == PATCHES, where=where),
        parent_fingerprint=fields.optional_text("parent_fingerprint"),
        backbone=fields.mapping("backbone"),
        licence=fields.text("licence"),
        software=fields.text_mapping("software"),
        counts=fields.count_mapping("counts"),
        files=_parse_files(fields.mapping("files"), where=where),
        exported_from=fields.mapping("exported_from") if fields.has("exported_from") else {},
        complete=fields.boolean("complete"),
    )
    stored = fields.text("fingerprint")
    if stored != info.fingerprint:
        raise DamagedShard(
            f"{where}: its identity hashes to {info.fingerprint}, but it says {shown(stored)}: "
            "the file was edited; restore it, or make the cache again in another folder"
        )
    return info


def _parse_shape(value: dict[str, Any], *, patches: bool, where: str) -> CacheShape:
    fields = Fields(value, where=f"{where}: shape")
    num_frames = fields.integer("num_frames", low=1, high=MAX_AXIS)
    hidden_size = fields.integer("hidden_size", low=1, high=MAX_AXIS)
    if not patches:
        return CacheShape(
            num_frames=num_frames, num_tokens=None, grid=None, hidden_size=hidden_size
        )
    num_tokens = fields.integer("num_tokens", low=1, high=MAX_AXIS)
    grid = fields.integers("grid", high=MAX_AXIS)
    if len(grid) != 2 or grid[0] * grid[1] != num_tokens:
        raise DamagedShard(
            f"{where}: shape.grid is {shown(list(grid))}, wanted two numbers whose product is "
            f"num_tokens = {num_tokens}: make the cache again"
        )
    return CacheShape(
        num_frames=num_frames,
        num_tokens=num_tokens,
        grid=(grid[0], grid[1]),
        hidden_size=hidden_size,
    )


def _parse_files(value: dict[str, Any], *, where: str) -> dict[str, dict[str, Any]]:
    files = {}
    for name, entry in value.items():
        fields = Fields(entry, where=f"{where}: files.{name}")
        files[name] = {"bytes": fields.integer("bytes"), "sha256": fields.text("sha256")}
    return files
