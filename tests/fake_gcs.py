"""A fake of Google Cloud Storage in memory, with faults on demand.

It knows what TensorFlow's gs:// and Google's own client ask for: the JSON API's metadata, lists,
uploads (multipart and resumable), downloads, deletes, rewrites and composes, preconditions on
generations, and the XML API's downloads of a range. It proves our wiring and our handling of
errors, not Google's servers.
"""

import base64
import json
import os
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
from gcs_proxy import ProxyHandler, serve_proxy

_FAULTS = ("429", "503", "reset before", "reset after", "half", "slow")
# Of uploads only, and never at random: half of a part is kept, and the answer says so.
KEEPS_HALF = "keeps half"
_SLOW_SECONDS = 0.1
_LIST_PAGE = 8  # Small, so that lists take several pages.


def random_faults(seed: int, rate: float) -> Callable[[str], str]:
    """A plan in which this share of the requests goes wrong."""
    draw = random.Random(seed)
    return lambda request: draw.choice(_FAULTS) if draw.random() < rate else ""


@dataclass
class Stored:
    """An object; its generation is the number of the write that made it."""

    data: bytes
    generation: int
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Session:
    """A resumable upload: what it makes, under which condition, and what has arrived."""

    bucket: str
    resource: dict
    query: dict[str, str]
    received: bytearray = field(default_factory=bytearray)


@dataclass
class FakeStorage:
    """Buckets of objects, sessions of uploads, and what goes wrong.

    Attributes:
      buckets: by bucket and name.
      statuses: buckets that answer every request with this status, such as 403 or 503.
      locations: where buckets lie; default: nowhere.
      plan: for each of the other requests ("GET /path?query"), one of `_FAULTS` or "" for none.
      faults: how often each came.
    """

    buckets: dict[str, dict[str, Stored]]
    statuses: dict[str, int] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    plan: Callable[[str], str] = lambda request: ""
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.sessions: dict[str, Session] = {}
        self.generation = 0

    def next_fault(self, request: str) -> str:
        """What the plan has for a request."""
        with self.lock:
            fault = self.plan(request)
            if fault:
                self.faults[fault] += 1
            return fault

    def put(
        self, bucket: str, name: str, data: bytes, metadata: dict[str, str] | None = None
    ) -> Stored:
        """Stores an object under a new generation."""
        with self.lock:
            self.generation += 1
            self.buckets[bucket][name] = Stored(data, self.generation, metadata or {})
            return self.buckets[bucket][name]

    def put_folder(self, bucket: str, prefix: str, folder: str) -> None:
        """Stores the files of a local folder and of those in it."""
        for place, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(place, name)
                with open(path, "rb") as file:
                    self.put(bucket, f"{prefix}/{os.path.relpath(path, folder)}", file.read())

    def get_folder(self, bucket: str, prefix: str, folder: str) -> None:
        """Writes the objects under a prefix to a local folder."""
        for name, stored in self.buckets[bucket].items():
            if name.startswith(prefix + "/") and not name.endswith("/"):
                path = os.path.join(folder, os.path.relpath(name, prefix))
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(stored.data)


