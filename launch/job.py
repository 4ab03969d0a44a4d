"""The record of a job: what runs where, how it is marked as ours, where its files lie.

A job's folder in the bucket is `gs://BUCKET/multihot/NAME/`:

    job.json               this record
    package/               the project's wheel and the locked requirements of its environment
    logs/host-K/           what host K printed, in pieces whose names sort as they were written
    state/host-K.json      what host K is doing, every few seconds
    exit_code/host-K       how host K ended, as JSON

What the commands write lies where their own flags say. Imports nothing but the standard library,
so that machines that run the job can read its record at once.
"""

import dataclasses
import datetime
import json
import re
import uuid
from dataclasses import dataclass

import trainer
from trainer.errors import UserError

FOLDER = "multihot"
JOB_LABEL, VERSION_LABEL = "multihot-job", "multihot-version"
ENVIRONMENTS = ("tpu", "gpu", "cpu")
# Commands whose work several machines share; the others run on the first machine alone.
SHARED = ("train", "score")
# Cloud TPU's rule for the names of nodes, with room for the number of a slice.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class StoredFile:
    """A file that a job's hosts fetch: its name in the job's `package/`, bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Job:
    """One job: on Cloud TPU one slice, on Vertex AI one set of machines.

    Attributes:
      name: of the job, and of what is created for it.
      group: the name that the user gave: `name`, unless the user's job is several slices.
      submission: identifies this submission among those of the same name; they sort by time.
      bucket: its name alone.
      commands: Multihot commands, each with its flags, that run one after the other.
      environment: which locked requirements they run in: `tpu`, `gpu` or `cpu`.
      accelerator: what they run on, as the user named it.
      resource: full name of what the hosts delete at the end; "" if they delete nothing.
      wheel, requirements: what the hosts install.
      max_restarts: how often to run again what was stopped through no fault of its own.
      max_seconds: after which the hosts give up and delete themselves.
    """

    name: str
    group: str
    submission: str
    bucket: str
    commands: tuple[tuple[str, ...], ...]
    environment: str
    accelerator: str
    resource: str
    wheel: StoredFile
    requirements: StoredFile
    max_restarts: int
    max_seconds: int

    @property
    def folder(self) -> str:
        """URL of the job's folder."""
        return f"gs://{self.bucket}/{FOLDER}/{self.name}"

    def labels(self) -> dict[str, str]:
        """The labels by which the job's resources are known as ours, and as whose."""
        return marks(self.group)

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Job":
        """The inverse of `to_json`.

        Raises:
          UserError: if it is no record of this version.
        """
        try:
            values = json.loads(text)
            for name in ("wheel", "requirements"):
                values[name] = StoredFile(**values[name])
            values["commands"] = tuple(map(tuple, values["commands"]))
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"job.json: not a record of this version of Multihot ({error}); submit the job "
                "again, or use the version that submitted it"
            ) from None


def new_submission() -> str:
    """An identity for a submission; later ones sort after earlier ones."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dt%H%M%S}-{uuid.uuid4().hex[:8]}"


def marks(group: str) -> dict[str, str]:
    """The labels by which whatever is created for a job of that name is known as ours."""
    return {
        JOB_LABEL: group,
        VERSION_LABEL: re.sub(r"[^a-z0-9_-]", "-", trainer.__version__.lower()),
    }


def check_name(name: str) -> None:
    """Checks a job's name.

    Raises:
      UserError: if Google Cloud would not take it.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name={name}: expected at most 52 lower-case letters, digits and -, a letter first "
            "and no - last"
        )


def bucket_name(flag: str) -> str:
    """`--bucket` as the bucket's name alone: `gs://NAME/`, `gs://NAME` or `NAME`.

    Raises:
      UserError: for anything else.
    """
    name = flag.removeprefix("gs://").removesuffix("/")
    if not re.fullmatch(r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]", name):
        raise UserError(f"--bucket={flag}: expected the name of a bucket, or gs://NAME")
    return name
