"""verify_cache: goes through every byte of a cache and says all that is wrong with it.

Readers stop at the first thing that is wrong; this one goes on, for `deltatok-shards verify`. What
lies beside the shards is checked by `verify_beside`, what is in them by `contents`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from .cache import PATCHES, CacheInfo, read_cache_info
from .contents import check_deltas, check_patches
from .errors import CacheMismatch, DeltatokError
from .file_checks import check_threads, record_problems
from .records import DoneRecord, done_shards, read_done
from .verify_beside import (
    Leftovers,
    cache_problems,
    count_problems,
    find_leftovers,
    index_problems,
    missing_shards,
    plan_problems,
    quarantine_problems,
)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify_cache` found."""

    problems: list[str]
    """One sentence each; empty: the cache is whole."""
    shards: int
    """Shards with a readable done-record."""
    windows: int
    bytes: int
    """Bytes of the shards' files, by their done-records."""
    damaged: list[int]
    """Shards to be made again."""
    missing: list[int]
    """Shards of the plan that are not done."""
    leftovers: Leftovers
    """Files that belong to no shard."""
    is_deep: bool
    """Whether what is in the files was looked at, too."""


def verify_cache(
    folder: Path | str,
    *,
    deep: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> VerifyReport:
    """Checks presence, sizes, SHA-256, counts and leftovers; with `deep` also decodes every chunk
    and looks at checksums, dtypes, shapes, values, times, crops and statistics.

    progress: called with (shards done, shards in all, bytes done) after every shard. Raises
    UsageError, CacheMismatch or DamagedShard only where nothing can be checked: no such folder, no
    cache, no readable cache.json.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    problems: list[str] = []
    damaged: set[int] = set()
    records: list[DoneRecord] = []
    shards, num_bytes = done_shards(folder), 0
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        found = pool.map(lambda shard: _check_shard(folder, info, shard, deep), shards)
        for number, (shard, result) in enumerate(zip(shards, found, strict=True), start=1):
            problems += result.problems
            damaged.update([shard] * result.is_damaged)
            if result.record is not None:
                records.append(result.record)
                num_bytes += _size(result.record)
            if progress is not None:
                progress(number, len(shards), num_bytes)
    problems += cache_problems(folder, info)
    for doubted, problem in plan_problems(folder, info, records):
        problems.append(problem)
        damaged.update([] if doubted is None else [doubted])
    for doubted, problem in index_problems(folder, info, records, set(damaged)):
        problems.append(problem)
        damaged.update([] if doubted is None else [doubted])
    problems += count_problems(folder, info, records)
    problems += quarantine_problems(folder, records)
    leftovers = find_leftovers(folder, records)
    problems += leftovers.problems(folder)
    return VerifyReport(
        problems=problems,
        shards=len(records),
        windows=sum(record.rows for record in records),
        bytes=num_bytes,
        damaged=sorted(damaged),
        missing=missing_shards(folder, records),
        leftovers=leftovers,
        is_deep=deep,
    )


@dataclass(frozen=True)
class _Checked:
    record: DoneRecord | None
    """Without what takes room and is not needed again; None if it cannot be read."""
    problems: list[str]
    is_damaged: bool
    """Whether making the shard again is what mends it."""


def _check_shard(folder: Path, info: CacheInfo, shard: int, deep: bool) -> _Checked:
    try:
        record = read_done(folder, shard)
    except DeltatokError as error:
        return _Checked(None, [str(error)], True)
    if record is None:  # taken back just now
        return _Checked(None, [], False)
    problems, is_damaged = _shard_problems(folder, info, record, deep)
    return _Checked(replace(record, statistics={}, decoders={}), problems, is_damaged)


def _shard_problems(
    folder: Path, info: CacheInfo, record: DoneRecord, deep: bool
) -> tuple[list[str], bool]:
    """What is wrong with a shard, and whether making it again is what mends it."""
    different = [str(error) for error in record_problems(folder, record, depth="sha256")]
    if different:
        return different, True  # what is in changed files is no second problem
    suffix = ".zarr" if info.format == PATCHES else ".tar"
    own = f"shards/{record.shard:06d}{suffix}"
    strangers = [name for name in record.files if not f"{name}/".startswith(f"{own}/")]
    if strangers or bool(record.files) != bool(record.rows):
        problem = (
            f"shard {record.shard:06d}: {record.rows} windows in {len(record.files)} files, "
            f"{len(strangers)} of them not its own: remove its done-record and make it again"
        )
        return [problem], True
    if record.rows and deep:
        check = check_patches if info.format == PATCHES else check_deltas
        try:
            check(folder, info, record)
        except DeltatokError as error:
            # Files as they were written that are not of this cache speak against cache.json.
            return [f"shard {record.shard:06d}: {error}"], not isinstance(error, CacheMismatch)
    return [], False


def _size(record: DoneRecord) -> int:
    return sum(int(entry["bytes"]) for entry in record.files.values())
