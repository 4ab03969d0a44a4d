"""The output, state and end that a job's machines report to the job's folder in the bucket."""

import contextlib
import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from launch.job import Job
from trainer.errors import RunAgain, UserError
from trainer.runtime.workers import background_thread
from trainer.storage import gcs
from trainer.storage.own_files import Count, Number, fields, parse

_INTERVAL_SECONDS = 10.0
_PIECE_BYTES = 4 << 20
# Output that waits for a store that is away; beyond this the oldest is dropped.
_KEPT_BYTES = 64 << 20
_LINE_CHARACTERS = 400
_DONE = "state/done.json"


@dataclass(frozen=True)
class State:
    """What a machine does at one moment (`time`, in seconds since 1970).

    `line` is the last line of its command, progress bars included.
    """

    submission: str
    attempt: Count
    host: Count
    what: str
    line: str
    time: Number


@dataclass(frozen=True)
class Ending:
    """How a machine ended; the reason is the last line of its command, or startup.sh's words."""

    submission: str
    attempt: Count
    host: Count
    exit_code: Annotated[int, Field(ge=-255, le=255)]
    reason: str


class Reporter:
    """Uploads a command's output and the machine's state every few seconds, in a thread.

    A state shows a progress bar as it is drawn. The logs have the final text of each line only.
    """

    def __init__(self, job: Job, host: int, attempt: int, interval: float = _INTERVAL_SECONDS):
        self._job, self._host, self._attempt = job, host, attempt
        self._interval = interval
        self._what = "starting"
        self._line = ""
        self._rest = b""
        self._pending = bytearray()
        self._num_pieces = 0
        self._started = int(time.time())
        self._lock = threading.Lock()
        self._uploading = contextlib.ExitStack()

    def __enter__(self) -> "Reporter":
        self._uploading.enter_context(background_thread(self._upload_until_stopped))
        return self

    def __exit__(self, *_: Any) -> None:
        self._uploading.close()

    def begin(self, what: str) -> None:
        """Sets what this machine does from now on."""
        with self._lock:
            self._what = what
        self.say(what)

    def say(self, message: str) -> None:
        """Adds a line of Multihot's own to the command's output."""
        self.take(f"multihot: host {self._host}: {message}\n".encode())

    def take(self, data: bytes) -> None:
        """Adds a piece of the command's output, which may end within a line."""
        with self._lock:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                # The text after the last carriage return has overwritten the rest.
                shown = line.rstrip(b"\r").rpartition(b"\r")[2]
                self._pending += shown + b"\n"
                self._line = _shorten(shown) or self._line
            drawn = self._rest.rstrip(b"\r").rpartition(b"\r")[2]
            self._line = _shorten(drawn) or self._line
            self._rest = drawn if b"\r" in self._rest else self._rest
            del self._pending[: max(0, len(self._pending) - _KEPT_BYTES)]

    def record_exit_code(self, code: int, copy: Path) -> None:
        """Writes how this machine ended to the bucket and to the file that startup.sh looks for."""
        ending = Ending(self._job.submission, self._attempt, self._host, code, self._line)
        text = json.dumps(asdict(ending)) + "\n"
        copy.write_text(text, encoding="utf-8")
        gcs.upload(f"{self._job.folder}/exit_code/host-{self._host}", text.encode())

    def record_num_done(self, count: int) -> None:
        """Writes how many of the job's commands are done, for a machine that replaces this one."""
        record = {"submission": self._job.submission, "num_done": count}
        gcs.upload(f"{self._job.folder}/{_DONE}", json.dumps(record).encode())

    def read_num_done(self) -> int:
        """How many of the job's commands were done before this machine started."""
        text = gcs.read_object(f"{self._job.folder}/{_DONE}")
        try:
            done = parse(fields(submission=str, num_done=Count), text or b"", _DONE, "")
        except UserError:
            return 0  # Each command goes on where it stopped, and so does one that is done.
        return done["num_done"] if done["submission"] == self._job.submission else 0

    def _upload_until_stopped(self, stopped: threading.Event) -> None:
        while not stopped.wait(self._interval):
            self._upload()
        with self._lock:
            if self._rest:
                self._pending += self._rest + b"\n"
                self._rest = b""
        self._upload()

    def _upload(self) -> None:
        """Uploads the pending output and the state; what fails is repeated the next time."""
        piece = b""
        try:
            while True:
                with self._lock:
                    piece = bytes(self._pending[:_PIECE_BYTES])
                    del self._pending[: len(piece)]
                if not piece:
                    break
                name = (
                    f"{self._job.submission}-{self._attempt:03d}-{self._started}-"
                    f"{self._num_pieces:06d}.log"
                )
                gcs.upload(f"{self._job.folder}/logs/host-{self._host}/{name}", piece)
                self._num_pieces += 1
            with self._lock:
                place = (self._job.submission, self._attempt, self._host)
                state = State(*place, self._what, self._line, time.time())
            url = f"{self._job.folder}/state/host-{self._host}.json"
            gcs.upload(url, json.dumps(asdict(state)).encode())
        except (OSError, RunAgain) as error:
            print(f"multihot: cannot report: {error}", flush=True)
            with self._lock:
                self._pending[:0] = piece


def _shorten(line: bytes) -> str:
    return " ".join(line.decode("utf-8", "replace").split())[:_LINE_CHARACTERS]
