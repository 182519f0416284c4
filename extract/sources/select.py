"""Which of the clips found are taken: --exclude, then --split, then --limit."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...shards.errors import UsageError
from ...shards.files import read_text
from ...shards.plan import plan_order
from ..config import ExtractConfig
from .clip import Clip, check_writable, without_suffix
from .find import find_clips

logger = logging.getLogger(__name__)


def clips_of(config: ExtractConfig) -> list[Clip]:
    """The clips that an extraction is to read, sorted by key; UsageError where there are none, and
    for names that cannot be stored."""
    clips = find_clips(config.videos, root=config.root)
    if config.exclude is not None:
        clips = without_excluded(clips, Path(config.exclude))
    if config.split is not None:
        clips = of_split(clips, config.split)
    check_writable(clips)
    if config.limit is not None:
        clips = first_clips(clips, config.limit, seed=config.seed)
    return clips


def without_excluded(clips: Sequence[Clip], file: Path) -> list[Clip]:
    """The clips that no line of `file` names.

    A line is a clip's key or the end of it after a slash, or class/name, with or without the
    suffix of a video; empty lines and lines that start with # are skipped.

    Raises:
        UsageError: the file cannot be read, a line names no clip, or no clip is left. A line that
            does nothing is a misspelt one: what should be kept out would be in the cache.
    """
    try:
        lines = read_text(file, encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--exclude {file}: cannot be read ({error})") from error
    stripped = (line.strip() for line in lines)
    wanted = {without_suffix(line): line for line in stripped if line and not line.startswith("#")}
    used: set[str] = set()
    kept = []
    for clip in clips:
        hits = _names(clip) & wanted.keys()
        used |= hits
        if not hits:
            kept.append(clip)
    unused = sorted(wanted.keys() - used)
    if unused:
        raise UsageError(
            f"--exclude {file}: {wanted[unused[0]]!r} is no clip here ({len(unused)} of "
            f"{len(wanted)} lines name none): correct the lines, or take them out"
        )
    if not kept:
        raise UsageError(f"--exclude {file}: names all {len(clips)} clips: nothing is left to do")
    logger.info("excluded %d of %d clips", len(clips) - len(kept), len(clips))
    return kept


def of_split(clips: Sequence[Clip], split: str) -> list[Clip]:
    """The clips of that split: by their `split`, or where they have none by a folder in the key.

    Raises UsageError, naming the splits there are, if no clip is in it.
    """
    kept = [
        clip
        for clip in clips
        if clip.split == split or (clip.split is None and split in clip.key.split("/")[:-1])
    ]
    if not kept:
        there = Counter(clip.split for clip in clips if clip.split is not None)
        names = ", ".join(f"{name} ({count} clips)" for name, count in sorted(there.items()))
        raise UsageError(
            f"--split {split}: no clip of {len(clips)} is in it, nor in a folder of that name; "
            f"splits named: {names[:500] or 'none'}"
        )
    return kept


def first_clips(clips: Sequence[Clip], limit: int, *, seed: int) -> list[Clip]:
    """The first `limit` clips of the plan's order, sorted by key: any more keep these."""
    taken = set(plan_order([clip.key for clip in clips], seed=seed)[:limit])
    return [clip for clip in clips if clip.key in taken]


def _names(clip: Clip) -> set[str]:
    """What a line may call the clip."""
    parts = without_suffix(clip.key).split("/")
    names = {"/".join(parts[start:]) for start in range(len(parts))}
    if clip.label is not None:
        names |= {f"{label}/{parts[-1]}" for label in (clip.label, clip.label.replace(" ", "_"))}
    return names
