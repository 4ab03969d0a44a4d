"""What a user sees of a running job, read from the bucket; whether the bucket suits the job."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from launch.cloud.findings import Finding
from launch.cloud.findings import State as Known
from launch.job import Job
from launch.machine.reports import Ending, State
from trainer.errors import RunAgain, UserError
from trainer.storage import gcs
from trainer.storage.own_files import parse

Record = TypeVar("Record", State, Ending)
# A machine that has not reported for so long is called silent.
_SILENT_SECONDS = 120.0
# Between two lines on what a job does, where its output is not shown.
_REPORT_SECONDS = 60.0
_STARTUP = "-startup.log"
_TAIL_LINES = 20
# Multi-regions, and Google's own pairs of regions, by what the names of their regions begin with.
_REGIONS = {
    "us": ("us-",),
    "eu": ("europe-",),
    "asia": ("asia-",),
    "nam4": ("us-central1", "us-east1"),
    "eur4": ("europe-north1", "europe-west4"),
    "eur5": ("europe-west1", "europe-west2"),
    "eur7": ("europe-west2", "europe-west3"),
    "eur8": ("europe-west3", "europe-west6"),
    "asia1": ("asia-northeast1", "asia-northeast2"),
}


def region_of(zone: str) -> str:
    """The region of a zone: `us-central1` of `us-central1-a`."""
    return zone.rpartition("-")[0]


def look_at_bucket(bucket: str, project: str, region: str) -> Finding:
    """Whether a bucket exists and lies in a region; OSError or RunAgain without an answer.

    An account that may use a bucket's objects but not look at the bucket cannot know.
    """
    subject = f"gs://{bucket} in {region}"
    create = f"gcloud storage buckets create gs://{bucket} --project={project} --location={region}"
    try:
        places = gcs.find_regions(bucket)
    except PermissionError as error:
        detail = f"{error.strerror}; whether it lies in {region} is not known"
        return Finding(Known.UNKNOWN, subject, detail)
    if places is None:
        return Finding(Known.MISSING, subject, "there is no such bucket; create it", create)
    begins = [start for place in places for start in _REGIONS.get(place, (place,))]
    if any(region.startswith(start) for start in begins):
        return Finding(Known.OK, subject, f"lies in {', '.join(places)}")
    other = create.replace(f"gs://{bucket}", f"gs://{bucket}-{region}")
    detail = (
        f"lies in {', '.join(places)}, but the job runs in {region}, where every byte would come "
        "from far away and cost extra; create one there"
    )
    return Finding(Known.MISSING, subject, detail, other)


def check_bucket(bucket: str, project: str, region: str) -> None:
    """Raises a UserError unless `look_at_bucket` finds it well, which raises too."""
    found = look_at_bucket(bucket, project, region)
    if found.state is Known.MISSING:
        raise UserError(f"--bucket=gs://{bucket}: {found.line}")
    if found.state is Known.UNKNOWN:
        print(f"warning: gs://{bucket}: {found.line}", file=sys.stderr)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the exit code and last line of its last command, or what else ended it.

    `error` is to be raised instead of an error with that message.
    """

    exit_code: int
    message: str
    error: UserError | RunAgain | None = None


def read_records(job: Job, kind: type[Record]) -> dict[int, Record]:
    """The last `State` or `Ending` records of a submission's machines, by host.

    Those of other submissions of the same name are left out.
    """
    folder = "state" if kind is State else "exit_code"
    urls = [item.url for item in gcs.list_objects(f"{job.folder}/{folder}/host-")]
    records = {}
    for text in gcs.read_objects(urls):
        try:
            record = parse(kind, text or b"", folder, "")
        except UserError:
            continue  # Of another version.
        if record.submission == job.submission:
            records[record.host] = record
    return records


class JobLog:
    """The output of one of a job's machines, as it comes into the bucket."""

    def __init__(self, job: Job, host: int = 0) -> None:
        self._prefix = f"{job.folder}/logs/host-{host}/{job.submission}-"
        self._seen: set[str] = set()

    def read_new(self) -> str:
        """The output since the last call, in order."""
        new = [
            item.url
            for item in gcs.list_objects(self._prefix)
            if item.url not in self._seen and not item.url.endswith(_STARTUP)
        ]
        texts = gcs.read_objects(new)
        self._seen.update(new)
        return b"".join(text or b"" for text in texts).decode("utf-8", "replace")

    def read_startup(self) -> str:
        """The last lines of the newest log of startup.sh, which a host uploads when it ends."""
        urls = [item.url for item in gcs.list_objects(self._prefix) if item.url.endswith(_STARTUP)]
        text = (gcs.read_object(urls[-1]) or b"" if urls else b"").decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-_TAIL_LINES:])


def describe_state(state: State, now: float | None = None) -> str:
    """A machine's state as a line: what it does, and what its command printed last."""
    age = (time.time() if now is None else now) - state.time
    silent = f" (silent for {age:.0f} s)" if age > _SILENT_SECONDS else ""
    return f"{state.what}: {state.line}{silent}" if state.line else f"{state.what}{silent}"


class Progress:
    """Shows a job's output, or else a line on its first machine now and then."""

    def __init__(
        self, job: Job, follow: bool, start: str = "", max_characters: int | None = None
    ) -> None:
        """`start` stands for a job that has not reported; a line is cut at `max_characters`."""
        self._job = job
        self._log = JobLog(job) if follow else None
        self._line = start
        self._max_characters = max_characters
        self._shown = ""
        self._looked = -math.inf

    def show_output(self) -> None:
        """Prints the output since the last call, if it is to be shown."""
        if self._log is not None:
            print(self._log.read_new(), end="", flush=True)

    def show_state(self) -> None:
        """Prints what the first machine does, if that is new and the output is not shown."""
        now = time.monotonic()
        if self._log is not None or now - self._looked < _REPORT_SECONDS:
            return
        self._looked = now
        state = read_records(self._job, State).get(0)
        if state is not None:
            self._line = describe_state(replace(state, line=state.line[: self._max_characters]))
        if self._line != self._shown:
            self._shown = self._line
            say(f"{self._job.name}: {self._line}")


def say(line: str) -> None:
    """Prints a line at once, also where the output is a pipe."""
    print(line, flush=True)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of texts under a head, in columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        print(line.rstrip())


def ask_to_leave(name: str) -> bool:
    """Asks after a Ctrl-C whether to leave the job running; without a terminal it is left."""
    if not sys.stdin.isatty():
        return True
    question = f"\n{name}: leave it running? [Y = leave it running, c = cancel and delete it] "
    try:
        return input(question).strip().lower() not in ("c", "cancel", "n", "no")
    except (EOFError, KeyboardInterrupt):
        return True
