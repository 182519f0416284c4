"""The plan: which clip goes into which shard, fixed before any work starts.

    plan.json                             {"format_version": 1, "root": "/videos/", "shards": 1234,
                                           "clips": 78965, "parts": [{"file": "plan/000000-...",
                                           "first_shard": 0, "shards": 1000, "clips": 64000,
                                           "bytes": 4321000, "sha256": "..."}, ...]}
    plan/000000-<16 hex digits>.jsonl     {"clips":[{"key":"a.mp4","size_bytes":1},...],"shard":0}

A line of a part is a shard, in order. A part never changes: its name ends in the beginning of its
hash, and plan.json, written last, says which parts count. So a plan is read by shard, and no
process holds all of it but the one that makes it: that needs about 200 bytes a clip beside the
clips themselves (`make_plan`), everything else one part at a time.

The order of clips and of windows comes from hashes, not from a random generator, so that it is the
same with every release of every library and does not depend on the order the clips are found in.

A clip that cannot be read at all is planned with 0 bytes (and without a target) and goes to
quarantine. Its entry is filled in when the quarantined are tried again: nothing that is stored
depends on it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby, islice, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import CacheMismatch, DamagedShard, UsageError
from .evaluation.labels import PlanTarget, check_same_target, check_target, target_to_json
from .files import create_bytes, flush, json_bytes, remove_partials, write_bytes
from .schema import (
    ADVICE,
    STORED,
    is_count,
    load,
    parse_json,
    read_file,
    shown,
)
from .stores.mirror import RemoteFile, present
from .stores.upload import top_changed

PLAN = "plan.json"
PLAN_FOLDER = "plan"
PLAN_VERSION = 1
SHARDS_PER_PART = 1000
"""What is read at once: 64,000 clips of Kinetics, 5 MB (a guess)."""
MAX_PART_BYTES = 2**30
"""A guard against absurd files: a part of ten million clips (a guess)."""
_OPTIONAL = ("label", "split", "target")
_PART_NAME = re.compile(r"[0-9]{6,}-[0-9a-f]{16}\.jsonl")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class PlannedClip(Protocol):
    """What a plan needs to know of a clip; its `label`, `split` and `target` too, if it has any."""

    @property
    def key(self) -> str:
        """Its name in the cache, unique."""

    @property
    def origin(self) -> str:
        """Where it is read from: a path or an address."""

    @property
    def size_bytes(self) -> int:
        """The size of that file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntry:
    """One clip of the plan."""

    key: str
    source: str
    """Where the clip was read from; for people, may be gone."""
    size_bytes: int
    """Size of the source file: another size means another clip."""
    shard: int
    label: str | None = None
    """Class of the clip, if known."""
    split: str | None = None
    """Part of the data set it belongs to, if known."""
    target: PlanTarget | None = None
    """What its windows are evaluated on (evaluation caches)."""


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """A file with the clips of consecutive shards."""

    file: str
    """plan/NNNNNN-<16 hex digits>.jsonl: the first shard, the beginning of the SHA-256."""
    first_shard: int
    shards: int
    """1 to 1,000."""
    clips: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What plan.json says first."""

    format_version: int


@dataclass(frozen=True, kw_only=True)
class _PlanFile(_Header):
    """What plan.json says."""

    root: str
    shards: int
    clips: int
    parts: list[PlanPart]


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of a part."""

    shard: int
    clips: list[Any]


