"""cache.json: what made a cache, its fingerprint, and the refusal of any other cache.

    {"format": "deltatok-patches", "format_version": 1, "fingerprint": "sha256:...",
     "parent_fingerprint": null, "shape": {...}, "identity": {...}, "backbone": {...},
     "licence": "...", "software": {...}, "counts": {...}, "files": {...}, "complete": true}

`identity` holds everything that changes a stored number, and only that; the fingerprint is the hash
of its canonical JSON. NOTICE.txt, written when a cache is begun, holds the terms that go with it,
for whoever gets the folder without knowing why.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CacheMismatch, DamagedShard, UsageError
from .files import (
    create_bytes,
    flush,
    flush_names,
    is_partial,
    json_bytes,
    local_path,
    partial_path,
    publish,
    remove,
    sha256_file,
    write_bytes,
    write_json,
)
from .index import INDEX, index_header, index_line
from .plan import PLAN, Plan, keys_sha256, shard_keys
from .records import (
    QUARANTINE,
    DoneRecord,
    Quarantined,
    StoredFile,
    done_shards,
    iterate_done,
    read_done,
    write_quarantine,
)
from .schema import ADVICE, STORED, canonical_json, load, plain, read_json, shown
from .stores.mirror import local_folder
from .stores.upload import UPLOAD, top_begun, top_changed

PATCHES = "deltatok-patches"
DELTAS = "deltatok-deltas"
BLACK = "black.npy"
CHANNEL_SCALE = "channel_scale.npy"
PCA = "pca.npy"
NOTICE = "NOTICE.txt"
FORMAT_VERSION = 1
UNRELEASED_PLAN = "plan.jsonl"
"""Only caches have it that were made before format 1 was fixed."""

MAX_AXIS = 2**20
"""No axis of a cache (frames, tokens, channels) is longer: a guard against absurd values."""

MAX_WINDOW_VALUES = 2**30
"""Numbers in the tokens of a window: 4 GiB in float32 (a guess), such a guard too."""

FINISHED_FILES = (PLAN, BLACK, CHANNEL_SCALE, PCA, NOTICE, INDEX, QUARANTINE)
"""Files beside the shards whose size and SHA-256 `finish_cache` records, where they exist."""

SAME_SETTINGS = (
    "use a cache that was made with the same settings, or make a new one in another folder"
)


def fingerprint(format_name: str, format_version: int, identity: Mapping[str, Any]) -> str:
    """ "sha256:" + the hash of [format_name, format_version, identity] as `canonical_json`."""
    text = canonical_json([format_name, format_version, identity])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def checksum(value: Mapping[str, Any]) -> str:
    """ "sha256:" + the hash of a JSON object as `canonical_json`, without its field `checksum`."""
    text = canonical_json({name: item for name, item in value.items() if name != "checksum"})
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def compare(
    got: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    what_got: str,
    what_wanted: str,
    fields: Sequence[str] | None = None,
    advice: str = SAME_SETTINGS,
) -> None:
    """Raises CacheMismatch naming the first field (dotted, in sorted order) that differs.

    `fields` limits the comparison to these dotted names and what lies below them. `advice`: what to
    do, the end of the message.
    """
    for name, shown_got, shown_wanted in differences(got, wanted):
        if fields is None or any(_below(name, prefix) for prefix in fields):
            raise CacheMismatch(
                f"{what_got}: {name} is {shown_got}, but {shown_wanted} in {what_wanted}: {advice}"
            )


def differences(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of every field that differs, in sorted order: its dotted name, and both values as they may
    stand in a message. A whole float equals the integer; what one side lacks is "missing", which
    differs from any value, null too."""
    ours, theirs = flatten(got), flatten(wanted)

    def value_in(side: dict[str, Any], name: str) -> str:
        return shown(side[name]) if name in side else "missing"

    return [
        (name, value_in(ours, name), value_in(theirs, name))
        for name in sorted(ours.keys() | theirs.keys())
        if not (name in ours and name in theirs)
        or canonical_json(ours[name]) != canonical_json(theirs[name])
    ]


def flatten(values: Mapping[str, Any], *, under: str = "") -> dict[str, Any]:
    """Nested mappings as one: dotted name -> what is no mapping, or an empty one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, under=f"{under}{name}.")
        else:
            found[f"{under}{name}"] = value
    return found


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.") or prefix.startswith(f"{name}.")


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
    """Known when the cache is complete: clips of the plan, how many of them are quarantined,
    windows, frames, shards."""
    abs_max: float | None = None
    """The largest absolute value of all tokens, known when the cache is complete."""
    beyond_float16: int | None = None
    """How many of all tokens' values float16 could not hold, known when the cache is complete."""
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


