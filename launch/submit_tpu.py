"""`multihot submit tpu`: from a command to its results in the bucket, with nothing left running."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from launch.accelerators import TpuSlice, find_slice
from launch.cloud import package as packages
from launch.cloud.follow import ask_to_leave, check_bucket, region_of
from launch.cloud.package import Package, upload_request
from launch.cloud.slice_watch import Outcome, SliceWatch
from launch.cloud.tpu_slices import (
    API,
    Phase,
    QueuedResources,
    make_create_request,
    resource_name,
    to_dict,
)
from launch.job import Job, bucket_name, new_submission
from launch.launch_config import SubmitTpuConfig
from launch.submit import Commands, parse_commands
from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.storage import gcs

_POLL_SECONDS = 10.0


def run(config: SubmitTpuConfig, arguments: Sequence[str]) -> None:
    """Runs commands on a slice that is created and deleted for them.

    Args:
      config: the slice, and how to wait for it.
      arguments: what follows `--`.

    Raises:
      UserError: for what the user can mend, here or in the job, and for a job that failed.
      RunAgain: if the slice was taken away too often, or a service does not answer.
    """
    commands = parse_commands(arguments)
    slice_of_chips = find_slice(config.accelerator)
    if slice_of_chips.warning:
        print(f"warning: {slice_of_chips.warning}", file=sys.stderr)
    package = packages.build("tpu")
    jobs = make_jobs(config, commands, package)
    if config.dry_run:
        print(json.dumps(list_requests(config, slice_of_chips, jobs, package), indent=2))
        return
    resources = QueuedResources(config.project, config.zone, config.service_account)
    bucket = bucket_name(config.bucket)
    check_bucket(bucket, config.project, region_of(config.zone))
    for job in jobs:
        _make_room(resources, job, config)
        packages.upload(job, package)
    watches = [_make_watch(config, slice_of_chips, resources, job) for job in jobs]
    try:
        _say(f"{config.name}: asking for {slice_of_chips.name} in {config.zone}")
        _create(watches)
        _say(f"{config.name}: asked; {jobs[0].folder}/ has what is known of it")
        if config.waits:
            outcomes = _wait(config, watches)
        else:
            _say(_manual(config))
            return
    except KeyboardInterrupt:
        _stop(config, watches)
    _report(config, outcomes)


def make_jobs(
    config: SubmitTpuConfig,
    commands: Commands,
    package: Package,
    submission: str | None = None,
) -> list[Job]:
    """The records of a submission: one a slice.

    Raises:
      UserError: for several slices of a command that does not share its work.
    """
    names = [config.name]
    if config.num_slices > 1:
        names = [f"{config.name}-{index}" for index in range(config.num_slices)]
    return [
        Job(
            name=name,
            group=config.name,
            submission=submission or new_submission(),
            bucket=bucket_name(config.bucket),
            commands=_share(commands, index, config.num_slices),
            environment="tpu",
            accelerator=config.accelerator,
            resource=resource_name(config, name),
            wheel=package.wheel,
            requirements=package.requirements,
            max_restarts=config.max_restarts,
            max_seconds=max(60, round(config.max_hours * 3600)),
        )
        for index, name in enumerate(names)
    ]


def _share(commands: Commands, index: int, count: int) -> Commands:
    """The commands of one of several slices."""
    if count == 1:
        return commands
    for command in commands:
        if command[0] != "score" or any("worker" in flag for flag in command[1:]):
            raise UserError(
                f"--num_slices={count} -- {' '.join(command)}: expected `score` alone, without "
                "--worker_index and --num_workers, which each slice gets its own of"
            )
    share = (f"--worker_index={index}", f"--num_workers={count}")
    return tuple((*command, *share) for command in commands)


def list_requests(
    config: SubmitTpuConfig, slice_of_chips: TpuSlice, jobs: Sequence[Job], package: Package
) -> list[dict[str, Any]]:
    """Every request that a submission sends, in order, as JSON; and those that the slice sends."""
    requests: list[dict[str, Any]] = []
    for job in jobs:
        for item in (package.wheel, package.requirements):
            requests.append(
                upload_request(
                    f"{job.folder}/package/{item.name}", if_generation=0, sha256=item.sha256
                )
            )
    for job in jobs:
        create = make_create_request(config, slice_of_chips, job)
        requests.append(
            {"service": API, "method": "CreateQueuedResource", "request": to_dict(create)}
        )
        requests.append(upload_request(f"{job.folder}/job.json", content=json.loads(job.to_json())))
    for job in jobs:
        requests.append(
            {
                "service": API,
                "method": "DeleteQueuedResource",
                "sent_by": f"the slice, at its end or after {job.max_seconds} seconds",
                "request": {"name": job.resource, "force": True},
            }
        )
    return requests


def _make_room(resources: QueuedResources, job: Job, config: SubmitTpuConfig) -> None:
    """Removes what an earlier slice of that name left that was taken away, failed or is going.

    Raises:
      UserError: if the name is taken by anything else.
    """
    found = resources.find(job.name)
    if found.phase is Phase.ABSENT:
        return
    if not found.job:
        raise UserError(
            f"--name={config.name}: a queued resource of that name exists, and is not of "
            "Multihot's making; take another name, or remove it: "
            f"{resources.place(job.name).remove}"
        )
    if found.phase not in (Phase.TAKEN_AWAY, Phase.FAILED, Phase.DELETING):
        raise UserError(
            f"--name={config.name}: a job of that name {found.phase.value} ({found.state}); take "
            f"another name, or end it: multihot jobs cancel --project={config.project} "
            f"--zone={config.zone} --name={config.name}"
        )
    _say(f"{job.name}: removing the slice of that name that {found.phase.value}")
    resources.delete(job.name)


def _make_watch(
    config: SubmitTpuConfig, slice_of_chips: TpuSlice, resources: QueuedResources, job: Job
) -> SliceWatch:
    def make_request(attempt: int, seconds_left: int) -> Any:
        return make_create_request(config, slice_of_chips, job, attempt, seconds_left)

    return SliceWatch(resources, job, make_request, _say, config.follow)


def _create(watches: Sequence[SliceWatch]) -> None:
    """Asks for all slices, or leaves none."""
    for index, watch in enumerate(watches):
        try:
            watch.create()
            gcs.upload(f"{watch.job.folder}/job.json", watch.job.to_json().encode())
        except (UserError, RunAgain, OSError):
            for created in watches[: index + 1]:
                created.cancel(seconds=0)
            raise


def _wait(config: SubmitTpuConfig, watches: Sequence[SliceWatch]) -> dict[str, Outcome]:
    """How each slice's job ended, once all have; goes on through times without an answer."""
    outcomes: dict[str, Outcome] = {}
    while True:
        for watch in watches:
            if watch.job.name in outcomes:
                continue
            try:
                outcome = watch.step()
            except RunAgain as error:
                _say(f"{watch.job.name}: still waiting: {error}")
                continue
            except (UserError, OSError):
                _say(f"{config.name}: left running. {_manual(config)}")
                raise
            if outcome is not None:
                outcomes[watch.job.name] = outcome
        if len(outcomes) == len(watches):
            return outcomes
        time.sleep(_POLL_SECONDS)


