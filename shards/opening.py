"""What both readers do before the first number is read: is the cache whole, is it the right one.

Zarr and memory maps notice a missing or short file late or never, so every file is held against
its done-record first.
"""

import contextlib
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import CacheInfo, read_cache_info
from .errors import CacheMismatch, DamagedShard, UsageError
from .files import sha256_file
from .plan import PLAN, PlanEntry, num_shards, read_plan
from .records import DoneRecord, read_all_done

Verify = Literal["size", "sha256"]

ADVICE = (
    "run `deltatok-shards verify` on the cache, then delete the shard's done-record "
    "(shards/NNNNNN.json) and make the shard again"
)


@dataclass(frozen=True, kw_only=True)
class OpenedCache:
    """A cache whose files are all there, with the windows of its shards numbered through."""

    folder: Path
    info: CacheInfo
    records: list[DoneRecord]
    """The done-records of the shards that have windows, in shard order."""
    starts: NDArray[np.int64]
    """int64 (len(records) + 1,): the number of the first window of each, and the total."""

    @property
    def num_windows(self) -> int:
        """Windows in all shards."""
        return int(self.starts[-1])

    def locate(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window numbers -> (index into `records`, window within that shard), int64 each."""
        shards = np.searchsorted(self.starts, windows, side="right").astype(np.int64) - 1
        return shards, windows - self.starts[shards]

    def keys(self) -> list[str]:
        """All clips that have windows: the `keys` of the records, one after the other."""
        return [key for record in self.records for key in record.keys]

    def planned(self) -> list[PlanEntry]:
        """What plan.jsonl says of the clips of `keys()`, in that order; DamagedShard if it lacks
        one."""
        entries = {entry.key: entry for entry in read_plan(self.folder)}
        missing = [key for key in self.keys() if key not in entries]
        if missing:
            raise DamagedShard(
                f"{self.folder / PLAN}: has no clip {missing[0]!r}, of which there are windows: "
                "restore the file"
            )
        return [entries[key] for key in self.keys()]

    def first_keys(self) -> NDArray[np.int64]:
        """int64 (len(records),): where each record's keys start in `keys()`."""
        counts = [len(record.keys) for record in self.records]
        return np.cumsum([0, *counts], dtype=np.int64)[:-1]


def open_finished(
    folder: Path | str, *, format: str, verify: Verify, allow_incomplete: bool
) -> OpenedCache:
    """Opens a cache for reading and checks all its files by size, or by SHA-256.

    Raises CacheMismatch for another kind of cache and for one that is not finished (unless
    `allow_incomplete`: then its finished shards), DamagedShard for files missing or changed.
    """
    if verify not in ("size", "sha256"):
        raise UsageError(f"verify is {verify!r}, wanted 'size' or 'sha256'")
    folder = Path(folder)
    info = read_cache_info(folder, format=format)
    records = read_all_done(folder)
    if info.complete:
        _check_totals(folder, info, records)
    elif not allow_incomplete:
        wanted = num_shards(read_plan(folder)) if (folder / PLAN).is_file() else "?"
        raise CacheMismatch(
            f"{folder}: extraction has not finished, {len(records)} of {wanted} shards: "
            "run deltatok-extract again"
        )
    with contextlib.closing(file_problems(folder, records, verify=verify)) as problems:
        for problem in problems:
            raise problem
    records = [record for record in records if record.rows]
    starts = np.cumsum([0, *(record.rows for record in records)], dtype=np.int64)
    return OpenedCache(folder=folder, info=info, records=records, starts=starts)


def file_problems(
    folder: Path, records: Sequence[DoneRecord], *, verify: Verify
) -> Generator[DamagedShard, None, None]:
    """Every file that is missing or differs from its done-record, in shard order."""
    checks = [
        (record.shard, folder / name, entry)
        for record in records
        for name, entry in record.files.items()
    ]

    def check(item: tuple[int, Path, dict[str, Any]]) -> DamagedShard | None:
        return _file_problem(*item, verify=verify)

    # Hashing leaves the interpreter lock, waiting for a network file system does too.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from (problem for problem in pool.map(check, checks) if problem is not None)


def checked_windows(windows: ArrayLike, num_windows: int) -> NDArray[np.int64]:
    """Window numbers as int64 (B,).

    Raises IndexError outside of 0..num_windows - 1, TypeError for anything but whole numbers.
    """
    numbers = np.asarray(windows)
    if numbers.size == 0:
        numbers = numbers.astype(np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise TypeError(
            f"windows is {numbers.dtype} {numbers.shape}, wanted integers of shape (B,)"
        )
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < num_windows):
        raise IndexError(
            f"windows {numbers.min()}..{numbers.max()} asked for, "
            f"the cache has 0..{num_windows - 1}"
        )
    return numbers.astype(np.int64)


def checked_out(
    out: NDArray[Any] | None, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The array to fill: `out` if it fits exactly, a fresh one for None, else ValueError."""
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}, wanted C-contiguous {dtype} {shape}")
    return out


def _check_totals(folder: Path, info: CacheInfo, records: Sequence[DoneRecord]) -> None:
    wanted = info.counts.get("shards", len(records))
    missing = sorted(set(range(wanted)) - {record.shard for record in records})
    if missing:
        raise DamagedShard(
            f"{folder}: shard {missing[0]:06d} has no done-record ({len(missing)} of {wanted} "
            "shards missing), but the cache is marked complete: make the missing shards again, "
            "by the command that made the cache"
        )
    rows = sum(record.rows for record in records)
    if len(records) != wanted or rows != info.counts.get("windows", rows):
        raise DamagedShard(
            f"{folder}: {len(records)} shards with {rows} windows, cache.json says {wanted} with "
            f"{info.counts.get('windows', rows)}: run the command that made the cache again"
        )


def _file_problem(
    shard: int, path: Path, entry: dict[str, Any], *, verify: Verify
) -> DamagedShard | None:
    where = f"shard {shard:06d}: {path}"
    try:
        size = path.stat().st_size
        if not path.is_file():
            return DamagedShard(f"{where}: is no file: {ADVICE}")
        if size != entry["bytes"]:
            return DamagedShard(
                f"{where}: {size} bytes, the done-record says {entry['bytes']}: {ADVICE}"
            )
        if verify == "sha256" and sha256_file(path) != entry["sha256"]:
            return DamagedShard(
                f"{where}: its SHA-256 is not that of the done-record, "
                f"the file was changed or damaged: {ADVICE}"
            )
    except OSError as error:
        return DamagedShard(f"{where}: cannot be read ({error.strerror}): {ADVICE}")
    return None