@dataclass(frozen=True)
class Plan:
    """The plan of the cache in `folder`. Iterating gives its entries in shard order, a part in
    memory at a time; DamagedShard for a part that is missing, changed or malformed."""

    folder: Path = field(compare=False)
    root: str
    """A clip whose entry names no source came from root + key."""
    parts: tuple[PlanPart, ...]

    @classmethod
    def open(cls, folder: Path | str, *, sha256: str | None = None) -> "Plan":
        """The stored plan, of which only plan.json is read.

        Raises DamagedShard if it is missing, malformed, contradicts itself or has another SHA-256
        than given; CacheMismatch for a newer format_version.
        """
        path = Path(folder) / PLAN
        data = read_file(path)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedShard(f"{path}: was changed since the cache was finished: restore it")
        return cls.parse(parse_json(data, where=str(path)), folder=Path(folder))

    @classmethod
    def parse(cls, value: object, *, folder: Path) -> "Plan":
        """The plan in the parsed JSON of the plan.json of `folder`; raises as `open` does."""
        where = str(folder / PLAN)
        version = load(_Header, value, where=where, how=STORED).format_version
        if version > PLAN_VERSION:
            raise CacheMismatch(
                f"{where}: format_version {version}, this release reads up to {PLAN_VERSION}: "
                "update deltatok"
            )
        stored = load(_PlanFile, value, where=where, how=STORED)
        if version < 1:
            raise DamagedShard(f"{where}: format_version is {version}: {ADVICE}")
        plan = cls(folder, stored.root, tuple(stored.parts))
        first_shard = 0
        for part in plan.parts:
            if not _SHA256.fullmatch(part.sha256) or part.file != _part_name(
                part.first_shard, part.sha256
            ):
                raise DamagedShard(
                    f"{where}: names the part {shown(part.file)}, wanted plan/NNNNNN-<16 hex "
                    f"digits>.jsonl, its first shard and the beginning of its hash: {ADVICE}"
                )
            if part.first_shard != first_shard or not 1 <= part.shards <= SHARDS_PER_PART:
                raise DamagedShard(
                    f"{where}: {part.file} has {part.shards} shards from {part.first_shard} on, "
                    f"wanted 1 to {SHARDS_PER_PART} from {first_shard} on: {ADVICE}"
                )
            first_shard += part.shards
        if (stored.shards, stored.clips) != (plan.num_shards, plan.num_clips):
            raise DamagedShard(
                f"{where}: says {stored.shards} shards with {stored.clips} clips, its parts have "
                f"{plan.num_shards} with {plan.num_clips}: {ADVICE}"
            )
        return plan

    @cached_property
    def num_shards(self) -> int:
        """Shards are numbered from 0 without gaps."""
        return sum(part.shards for part in self.parts)

    @cached_property
    def num_clips(self) -> int:
        """The clips in quarantine too."""
        return sum(part.clips for part in self.parts)

    def __iter__(self) -> Iterator[PlanEntry]:
        for _, entries in self.shards():
            yield from entries

    def shards(self, wanted: Container[int] | None = None) -> Iterator[tuple[int, list[PlanEntry]]]:
        """Number -> its clips, of all shards or of those in `wanted`, ascending. Parts without a
        wanted shard are not read, lines of others not parsed."""
        for part in self.parts:
            yield from self.shards_of(part, wanted)

    def shards_of(
        self, part: PlanPart, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, list[PlanEntry]]]:
        """The same of one part."""
        for number, clips, where in self._parsed(part, wanted):
            entries = [_parse_clip(clip, number, root=self.root, where=where) for clip in clips]
            _check_once([entry.key for entry in entries], where)
            yield number, entries

    def keys_of_shards(
        self, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, list[str]]]:
        """Number -> the keys of its clips, as `shards` gives them, in half the time."""
        for part in self.parts:
            yield from self.keys_of(part, wanted)

    def keys_of(
        self, part: PlanPart, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, list[str]]]:
        """The same of one part."""
        for number, clips, where in self._parsed(part, wanted):
            keys = [_key_of(clip, where) for clip in clips]
            _check_once(keys, where)
            yield number, keys

    def _parsed(
        self, part: PlanPart, wanted: Container[int] | None
    ) -> Iterator[tuple[int, list[Any], str]]:
        """Number -> its clips as JSON gives them, and where they stand."""
        numbers = range(part.first_shard, part.first_shard + part.shards)
        if wanted is not None and not any(number in wanted for number in numbers):
            return
        path = self.folder / part.file
        num_clips = 0
        for number, line in zip(numbers, self._lines(part), strict=True):
            if wanted is None or number in wanted:
                where = f"{path}: line {number - part.first_shard + 1}"
                value = load(_Line, parse_json(line, where=where), where=where, how=STORED)
                if value.shard != number:
                    raise DamagedShard(
                        f"{where}: shard is {value.shard}, wanted {number}: {ADVICE}"
                    )
                num_clips += len(value.clips)
                yield number, value.clips, where
        if wanted is None and num_clips != part.clips:
            raise DamagedShard(
                f"{path}: has {num_clips} clips, {PLAN} says {part.clips}: restore the file"
            )

    def shard(self, number: int) -> list[PlanEntry]:
        """The clips of one shard; its part is read for them."""
        ((_, entries),) = self.shards((number,))
        return entries

    def commit(self) -> None:
        """Makes this the plan of its folder: one process at a time, or all the same, after the
        cache was reopened."""
        write_bytes(self.folder / PLAN, self.to_bytes())
        self._tell()

    def _tell(self) -> None:
        for part in self.parts:
            top_changed(self.folder, part.file)
        top_changed(self.folder, PLAN)

    def to_bytes(self) -> bytes:
        """plan.json."""
        return json_bytes(
            {
                "format_version": PLAN_VERSION,
                "root": self.root,
                "shards": self.num_shards,
                "clips": self.num_clips,
                "parts": [asdict(part) for part in self.parts],
            }
        )

    def strangers(self) -> list[Path]:
        """Files in plan/ that are no part: of a plan before, of one that was never committed, or
        partial."""
        top, named = self.folder / PLAN_FOLDER, {part.file for part in self.parts}
        return [
            path
            for path in (sorted(top.iterdir()) if top.is_dir() else [])
            if f"{PLAN_FOLDER}/{path.name}" not in named
        ]

    def read_part(self, part: PlanPart) -> bytes:
        """The bytes of a part; DamagedShard if it is missing or was changed."""
        path = present(self.folder, RemoteFile(part.file, part.bytes, part.sha256))
        data = read_file(path, max_bytes=MAX_PART_BYTES)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise DamagedShard(f"{path}: was changed since the plan was made: restore the file")
        return data

    def _lines(self, part: PlanPart) -> list[bytes]:
        path, data = self.folder / part.file, self.read_part(part)
        lines = data.splitlines()
        if len(lines) != part.shards or len(data) != part.bytes:
            raise DamagedShard(
                f"{path}: has {len(lines)} shards in {len(data)} bytes, {PLAN} says {part.shards} "
                f"in {part.bytes}: restore the file"
            )
        return lines


