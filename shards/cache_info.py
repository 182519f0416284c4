"""The contents of a cache.json, and how they are taken out of JSON that may be damaged or made up.

`cache` reads and writes the file, and names what is here again.
"""

from dataclasses import dataclass, field
from typing import Any

from .checked import Fields, shown
from .errors import CacheMismatch, DamagedShard
from .identity import fingerprint

PATCHES = "deltatok-patches"
DELTAS = "deltatok-deltas"
BLACK = "black.npy"
CHANNEL_SCALE = "channel_scale.npy"
FORMAT_VERSION = 1

MAX_AXIS = 2**20
"""No axis of a cache (frames, tokens, channels) is longer: a guard against absurd values."""

MAX_WINDOW_VALUES = 2**30
"""Numbers in the tokens of a window: 4 GiB in float32 (a guess), such a guard too."""


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


def parse_cache_info(value: object, *, where: str) -> CacheInfo:
    """The cache.json in parsed JSON; raises CacheMismatch for what is no cache or a newer one,
    DamagedShard for one that contradicts itself."""
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
        _check_size(num_frames * hidden_size, where=where)
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
    _check_size(num_frames * num_tokens * hidden_size, where=where)
    return CacheShape(
        num_frames=num_frames,
        num_tokens=num_tokens,
        grid=(grid[0], grid[1]),
        hidden_size=hidden_size,
    )


def _check_size(num_values: int, *, where: str) -> None:
    if num_values > MAX_WINDOW_VALUES:
        raise DamagedShard(
            f"{where}: shape gives {num_values} numbers a window, wanted at most "
            f"{MAX_WINDOW_VALUES}: make the cache again"
        )


def _parse_files(value: dict[str, Any], *, where: str) -> dict[str, dict[str, Any]]:
    files = {}
    for name, entry in value.items():
        fields = Fields(entry, where=f"{where}: files.{name}")
        files[name] = {"bytes": fields.integer("bytes"), "sha256": fields.text("sha256")}
    return files
