"""Lines of a plan whose clips were not there when it was made, once they are.

A clip that cannot be read at all is planned with 0 bytes (and without a target) and goes to
quarantine. Its line is filled in when the quarantined are tried again: nothing that is stored
depends on it. Called by extract/common.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .files import write_bytes
from .plan import PLAN, PlanEntry, plan_lines, read_plan


def needs_mending(folder: Path | str, asked: Sequence[PlanEntry]) -> bool:
    """Whether the stored plan has clips of 0 bytes that have more now."""
    folder = Path(folder)
    return (folder / PLAN).exists() and _mended(read_plan(folder), asked) is not None


def mend_plan(folder: Path | str, asked: Sequence[PlanEntry]) -> None:
    """Fills these lines in; one process at a time, after the cache was reopened."""
    folder = Path(folder)
    mended = _mended(read_plan(folder), asked)
    if mended is not None:
        write_bytes(folder / PLAN, plan_lines(mended))


def _mended(stored: Sequence[PlanEntry], asked: Sequence[PlanEntry]) -> list[PlanEntry] | None:
    there = {entry.key: entry for entry in asked if entry.size_bytes > 0}
    lost = {entry.key for entry in stored if entry.size_bytes == 0}
    if not lost & there.keys():
        return None
    return [
        replace(there[entry.key], shard=entry.shard) if entry.key in lost & there.keys() else entry
        for entry in stored
    ]
