"""A finished shard gets its name and its done-record, also where two processes finish the same one.

Processes have different shards of a folder to make, unless somebody starts the same command twice:
then the same shard can be written twice at once. Same clips, same bytes: the second writer finds
the shard there as it would have written it and leaves it alone. So nothing that a done-record
promises is ever taken away, and whoever comes last writes the same record.
"""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files import publish, remove, sha256_file
from .records import DoneRecord, describe_files, remove_done, shard_path, write_done

_MAX_TRIES = 10
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""What moving a folder onto its name ends with when another process did so meanwhile."""


def publish_shard(folder: Path, record: DoneRecord, *, partial: Path, suffix: str) -> DoneRecord:
    """Moves `partial` onto shards/NNNNNN`suffix` and writes the done-record; gives the record.

    record: all but its `files`, which are described here. partial: a file or folder; not there if
    the shard has no windows. Gone afterwards, whatever happens. A shard that is already there with
    other bytes (a leftover, or clips that were tried again) is replaced, its record first.
    """
    final = shard_path(folder, record.shard, suffix)
    try:
        record = replace(record, files=_files(folder, partial, final))
        for tries_left in reversed(range(_MAX_TRIES)):
            if _is_there(final, record.files, folder):
                break
            remove_done(folder, record.shard)
            try:
                _move(partial, final)
                break
            except OSError as error:
                if error.errno not in _IN_THE_WAY or not partial.exists() or not tries_left:
                    raise
    finally:
        remove(partial)
    write_done(folder, record)
    return record


def _move(partial: Path, final: Path) -> None:
    if partial.exists():
        publish(partial, final)
    else:
        remove(final)


def _files(folder: Path, partial: Path, final: Path) -> dict[str, dict[str, Any]]:
    """What the done-record is to say of the files of `partial` once they are at `final`."""
    before = partial.relative_to(folder).as_posix()
    after = final.relative_to(folder).as_posix()
    described = describe_files(folder, _all_files(partial))
    return {after + name.removeprefix(before): entry for name, entry in described.items()}


def _is_there(final: Path, files: dict[str, dict[str, Any]], folder: Path) -> bool:
    """Whether `final` holds these files and no other, byte for byte."""
    try:
        found = {path.relative_to(folder).as_posix(): path for path in _all_files(final)}
        return (
            final.exists() == bool(files)
            and found.keys() == files.keys()
            and all(
                path.stat().st_size == files[name]["bytes"]
                and sha256_file(path) == files[name]["sha256"]
                for name, path in found.items()
            )
        )
    except FileNotFoundError:  # moved away while it was looked at
        return False


def _all_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [child for child in path.rglob("*") if not child.is_dir()]
    return [path] if path.exists() else []
