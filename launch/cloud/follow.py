"""What the user sees of a running job: its output and progress from the bucket; Ctrl-C.

Whether a bucket suits a job: that it exists, and lies where the job runs.
"""

import json
import sys
import time
from typing import TypeVar

from launch.job import Job
from launch.machine.reports import Ending, State
from trainer.errors import UserError
from trainer.storage import gcs

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


def check_bucket(bucket: str, project: str, region: str) -> None:
    """Checks that a bucket exists and lies in a region.

    An account that may use a bucket's objects but not look at the bucket gets a warning.

    Raises:
      UserError: if it does not.
      RunAgain: if the store does not answer.
    """
    create = f"gcloud storage buckets create gs://{bucket} --project={project} --location={region}"
    try:
        places = gcs.find_regions(bucket)
    except PermissionError as error:
        print(
            f"warning: gs://{bucket}: {error.strerror}; whether it lies in {region} is not known",
            file=sys.stderr,
        )
        return
    if places is None:
        raise UserError(f"--bucket=gs://{bucket}: there is no such bucket; create it: {create}")
    begins = [start for place in places for start in _REGIONS.get(place, (place,))]
    if not any(region.startswith(start) for start in begins):
        other = create.replace(f"gs://{bucket}", f"gs://{bucket}-{region}")
        raise UserError(
            f"--bucket=gs://{bucket}: lies in {', '.join(places)}, but the job runs in {region}, "
            f"where every byte would come from far away and cost extra; create one there: {other}"
        )


Record = TypeVar("Record", State, Ending)
# A machine that has not reported for so long is said to be silent.
_SILENT_SECONDS = 120.0
_STARTUP = "-startup.log"
_TAIL_LINES = 20


def read_records(job: Job, kind: type[Record]) -> dict[int, Record]:
    """What the job's machines have said last, by host; what other submissions left is left out.

    Args:
      job: whose.
      kind: `State` (what they do) or `Ending` (how they ended).

    Raises:
      OSError, RunAgain: if the store refuses or does not answer.
    """
    folder = "state" if kind is State else "exit_code"
    urls = [item.url for item in gcs.list_objects(f"{job.folder}/{folder}/host-")]
    records = {}
    for text in gcs.read_objects(urls):
        try:
            record = kind(**json.loads(text or b""))
        except (ValueError, TypeError):
            continue  # Another version's.
        if record.submission == job.submission:
            records[record.host] = record
    return records


class JobLog:
    """The output of one of a job's machines, as it comes into the bucket."""

    def __init__(self, job: Job, host: int = 0) -> None:
        """Args: job, host: whose output."""
        self._prefix = f"{job.folder}/logs/host-{host}/{job.submission}-"
        self._seen: set[str] = set()

    def read_new(self) -> str:
        """What has come since the last call, in order.

        Raises:
          OSError, RunAgain: if the store refuses or does not answer.
        """
        new = [
            item.url
            for item in gcs.list_objects(self._prefix)
            if item.url not in self._seen and not item.url.endswith(_STARTUP)
        ]
        texts = gcs.read_objects(new)
        self._seen.update(new)
        return b"".join(text or b"" for text in texts).decode("utf-8", "replace")

    def read_startup(self) -> str:
        """The last lines of the newest log of the installation, which comes when a host ends."""
        urls = [item.url for item in gcs.list_objects(self._prefix) if item.url.endswith(_STARTUP)]
        text = (gcs.read_object(urls[-1]) or b"" if urls else b"").decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-_TAIL_LINES:])


def describe_state(state: State, now: float | None = None) -> str:
    """A machine's state as a line: what it does, what it printed last, how long ago."""
    age = (time.time() if now is None else now) - state.time
    silent = f" (silent for {age:.0f} s)" if age > _SILENT_SECONDS else ""
    return f"{state.what}: {state.line}{silent}" if state.line else f"{state.what}{silent}"


def ask_to_leave(name: str) -> bool:
    """After a Ctrl-C: whether the job is to be left running; without a terminal, it is."""
    if not sys.stdin.isatty():
        return True
    question = f"\n{name}: leave it running? [Y = leave it running, c = cancel and delete it] "
    try:
        return input(question).strip().lower() not in ("c", "cancel", "n", "no")
    except (EOFError, KeyboardInterrupt):
        return True
