"""What the `submit` commands share: the commands behind `--`, and the course of a submission.

`parse_commands` checks the commands before anything is sent. `submit` does everything from there to
the end of the job; what differs between Cloud TPU and Vertex AI is a `Submission`.
"""

import abc
import difflib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from launch.cloud import package as packages
from launch.cloud.calls import explained
from launch.cloud.findings import Finding, State, place_of
from launch.cloud.follow import Outcome, ask_to_leave, check_bucket, say
from launch.cloud.package import Package
from launch.cloud.permissions import PROJECTS
from launch.cloud.rest import Rest
from launch.cloud.rights import OF_SLICES, Needs, Rights
from launch.job import Job, bucket_name, new_submission
from launch.launch_config import SubmitTpuConfig, SubmitVertexConfig
from trainer.config import COMMANDS
from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.flags import parse_flags
from trainer.storage import gcs

Commands = tuple[tuple[str, ...], ...]
Config = SubmitTpuConfig | SubmitVertexConfig

_POLL_SECONDS = 10.0
_NOT_LOOKED_AT = Finding(State.UNKNOWN, "rights", "--nocheck_rights")
# The flag of what each command writes, and the flags of what commands read. (`sample` writes to a
# local path only.)
_WRITTEN = {
    "sample": "output",
    "prepare": "data_dir",
    "train": "model_dir",
    "evaluate": "model_dir",
    "report": "model_dir",
    "export": "export_dir",
    "score": "output_dir",
}
_READ = ("input", "labels", "data_dir", "model_dir", "model", "tfds_data_dir")
# Inputs that are neither files nor folders.
_NO_FILES = ("sample:", "tfds:")


def _split(arguments: Sequence[str]) -> Commands:
    commands: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            commands.append([])
        else:
            commands[-1].append(argument)
    return tuple(map(tuple, commands))


def parse_commands(arguments: Sequence[str]) -> Commands:
    """Checks the commands that follow the first `--` of `submit`, one after each further `--`.

    Returns them, each as (name, flag, ...). Raises UserError if a command is unknown, its flags do
    not parse, it reads a local file, or its output would be lost with the machine that it runs on.
    """
    commands = _split(arguments)
    local: dict[str, str] = {}
    for command in commands:
        if not command:
            raise UserError(
                "expected a command behind `--`, as in `… -- train --data_dir=gs://… "
                "--model_dir=gs://…`"
            )
        name, flags = command[0], command[1:]
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(COMMANDS)}"
            raise UserError(f"-- {name}: no command that can be submitted; {hint}")
        try:
            config: Any = parse_flags(COMMANDS[name], flags)
        except UserError as error:
            raise UserError(f"-- {name}: {error}") from None
        _check_places(name, config, local)
    for path, name in local.items():
        raise UserError(
            f"-- {name} --{_WRITTEN[name]}={path}: would be lost with the machine that runs it; "
            "expected gs://BUCKET/FOLDER"
        )
    return commands


def _check_places(name: str, config: Any, local: dict[str, str]) -> None:
    """Checks the places that one command reads and writes.

    `local`, which is updated, maps local paths that no command has read yet to their writers.
    """
    written = _WRITTEN[name]
    for flag in _READ:
        values = getattr(config, flag, None)
        if flag == written and name in ("prepare", "train"):
            continue
        for path in (values,) if isinstance(values, str) else values or ():
            if "://" in path or path.startswith(_NO_FILES):
                continue
            if path not in local:
                raise UserError(
                    f"-- {name} --{flag}={path}: lies on this machine, where the command will not "
                    "run; copy it with `gcloud storage cp -r` and give gs://BUCKET/FOLDER"
                )
            if flag != written:
                local.pop(path)
    target = getattr(config, written)
    if "://" in target:
        return
    if name == "train":
        raise UserError(
            f"-- train --model_dir={target}: checkpoints have to outlive the machine that writes "
            "them; expected gs://BUCKET/FOLDER"
        )
    local[target] = name


class Submission(abc.ABC):
    """The steps of a submission that differ between Cloud TPU and Vertex AI.

    `needs` are the rights without which a job cannot run, or cannot be ended.
    """

    needs: Needs

    def __init__(self, config: Config, region: str, jobs: Sequence[Job], package: Package) -> None:
        """Sends nothing yet. The jobs run in `region`, where their bucket has to lie."""
        self.config, self.region, self.jobs, self.package = config, region, jobs, package

    @abc.abstractmethod
    def request_of(self, job: Job) -> dict[str, Any]:
        """The request that creates a job's machines, as JSON."""

    @abc.abstractmethod
    def connect(self) -> None:
        """Creates the service's client."""

    @abc.abstractmethod
    def make_room(self) -> None:
        """Removes what is left of earlier jobs of that name; raises UserError if one runs."""

    @abc.abstractmethod
    def create(self) -> None:
        """Creates the jobs and writes their records."""

    @abc.abstractmethod
    def step(self) -> Outcome | None:
        """Looks at the jobs once and prints what is new; how they ended, once all have."""

    @abc.abstractmethod
    def find_created(self) -> Sequence[Job]:
        """The jobs that may exist, including one whose creation was not answered yet."""

    @abc.abstractmethod
    def cancel(self) -> str:
        """Ends what `find_created` has found; says what becomes of the machines."""

    @abc.abstractmethod
    def advise(self) -> str:
        """How to look at a job that was left running, and how to end it."""

    @abc.abstractmethod
    def name_logs(self) -> str:
        """Where to find what a failed job has printed."""

    def list_requests(self) -> list[dict[str, Any]]:
        """All requests in the order in which they are sent, as JSON."""
        insert = {"service": "storage.googleapis.com", "method": "Insert"}
        requests: list[dict[str, Any]] = [
            insert
            | {"object": f"{job.folder}/package/{item.name}"}
            | {"if_generation": 0, "sha256": item.sha256}
            for job in self.jobs
            for item in (self.package.wheel, self.package.requirements)
        ]
        for job in self.jobs:
            record = {"object": f"{job.folder}/job.json", "content": json.loads(job.to_json())}
            requests += [self.request_of(job), insert | record]
        return requests

    def jobs_command(self, action: str, *flags: str) -> str:
        """A `multihot jobs` command about this submission."""
        place = "zone" if isinstance(self.config, SubmitTpuConfig) else "region"
        where = [f"--project={self.config.project}", f"--{place}={getattr(self.config, place)}"]
        return " ".join([f"multihot jobs {action}", *where, *flags, f"--name={self.config.name}"])


