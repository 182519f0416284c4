"""A local copy of the cache at an address, filled as it is read, and bounded.

    CACHE_DIR/mirrors/<16 hex>/     a cache folder like any other, and mirror.json; its name is the
                                    hash of the address and of the cache.json that lies there, so
                                    that a cache that was changed gets a new mirror

`local_folder` is the door: it turns the place that somebody gave into a folder. cache.json and the
files that it names come at once; a shard, or a part of the plan, when it is first asked for
(`present`), checked by size and SHA-256, by one process of the machine while the others wait.
Where CACHE_DIR is limited, the shards that were not used for longest make room (for what is being
fetched at this moment, at most THREADS shards, there is none beside it).
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import CacheMismatch, DamagedShard, UsageError
from ..files import is_address, local_path, write_bytes
from ..schema import ADVICE, MAX_JSON_BYTES, STORED, load, parse_json, read_json, shown
from .store import Store, open_store

CACHE_DIR = "DELTATOK_CACHE_DIR"
CACHE_LIMIT = "DELTATOK_CACHE_LIMIT_GB"
"""Environment variables; the flags --cache-dir and --cache-limit-gb set them."""

MIRROR = "mirror.json"
NOT_NEEDED = ("NOTICE.txt",)
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
"""Of a file beside the shards: no path."""
KEPT_SHARE = 0.9
"""Of the limit, after room was made: so that not every fetch has to look through all shards."""

NUM_AHEAD = 16
"""Shards that are fetched and were not asked for yet, at most (a guess)."""
THREADS = 8


class RemoteFile(NamedTuple):
    """A file of a cache, as its index or plan promises it."""

    name: str
    size: int
    sha256: str


def cache_dir() -> Path:
    """Where mirrors and unfinished uploads lie: DELTATOK_CACHE_DIR, else deltatok in the user's
    cache folder."""
    given = os.environ.get(CACHE_DIR)
    if given:
        return local_path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltatok"


def cache_limit_bytes() -> int | None:
    """Bytes of all mirrored shards, by DELTATOK_CACHE_LIMIT_GB; None: no limit."""
    text = os.environ.get(CACHE_LIMIT, "")
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 < limit < 1e9:
        raise UsageError(f"{CACHE_LIMIT} is {text!r}, wanted a number of gigabytes above 0")
    return int(limit * 1e9)


def local_folder(place: Path | str) -> Path:
    """The folder of the cache at `place`: itself, or the mirror of an address.

    Raises UsageError and DeltatokError as stores do, CacheMismatch where no finished cache is,
    DamagedShard where a file is not what cache.json promises.
    """
    text = os.fspath(place)
    if not is_address(text):
        return local_path(place)
    store = open_store(text)
    data = store.read("cache.json", max_bytes=MAX_JSON_BYTES)
    if data is None:
        raise CacheMismatch(f"{text}: not a deltatok cache (it has no cache.json)")
    where = store.at("cache.json")
    info = parse_json(data, where=where)
    if not isinstance(info, dict) or not info.get("complete"):
        raise CacheMismatch(f"{text}: is not finished: run the command that makes it again")
    name = hashlib.sha256(store.url.encode() + b"\0" + data).hexdigest()[:16]
    folder = cache_dir() / "mirrors" / name
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        write_bytes(folder / MIRROR, json.dumps({"url": store.url}).encode())
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror}): give another --cache-dir"
        ) from error
    for file in top_files(info.get("files"), where=where):
        if file.name not in NOT_NEEDED:
            fetch_once(store, folder, file)
    if not (folder / "cache.json").exists():
        write_bytes(folder / "cache.json", data)  # last: now it is a cache
    return folder


@dataclass(frozen=True)
class _Stored:
    bytes: int
    sha256: str


def top_files(files: object, *, where: str) -> list[RemoteFile]:
    """`files` of the cache.json that lies at `where`: those beside the shards; DamagedShard for a
    name that is a path, or that of a file of ours."""
    if not isinstance(files, dict):
        raise DamagedShard(f"{where}: files is {shown(files)}, wanted a JSON object: {ADVICE}")
    found = []
    for name, entry in files.items():
        if not _NAME.fullmatch(name) or name in (MIRROR, "cache.json"):
            raise DamagedShard(f"{where}: names the file {shown(name)}: {ADVICE}")
        file = load(_Stored, entry, where=f"{where}: files.{name}", how=STORED)
        found.append(RemoteFile(name, file.bytes, file.sha256))
    return found


def is_mirror(folder: Path) -> bool:
    """Whether a folder is the mirror of an address."""
    return _mirror(folder, os.getpid()) is not None


def present(folder: Path, file: RemoteFile) -> Path:
    """The path of a file of a cache; in a mirror it is fetched where it is not there."""
    mirror = _mirror(folder, os.getpid())
    if mirror is not None:
        mirror.fetch(file)
    return folder / file.name


def fetch_records(folder: Path, num_shards: int) -> None:
    """Has all done-records of a mirror there; nothing for another folder."""
    mirror = _mirror(folder, os.getpid())
    names = (f"shards/{shard:06d}.json" for shard in range(num_shards if mirror else 0))
    missing = [name for name in names if not (folder / name).exists()]
    if mirror is not None and missing:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(mirror.fetch_record, missing))


def expect(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Says which files of a cache are needed next, in this order; a mirror fetches them ahead."""
    mirror = _mirror(folder, os.getpid())
    if mirror is not None:
        mirror.expect(files)


