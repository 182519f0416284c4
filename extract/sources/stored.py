"""Videos in object stores and on the Hugging Face hub -> clips, which a decoding process fetches.

    s3://bucket/prefix, gs://, az://, hf://datasets/owner/name/folder    its videos
    s3://bucket/prefix/video.mp4                                         itself

Folders of frames and archives would have to be read in pieces: they are not taken from a store.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...shards.errors import UsageError
from ...shards.stores.store import StoredObject, open_store
from .archive import archive_of
from .clip import VIDEO_SUFFIXES, ClipCandidate, StoredVideo, frame_seconds

logger = logging.getLogger(__name__)

LIST_SUFFIXES = frozenset([".txt", ".csv", ".jsonl"])
REQUESTS_AT_ONCE = 32
"""For the videos that a list names; each waits for an answer of some 20 ms (a guess)."""

_STORE_PARTS = {"hf": 3}
"""So much of an address is the store: datasets/owner/name; of the others a bucket."""


def find_in_store(address: str) -> Iterator[ClipCandidate]:
    """The videos at an address, without hidden names; UsageError for a list or an archive."""
    path = PurePosixPath(address)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        (video,) = stored_videos([address])
        if video.size_bytes == 0:
            raise UsageError(f"{address}: no such video: check the address")
        yield replace(video, name=path.name)
        return
    if path.suffix.lower() in LIST_SUFFIXES or is_archive(path.name):
        raise UsageError(
            f"{address}: from a store only videos are taken, wanted one or a folder of them: copy "
            "the list or archive to a disk and give it there"
        )
    left_out: list[str] = []
    for item in open_store(address).list():
        path = PurePosixPath(item.name)
        if any(part.startswith(".") for part in path.parts):
            continue
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield _candidate(item.name, address, item)
        elif is_archive(path.name) or frame_seconds(path.name) is not None:
            left_out.append(item.name)
    if left_out:
        logger.warning(
            "%s: %d archives or frames left out, first %s: from a store only videos are taken; "
            "copy these to a disk and give them there",
            address,
            len(left_out),
            left_out[0],
        )


def stored_videos(addresses: Sequence[str]) -> list[ClipCandidate]:
    """The video at each of these addresses; of 0 bytes where there is none."""

    def look(address: str) -> ClipCandidate:
        store, name = split_address(address)
        return _candidate("", store, open_store(store).stat(name) or StoredObject(name, 0, ""))

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        return list(threads.map(look, addresses))


def split_address(address: str) -> tuple[str, str]:
    """The store, and the name in it."""
    scheme, _, rest = address.partition("://")
    parts = rest.split("/")
    depth = _STORE_PARTS.get(scheme, 1)
    return f"{scheme}://{'/'.join(parts[:depth])}", "/".join(parts[depth:])


def file_of(address: str) -> Path:
    """The path that file:///folder/name means; UsageError for one that does not begin with /."""
    path = Path(address.removeprefix("file://"))
    if not path.is_absolute():
        raise UsageError(f"{address}: wanted three slashes: file:///folder")
    return path


def is_archive(name: str) -> bool:
    """Whether a file of this name is searched for clips on a disk, or would be uncompressed."""
    suffixes = {suffix.lower() for suffix in PurePosixPath(name).suffixes}
    return bool(suffixes & {".tar", ".tgz"}) or archive_of(Path(name)) is not None


def _candidate(name: str, store: str, item: StoredObject) -> ClipCandidate:
    source = StoredVideo(store, item.name, item.stamp)
    return ClipCandidate(name, Path(item.name), source, size_bytes=item.size)
