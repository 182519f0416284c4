"""What lies at an address, by name: read, create, list.

    s3://bucket/prefix  gs://bucket/prefix  az://container/prefix  file:///folder    obstore
    hf://datasets/owner/name[@revision][/folder]                                     huggingface_hub

Credentials, endpoints and regions come from the environment, as each library documents them
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, HF_TOKEN).

What is created is never replaced: `create` is one conditional request (If-None-Match: *), so that
of several writers exactly one wins, and the others find out whether it wrote the same bytes.
"""

import functools
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CacheMismatch, DamagedShard, DeltatokError, UsageError
from ..files import check_address, disk_errors, partial_path, publish, sha256_file

PROBE = "probe.deltatok"
MAX_OBJECT_BYTES = 5 * 10**9
"""The most that S3 takes in one request, and only one request can be conditional."""

RETRY_S = 60.0
"""For so long a request that fails for want of a network or by the server's fault is repeated."""

FETCH_TRIES = 3
"""Of a file whose transfer breaks off (a guess)."""

_CHUNK_BYTES = 4 * 2**20


class StoredObject(NamedTuple):
    """A file of a store, as it is listed."""

    name: str
    """Below the store's address."""
    size: int
    """Bytes."""
    stamp: str
    """The store's own mark of this version of the file (an ETag); another one: it was replaced."""


class NewFile(NamedTuple):
    """A file to be created in a store."""

    name: str
    source: Path | bytes
    sha256: str


def open_store(url: str) -> "Store":
    """The store of an address; nothing is asked of it yet.

    Raises UsageError for a scheme or an address that is not known, and where the library for it is
    not installed. A process that was forked gets one of its own.
    """
    return _open_store(url if url.endswith("://") else url.rstrip("/"), os.getpid())


@functools.lru_cache(maxsize=64)
def _open_store(url: str, _pid: int) -> "Store":
    check_address(url)
    if url.startswith("hf:"):
        from .hub import HubStore

        return HubStore(url)
    return ObjectStore(url)


def forget_stores() -> None:
    """The next `open_store` reads the environment again."""
    _open_store.cache_clear()


