"""What a host of a Cloud TPU slice finds around itself: its metadata, and Cloud TPU's REST API.

It proves our wiring and our handling of errors, not Google's servers.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "a-token-of-the-machine"


@dataclass
class FakeMachine:
    """A host.

    Attributes:
      attributes: its metadata.
      ip: its address.
      has_metadata: whether its metadata server answers; 503 otherwise.
      has_role: whether its account may use Cloud TPU.
      refused_deletes: how many deletions are answered by 503 before one is taken.
      deletes: URLs of the deletions that were taken.
      refusals: how many were not.
    """

    attributes: dict[str, str]
    ip: str = "127.0.0.1"
    has_metadata: bool = True
    has_role: bool = True
    refused_deletes: int = 0
    deletes: list[str] = field(default_factory=list)
    refusals: int = 0


class _Handler(BaseHTTPRequestHandler):
    machine: FakeMachine

    def do_GET(self) -> None:
        """Answers for the metadata server, and for Cloud TPU."""
        if self.path.startswith("/v2/"):
            return self._answer(200 if self._may_use() else 403, "{}")
        assert self.headers["Metadata-Flavor"] == "Google"
        if not self.machine.has_metadata:
            return self._answer(503, "away")
        path = urlsplit(self.path).path.removeprefix("/computeMetadata/v1/instance/")
        if path == "service-accounts/default/token":
            answer = {"access_token": TOKEN, "expires_in": 3000, "token_type": "Bearer"}
            return self._answer(200, json.dumps(answer))
        if path == "network-interfaces/0/ip":
            return self._answer(200, self.machine.ip)
        name = path.removeprefix("attributes/")
        if name in self.machine.attributes and path != name:
            return self._answer(200, self.machine.attributes[name])
        self._answer(404, "not found")

    def do_DELETE(self) -> None:
        """Answers for Cloud TPU."""
        if not self._may_use():
            return self._answer(403, "{}")
        if self.machine.refusals < self.machine.refused_deletes:
            self.machine.refusals += 1
            return self._answer(503, "{}")
        self.machine.deletes.append(self.path)
        self._answer(200, '{"name": "an operation"}')

    def _may_use(self) -> bool:
        return self.machine.has_role and self.headers["Authorization"] == f"Bearer {TOKEN}"

    def _answer(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serve(machine: FakeMachine) -> Iterator[str]:
    """Serves it; gives HOST:PORT."""
    handler = type("Handler", (_Handler,), {"machine": machine})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
