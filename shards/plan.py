"""plan.jsonl: which clip goes into which shard, fixed before any work starts.

One JSON object a line: {"key", "source", "size_bytes", "shard"}, in shard order; "label" and
"split" where they are known, "target" in evaluation caches (evaluation/labels.py). The order of
clips and of windows comes from hashes, not from a random generator, so that it is the same with
every release of every library and does not depend on the order the clips are found in.

A clip that cannot be read at all is planned with 0 bytes (and without a target) and goes to
quarantine. Its line is filled in when the quarantined are tried again: nothing that is stored
depends on it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import CacheMismatch, DamagedShard, UsageError
from .evaluation.labels import PlanTarget, check_same_target, check_target, target_to_json
from .files import create_bytes, write_bytes
from .schema import ADVICE, STORED, load, parse_json, read_file

PLAN = "plan.jsonl"
MAX_PLAN_BYTES = 4 * 2**30
"""More than twenty million clips (a guess)."""
_OPTIONAL = ("label", "split", "target")


class PlannedClip(Protocol):
    """What a plan needs to know of a clip; its `label`, `split` and `target` too, if it has any."""

    @property
    def key(self) -> str:
        """Its name in the cache, unique."""

    @property
    def path(self) -> Path:
        """The file to read it from."""

    @property
    def size_bytes(self) -> int:
        """The size of that file."""


@dataclass(frozen=True, kw_only=True)
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


def make_plan(clips: Iterable[PlannedClip], *, clips_per_shard: int, seed: int) -> list[PlanEntry]:
    """The clips dealt into shards of `clips_per_shard`, in an order fixed by `seed` and the keys.

    Raises UsageError for two clips of one key, or a key that is empty or no valid text.
    """
    if clips_per_shard < 1:
        raise UsageError(f"clips_per_shard is {clips_per_shard}, wanted 1 or more")
    by_key: dict[str, PlannedClip] = {}
    for clip in clips:
        _check_key(clip.key)
        if clip.key in by_key:
            raise UsageError(
                f"{clip.path} and {by_key[clip.key].path} are both called {clip.key!r}: "
                "rename one, or give a common parent folder"
            )
        by_key[clip.key] = clip
    return [
        PlanEntry(
            key=key,
            source=str(by_key[key].path),
            size_bytes=by_key[key].size_bytes,
            shard=position // clips_per_shard,
            **{name: getattr(by_key[key], name, None) for name in _OPTIONAL},
        )
        for position, key in enumerate(plan_order(by_key, seed=seed))
    ]


def plan_order(keys: Iterable[str], *, seed: int) -> list[str]:
    """The keys of clips in the order in which they are dealt into shards."""
    return sorted(keys, key=lambda key: (_digest(f"clip:{seed}:{key}"), key))


def window_order(num_windows: int, *, seed: int, shard: int) -> NDArray[np.intp]:
    """The order in which a shard stores its windows: stored[i] = made[order[i]], intp (W,)."""
    digests = [_digest(f"window:{seed}:{shard}:{window}") for window in range(num_windows)]
    return np.array(sorted(range(num_windows), key=digests.__getitem__), dtype=np.intp)


def write_plan(folder: Path | str, plan: Sequence[PlanEntry]) -> list[PlanEntry]:
    """Stores `plan`, or holds it against the one that is there; gives the plan to follow.

    A stored plan is kept: its shards stand, the sources are those of `plan` (files may have
    moved). Raises CacheMismatch when the two do not name the same clips of the same sizes.
    """
    folder = Path(folder)
    if not (folder / PLAN).exists() and create_bytes(folder / PLAN, plan_lines(plan)):
        return list(plan)
    stored = read_plan(folder)
    asked = {entry.key: entry for entry in plan}
    known = {entry.key for entry in stored}
    for names, what in (
        (sorted(asked.keys() - known), "is asked for but not in the plan of this cache"),
        (sorted(known - asked.keys()), "is in the plan of this cache but not asked for"),
    ):
        if names:
            raise CacheMismatch(
                f"{folder}: clip {names[0]!r} {what} ({len(names)} such clips): "
                "give the same videos as before, or another folder"
            )
    return _with_new_sources(folder, stored, asked)


def extend_plan(
    folder: Path | str, clips: Sequence[PlannedClip], *, clips_per_shard: int, seed: int
) -> list[PlanEntry]:
    """Adds the clips that the stored plan does not have, as shards after its last; gives it whole.

    The stored lines stay as they are, those of clips that are not among `clips` too. Nothing is
    written if there is no new clip. Processes that add the same clips at once write the same bytes.
    Raises CacheMismatch for a clip that the plan has with another size, or under another name.
    """
    folder = Path(folder)
    before = read_plan(folder)
    known = {entry.key for entry in before}
    asked = {entry.key: entry for entry in make_plan(clips, clips_per_shard=1, seed=seed)}
    stored = _with_new_sources(folder, before, asked)
    first = num_shards(stored)
    new = [clip for clip in clips if clip.key not in known]
    _refuse_other_names(folder, stored, new)
    added = [
        replace(entry, shard=first + entry.shard)
        for entry in make_plan(new, clips_per_shard=clips_per_shard, seed=seed)
    ]
    if added:
        replace_plan(folder, before + added)
    return stored + added


def longer_plan(folder: Path | str, plan: Sequence[PlanEntry]) -> list[PlanEntry] | None:
    """The stored plan with the rest of `plan`, if it is the beginning of that."""
    if not (Path(folder) / PLAN).exists():
        return None
    stored = read_plan(folder)
    begun = [(entry.key, entry.size_bytes, entry.shard) for entry in plan[: len(stored)]]
    same = begun == [(entry.key, entry.size_bytes, entry.shard) for entry in stored]
    return [*stored, *plan[len(stored) :]] if same and len(stored) < len(plan) else None


def mended_plan(folder: Path | str, asked: Sequence[PlanEntry]) -> list[PlanEntry] | None:
    """The stored plan with the lines of clips filled in that had 0 bytes and have more now, if
    there are such."""
    stored = read_plan(folder) if (Path(folder) / PLAN).exists() else []
    there = {entry.key: entry for entry in asked if entry.size_bytes > 0}
    mended = [
        replace(there[entry.key], shard=entry.shard)
        if entry.size_bytes == 0 and entry.key in there
        else entry
        for entry in stored
    ]
    return mended if mended != stored else None


def replace_plan(folder: Path | str, plan: Sequence[PlanEntry]) -> None:
    """Stores another plan: one process at a time, or all the same, after the cache was reopened."""
    write_bytes(Path(folder) / PLAN, plan_lines(plan))


def _refuse_other_names(
    folder: Path, stored: Sequence[PlanEntry], new: Sequence[PlannedClip]
) -> None:
    """A clip's key depends on the folders given: with another set of them, old clips look new."""
    known = {(entry.source, entry.size_bytes, Path(entry.key).name): entry for entry in stored}
    for clip in new:
        entry = known.get((str(clip.path), clip.size_bytes, Path(clip.key).name))
        if entry is not None:
            raise CacheMismatch(
                f"{folder}: {clip.path} is in this cache as {entry.key!r}, and would be added as "
                f"{clip.key!r}: give the new videos alone"
            )