class Store(ABC):
    """The files below an address. Safe to use from several threads.

    Every method raises UsageError (2) for what the user has to set right (credentials, bucket,
    region, permission) and DeltatokError (1) where the network or the server fails for a minute.
    """

    shards_at_once = 1
    """How many shards `push` gives to one `create`."""

    def __init__(self, url: str) -> None:
        self.url = url
        """Without a slash at its end."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The files of the folder `prefix` ("" or "shards/") and below."""

    @abstractmethod
    def stat(self, name: str) -> StoredObject | None:
        """A file as `list` gives it; None where there is none."""

    @abstractmethod
    def chunks(self, name: str, *, stamp: str = "") -> Iterator[bytes]:
        """A file's bytes; FileNotFoundError where there is none, or not that version of it."""

    @abstractmethod
    def create(self, files: Sequence[NewFile]) -> bool:
        """Creates files in this order, so that the last promises the others; False if all were
        there with the same bytes. Raises CacheMismatch where one is there with other bytes."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Writes a file, whatever was there before."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file; a missing one is fine."""

    @abstractmethod
    def probe(self) -> None:
        """Raises UsageError for a store that cannot be written, or that replaces what is there
        where it was asked not to. To be called before anything is created: it makes the folder."""

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """A small file; None where there is none, DamagedShard for a larger one."""
        data = bytearray()
        try:
            for chunk in self.chunks(name):
                data += chunk
                if len(data) > max_bytes:
                    raise DamagedShard(
                        f"{self.at(name)}: more than {max_bytes} bytes, which no file of a cache "
                        "of this name has: correct the address, or put the right one there"
                    )
        except FileNotFoundError:
            return None
        return bytes(data)

    def fetch(self, name: str, path: Path, *, size: int | None, sha256: str | None) -> None:
        """Copies a file to `path`, which is whole or not there.

        Raises DamagedShard unless it has this size and this SHA-256 (None: not known), or is not
        there; DeltatokError where the disk is full.
        """
        partial, digest, got = partial_path(path), hashlib.sha256(), 0
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    for chunk in self.stream(name):
                        file.write(chunk)
                        digest.update(chunk)
                        got += len(chunk)
                        if size is not None and got > size:
                            break
                if size not in (None, got) or sha256 not in (None, digest.hexdigest()):
                    raise DamagedShard(
                        f"{self.at(name)}: {got} bytes, SHA-256 {digest.hexdigest()}; the cache "
                        f"promises {size} and {sha256}: it was changed or damaged in the store; "
                        "put the right one there, or make the cache again"
                    )
                publish(partial, path)
            except FileNotFoundError as error:
                raise DamagedShard(
                    f"{self.at(name)}: is not there any more: put it back, or make the cache again"
                ) from error
            finally:
                partial.unlink(missing_ok=True)

    def at(self, name: str) -> str:
        """The address of a file."""
        return f"{self.url}/{name}"

    def check_same(self, file: NewFile) -> None:
        """Raises CacheMismatch unless the file of this name has these bytes."""
        there = hashlib.sha256()
        for chunk in self.stream(file.name):
            there.update(chunk)
        if there.hexdigest() != file.sha256:
            raise CacheMismatch(
                f"{self.at(file.name)}: is there with other bytes (SHA-256 {there.hexdigest()}, "
                f"ours {file.sha256}): another run, with other settings or versions, writes to "
                "this address; give another one"
            )

    def stream(self, name: str, *, stamp: str = "") -> Iterator[bytes]:
        """`chunks`, begun again where the transfer breaks off; what came before is skipped."""
        given, last_s = 0, time.monotonic()
        for tries_left in reversed(range(FETCH_TRIES)):
            skip = given
            try:
                for chunk in self.chunks(name, stamp=stamp):
                    last_s = time.monotonic()
                    rest = chunk[min(skip, len(chunk)) :]
                    skip -= len(chunk) - len(rest)
                    given += len(rest)
                    if rest:
                        yield rest
                return
            except UsageError:
                raise
            except DeltatokError:  # one that took RETRY_S was tried again all the while
                if not tries_left or time.monotonic() - last_s > RETRY_S / 2:
                    raise
                time.sleep(1.0)