class Refused(Exception):
    """A request that is answered with an error's status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(ProxyHandler):
    """One connection of a client."""

    storage: FakeStorage

    def _handle(self) -> None:
        body = self._read_body()
        fault = self.storage.next_fault(f"{self.command} {self.path}")
        if fault in ("429", "503"):
            return self._answer(int(fault), {"error": {"code": int(fault), "message": "injected"}})
        if fault == "reset before":
            return self._reset()
        if fault == "slow":
            time.sleep(_SLOW_SECONDS)
        if fault in ("half", KEEPS_HALF) and self.command == "PUT":
            received = self._put_half(body)
            if fault == "half":
                return self._reset()
            return self._answer(308, b"", {"Range": f"bytes=0-{received - 1}"})
        try:
            with self.storage.lock:
                status, content, headers = self._dispatch(body)
        except Refused as refused:
            status, headers = refused.status, {}
            content = {"error": {"code": status, "message": str(refused)}}
        if fault == "reset after":
            return self._reset()
        self._answer(status, content, headers, cut=fault == "half")

    do_GET = do_PUT = do_POST = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(
        self, status: int, content: object, headers: dict | None = None, cut: bool = False
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Ends the connection with a TCP reset, without TLS's farewell."""
        self.close_connection = True
        raw = socket.socket(fileno=self.connection.detach())
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()

    def _dispatch(self, body: bytes) -> tuple[int, object, dict[str, str]]:
        """Status, JSON or bytes, and headers of the answer to a request."""
        url = urlsplit(self.path)
        path, query = url.path, {name: values[0] for name, values in parse_qs(url.query).items()}
        json_api = re.fullmatch(
            r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?(/.*)?", path
        )
        if json_api is None:  # The XML API, which serves downloads.
            bucket, _, name = unquote(path).lstrip("/").partition("/")
            return self._download(self._find(bucket, name, query))
        service, bucket, name, action = json_api.groups()
        objects = self._objects(bucket)
        name = unquote(name) if name else ""
        if service == "/upload":
            return self._upload(bucket, query, body)
        if service == "/download" or query.get("alt") == "media":
            return self._download(self._find(bucket, name, query))
        if action:
            return 200, self._make_from(bucket, name, action, body), {}
        if not path.startswith(f"/storage/v1/b/{bucket}/o"):
            location = self.storage.locations.get(bucket, "NOWHERE")
            return 200, {"name": bucket, "location": location}, {}
        if not name:
            return 200, self._list(bucket, query), {}
        stored = self._find(bucket, name, query)
        if self.command == "DELETE":
            self._check_generation(bucket, name, query)
            del objects[name]
            return 204, b"", {}
        return 200, _describe(bucket, name, stored), {}

    def _objects(self, bucket: str) -> dict[str, Stored]:
        status = self.storage.statuses.get(bucket)
        if status is not None:
            raise Refused(status, f"every request to {bucket} ends so")
        if bucket not in self.storage.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.storage.buckets[bucket]

    def _find(self, bucket: str, name: str, query: dict[str, str] | None = None) -> Stored:
        stored = self._objects(bucket).get(name)
        generation = (query or {}).get("generation")
        if stored is None or generation not in (None, str(stored.generation)):
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def _download(self, stored: Stored) -> tuple[int, bytes, dict[str, str]]:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, stored.data, {"X-Goog-Hash": f"crc32c={_checksum(stored.data)}"}
        first, last = map(int, wanted.groups())
        if first >= len(stored.data):
            raise Refused(416, "The requested range cannot be satisfied.")
        part = stored.data[first : last + 1]
        where = f"bytes {first}-{first + len(part) - 1}/{len(stored.data)}"
        return 206, part, {"Content-Range": where}

    def _list(self, bucket: str, query: dict[str, str]) -> dict:
        objects = self._objects(bucket)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries: dict[str, Stored | None] = {}
        for name in sorted(objects):
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    entries[prefix + rest.split(delimiter)[0] + delimiter] = None
                else:
                    entries[name] = objects[name]
        left = [name for name in entries if name > query.get("pageToken", "")]
        page = left[: min(_LIST_PAGE, int(query.get("maxResults", _LIST_PAGE)))]
        answer: dict = {
            "items": [
                _describe(bucket, name, stored) for name in page if (stored := entries[name])
            ],
            "prefixes": [name for name in page if entries[name] is None],
        }
        return answer | ({"nextPageToken": page[-1]} if len(left) > len(page) else {})

    def _upload(
        self, bucket: str, query: dict[str, str], body: bytes
    ) -> tuple[int, object, dict[str, str]]:
        """A whole upload; or begins a resumable one, takes a part, or says how far it has come."""
        sessions = self.storage.sessions
        if query.get("uploadType") == "media":
            whole = Session(bucket, {"name": query["name"]}, query, bytearray(body))
            return 200, self._store(whole), {}
        if query.get("uploadType") == "multipart":
            resource, data = self._split_multipart(body)
            return 200, self._store(Session(bucket, resource, query, bytearray(data))), {}
        if self.command == "POST":
            resource = (json.loads(body) if body else {}) | (
                {"name": query["name"]} if "name" in query else {}
            )
            self._check_generation(bucket, resource["name"], query)
            identity = str(len(sessions))
            sessions[identity] = Session(bucket, resource, query)
            where = f"/upload/storage/v1/b/{bucket}/o?upload_id={identity}"
            scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
            return 200, b"", {"Location": f"{scheme}://{self.headers['Host']}{where}"}
        session = sessions[query["upload_id"]]
        received = session.received
        # No range comes with an object of no bytes; "*" asks how far the upload has come.
        sent = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+)", self.headers.get("Content-Range", "bytes */0")
        )
        assert sent is not None, self.headers["Content-Range"]
        if sent.group(1) is not None:
            first = int(sent.group(1))
            assert first <= len(received), "a part that does not follow"
            received += body[len(received) - first :]
        if len(received) == int(sent.group(2)):
            return 200, self._store(session), {}
        return 308, b"", {"Range": f"bytes=0-{len(received) - 1}"} if received else {}

    def _split_multipart(self, body: bytes) -> tuple[dict, bytes]:
        """The resource's JSON and the data of a multipart/related body."""
        found = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])
        assert found is not None
        boundary = b"--" + found.group(1).strip("'").encode()
        _, resource, data, _ = body.split(boundary)
        contents = [
            part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in (resource, data)
        ]
        return json.loads(contents[0]), contents[1]

    def _store(self, upload: Session) -> dict:
        """What an upload that has arrived makes, if it may."""
        name, data = upload.resource["name"], bytes(upload.received)
        self._check_generation(upload.bucket, name, upload.query)
        if upload.resource.get("crc32c", _checksum(data)) != _checksum(data):
            raise Refused(400, "Provided CRC32C does not match the calculated one.")
        metadata = upload.resource.get("metadata")
        return _describe(upload.bucket, name, self.storage.put(upload.bucket, name, data, metadata))

    def _put_half(self, body: bytes) -> int:
        """Half of an upload's part arrives; how much there is of it all."""
        identity = parse_qs(urlsplit(self.path).query)["upload_id"][0]
        session = self.storage.sessions[identity]
        sent = re.match(r"bytes (\d+)-", self.headers.get("Content-Range", ""))
        if sent and int(sent.group(1)) == len(session.received):
            session.received.extend(body[: len(body) // 2])
        return len(session.received)

    def _check_generation(self, bucket: str, name: str, query: dict[str, str]) -> None:
        if "ifGenerationMatch" in query:
            stored = self._objects(bucket).get(name)
            if int(query["ifGenerationMatch"]) != (stored.generation if stored else 0):
                raise Refused(412, "At least one of the pre-conditions did not hold.")

    def _make_from(self, bucket: str, name: str, action: str, body: bytes) -> dict:
        """An object from others: a rewrite (copy) or a compose."""
        if action == "/compose":
            sources = json.loads(body)["sourceObjects"]
            data = b"".join(self._find(bucket, source["name"]).data for source in sources)
            return _describe(bucket, name, self.storage.put(bucket, name, data))
        target = re.fullmatch(r"/rewriteTo/b/([^/]+)/o/([^/]+)", action)
        if target is None:
            raise Refused(400, f"{action}: unknown")
        place, name_of_copy = target.group(1), unquote(target.group(2))
        copy = self.storage.put(place, name_of_copy, self._find(bucket, name).data)
        return {"done": True, "resource": _describe(place, name_of_copy, copy)}


def _checksum(data: bytes) -> str:
    """CRC-32C as Cloud Storage writes it."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _describe(bucket: str, name: str, stored: Stored) -> dict[str, object]:
    return {
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "crc32c": _checksum(stored.data),
        "metadata": stored.metadata,
        "updated": "2024-05-01T00:00:00.000Z",
    }


@contextmanager
def serve(storage: FakeStorage, folder: str) -> Iterator[dict[str, str]]:
    """Serves it; gives the environment in which a process's gs:// comes here.

    TensorFlow comes as to Google's hosts, through the proxy; Google's own client comes in the
    clear, and without STORAGE_EMULATOR_HOST through the proxy too.

    Args:
      storage: what to serve.
      folder: for certificates.
    """
    handler = type("Handler", (_Handler,), {"storage": storage})
    with serve_proxy(handler, folder) as environment:
        yield environment | {
            "STORAGE_EMULATOR_HOST": environment["HTTPS_PROXY"],
            "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000",
            "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "10000",
        }
