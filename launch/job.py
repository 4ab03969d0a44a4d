"""The record of a job: what runs where, the labels that mark it as ours, and its files.

A job's folder in the bucket is `gs://BUCKET/multihot/NAME/`:

    job.json               this record
    package/               the project's wheel and the locked requirements of its environment
    logs/host-K/           what host K printed, in pieces whose names sort by time
    state/host-K.json      what host K is doing, written every few seconds
    state/done.json        how many of the commands are done
    exit_code/host-K       how host K ended, as JSON

The commands write their output to the places that their own flags name.
"""

import dataclasses
import datetime
import json
import re
import uuid
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

import trainer
from trainer.errors import UserError
from trainer.storage.own_files import Count, PathBelow, PlainName, closed, parse

FOLDER = "multihot"
JOB_LABEL, VERSION_LABEL = "multihot-job", "multihot-version"
# Commands whose work several machines share. The first machine alone runs the others.
SHARED = ("train", "score")
# Cloud TPU's rule for the names of nodes, with room for the number of a slice.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class StoredFile:
    """A file that a job's hosts download: its name in the job's `package/`, bytes and SHA-256."""

    name: PathBelow
    bytes: Count
    sha256: str


@closed
@dataclass(frozen=True)
class Job:
    """One job: on Cloud TPU one slice, on Vertex AI one set of machines.

    `name` is that of the resource created for it. `group` is the name that the user gave: it
    differs if the user's job has several slices. `submission` identifies this submission among
    those of the same name, and sorts by time. `bucket` is its name alone. `environment` names the
    locked requirements of the commands: `tpu`, `gpu` or `cpu`. `resource` is the full name of what
    the hosts delete at the end; "" for none. They stop the job after `max_seconds`.
    """

    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
    group: PlainName
    submission: Annotated[str, Field(pattern="^[0-9]{8}t[0-9]{6}-[0-9a-z]+$")]
    bucket: PlainName
    commands: tuple[tuple[str, ...], ...]
    environment: Annotated[str, Field(pattern="^(tpu|gpu|cpu)$")]
    accelerator: str
    resource: str
    wheel: StoredFile
    requirements: StoredFile
    max_restarts: Count
    max_seconds: Count

    @property
    def folder(self) -> str:
        """URL of the job's folder."""
        return f"gs://{self.bucket}/{FOLDER}/{self.name}"

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Job":
        """The inverse of `to_json`; UserError for a text that is no record of this version."""
        remedy = "submit the job again, or use the version that submitted it"
        return parse(cls, text, "job.json", remedy, "not a record of this version of Multihot")


def new_submission() -> str:
    """An identity for a submission; later ones sort after earlier ones."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dt%H%M%S}-{uuid.uuid4().hex[:8]}"


def labels_of(group: str) -> dict[str, str]:
    """The labels that mark the resources of a job of that name as ours."""
    return {
        JOB_LABEL: group,
        VERSION_LABEL: re.sub(r"[^a-z0-9_-]", "-", trainer.__version__.lower()),
    }


def check_name(name: str) -> None:
    """Raises a UserError for a job's name that Google Cloud does not allow."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name={name}: expected at most 52 lower-case letters, digits and -, a letter first "
            "and no - last"
        )


def bucket_name(flag: str) -> str:
    """The bucket's name of a flag's `gs://NAME/`, `gs://NAME` or `NAME`; UserError for others."""
    name = flag.removeprefix("gs://").removesuffix("/")
    if not re.fullmatch(r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]", name):
        raise UserError(f"--bucket={flag}: expected the name of a bucket, or gs://NAME")
    return name
