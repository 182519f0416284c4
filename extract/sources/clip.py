"""What a clip is: its name, and where its bytes lie, also inside an archive.

Found by sources.py, named in plan.jsonl, handed as JSON to the decoding processes (child.py).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..shards.plan_target import PlanTarget

Stamp = tuple[int, int]
"""Bytes and time of last change (ns) of an archive when it was searched: with another stamp it is
another archive, and positions in it mean nothing."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A video in an uncompressed tar: `size_bytes` of the clip from `offset` on."""

    offset: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class FrameFolder:
    """A folder of images named `*_<seconds>.jpg`; the clip's path is the folder."""


@dataclass(frozen=True, slots=True)
class ZipFolder:
    """Such a folder in a zip archive, which may be split (zip_parts.py)."""

    folder: str
    """Its name in the archive, without the last slash."""
    runs: tuple[tuple[int, int], ...]
    """(first byte, bytes) of the parts of the archive's directory in which its frames are listed;
    other entries may lie between them."""
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
class Unreadable:
    """A clip that is known by name only; it goes to quarantine for this reason."""

    reason: str


Source = TarMember | FrameFolder | ZipFolder | TargetFrames | Unreadable

_KINDS: dict[str, type[Any]] = {
    "tar": TarMember,
    "frames": FrameFolder,
    "zip": ZipFolder,
    "target": TargetFrames,
    "unreadable": Unreadable,
}


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
    source: Source | None = None
    """None: `path` is the video."""
    label: str | None = None
    """Its class, where a list or an archive names one."""
    split: str | None = None
    """The part of the data set it belongs to, where a list or an archive names one."""
    target: PlanTarget | None = None
    """What its windows are evaluated on (evaluation caches)."""


def source_to_json(source: Source | None) -> dict[str, Any] | None:
    """As a JSON object; `source_from_json` takes it back."""
    if source is None:
        return None
    (kind,) = (name for name, known in _KINDS.items() if isinstance(source, known))
    return {"kind": kind, **asdict(source)}


def source_from_json(value: dict[str, Any] | None) -> Source | None:
    """The source that `source_to_json` described."""
    if value is None:
        return None
    fields = {name: _frozen(item) for name, item in value.items() if name != "kind"}
    source: Source = _KINDS[value["kind"]](**fields)
    return source


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
