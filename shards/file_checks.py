"""Whether the files of a shard are those that its done-record promises.

Three depths: `size` (there, a regular file inside the cache folder, of this size), `sample` (also
the right shard: small files whole, 16 pieces of large ones) and `sha256` (every byte).
"""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from .errors import DamagedShard
from .files import sha256_file
from .records import DoneRecord
from .samples import SAMPLED_ABOVE_BYTES, sample_sha256

Verify = Literal["size", "sha256"]
Depth = Literal["size", "sample", "sha256"]

ADVICE = (
    "run `deltatok-shards verify` on the cache, then delete the shard's done-record "
    "(shards/NNNNNN.json) and make the shard again"
)

MAX_THREADS = 8


def file_problems(
    folder: Path, records: Sequence[DoneRecord], *, verify: Verify
) -> Generator[DamagedShard, None, None]:
    """Every file that is missing or differs from its done-record, in shard order."""
    root = os.path.realpath(folder)
    checks = [
        (record.shard, folder / name, entry)
        for record in records
        for name, entry in record.files.items()
    ]

    def check(item: tuple[int, Path, dict[str, Any]]) -> DamagedShard | None:
        return _file_problem(*item, root=root, depth=verify)

    # Hashing leaves the interpreter lock, waiting for a network file system does too.
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        yield from (problem for problem in pool.map(check, checks) if problem is not None)


def check_files(folder: Path, record: DoneRecord, *, depth: Depth) -> None:
    """Raises DamagedShard for the first file of a shard that is not the promised one."""
    for problem in record_problems(folder, record, depth=depth):
        raise problem


def record_problems(
    folder: Path, record: DoneRecord, *, depth: Depth
) -> Generator[DamagedShard, None, None]:
    """Every file of a shard that is not the promised one."""
    root = os.path.realpath(folder)
    for name, entry in record.files.items():
        problem = _file_problem(record.shard, folder / name, entry, root=root, depth=depth)
        if problem is not None:
            yield problem


def check_threads() -> int:
    """Threads to read files with."""
    return min(MAX_THREADS, os.cpu_count() or 1)


def leaves(path: Path, root: str) -> bool:
    """Whether links lead from `path` out of the folder `root` (real path)."""
    return not os.path.realpath(path).startswith(f"{root.rstrip('/')}/")


def _file_problem(
    shard: int, path: Path, entry: dict[str, Any], *, root: str, depth: Depth
) -> DamagedShard | None:
    where = f"shard {shard:06d}: {path}"
    try:
        if leaves(path, root):
            return DamagedShard(
                f"{where}: is a link to {os.path.realpath(path)}, outside of the cache: "
                "copy the file into the cache instead"
            )
        size = path.stat().st_size
        if not path.is_file():
            return DamagedShard(f"{where}: is no file: {ADVICE}")
        if size != entry["bytes"]:
            return DamagedShard(
                f"{where}: {size} bytes, the done-record says {entry['bytes']}: {ADVICE}"
            )
        if _hash(path, entry, depth=depth) not in (None, entry["sha256"]):
            return DamagedShard(
                f"{where}: its SHA-256 is not that of the done-record, "
                f"the file was changed or damaged, or is another shard's: {ADVICE}"
            )
    except OSError as error:
        return DamagedShard(f"{where}: cannot be read ({error.strerror}): {ADVICE}")
    return None


def _hash(path: Path, entry: dict[str, Any], *, depth: Depth) -> str | None:
    """What must be the SHA-256 of the done-record; None if nothing is to be said against it."""
    if depth == "size":
        return None
    if depth == "sha256" or entry["bytes"] <= SAMPLED_ABOVE_BYTES:
        return sha256_file(path)
    wanted = entry.get("sample_sha256")  # caches of before have none
    if wanted is None or sample_sha256(path, size=entry["bytes"]) == wanted:
        return None
    return "another sample"
