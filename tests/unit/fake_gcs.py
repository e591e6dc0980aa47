"""A Google Cloud Storage that lives in this process and keeps its objects in memory.

It speaks as much of the JSON API as gcsfs, google-cloud-storage and TensorStore use: listing with
prefix, delimiter and pages, metadata, ranges, the three kinds of upload, preconditions on the
generation, moving, copying and deleting. There is one server for the whole test process, because
TensorStore and gcsfs remember the address they saw first.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

PAGE = 1000  # entries of a listing, unless fewer are asked for
_TIME = "2026-01-01T00:00:00.000000Z"


@dataclasses.dataclass(frozen=True)
class Blob:
    """One object."""

    data: bytes
    generation: int
    content_type: str = "application/octet-stream"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked: the method, the decoded path, the query, the headers."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class HttpError(Exception):
    """An answer with this status."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


class FakeGCS:
    """The server; buckets maps a bucket's name to its objects by name.

    fault(request) is asked before every request: None goes on, a status is answered, and a negative
    number -n closes the connection after n bytes of the body. Every request is kept in `requests`.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Blob]] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], int | None] = lambda _: None
        self.page = PAGE
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self._numbers = itertools.count(1)
        handler = functools.partial(_Handler, self)
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def reset(self, *buckets: str) -> None:
        """Empty everything and make these buckets."""
        with self.lock:
            self.buckets = {name: {} for name in buckets}
            self.requests.clear()
            self.uploads.clear()
            self.fault, self.page = lambda _: None, PAGE

    def environment(self, nowhere: str) -> dict[str, str]:
        """Variables that bring the clients here without credentials; nowhere is an empty folder."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            # Asked for credentials, the metadata server answers that there are none.
            "GCE_METADATA_ROOT": self.url.removeprefix("http://"),
            "GCE_METADATA_HOST": self.url.removeprefix("http://"),
            "GCE_METADATA_IP": self.url.removeprefix("http://"),
            "CLOUDSDK_CONFIG": nowhere,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks through gRPC
        }

    def next_number(self) -> int:
        """A number that was not given out before."""
        return next(self._numbers)

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str] | None = None) -> Blob:
        """Store an object if the preconditions in the query hold; HttpError 412 if not."""
        with self.lock:
            objects = self.objects(bucket)
            held = objects.get(name)
            _check_generation(query or {}, held)
            blob = objects[name] = Blob(data, self.next_number())
            return blob

    def objects(self, bucket: str) -> dict[str, Blob]:
        """The objects of a bucket; HttpError 404 if there is none."""
        if bucket not in self.buckets:
            raise HttpError(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def blob(self, bucket: str, name: str) -> Blob:
        """One object; HttpError 404 if there is none."""
        try:
            return self.objects(bucket)[name]
        except KeyError:
            raise HttpError(404, f"No such object: {bucket}/{name}") from None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when another of their requests has the answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@functools.cache
def shared() -> FakeGCS:
    """The server of this process."""
    return FakeGCS()


def _check_generation(query: dict[str, str], blob: Blob | None) -> None:
    number = str(blob.generation) if blob else "0"
    if query.get("ifGenerationMatch", number) != number:
        raise HttpError(412, "At least one of the pre-conditions you specified did not hold.")
    if query.get("ifGenerationNotMatch") == number:
        raise HttpError(304)


def _resource(bucket: str, name: str, blob: Blob) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "id": f"{bucket}/{name}/{blob.generation}",
        "size": str(len(blob.data)),
        "generation": str(blob.generation),
        "metageneration": "1",
        "contentType": blob.content_type,
        "timeCreated": _TIME,
        "updated": _TIME,
        "storageClass": "STANDARD",
        "md5Hash": base64.b64encode(hashlib.md5(blob.data).digest()).decode(),
        "etag": str(blob.generation),
    }


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and one past the last of a Range header; HttpError 416 outside the object."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None:
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if int(first) >= size:
        raise HttpError(416)
    return int(first), min(int(last) + 1, size) if last else size


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, gcs: FakeGCS, *arguments: Any) -> None:
        self.gcs = gcs
        self._cut: int | None = None
        super().__init__(*arguments)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read `requests`."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET  # noqa: N815

    def _serve(self) -> None:
        body = self._body()
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, dict(urllib.parse.parse_qsl(query)), headers)
        with self.gcs.lock:
            self.gcs.requests.append(request)
        self._cut = None
        try:
            fault = self.gcs.fault(request)
            if fault is not None and fault > 0:
                raise HttpError(fault, "Fault.")
            self._cut = None if fault is None else -fault
            self._route(request, body)
        except HttpError as error:
            message = {"error": {"code": error.status, "message": str(error)}}
            content = b"" if error.status == 304 else json.dumps(message).encode()
            self._answer(content, status=error.status)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(
        self, content: bytes, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._cut is not None and self._cut < len(content):
            self.wfile.write(content[: self._cut])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, value: dict[str, Any]) -> None:
        self._answer(json.dumps(value).encode())

    def _route(self, request: Request, body: bytes) -> None:
        # Names keep their %2F until here: a slash in the path is not one in the object's name.
        parts = [urllib.parse.unquote(p) for p in request.path.strip("/").split("/")]
        match parts:
            case ["storage", "v1", "b", bucket]:
                self.gcs.objects(bucket)
                self._json({"kind": "storage#bucket", "name": bucket, "id": bucket})
            case ["storage", "v1", "b", bucket, "o"]:
                self._list(bucket, request.query)
            case ["storage" | "download", *_, "b", bucket, "o", name]:
                self._object(bucket, name, request)
            case ["storage", "v1", "b", bucket, "o", name, "moveTo", "o", target]:
                self._move(bucket, name, target)
            case ["storage", "v1", "b", bucket, "o", name, "rewriteTo", "b", other, "o", target]:
                copy = self.gcs.put(other, target, self.gcs.blob(bucket, name).data, request.query)
                self._json({"done": True, "resource": _resource(other, target, copy)})
            case ["upload", "storage", "v1", "b", bucket, "o"]:
                self._upload(bucket, request, body)
            case _:
                raise HttpError(404, f"Not known: {request.method} {request.path}")

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        limit = min(int(query.get("maxResults", self.gcs.page)), self.gcs.page)
        with self.gcs.lock:
            held = dict(self.gcs.objects(bucket))
        entries: dict[str, dict[str, Any] | None] = {}  # a prefix has no resource
        for name in sorted(held):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            entry = prefix + head + cut if cut else name
            entries.setdefault(entry, None if cut else _resource(bucket, name, held[name]))
        names = [name for name in entries if name > query.get("pageToken", "")]
        page = names[:limit]
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [item for name in page if (item := entries[name]) is not None],
            "prefixes": [name for name in page if entries[name] is None],
        }
        if len(names) > limit:
            answer["nextPageToken"] = page[-1]
        self._json(answer)

    def _object(self, bucket: str, name: str, request: Request) -> None:
        with self.gcs.lock:
            blob = self.gcs.blob(bucket, name)
            _check_generation(request.query, blob)
            if request.method == "DELETE":
                del self.gcs.objects(bucket)[name]
                self._answer(b"", status=204)
                return
        if request.query.get("alt") != "media":
            self._json(_resource(bucket, name, blob))
            return
        headers = {
            "Content-Type": blob.content_type,
            "x-goog-generation": str(blob.generation),
            "x-goog-hash": f"crc32c={_crc32c(blob.data)}",
            "ETag": str(blob.generation),
        }
        span = _range(request.headers.get("range"), len(blob.data))
        if span is None:
            self._answer(blob.data, headers=headers)
        else:
            first, end = span
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(blob.data)}"
            self._answer(blob.data[first:end], status=206, headers=headers)

    def _move(self, bucket: str, name: str, target: str) -> None:
        with self.gcs.lock:
            blob = self.gcs.blob(bucket, name)
            moved = self.gcs.put(bucket, target, blob.data)
            del self.gcs.objects(bucket)[name]
        self._json(_resource(bucket, target, moved))

    def _upload(self, bucket: str, request: Request, body: bytes) -> None:
        query = request.query
        if "upload_id" in query:
            self._continue(query["upload_id"], request, body)
        elif query["uploadType"] == "media":
            blob = self.gcs.put(bucket, query["name"], body, query)
            self._json(_resource(bucket, query["name"], blob))
        elif query["uploadType"] == "multipart":
            name, data = _multipart(request.headers["content-type"], body)
            name = query.get("name", name)
            self._json(_resource(bucket, name, self.gcs.put(bucket, name, data, query)))
        else:
            name = query.get("name") or json.loads(body)["name"]
            key = str(self.gcs.next_number())
            self.gcs.objects(bucket)
            self.gcs.uploads[key] = bucket, name, query, bytearray()
            place = f"{self.gcs.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            self._answer(b"", headers={"Location": f"{place}&upload_id={key}"})

    def _continue(self, key: str, request: Request, body: bytes) -> None:
        if request.method == "DELETE":
            self.gcs.uploads.pop(key, None)
            raise HttpError(499)
        bucket, name, query, data = self.gcs.uploads[key]
        data += body
        if request.headers.get("content-range", "").endswith("/*"):
            headers = {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
            self._answer(b"", status=308, headers=headers)
            return
        del self.gcs.uploads[key]
        self._json(_resource(bucket, name, self.gcs.put(bucket, name, bytes(data), query)))


def _multipart(content_type: str, body: bytes) -> tuple[str, bytes]:
    """The name and the data of a multipart upload."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    assert boundary is not None
    mark = b"--" + boundary[1].encode()
    line = b"\r\n" if body.startswith(mark + b"\r\n") else b"\n"
    _, head, rest = body.split(mark + line, 2)
    data = rest[: rest.rindex(line + mark)].split(line * 2, 1)[1]
    return json.loads(head.split(line * 2, 1)[1])["name"], data


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = (number >> 1) ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


@functools.lru_cache(maxsize=256)
def _crc32c(data: bytes) -> str:
    """The checksum in base64, as the service gives it; plain Python, for small objects."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return base64.b64encode(binascii.unhexlify(f"{crc ^ 0xFFFFFFFF:08x}")).decode()
