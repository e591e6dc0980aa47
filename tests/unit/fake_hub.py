"""A Hugging Face hub that lives in this process and serves one folder as one model.

It answers what huggingface_hub asks for a download over plain HTTP: the model's files and sizes,
the tree of a commit, and each file, in ranges too.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import re
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked: the method, the decoded path, the headers."""

    method: str
    path: str
    headers: dict[str, str]


class FakeHub:
    """The server of `folder` as model `repo`, whose revisions are main, v1 and the commit.

    fault(request) is asked before every request: None goes on, a pair (status, X-Error-Code) is
    answered, and a number n closes the connection after n bytes of the body. Every request is kept
    in `requests`.
    """

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo = repo
        self.folder = folder
        self.requests: list[Request] = []
        self.fault: Callable[[Request], tuple[int, str] | int | None] = lambda _: None
        self._server = _Server(("127.0.0.1", 0), functools.partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop answering, open connections included."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def files(self) -> dict[str, Path]:
        """The model's files by name."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def fetched(self) -> list[str]:
        """The names of the files whose contents were asked for, in order."""
        prefix = f"/{self.repo}/resolve/{COMMIT}/"
        gets = [r.path for r in self.requests if r.method == "GET"]
        return [path.removeprefix(prefix) for path in gets if path.startswith(prefix)]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Keep what was accepted."""
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when they give in."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: FakeHub, *arguments: Any) -> None:
        self.hub = hub
        self._cut: int | None = None
        super().__init__(*arguments)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read `requests`."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, headers)
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        self._cut = fault if isinstance(fault, int) else None
        if isinstance(fault, tuple):
            status, code = fault
            self._answer(b"", status=status, headers={"X-Error-Code": code} if code else {})
            return
        repo = re.escape(self.hub.repo)
        if match := re.fullmatch(rf"/api/models/{repo}(?:/revision/(.*))?", path):
            self._with_revision(match[1] or "main", self._model)
        elif match := re.fullmatch(rf"/api/models/{repo}/tree/([^/]*)/?", path):
            self._with_revision(match[1], self._tree)
        elif match := re.fullmatch(rf"/{repo}/resolve/([^/]*)/(.*)", path):
            self._with_revision(match[1], functools.partial(self._file, match[2]))
        else:
            self._answer(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def _with_revision(self, revision: str, answer: Callable[[], None]) -> None:
        if revision in ("main", "v1", COMMIT):
            answer()
        else:
            self._answer(b"", status=404, headers={"X-Error-Code": "RevisionNotFound"})

    def _model(self) -> None:
        siblings = [
            {"rfilename": name, "size": path.stat().st_size, "blobId": _etag(path)}
            for name, path in self.hub.files().items()
        ]
        self._json({"id": self.hub.repo, "sha": COMMIT, "siblings": siblings})

    def _tree(self) -> None:
        self._json(
            [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in self.hub.files().items()
            ]
        )

    def _file(self, name: str) -> None:
        path = self.hub.files().get(name)
        if path is None:
            self._answer(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {
            "ETag": f'"{_etag(path)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._answer(data, headers=headers)
            return
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(data[first : last + 1], status=206, headers=headers)

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _answer(self, content: bytes, *, status: int = 200, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._cut is not None and self._cut < len(content):
            self.wfile.write(content[: self._cut])
            self.close_connection = True
        else:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