def parse_cache_info(value: object, *, where: str) -> CacheInfo:
    """The cache.json in parsed JSON; raises CacheMismatch for what is no cache or a newer one,
    DamagedShard for one that contradicts itself."""
    header = load(_Header, value, where=where, how=STORED)
    if header.format not in (PATCHES, DELTAS):
        raise CacheMismatch(
            f"{where}: not a deltatok cache (format {shown(header.format)}, known: {PATCHES}, "
            f"{DELTAS})"
        )
    if header.format_version < 1:
        raise DamagedShard(f"{where}: format_version is {header.format_version}: {ADVICE}")
    if header.format_version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{where}: format_version {header.format_version}, this release reads up to "
            f"{FORMAT_VERSION}: update deltatok"
        )
    info = load(CacheInfo, value, where=where, how=STORED)
    _check_shape(info.shape, patches=info.format == PATCHES, where=where)
    for name, entry in info.files.items():
        load(StoredFile, entry, where=f"{where}: files.{name}", how=STORED)
    if header.fingerprint != info.fingerprint:
        raise DamagedShard(
            f"{where}: its identity hashes to {info.fingerprint}, but it says "
            f"{shown(header.fingerprint)}: the file was edited; restore it, or make the cache "
            "again in another folder"
        )
    return info


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What cache.json says first."""

    format: str
    format_version: int
    fingerprint: str


def _check_shape(shape: CacheShape, *, patches: bool, where: str) -> None:
    axes = {"num_frames": shape.num_frames, "hidden_size": shape.hidden_size}
    if patches:
        axes["num_tokens"] = shape.num_tokens or 0
    for name, size in axes.items():
        if not 1 <= size <= MAX_AXIS:
            raise DamagedShard(
                f"{where}: shape: {name} is {shown(getattr(shape, name))}, wanted an integer from "
                f"1 to {MAX_AXIS}: {ADVICE}"
            )
    if patches and (shape.grid is None or math.prod(shape.grid) != shape.num_tokens):
        raise DamagedShard(
            f"{where}: shape.grid is {shown(shape.grid)}, wanted two numbers whose product is "
            f"num_tokens = {shape.num_tokens}: make the cache again"
        )
    num_values = math.prod(axes.values())
    if num_values > MAX_WINDOW_VALUES:
        raise DamagedShard(
            f"{where}: shape gives {num_values} numbers a window, wanted at most "
            f"{MAX_WINDOW_VALUES}: make the cache again"
        )


def read_cache_info(folder: Path | str, *, format: str | None = None) -> CacheInfo:
    """What the cache.json of `folder` says.

    Raises UsageError if there is no such folder, CacheMismatch if it is no cache, a newer one, or
    another `format` than asked, DamagedShard if cache.json contradicts itself.
    """
    folder = local_folder(folder)
    path = folder / "cache.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: give the folder of a cache")
    if not path.is_file():
        raise CacheMismatch(f"{folder}: not a deltatok cache (it has no cache.json)")
    info = parse_cache_info(read_json(path), where=str(path))
    if UNRELEASED_PLAN in info.files or (folder / UNRELEASED_PLAN).exists():
        raise CacheMismatch(
            f"{folder}: made before format 1 was fixed (it has {UNRELEASED_PLAN}): extract again, "
            "into another folder"
        )
    if format is not None and info.format != format:
        raise CacheMismatch(f"{folder}: is a {info.format} cache, wanted a {format} cache")
    return info


def data_suffix(info: CacheInfo) -> str:
    """Of the files of the cache's shards."""
    return ".zarr.zip" if info.format == PATCHES else ".tar"


def open_cache(folder: Path | str, info: CacheInfo) -> CacheInfo:
    """Makes `folder` a cache of this identity, or checks that it is one; gives its cache.json.

    Raises CacheMismatch naming the first field that differs, or when the folder holds something
    else; UsageError when it cannot be written.
    """
    folder = local_path(folder)
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
            top_begun(folder, "cache.json")
        flush_names(folder)  # a run before may have been killed when it had not done so
        (folder / "shards").mkdir(exist_ok=True)
        _write_notice(folder)
        flush(folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}): give another folder"
        ) from error
    stored = read_cache_info(folder)
    compare(
        compared(stored), compared(info), what_got=str(folder), what_wanted="the settings given"
    )
    return stored


def reopen_cache(folder: Path | str) -> CacheInfo:
    """Takes `complete` back, before shards join or are made again; gives the new cache.json."""
    folder = Path(folder)
    info = replace(
        read_cache_info(folder),
        counts={},
        abs_max=None,
        beyond_float16=None,
        files={},
        complete=False,
    )
    write_json(folder / "cache.json", _to_json(info))
    top_changed(folder, "cache.json")
    return info


