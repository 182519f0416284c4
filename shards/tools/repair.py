"""repair_cache: takes out of a cache what keeps it from being made whole by running again.

Removed are partial files of killed writers and, of shards that `verify_cache` calls damaged, the
done-record and the file beside it. Nothing else: good shards stay, what nobody knows stays and
is listed by verify, links are removed and never followed, nothing outside of the folder is touched.
Derived files (quarantine.jsonl, index.jsonl, NOTICE.txt) are written again. Nobody may write to the
cache meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path

from ..cache import read_cache_info, refresh_derived, reopen_cache
from ..errors import DamagedShard, DeltatokError
from ..files import remove_partials
from ..plan import PLAN_FOLDER
from ..records import read_done, remove_done, shard_path, write_quarantine
from .verify import VerifyReport, data_path, is_untouched


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What `repair_cache` did; paths relative to the cache folder."""

    removed: list[str]
    """Files and folders that are gone."""
    shards: list[int]
    """Shards that are to be made again."""
    rewritten: list[str]
    """Derived files that were made again from the done-records."""


def repair_cache(folder: Path | str, report: VerifyReport) -> Repaired:
    """Clears what `report`, of `verify_cache(folder)`, names; then run what makes the cache again.

    Raises DamagedShard, having touched nothing, if shards/ is a link or cache.json was changed.
    """
    folder = Path(folder)
    shards = folder / "shards"
    if not is_untouched(folder):
        raise DamagedShard(
            f"{folder / 'cache.json'}: was changed by hand or damaged: nothing was removed, for "
            "all shards are judged by it; restore it from a copy and repair again"
        )
    if shards.is_symlink():
        raise DamagedShard(
            f"{shards}: is a link: nothing was removed; put the folder in its place first"
        )
    places = (folder, shards, folder / PLAN_FOLDER)
    partials = [path for place in places for path in remove_partials(place, stale_after_s=0.0)]
    removed = [path.relative_to(folder).as_posix() for path in partials]
    if (report.damaged or report.missing) and read_cache_info(folder).complete:
        reopen_cache(folder)  # first: a finished cache has all its shards
    for shard in report.damaged:
        removed += _remove_shard(folder, shard)
    rewritten = refresh_derived(folder)
    before = _bytes(folder / "quarantine.jsonl")
    write_quarantine(folder)
    if _bytes(folder / "quarantine.jsonl") != before:
        rewritten.append("quarantine.jsonl")
    to_make = sorted({*report.damaged, *report.missing})
    return Repaired(removed=removed, shards=to_make, rewritten=rewritten)


def _remove_shard(folder: Path, shard: int) -> list[str]:
    """The promise first, then the file that it is about; if it cannot be read, that stays."""
    record_path = shard_path(folder, shard, ".json")
    try:
        record = read_done(folder, shard)
    except DeltatokError:
        record = None
    if record_path.is_dir() and not record_path.is_symlink():
        return []  # no file of ours
    remove_done(folder, shard)
    removed = [record_path.relative_to(folder).as_posix()]
    path = data_path(folder, read_cache_info(folder), shard)
    if record is None or record.file is None:
        return removed
    if path.is_symlink() or path.is_file():
        path.unlink()
        removed.append(path.relative_to(folder).as_posix())
    elif path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    return removed


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