class ObjectStore(Store):
    """A folder of a bucket, by obstore."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            import obstore
            from obstore import store
            from obstore.exceptions import BaseError
        except ImportError as error:
            raise UsageError(
                f"{url}: obstore is not installed: pip install 'deltatok[cloud]'"
            ) from error
        self._obstore, self._base_error = obstore, BaseError
        self._folder = Path(url.removeprefix("file://")) if url.startswith("file://") else None
        if self._folder is None:
            # So many that the time alone decides.
            retries = {"max_retries": 1000, "retry_timeout": timedelta(seconds=RETRY_S)}
            with self._errors(""):
                self._store = store.from_url(url, retry_config=retries)

    @functools.cached_property
    def _store(self) -> Any:
        """obstore's own; of a folder, which must be there."""
        if self._folder is None or not self._folder.is_dir():
            raise UsageError(f"{self.url}: no such folder: correct the address")
        return self._obstore.store.LocalStore(self._folder)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        with self._errors(prefix):
            for page in self._obstore.list(self._store, prefix or None):
                for item in page:
                    yield StoredObject(item["path"], item["size"], item["e_tag"] or "")

    def stat(self, name: str) -> StoredObject | None:
        try:
            with self._errors(name):
                item = self._obstore.head(self._store, name)
        except FileNotFoundError:
            return None
        return StoredObject(name, item["size"], item["e_tag"] or "")

    def chunks(self, name: str, *, stamp: str = "") -> Iterator[bytes]:
        options = {"if_match": stamp} if stamp else None
        with self._errors(name):
            found = self._obstore.get(self._store, name, options=options)
            for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    def create(self, files: Sequence[NewFile]) -> bool:
        created = [self._create(file) for file in files]
        return any(created)

    def _create(self, file: NewFile) -> bool:
        size = file.source.stat().st_size if isinstance(file.source, Path) else len(file.source)
        if size > MAX_OBJECT_BYTES:
            raise UsageError(
                f"{self.at(file.name)}: {size} bytes, a store takes {MAX_OBJECT_BYTES} at once: "
                "lower frames_per_shard"
            )
        try:
            with self._errors(file.name, writing=True):
                self._obstore.put(self._store, file.name, file.source, mode="create")
        except FileExistsError:
            self.check_same(file)
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        with self._errors(name, writing=True):
            self._obstore.put(self._store, name, data)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._errors(name, writing=True):
            self._obstore.delete(self._store, [name])

    def probe(self) -> None:
        name = f"{PROBE}-{os.getpid()}-{time.time_ns()}"
        if self._folder is not None:
            try:
                self._folder.mkdir(exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"{self.url}: cannot be made ({error.strerror}): give another folder"
                ) from error
        with self._errors(name, writing=True):
            self._obstore.put(self._store, name, b"1", mode="create")
            try:
                self._obstore.put(self._store, name, b"2", mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return
            finally:
                self._obstore.delete(self._store, [name])
        raise UsageError(
            f"{self.url}: this store replaces a file where it was asked to create it only, so that "
            "two runs could mix: use a store with conditional requests (If-None-Match)"
        )

    @contextmanager
    def _errors(self, name: str, *, writing: bool = False) -> Iterator[None]:
        """obstore's errors as ours; FileNotFoundError and FileExistsError pass."""
        exceptions = self._obstore.exceptions
        try:
            yield
        except exceptions.AlreadyExistsError as error:
            raise FileExistsError(self.at(name)) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise _as_ours(self.at(name), error) from error
            raise FileNotFoundError(self.at(name)) from error
        except exceptions.PreconditionError as error:  # of `chunks`: another version
            raise FileNotFoundError(self.at(name)) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            wanted = "may write there" if writing else "may read there"
            raise UsageError(
                f"{self.at(name)}: refused by the store ({_first_line(error)}): give credentials "
                f"that {wanted} (AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, ...)"
            ) from error
        except self._base_error as error:
            raise _as_ours(self.at(name), error) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def _as_ours(where: str, error: BaseException) -> DeltatokError:
    """What the text of an obstore error means: it has one class for most of them."""
    text = str(error)
    for sign, advice in _SIGNS:
        if sign in text:
            return UsageError(f"{where}: {advice} ({_first_line(error)})")
    return DeltatokError(
        f"{where}: cannot be reached ({_first_line(error)}): check the network and the endpoint, "
        "and run again; what is finished stays"
    )


_SIGNS = (
    ("os error 13", "may not be written: give another folder, or correct its permissions"),
    ("os error 30", "is read-only: give another folder"),
    ("NoSuchBucket", "no such bucket: make it, or correct the name"),
    ("169.254.169.254", "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ("Missing AccessKeyId", "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ("metadata.google.internal", "no credentials: set GOOGLE_SERVICE_ACCOUNT"),
    ("Account must be specified", "no account: set AZURE_STORAGE_ACCOUNT_NAME"),
    ("PermanentRedirect", "the bucket is in another region: set AWS_REGION"),
    ("AuthorizationHeaderMalformed", "the bucket is in another region: set AWS_REGION"),
    ("301 Moved", "the bucket is in another region: set AWS_REGION"),
    ("Unable to recognise URL", "not an address of a bucket: give scheme://bucket/prefix"),
)


def new_file(folder: Path, name: str) -> NewFile:
    """The file `name` of a folder, to be created under the same name."""
    return NewFile(name, folder / name, sha256_file(folder / name))