def make_job(
    config: Config, commands: Commands, package: Package, environment: str, accelerator: str
) -> Job:
    """The record of a submission whose machines delete nothing; see `Job` for the arguments."""
    return Job(
        name=config.name,
        group=config.name,
        submission=new_submission(),
        bucket=bucket_name(config.bucket),
        commands=commands,
        environment=environment,
        accelerator=accelerator,
        resource="",
        wheel=package.wheel,
        requirements=package.requirements,
        max_restarts=config.max_restarts,
        max_seconds=max(60, round(config.max_hours * 3600)),
    )


def write_record(job: Job) -> None:
    """Writes a job's record to its folder, where `multihot jobs` finds it."""
    gcs.upload(f"{job.folder}/job.json", job.to_json().encode())


def check_rights(config: Config, needs: Needs) -> None:
    """Looks for rights that the job needs, before anything is created for it.

    Raises a UserError for each that is missing, with the command that grants it. What could not be
    looked at is a warning. It is an error for a slice that nobody waits for and that nobody has
    named an account for: without rights it could not delete itself, and nobody else would.
    `--nocheck_rights` makes all of it unknown.
    """
    findings = _find_rights(config, needs) if config.check_rights else [_NOT_LOOKED_AT]
    missing = [item.line for item in findings if item.state is State.MISSING]
    if missing:
        raise UserError(f"{config.name}: nothing was created. {'; '.join(missing)}")
    unknown = list(dict.fromkeys(item.line for item in findings if item.state is State.UNKNOWN))
    if unknown and needs is OF_SLICES and not config.waits and not config.service_account:
        raise UserError(
            f"--no_wait: nothing was created, because nobody would end a slice that may not delete "
            f"itself, and whether it may is not known: {'; '.join(unknown)}. Name an account that "
            "may by --service_account=ACCOUNT, or wait"
        )
    for line in unknown:
        print(f"warning: not all rights could be checked: {line}", file=sys.stderr)


def _find_rights(config: Config, needs: Needs) -> list[Finding]:
    """What is known of the rights of the caller and of the machines' account."""
    with explained(place_of(PROJECTS, config.project, config.name, "roles/browser")):
        rights = Rights(Rest(), config.project, bucket_name(config.bucket), needs)
        findings = rights.check_caller()
        # Vertex AI ends its machines itself, and its own account has rights that it came with.
        if needs is OF_SLICES or config.service_account:
            findings += rights.check_account(config.service_account)
    return findings


def submit(submission: Submission) -> None:
    """Submits jobs, waits for them if that is wanted, and reports how they ended.

    Raises UserError for what the user can correct, here or in the job, and for a job that failed;
    RunAgain if the job was lost, or a service does not answer; KeyboardInterrupt after a Ctrl-C,
    once the jobs are cancelled or left running on purpose.
    """
    config = submission.config
    if config.dry_run:
        print(json.dumps(submission.list_requests(), indent=2))
        return
    submission.connect()
    check_bucket(bucket_name(config.bucket), config.project, submission.region)
    check_rights(config, submission.needs)
    submission.make_room()
    for job in submission.jobs:
        packages.upload(job, submission.package)
    try:
        submission.create()
        if not config.waits:
            say(submission.advise())
            return
        while (outcome := submission.step()) is None:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        _stop(submission)
        raise
    _report(submission, outcome)


def _stop(submission: Submission) -> None:
    """Asks after a Ctrl-C whether to leave the jobs running, and cancels them if not."""
    name = submission.config.name
    created = submission.find_created()
    if not created:
        say(f"{name}: not made; nothing is left running")
    elif ask_to_leave(name):
        for job in created:
            write_record(job)
        say(f"{name}: left running. {submission.advise()}")
    else:
        say(f"{name}: cancelled; {submission.cancel()}")


def _report(submission: Submission, outcome: Outcome) -> None:
    """Says how the jobs ended, and raises the error that ends the process as they did."""
    if outcome.exit_code == 0:
        say(f"{submission.config.name}: done; nothing is left running")
    elif outcome.error is not None:
        raise outcome.error
    elif outcome.exit_code == RUN_AGAIN:
        raise RunAgain(f"{outcome.message}; run the same command again to resume")
    else:
        raise UserError(f"{outcome.message}; {submission.name_logs()}")