def _report(config: SubmitTpuConfig, outcomes: dict[str, Outcome]) -> None:
    """Says how it went, and ends the process as the job ended."""
    for name, outcome in outcomes.items():
        if outcome.exit_code == 0:
            continue
        if outcome.error is not None:
            raise outcome.error
        message = f"{name}: ended with exit code {outcome.exit_code}: {outcome.message}"
        if outcome.exit_code == RUN_AGAIN:
            raise RunAgain(f"{message}; run the same command again to resume")
        logs = (
            f"multihot jobs logs --project={config.project} --zone={config.zone} "
            f"--bucket={config.bucket} --name={config.name}"
        )
        raise UserError(f"{message}; its slice is deleted; see what it printed: {logs}")
    _say(f"{config.name}: done; nothing is left running")


def _stop(config: SubmitTpuConfig, watches: Sequence[SliceWatch]) -> NoReturn:
    """Asks what to do after a Ctrl-C, and does it."""
    if ask_to_leave(config.name):
        _say(f"{config.name}: left running. {_manual(config)}")
    else:
        for watch in watches:
            watch.cancel()
        _say(f"{config.name}: cancelled; nothing is left running")
    raise KeyboardInterrupt


def _manual(config: SubmitTpuConfig) -> str:
    """What to do about a job that nobody waits for."""
    flags = f"--project={config.project} --zone={config.zone} --name={config.name}"
    return (
        f"It deletes its slice at its end, and after --max_hours={config.max_hours:g}; a slice "
        f"that is taken away is not created again. See it: multihot jobs status {flags}; stop it: "
        f"multihot jobs cancel {flags}"
    )


def _say(line: str) -> None:
    print(line, flush=True)
