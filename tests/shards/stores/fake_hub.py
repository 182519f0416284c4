"""A pretended Hugging Face hub with the one data set u/c, in memory: enough of its endpoints for
commits, listings and downloads by huggingface_hub.

After the API as huggingface_hub calls it: POST /api/repos/create, preupload, LFS batch and commit
(lines of JSON), GET tree, HEAD and GET resolve.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

REPO = "u/c"
LFS_ABOVE_BYTES = 100_000


class FakeHub:
    """Serves on 127.0.0.1 while it is entered."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.commits = 0
        self.requests: list[tuple[str, str]] = []
        """(method, path)"""
        self.conflicts = 0
        """So many commits are refused with 412."""
        self.is_down = False
        """Files are not given."""
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin()
        if found := re.fullmatch(rf"/datasets/{REPO}/resolve/[^/]+/(.+)", path):
            self._file(self.hub.files.get(found[1]))
        elif re.fullmatch(rf"/api/datasets/{REPO}(/revision/[^/]+)?", path):
            names = [{"rfilename": name} for name in sorted(self.hub.files)]
            self._say({"id": REPO, "sha": "0" * 40, "siblings": names, "private": True})
        elif found := re.fullmatch(rf"/api/datasets/{REPO}/tree/[^/]+(?:/(.*))?", path):
            self._tree(found[1] or "")
        else:
            self._missing("RepoNotFound" if "/api/" in path else "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 the name that http.server looks for

    def do_POST(self) -> None:
        path, body = self._begin(), self._body()
        if path == "/api/repos/create":
            self._say({"url": f"{self.hub.endpoint}/datasets/{REPO}", "name": REPO, "id": REPO})
        elif path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._say({"files": [self._upload_mode(file) for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._lfs_object(item) for item in json.loads(body)["objects"]]
            self._say({"transfer": "basic", "objects": objects}, kind="vnd.git-lfs+json")
        elif "/commit/" in path:
            self._commit(body)
        else:
            self._missing("RepoNotFound")

    def do_PUT(self) -> None:
        sha256, data = self._begin().rpartition("/")[2], self._body()
        if hashlib.sha256(data).hexdigest() != sha256:
            self._say({"error": "other bytes"}, status=400)
            return
        self.hub.large[sha256] = data
        self._say({})

    def _commit(self, body: bytes) -> None:
        with self.hub.lock:
            if self.hub.conflicts:
                self.hub.conflicts -= 1
                self._say({"error": "a commit has happened since"}, status=412)
                return
            for line in body.decode().splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    self.hub.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.hub.files[value["path"]] = self.hub.large[value["oid"]]
            self.hub.commits += 1
        url = f"{self.hub.endpoint}/datasets/{REPO}/commit/{self.hub.commits:040x}"
        self._say({"success": True, "commitOid": url[-40:], "commitUrl": url, "hookOutput": ""})

    def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] > LFS_ABOVE_BYTES else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _lfs_object(self, item: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.hub.large:
            return found
        return found | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}}

    def _tree(self, folder: str) -> None:
        inside = {n: d for n, d in self.hub.files.items() if n.startswith(f"{folder}/".lstrip("/"))}
        if folder and not inside:
            self._missing("EntryNotFound")
            return
        self._say([_described(name, data) for name, data in sorted(inside.items())])

    def _file(self, data: bytes | None) -> None:
        if data is None:
            self._missing("EntryNotFound")
            return
        if self.hub.is_down:
            self._say({"error": "down"}, status=503)
            return
        etag = f'"{_stamp(data)}"'
        self._answer(data, {"ETag": etag, "X-Repo-Commit": "0" * 40}, kind="octet-stream")

    def _missing(self, code: str) -> None:
        self._say({"error": code}, status=404, headers={"X-Error-Code": code})

    def _begin(self) -> str:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path))
        return path

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _say(
        self,
        value: Any,
        *,
        status: int = 200,
        kind: str = "json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self._answer(json.dumps(value).encode(), headers or {}, status=status, kind=kind)

    def _answer(
        self, data: bytes, headers: dict[str, str], *, status: int = 200, kind: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": f"application/{kind}", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _stamp(data: bytes) -> str:
    known = hashlib.sha1 if len(data) <= LFS_ABOVE_BYTES else hashlib.sha256
    return known(data).hexdigest()


def _described(name: str, data: bytes) -> dict[str, Any]:
    item = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) <= LFS_ABOVE_BYTES:
        return item
    sha256 = hashlib.sha256(data).hexdigest()
    return item | {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}}
