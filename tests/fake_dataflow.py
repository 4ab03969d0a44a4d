"""A fake of Dataflow's job service in memory, over HTTP: takes jobs, which end as they are told.

It runs nothing, and proves our wiring and our handling of errors, not Google's servers.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class FakeDataflow:
    """Jobs and what goes wrong.

    Attributes:
      state: which jobs are in as soon as they are made, such as JOB_STATE_DONE.
      refusal: status and message with which every job is refused.
      jobs: as they were asked for.
      cancelled: names of jobs that were asked to end.
      on_get: called whenever a job is read.
    """

    state: str = "JOB_STATE_DONE"
    refusal: tuple[int, str] | None = None
    jobs: list[dict] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    on_get: Callable[[], None] = lambda: None


class _Handler(BaseHTTPRequestHandler):
    dataflow: FakeDataflow

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        found = re.fullmatch(
            r"/v1b3/projects/([^/]+)/locations/([^/]+)/jobs(?:/(\d+))?(/\w+)?", path
        )
        assert found is not None, path
        _, region, number, part = found.groups()
        fake = self.dataflow
        if self.command == "POST":
            if fake.refusal:
                status, message = fake.refusal
                return self._answer(status, {"error": {"code": status, "message": message}})
            fake.jobs.append(json.loads(body) | {"region": region})
            return self._answer(200, self._describe(len(fake.jobs) - 1))
        if part == "/messages":
            return self._answer(200, {"jobMessages": []})
        if part == "/metrics":
            return self._answer(200, {"metrics": []})
        if self.command == "PUT":
            fake.cancelled.append(fake.jobs[int(number)]["name"])
            fake.state = "JOB_STATE_CANCELLED"
        else:
            fake.on_get()
        self._answer(200, self._describe(int(number)))

    do_GET = do_POST = do_PUT = _handle

    def _describe(self, number: int) -> dict:
        job = self.dataflow.jobs[number]
        return {
            "id": str(number),
            "name": job["name"],
            "type": "JOB_TYPE_BATCH",
            "currentState": self.dataflow.state,
            "clientRequestId": job.get("clientRequestId", ""),
        }

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""


@contextmanager
def serve(dataflow: FakeDataflow) -> Iterator[str]:
    """Serves it; gives the address."""
    handler = type("Handler", (_Handler,), {"dataflow": dataflow})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
