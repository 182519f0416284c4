"""Who works on what: lease files in OUT/leases, for all processes and machines on one folder.

    leases/000003.json      taken first; while it is there nobody else makes shard 3
    leases/000003.1.json    taken over from a holder of 000003.json that was found dead; and so on

A file is written under a partial name and then linked, which fails if the name is taken: of several
takers one wins. A takeover makes the next number instead of removing anything, so a dead taker is
in nobody's way. Each file tells host, process and a heartbeat, which its holder rewrites in place
through the open file: if it was taken over meanwhile, that hurts nobody.

A holder is dead if its process is gone (on the same machine), or if its file did not change for
`timeout_s` while somebody watched: clocks of different machines are never compared. A holder that
only slept finds out with `Lease.is_held`.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ..shards.files import NO_LINKS, partial_path, remove_partials
from .holder import Holder

FOLDER = "leases"

_NAME = re.compile(r"(?P<name>[^.]+)(?:\.(?P<number>[0-9]+))?\.json")
_BYTES = 512
"""Of a lease file: a heartbeat never changes its length."""
_BEATS_IN_TIMEOUT = 6
"""Heartbeats in the time after which a holder counts as dead (a guess)."""

_LOGGER = logging.getLogger(__name__)


class Lease:
    """One lease file that this process made. Safe to use from several threads."""

    def __init__(self, path: Path, next_path: Path, descriptor: int, holder: Holder) -> None:
        """descriptor: of `path`, open for writing. next_path: the file that a takeover makes."""
        self._path, self._next_path = path, next_path
        self._descriptor: int | None = descriptor
        self._holder = holder
        self._lock = threading.Lock()
        self._num_beats = 0

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._descriptor is None

    def is_held(self) -> bool:
        """Whether this process still has it; False once it was taken over or released."""
        with self._lock:
            return self._is_ours() and not self._next_path.exists()

    def beat(self) -> None:
        """Rewrites the file; raises OSError where that cannot be done."""
        with self._lock:
            if self._descriptor is None:
                return
            self._num_beats += 1
            content = {
                **self._holder.to_json(),
                "beats": self._num_beats,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),  # for people
            }
            os.pwrite(self._descriptor, json.dumps(content).encode().ljust(_BYTES), 0)
            os.fsync(self._descriptor)

    def release(self) -> None:
        """Gives it up; a second call does nothing."""
        with self._lock:
            if self._descriptor is None:
                return
            try:
                if self._is_ours():
                    self._path.unlink(missing_ok=True)
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def _is_ours(self) -> bool:
        return self._descriptor is not None and _is_file(self._path, self._descriptor)


class Leases:
    """The leases of one folder; a context manager that keeps this process's ones alive."""

    def __init__(self, folder: Path, *, timeout_s: float) -> None:
        """folder: that of the cache. timeout_s: seconds without a heartbeat after which a holder
        counts as dead."""
        self._folder = folder / FOLDER
        self._timeout_s = timeout_s
        self._holder = Holder.of_this_process()
        self._held: list[Lease] = []
        self._seen: dict[tuple[str, int], tuple[bytes, float]] = {}
        """(name, number) -> what was in the file, and since when (monotonic clock)."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        for lease in self._held:
            lease.release()
        self._tidy()

    def take(self, name: str) -> Lease | None:
        """A lease on `name`, free of "." and "/"; None as long as somebody else has it."""
        return self.take_first([name])

    def take_first(self, names: Iterable[str]) -> Lease | None:
        """A lease on the first of `names` that can be had. `names` is read only so far."""
        standing = self._standing()
        for name in names:
            lease = self._take(name, standing.get(name))
            if lease is not None:
                self._held = [*(other for other in self._held if not other.released), lease]
                return lease
        return None

    def names(self) -> list[str]:
        """What there is a lease on, of living and dead holders."""
        return sorted(self._standing())

    def _take(self, name: str, number: int | None) -> Lease | None:
        """number: of the youngest lease there is, if any."""
        if number is None:
            lease = self._create(name, 0)
            judged = b""
        else:
            content = self._read(name, number)
            if content is None or not self._is_dead(name, number, content):
                return None
            lease, judged = self._create(name, number + 1), content
        if lease is None:
            return None
        # A listing and a judgement are old by now. Whoever else made a file meanwhile sees ours in
        # turn: at most one of the two goes on.
        mine = 0 if number is None else number + 1
        beaten = self._standing().get(name) != mine
        if beaten or (number is not None and self._read(name, number) != judged):
            lease.release()
            return None
        if number is not None:
            _LOGGER.warning("took %s over from %s", name, Holder.describe(judged))
            for old in range(number + 1):
                self._path(name, old).unlink(missing_ok=True)
        return lease

    def _create(self, name: str, number: int) -> Lease | None:
        path = self._path(name, number)
        path.parent.mkdir(exist_ok=True)  # gone where all others were just released
        partial = partial_path(path)
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileNotFoundError:  # gone again
            return None
        lease = Lease(path, self._path(name, number + 1), descriptor, self._holder)
        try:
            lease.beat()
            if not _link(partial, path, descriptor):
                lease.release()
                return None
        except OSError:
            lease.release()
            raise
        finally:
            partial.unlink(missing_ok=True)
        return lease

    def _is_dead(self, name: str, number: int, content: bytes) -> bool:
        now_s = time.monotonic()
        before, since_s = self._seen.get((name, number), (None, now_s))
        if before != content:
            since_s = now_s
        self._seen[name, number] = content, since_s
        return Holder.is_dead(content) or now_s - since_s > self._timeout_s

    def _standing(self) -> dict[str, int]:
        """Name -> the number of its youngest lease."""
        standing: dict[str, int] = {}
        for path in self._files():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                number = int(match["number"] or 0)
                standing[match["name"]] = max(number, standing.get(match["name"], 0))
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in standing}
        return standing

    def _files(self) -> list[Path]:
        try:
            return list(self._folder.iterdir())
        except FileNotFoundError:
            return []

    def _read(self, name: str, number: int) -> bytes | None:
        try:
            return self._path(name, number).read_bytes()
        except FileNotFoundError:
            return None

    def _path(self, name: str, number: int) -> Path:
        return self._folder / (f"{name}.{number}.json" if number else f"{name}.json")

    def _beat(self) -> None:
        while not self._ended.wait(self._timeout_s / _BEATS_IN_TIMEOUT):
            for lease in list(self._held):
                try:
                    lease.beat()
                except OSError as error:
                    _LOGGER.warning("%s: no heartbeat (%s)", self._folder, error.strerror)

    def _tidy(self) -> None:
        remove_partials(self._folder)
        with suppress(OSError):  # not empty: others are at work
            self._folder.rmdir()


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether `descriptor` is open on the file that is at `path` now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:  # removed, or a stale handle
        return False


def _link(partial: Path, path: Path, descriptor: int) -> bool:
    """Gives `partial`, open as `descriptor`, the name `path` unless there is such a file."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        # On NFS the answer to a link that was made can get lost, and the question be put again.
        return _is_file(path, descriptor)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _rename(partial, path)
    return True


def _rename(partial: Path, path: Path) -> bool:
    """The same where the file system has no hard links: the name is reserved, then replaced."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    partial.replace(path)
    return True