@functools.lru_cache(maxsize=256)
def _mirror(folder: Path, _pid: int) -> "Mirror | None":
    path = folder / MIRROR
    if not path.is_file():
        return None
    told = read_json(path)
    return Mirror(folder, open_store(str(told["url"])))


class Mirror:
    """The shards of one mirror, in this process."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self._store = folder, store
        self._lock = threading.Condition()
        self._waiting: deque[RemoteFile] = deque()
        self._ahead: set[str] = set()
        """Names that were fetched, or are being, and not yet asked for."""
        self._threads: list[threading.Thread] = []
        self._stored_bytes: int | None = None

    def fetch(self, file: RemoteFile) -> None:
        """Returns when the file is there."""
        with self._lock:
            self._ahead.discard(file.name)
            self._lock.notify_all()
        self._fetch(file)

    def fetch_record(self, name: str) -> None:
        """A file of which nothing promises the hash."""
        self._store.fetch(name, self.folder / name, size=None, sha256=None)

    def expect(self, files: Sequence[RemoteFile]) -> None:
        """These next, in the background; what was expected before and not yet begun is not."""
        with self._lock:
            self._waiting = deque(
                file
                for file in files
                if file.name not in self._ahead and not (self.folder / file.name).exists()
            )
            self._lock.notify_all()
            while self._waiting and len(self._threads) < THREADS:
                thread = threading.Thread(target=self._work, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting or len(self._ahead) >= NUM_AHEAD:
                    self._lock.wait()
                file = self._waiting.popleft()
                self._ahead.add(file.name)
            try:
                self._fetch(file)
            except Exception:  # whoever asks for the file meets it again, and raises it
                with self._lock:
                    self._ahead.discard(file.name)

    def _fetch(self, file: RemoteFile) -> None:
        if _used(self.folder, file):
            return
        with _alone(self.folder, file.name):
            if _used(self.folder, file):
                return
            self._make_room(file)
            fetch_once(self._store, self.folder, file)
            with self._lock:
                if self._stored_bytes is not None:
                    self._stored_bytes += file.size

    def _make_room(self, file: RemoteFile) -> None:
        limit = cache_limit_bytes()
        if limit is None:
            return
        if file.size > limit:
            raise UsageError(
                f"{file.name} has {file.size} bytes, --cache-limit-gb allows {limit}: raise it"
            )
        with self._lock:
            stored = self._stored_bytes
            if stored is not None and stored + file.size <= limit:
                return
        root = self.folder.parent
        with _alone(root, "eviction"):
            found = []
            for path in root.glob("*/shards/*[!n]"):  # all but done-records
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                found.append((status.st_mtime_ns, status.st_size, path))
            stored = sum(size for _, size, _ in found)
            keep = limit if stored + file.size <= limit else int(limit * KEPT_SHARE)
            for _, size, path in sorted(found):
                if stored + file.size <= keep:
                    break
                path.unlink(missing_ok=True)  # who has it open goes on reading
                stored -= size
        with self._lock:
            self._stored_bytes = stored


def fetch_once(store: Store, folder: Path, file: RemoteFile) -> None:
    """Fetches a file of a store into `folder` unless it is there."""
    if not _used(folder, file):
        store.fetch(file.name, folder / file.name, size=file.size, sha256=file.sha256)


def _used(folder: Path, file: RemoteFile) -> bool:
    """Notes that a file is used now; False where there is none of its size."""
    try:
        os.utime(folder / file.name)
        return (folder / file.name).stat().st_size == file.size
    except FileNotFoundError:
        return False


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Of all threads and processes of this machine, one at a time for the same name."""
    locks = folder / "locks"
    locks.mkdir(exist_ok=True)
    with (locks / name.replace("/", "_")).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