def finish_cache(folder: Path | str) -> CacheInfo:
    """Marks the cache complete; gives its new cache.json.

    One pass over the plan and the done-records, of which one is held at a time: writes
    quarantine.jsonl and index.jsonl, adds up what cache.json tells of all shards, and records the
    hashes of the files beside the shards. Raises CacheMismatch if a shard of the plan is not done,
    DamagedShard for one that was made of other clips than the plan says.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    plan, done = Plan.open(folder), done_shards(folder)
    if len(done) != plan.num_shards or (done and done[-1] != len(done) - 1):
        raise CacheMismatch(
            f"{folder}: {len(done)} shards are done, wanted the {plan.num_shards} of the plan: "
            "run the command that makes this cache again"
        )
    _write_notice(folder)
    windows, abs_max, beyond_float16 = 0, 0.0, 0
    lost: list[Quarantined] = []
    partial = partial_path(folder / INDEX)
    try:
        with partial.open("xb") as file:
            file.write(index_header())
            for shard, keys in plan.keys_of_shards():
                record = read_done(folder, shard)
                if record is None:
                    raise CacheMismatch(
                        f"{folder}: shard {shard:06d} was taken back by another process: run the "
                        "command that makes this cache again"
                    )
                check_clips(folder, record, keys)
                file.write(index_line(record))
                windows += record.rows
                abs_max = max(abs_max, record.abs_max)
                beyond_float16 += record.beyond_float16
                lost += record.quarantined
        publish(partial, folder / INDEX)
    except BaseException:
        remove(partial)
        raise
    write_quarantine(folder, lost)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in FINISHED_FILES
        if (folder / name).is_file()
    }
    counts = {
        "clips": plan.num_clips,
        "quarantined": len(lost),
        "windows": windows,
        "frames": windows * info.shape.num_frames,
        "shards": len(done),
    }
    finished = replace(
        info,
        counts=counts,
        abs_max=abs_max,
        beyond_float16=beyond_float16,
        files=files,
        complete=True,
    )
    for name in (NOTICE, INDEX, QUARANTINE):
        top_changed(folder, name)
    write_json(folder / "cache.json", _to_json(finished))
    top_changed(folder, "cache.json")
    return finished


def check_clips(folder: Path, record: DoneRecord, planned: Sequence[str]) -> None:
    """Raises DamagedShard unless the shard of `record` was made of the clips of these keys, which
    the plan gives it."""
    keys = shard_keys(planned, record.lost)
    if (
        len(keys) != record.clips
        or len(keys) + len(record.quarantined) != len(planned)
        or keys_sha256(keys) != record.keys_sha256
    ):
        raise DamagedShard(
            f"{folder}: shard {record.shard:06d} was made of other clips than the plan says: "
            "the plan or shards/ was changed: restore it, or extract into another folder"
        )


def _ours(child: Path, info: CacheInfo) -> bool:
    """Whether a writer of this cache leaves it in the folder before cache.json: int8 scales and
    principal components are agreed on first, because cache.json names their hashes."""
    storage = info.identity.get("storage")
    int8 = isinstance(storage, dict) and storage.get("dtype") == "int8"
    is_scale = int8 and child.name == CHANNEL_SCALE
    is_pca = pca_of(info.identity) is not None and child.name == PCA
    return is_partial(child) or is_scale or is_pca or child.name == UPLOAD


def pca_of(identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`backbone.pca` of a patch cache's identity, or of the one a delta cache was made from; None
    where tokens are the backbone's features themselves."""
    patches = identity.get("patches", identity)
    backbone = patches.get("backbone") if isinstance(patches, Mapping) else None
    pca = backbone.get("pca") if isinstance(backbone, Mapping) else None
    return pca if isinstance(pca, Mapping) else None


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
        index = index_header() + b"".join(map(index_line, iterate_done(folder)))
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


def compared(info: CacheInfo) -> dict[str, Any]:
    """What two caches must have in common to be one."""
    return {
        "format": info.format,
        "format_version": info.format_version,
        "identity": info.identity,
        "shape": plain(asdict(info.shape)),
        "parent_fingerprint": info.parent_fingerprint,
    }


def notice_bytes(licence: str, backbone: Mapping[str, Any]) -> bytes:
    """The file for these fields of cache.json."""
    name = backbone.get("name")
    made_with = f"Backbone: {name}\n" if isinstance(name, str) else ""
    text = (
        "This folder holds features that a frozen image backbone computed from videos: numbers,\n"
        "no images. cache.json says what made them. Keep this file with every copy, whole or in\n"
        f"part.\n\n{made_with}Licence: {licence or 'not stated in cache.json'}\n\n"
        "Features made with DINOv3 are to be treated as DINO Materials: share them only under\n"
        "the DINOv3 License and with a copy of it, and acknowledge DINOv3 in publications\n"
        "(https://ai.meta.com/resources/models-and-libraries/dinov3-license/). The terms of the\n"
        "videos apply as well. This is a notice, not legal advice.\n"
    )
    return text.encode()


def _write_notice(folder: Path) -> None:
    if not (folder / NOTICE).exists():
        info = read_cache_info(folder)
        create_bytes(folder / NOTICE, notice_bytes(info.licence, info.backbone))


def _to_json(info: CacheInfo) -> dict[str, Any]:
    value = {
        **compared(info),
        "identity": plain(info.identity),
        "fingerprint": info.fingerprint,
        "backbone": info.backbone,
        "licence": info.licence,
        "software": info.software,
        "counts": info.counts,
        **({"abs_max": info.abs_max} if info.abs_max is not None else {}),
        **({"beyond_float16": info.beyond_float16} if info.beyond_float16 is not None else {}),
        "files": info.files,
        **({"exported_from": info.exported_from} if info.exported_from else {}),
        "complete": info.complete,
    }
    return {**value, "checksum": checksum(value)}