def _with_new_sources(
    folder: Path, stored: Sequence[PlanEntry], asked: Mapping[str, PlanEntry]
) -> list[PlanEntry]:
    """`stored` with the sources of `asked`; CacheMismatch where size or target differ."""
    for entry in stored:
        size = asked.get(entry.key, entry).size_bytes
        if entry.size_bytes != size:
            advice = "restore the file, or extract into another folder"
            if entry.size_bytes == 0:  # it could not be read at all
                advice = "add --retry-quarantined to take it in"
            raise CacheMismatch(
                f"{folder}: clip {entry.key!r} had {entry.size_bytes} bytes when the plan was "
                f"made, now {size}: {advice}"
            )
        if entry.key in asked:
            check_same_target(f"{folder}: {entry.key!r}", entry.target, asked[entry.key].target)
    return [
        replace(entry, source=asked[entry.key].source) if entry.key in asked else entry
        for entry in stored
    ]


def plan_lines(plan: Iterable[PlanEntry]) -> bytes:
    """plan.jsonl."""
    return "".join(f"{json.dumps(_to_json(entry), sort_keys=True)}\n" for entry in plan).encode()


def read_plan(folder: Path | str, *, sha256: str | None = None) -> list[PlanEntry]:
    """The stored plan; DamagedShard if it is missing, malformed, or has another hash than given."""
    path = Path(folder) / PLAN
    data = read_file(path, max_bytes=MAX_PLAN_BYTES)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedShard(f"{path}: was changed since the cache was finished: restore the file")
    return parse_plan(data, path)


def parse_plan(data: bytes, path: Path) -> list[PlanEntry]:
    """The plan in the bytes of `path`; DamagedShard if it is malformed."""
    lines = data.splitlines()
    plan = []
    keys = set()
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        entry = load(PlanEntry, parse_json(line, where=where), where=where, how=STORED)
        if entry.shard >= len(lines):
            raise DamagedShard(
                f"{where}: shard is {entry.shard}, wanted less than {len(lines)}: {ADVICE}"
            )
        if entry.target is not None:
            check_target(entry.target, where=f"{where}: target")
        if entry.key in keys:
            raise DamagedShard(f"{where}: clip {entry.key!r} a second time: restore the file")
        keys.add(entry.key)
        plan.append(entry)
    return plan


def clips_by_shard(plan: Iterable[PlanEntry]) -> dict[int, list[PlanEntry]]:
    """The clips of every shard, each in plan order, shards ascending."""
    shards: dict[int, list[PlanEntry]] = {}
    for entry in plan:
        shards.setdefault(entry.shard, []).append(entry)
    return dict(sorted(shards.items()))


def count_planned(folder: Path | str) -> int:
    """How many shards the stored plan has, by its last line: plans are in shard order."""
    path = Path(folder) / PLAN
    line = read_file(path, max_bytes=MAX_PLAN_BYTES).rstrip().rpartition(b"\n")[2]
    if not line:
        return 0
    where = f"{path}: last line"
    return load(PlanEntry, parse_json(line, where=where), where=where, how=STORED).shard + 1


def num_shards(plan: Iterable[PlanEntry]) -> int:
    """How many shards the plan has; shards are numbered from 0 without gaps."""
    return max((entry.shard for entry in plan), default=-1) + 1


def _to_json(entry: PlanEntry) -> dict[str, Any]:
    """Its fields; label, split and target only where they are known."""
    fields = asdict(entry)
    if entry.target is not None:
        fields["target"] = target_to_json(entry.target)
    return {k: v for k, v in fields.items() if k not in _OPTIONAL or v is not None}


def _check_key(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the clip name {key!r} is no valid UTF-8 text: rename the file"
        ) from error
    if not key:
        raise UsageError("a clip has an empty name: give the folder above it")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