def shard_keys(planned: Iterable[str], quarantined: Container[str]) -> list[str]:
    """The keys of a shard: of its clips that have windows, in plan order; `clip` arrays index into
    this list. planned: the keys of all its clips; quarantined: of those that have none."""
    return [key for key in planned if key not in quarantined]


def keys_sha256(keys: Collection[str]) -> str:
    """The SHA-256, 64 hex digits, of the canonical JSON of the list of `keys`."""
    text = json.dumps(list(keys), separators=(",", ":"))  # as `canonical_json` gives
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    clips: Iterable[PlannedClip], *, clips_per_shard: int, seed: int, first_shard: int = 0
) -> Iterator[PlanEntry]:
    """The clips dealt into shards of `clips_per_shard`, in an order fixed by `seed` and the keys.

    Entries are made as they are taken. Until then about 200 bytes a clip are held, 100 of them
    until the last is: keys and hashes to sort. Raises UsageError at once for two clips of one key,
    or a key that is empty or no valid text.
    """
    if clips_per_shard < 1:
        raise UsageError(f"clips_per_shard is {clips_per_shard}, wanted 1 or more")
    by_key: dict[str, PlannedClip] = {}
    for clip in clips:
        _check_key(clip.key)
        if clip.key in by_key:
            raise UsageError(
                f"{clip.origin} and {by_key[clip.key].origin} are both called {clip.key!r}: "
                "rename one, or give a common parent folder"
            )
        by_key[clip.key] = clip
    return (
        _entry_of(by_key[key], shard=first_shard + position // clips_per_shard)
        for position, key in enumerate(plan_order(by_key, seed=seed))
    )


def plan_order(keys: Iterable[str], *, seed: int) -> list[str]:
    """The keys of clips in the order in which they are dealt into shards: that of their hashes."""
    keys = list(keys)
    digests = bytearray()
    for key in keys:
        digests += _digest(f"clip:{seed}:{key}")
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return [keys[place] for place in order.tolist()]


def window_order(num_windows: int, *, seed: int, shard: int) -> NDArray[np.intp]:
    """The order in which a shard stores its windows: stored[i] = made[order[i]], intp (W,)."""
    digests = [_digest(f"window:{seed}:{shard}:{window}") for window in range(num_windows)]
    return np.array(sorted(range(num_windows), key=digests.__getitem__), dtype=np.intp)


def write_plan(folder: Path | str, entries: Iterable[PlanEntry]) -> Plan:
    """Stores `entries`, which come in shard order, as the plan of `folder`; gives the plan.

    A plan that is there must be the same: CacheMismatch for the first shard that differs. Of
    processes that write the same one at once, each writes the same bytes.
    """
    folder = Path(folder)
    if not (folder / PLAN).exists():
        first, rest = _first_shard(entries)
        root = next(filter(None, map(_root_of, first)), "")
        plan = Plan(folder, root, tuple(_write_parts(folder, chain(first, rest), root=root)))
        if create_bytes(folder / PLAN, plan.to_bytes()):
            plan._tell()
            return plan
        entries = plan  # another process was quicker
    stored = Plan.open(folder)
    if begins(stored, entries):
        raise CacheMismatch(
            f"{folder}: more clips are asked for than the {stored.num_clips} in the plan of this "
            "cache: give the same clips as before, or another folder"
        )
    return stored


def begins(stored: Plan, entries: Iterable[PlanEntry], *, may_be_mended: bool = False) -> bool:
    """Whether `entries` go on after the last of `stored`; sources do not matter.

    may_be_mended: what had 0 bytes may have more. Raises CacheMismatch, naming the first
    difference, if they do not begin with all of it.
    """
    for ours, theirs in zip_longest(stored, entries):
        if ours is None:
            return True
        if theirs is None:
            raise CacheMismatch(
                f"{stored.folder}: clip {ours.key!r} is in the plan of this cache but not asked "
                "for: give the same clips as before, or another folder"
            )
        if (ours.key, ours.shard) != (theirs.key, theirs.shard):
            raise CacheMismatch(
                f"{stored.folder}: shard {ours.shard:06d} has clip {ours.key!r} where "
                f"{theirs.key!r} in shard {theirs.shard:06d} is asked for: other clips, or shards "
                "of another size, than before: give the same, or another folder"
            )
        if ours.size_bytes or not may_be_mended:
            _check_same(stored.folder, ours, theirs)
    return False


def check_same_clips(plan: Plan, clips: Mapping[str, PlannedClip]) -> None:
    """Raises CacheMismatch unless these clips, by key, are those of the plan, in whatever shards,
    and of the same sizes and targets. Their files may have moved."""
    matched = sum(_is_among(clips, entry, plan) for entry in plan)
    if matched == len(clips) == plan.num_clips:
        return
    known = {entry.key for entry in plan}
    for names, what in (
        (sorted(clips.keys() - known), "is asked for but not in the plan of this cache"),
        (sorted(known - clips.keys()), "is in the plan of this cache but not asked for"),
    ):
        if names:
            raise CacheMismatch(
                f"{plan.folder}: clip {names[0]!r} {what} ({len(names)} such clips): "
                "give the same videos as before, or another folder"
            )
    raise DamagedShard(f"{plan.folder / PLAN}: has a clip twice: {ADVICE}")


def keys_twice(plan: Plan) -> list[str]:
    """The keys that are in two shards, sorted; 16 bytes a clip are held. `Plan.shards` refuses a
    key that is twice in one shard."""
    hashes = np.fromiter(map(_hash64, plan), dtype=np.uint64)
    hashes.sort()
    again = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    counts = Counter(entry.key for entry in plan if again and _hash64(entry) in again)
    return sorted(key for key, count in counts.items() if count > 1)


def longer_plan(
    plan: Plan, clips: Mapping[str, PlannedClip], *, clips_per_shard: int, seed: int
) -> Plan:
    """`plan` with those of `clips`, by key, that it does not have, as shards after its last; the
    same plan if it has all. To be committed.

    Its parts stay as they are, the clips in them that are not among `clips` too. Processes that
    add the same clips at once write the same bytes. Raises CacheMismatch for a clip that the plan
    has with another size, or under another name.
    """
    new = dict(clips)
    for entry in plan:
        if _is_among(clips, entry, plan):
            new.pop(entry.key, None)
    if not new:
        return plan
    _refuse_other_names(plan, new.values())
    first_shard = plan.num_shards
    entries = make_plan(
        new.values(), clips_per_shard=clips_per_shard, seed=seed, first_shard=first_shard
    )
    added = _write_parts(plan.folder, entries, root=plan.root, first_shard=first_shard)
    return replace(plan, parts=(*plan.parts, *added))


def mended_plan(plan: Plan, clips: Mapping[str, PlannedClip]) -> Plan:
    """`plan` with the entries filled in of clips that had 0 bytes and have more now, in new parts;
    the same plan if there are none. To be committed."""
    parts: list[PlanPart] = []
    for part in plan.parts:
        entries = [entry for _, shard in plan.shards_of(part) for entry in shard]
        mended = [_mended(entry, clips) for entry in entries]
        first_shard = part.first_shard
        if mended != entries:
            parts += _write_parts(plan.folder, mended, root=plan.root, first_shard=first_shard)
        else:
            parts.append(part)
    return replace(plan, parts=tuple(parts))


def copied_plan(plan: Plan, folder: Path) -> Plan:
    """`plan` as that of another cache, its shards one to one; to be committed."""
    for part in plan.parts:
        _store_part(folder, part, plan.read_part(part))
    return replace(plan, folder=folder)


def remove_strangers(folder: Path) -> None:
    """Removes parts that are none of the plan's any more, and what killed writers left; while
    nobody changes the plan."""
    remove_partials(folder / PLAN_FOLDER)
    strangers = [path for path in Plan.open(folder).strangers() if _PART_NAME.fullmatch(path.name)]
    for path in strangers:
        path.unlink(missing_ok=True)
    if strangers:  # else a power loss would bring them back into a finished cache
        flush(folder / PLAN_FOLDER)


def _is_among(clips: Mapping[str, PlannedClip], entry: PlanEntry, plan: Plan) -> bool:
    """Whether there is a clip of the entry's key; CacheMismatch for another one of that name."""
    clip = clips.get(entry.key)
    if clip is not None:
        _check_same(plan.folder, entry, clip)
    return clip is not None


def _check_same(folder: Path, entry: PlanEntry, clip: PlannedClip | PlanEntry) -> None:
    if entry.size_bytes != clip.size_bytes:
        advice = "restore the file, or extract into another folder"
        if entry.size_bytes == 0:  # it could not be read at all
            advice = "add --retry-quarantined to take it in"
        raise CacheMismatch(
            f"{folder}: clip {entry.key!r} had {entry.size_bytes} bytes when the plan was "
            f"made, now {clip.size_bytes}: {advice}"
        )
    target = getattr(clip, "target", None)
    if entry.target != target:
        check_same_target(f"{folder}: {entry.key!r}", entry.target, target)


def _refuse_other_names(plan: Plan, new: Iterable[PlannedClip]) -> None:
    """A clip's key depends on the folders given: with another set of them, old clips look new."""
    names = {(clip.origin, clip.size_bytes, Path(clip.key).name): clip for clip in new}
    for entry in plan:
        clip = names.get((entry.source, entry.size_bytes, entry.key.rpartition("/")[2]))
        if clip is not None:
            raise CacheMismatch(
                f"{plan.folder}: {clip.origin} is in this cache as {entry.key!r}, and would be "
                f"added as {clip.key!r}: give the new videos alone"
            )


def _mended(entry: PlanEntry, clips: Mapping[str, PlannedClip]) -> PlanEntry:
    clip = clips.get(entry.key)
    if clip is None or entry.size_bytes or not clip.size_bytes:
        return entry
    return _entry_of(clip, shard=entry.shard)


def _entry_of(clip: PlannedClip, *, shard: int) -> PlanEntry:
    return PlanEntry(
        key=clip.key,
        source=clip.origin,
        size_bytes=clip.size_bytes,
        shard=shard,
        **{name: getattr(clip, name, None) for name in _OPTIONAL},
    )


def _first_shard(entries: Iterable[PlanEntry]) -> tuple[list[PlanEntry], Iterator[PlanEntry]]:
    """The entries of the first shard, and the others."""
    rest = iter(entries)
    first: list[PlanEntry] = []
    for entry in rest:
        if first and entry.shard != first[0].shard:
            return first, chain((entry,), rest)
        first.append(entry)
    return first, rest


def _root_of(entry: PlanEntry) -> str:
    """What is before the key in the entry's source, if it ends so."""
    return entry.source.removesuffix(entry.key) if entry.source.endswith(entry.key) else ""


def _write_parts(
    folder: Path, entries: Iterable[PlanEntry], *, root: str, first_shard: int = 0
) -> list[PlanPart]:
    """Writes `entries`, in shard order from `first_shard` on, as parts of 1,000 shards."""
    parts: list[PlanPart] = []
    shards = enumerate(groupby(entries, key=attrgetter("shard")), start=first_shard)
    while batch := [
        _shard_line(wanted, number, list(group), root=root)
        for wanted, (number, group) in islice(shards, SHARDS_PER_PART)
    ]:
        lines, counts = zip(*batch, strict=True)
        data = b"".join(lines)
        digest = hashlib.sha256(data).hexdigest()
        part = PlanPart(
            file=_part_name(first_shard, digest),
            first_shard=first_shard,
            shards=len(lines),
            clips=sum(counts),
            bytes=len(data),
            sha256=digest,
        )
        _store_part(folder, part, data)
        parts.append(part)
        first_shard += len(lines)
    return parts


def _store_part(folder: Path, part: PlanPart, data: bytes) -> None:
    path = folder / part.file
    if not path.parent.is_dir():
        path.parent.mkdir(exist_ok=True)
        flush(folder)
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def _part_name(first_shard: int, sha256: str) -> str:
    return f"{PLAN_FOLDER}/{first_shard:06d}-{sha256[:16]}.jsonl"


def _shard_line(
    wanted: int, number: int, entries: list[PlanEntry], *, root: str
) -> tuple[bytes, int]:
    """The line of a shard, and how many clips it has."""
    if number != wanted:
        raise ValueError(f"shard {number} of a plan comes where {wanted} is wanted")
    value = {"clips": [_to_json(entry, root) for entry in entries], "shard": number}
    return f"{json.dumps(value, sort_keys=True, separators=(',', ':'))}\n".encode(), len(entries)


def _to_json(entry: PlanEntry, root: str) -> dict[str, Any]:
    """Its fields but the shard; label, split and target only where they are known, source where it
    is not root + key."""
    value: dict[str, Any] = {"key": entry.key, "size_bytes": entry.size_bytes}
    if not root or entry.source != root + entry.key:
        value["source"] = entry.source
    if entry.label is not None:
        value["label"] = entry.label
    if entry.split is not None:
        value["split"] = entry.split
    if entry.target is not None:
        value["target"] = target_to_json(entry.target)
    return value


def _check_once(keys: list[str], where: str) -> None:
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DamagedShard(f"{where}: clip {twice!r} a second time: restore the file")


def _key_of(clip: Any, where: str) -> str:
    key = clip.get("key") if type(clip) is dict else None
    if type(key) is not str:
        raise DamagedShard(f"{where}: a clip is {shown(clip)}, wanted one with a key: {ADVICE}")
    return key


def _parse_clip(clip: Any, shard: int, *, root: str, where: str) -> PlanEntry:
    if type(clip) is not dict:
        raise DamagedShard(f"{where}: a clip is {shown(clip)}, wanted a JSON object: {ADVICE}")
    key: Any = clip.get("key")
    size_bytes: Any = clip.get("size_bytes")
    if len(clip) == 2 and root and type(key) is str and is_count(size_bytes):  # nearly all are so
        return PlanEntry(key=key, source=root + key, size_bytes=size_bytes, shard=shard)
    if root and type(key) is str:
        clip = {"source": root + key, **clip}
    entry = load(PlanEntry, {**clip, "shard": shard}, where=where, how=STORED)
    if entry.target is not None:
        check_target(entry.target, where=f"{where}: target")
    return entry


def _check_key(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the clip name {key!r} is no valid UTF-8 text: rename the file"
        ) from error
    if not key:
        raise UsageError("a clip has an empty name: give the folder above it")


def _hash64(entry: PlanEntry) -> int:
    return int.from_bytes(_digest(entry.key)[:8], "little")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
