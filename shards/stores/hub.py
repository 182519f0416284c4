"""A data set of the Hugging Face hub as a store: hf://datasets/owner/name[@revision][/folder].

Every `create` is one commit, so that a shard and its record come together. Files are checked by
SHA-256 as everywhere; the hub keeps large ones as LFS objects of that hash.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import DeltatokError, UsageError
from .store import NewFile, Store, StoredObject

_CHUNK_BYTES = 4 * 2**20
COMMIT_TRIES = 5
"""Another writer's commit makes ours fail with 412 or 409; it is tried again."""


class HubStore(Store):
    """A folder of a data set, or all of it."""

    shards_at_once = 50  # the hub limits commits an hour

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parts = url.removeprefix("hf://").split("/")
        if len(parts) < 3 or parts[0] != "datasets" or not all(parts):
            raise UsageError(f"{url}: wanted hf://datasets/owner/name or .../name/folder")
        name, _, revision = parts[2].partition("@")
        self._repo, self._revision = f"{parts[1]}/{name}", revision or None
        self._folder = "".join(f"{part}/" for part in parts[3:])
        # Imported here: it takes a quarter of a second.
        from huggingface_hub import HfApi

        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        self._where: dict[str, Any] = {
            "repo_id": self._repo,
            "repo_type": "dataset",
            "revision": self._revision,
        }

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        folder = f"{self._folder}{prefix}".rstrip("/") or None
        with self._errors(prefix):
            try:
                for item in self._api.list_repo_tree(
                    path_in_repo=folder, recursive=True, **self._where
                ):
                    if isinstance(item, RepoFile) and item.path.startswith(self._folder):
                        name = item.path.removeprefix(self._folder)
                        stamp = item.lfs.sha256 if item.lfs else item.blob_id
                        yield StoredObject(name, item.size, stamp)
            except EntryNotFoundError:  # no such folder
                return

    def stat(self, name: str) -> StoredObject | None:
        from huggingface_hub import get_hf_file_metadata

        try:
            with self._errors(name):
                found = get_hf_file_metadata(self._address(name), endpoint=self._api.endpoint)
        except FileNotFoundError:
            return None
        return StoredObject(name, found.size or 0, found.etag or "")

    def chunks(self, name: str, *, stamp: str = "") -> Iterator[bytes]:
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        headers, address = build_hf_headers(), self._address(name)
        with (
            self._errors(name),
            get_session().stream("GET", address, headers=headers, follow_redirects=True) as answer,
        ):
            hf_raise_for_status(answer)
            if stamp and _stamp(answer) != stamp:
                raise FileNotFoundError(self.at(name))
            yield from answer.iter_bytes(_CHUNK_BYTES)

    def _address(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        filename = f"{self._folder}{name}"
        return hf_hub_url(filename=filename, endpoint=self._api.endpoint, **self._where)

    def create(self, files: Sequence[NewFile]) -> bool:
        new = []
        for file in files:
            if self._is_there(file.name):
                self.check_same(file)
            else:
                new.append(file)
        self._commit([(file.name, file.source) for file in new])
        return bool(new)

    def replace(self, name: str, data: bytes) -> None:
        self._commit([(name, data)])

    def delete(self, name: str) -> None:
        if self._is_there(name):
            with self._errors(name):
                self._api.delete_file(f"{self._folder}{name}", **self._where)

    def probe(self) -> None:
        """Makes the data set, private, where there is none."""
        with self._errors(""):
            self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)

    def _is_there(self, name: str) -> bool:
        with self._errors(name):
            return self._api.file_exists(filename=f"{self._folder}{name}", **self._where)

    def _commit(self, files: Sequence[tuple[str, Any]]) -> None:
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        if not files:
            return
        names = files[0][0] if len(files) == 1 else f"{files[0][0]} and {len(files) - 1} more"
        for tries_left in reversed(range(COMMIT_TRIES)):
            operations = [
                CommitOperationAdd(path_in_repo=f"{self._folder}{name}", path_or_fileobj=source)
                for name, source in files
            ]
            try:
                with self._errors(files[0][0]):
                    self._api.create_commit(
                        operations=operations, commit_message=f"Add {names}", **self._where
                    )
                return
            except DeltatokError as error:
                cause = error.__cause__
                status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
                if status not in (409, 412) or not tries_left:
                    raise
                time.sleep(1.0)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """The hub's errors as ours; FileNotFoundError for a file that is not there."""
        from huggingface_hub import errors

        try:
            yield
        except errors.RemoteEntryNotFoundError as error:
            raise FileNotFoundError(self.at(name)) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise UsageError(
                f"{self.url}: no such data set or revision, or it is private: correct the name, or "
                "log in (hf auth login, or HF_TOKEN)"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
            text = str(error).partition("\n")[0][:300]
            if status in (401, 403):
                raise UsageError(
                    f"{self.at(name)}: refused by the hub ({text}): log in with a token that may "
                    "do so (hf auth login, or HF_TOKEN)"
                ) from error
            raise DeltatokError(
                f"{self.at(name)}: the hub cannot be reached or failed ({text}): run again; what "
                "is finished stays"
            ) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore"):
                raise
            raise DeltatokError(
                f"{self.at(name)}: the hub cannot be reached ({error}): check the network, and run "
                "again"
            ) from error


def _stamp(response: Any) -> str:
    """What `list` calls this version: a large file is redirected to where it has another ETag."""
    for answer in (*response.history, response):
        if linked := answer.headers.get("x-linked-etag"):
            return str(linked).removeprefix("W/").strip('"')
    return str(response.headers.get("etag", "")).removeprefix("W/").strip('"')
