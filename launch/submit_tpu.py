"""`multihot submit tpu`: commands on Cloud TPU slices that are created and deleted for them."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from launch.accelerators import TpuSlice, find_slice
from launch.cloud import calls
from launch.cloud import package as packages
from launch.cloud.follow import Outcome, region_of, say
from launch.cloud.package import Package
from launch.cloud.rights import OF_SLICES
from launch.cloud.slice_watch import SliceWatch
from launch.cloud.tpu_slices import (
    API,
    Phase,
    QueuedResources,
    make_create_request,
    resource_name,
    version_of,
)
from launch.job import Job
from launch.launch_config import SubmitTpuConfig
from launch.submit import Commands, Submission, make_job, parse_commands, submit, write_record
from trainer.errors import RunAgain, UserError


def run(config: SubmitTpuConfig, arguments: Sequence[str]) -> None:
    """Runs the commands that follow `--` on slices that are created and deleted for them.

    Raises as `submit`; RunAgain also if a slice was taken away too often.
    """
    commands = parse_commands(arguments)
    slice_of_chips = find_slice(config.accelerator)
    if slice_of_chips.hosts > 1 and not config.allow_experimental:
        raise UserError(
            f"--accelerator={config.accelerator}: {slice_of_chips.name} has {slice_of_chips.hosts} "
            "hosts, and nobody has shown that TensorFlow trains there; take a slice of one host, "
            "or give --allow_experimental, best with --max_hours=1"
        )
    if slice_of_chips.warning:
        print(f"warning: {slice_of_chips.warning}", file=sys.stderr)
    package = packages.build("tpu")
    submit(TpuSubmission(config, slice_of_chips, make_jobs(config, commands, package), package))


def make_jobs(config: SubmitTpuConfig, commands: Commands, package: Package) -> list[Job]:
    """A record for each slice; UserError for several slices of commands that do not share work."""
    count = config.num_slices
    names = [f"{config.name}-{index}" for index in range(count)] if count > 1 else [config.name]
    job = make_job(config, commands, package, "tpu", config.accelerator)
    return [
        replace(
            job,
            name=name,
            commands=_share(commands, index, count),
            resource=resource_name(config, name),
        )
        for index, name in enumerate(names)
    ]


def _share(commands: Commands, index: int, count: int) -> Commands:
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


class TpuSubmission(Submission):
    """Slices that delete themselves, each with a job of its own."""

    config: SubmitTpuConfig
    needs = OF_SLICES

    def __init__(
        self, config: SubmitTpuConfig, slice_of_chips: TpuSlice, jobs: list[Job], package: Package
    ) -> None:
        super().__init__(config, region_of(config.zone), jobs, package)
        self._slice = slice_of_chips
        self._outcomes: dict[str, Outcome] = {}

    def request_of(self, job: Job) -> dict[str, Any]:
        request = make_create_request(self.config, self._slice, job)
        return {
            "service": API,
            "version": version_of(self.config),
            "method": "CreateQueuedResource",
            "request": calls.to_dict(request),
        }

    def list_requests(self) -> list[dict[str, Any]]:
        deletions = [
            {
                "service": API,
                "version": "v2",
                "method": "DeleteQueuedResource",
                "sent_by": f"the slice, at its end or after {job.max_seconds} seconds",
                "request": {"name": job.resource, "force": True},
            }
            for job in self.jobs
        ]
        return super().list_requests() + deletions

    def connect(self) -> None:
        config = self.config
        self._resources = QueuedResources(
            config.project, config.zone, config.service_account, self._slice.kind.zones
        )
        self._watches = []
        for job in self.jobs:
            make_request = partial(make_create_request, config, self._slice, job)
            self._watches.append(SliceWatch(self._resources, job, make_request, config.follow))

    def make_room(self) -> None:
        """Deletes slices of those names that were taken away or failed, or waits for their end."""
        name = self.config.name
        for job in self.jobs:
            found = self._resources.find(job.name)
            if found.phase is Phase.ABSENT:
                continue
            if not found.job:
                raise UserError(
                    f"--name={name}: a queued resource of that name exists, and is not of "
                    "Multihot's making; take another name, or remove it: "
                    f"{self._resources.place(job.name).remove}"
                )
            if found.phase not in (Phase.TAKEN_AWAY, Phase.FAILED, Phase.DELETING):
                raise UserError(
                    f"--name={name}: a job of that name {found.phase.value} ({found.state}); take "
                    f"another name, or end it: {self.jobs_command('cancel')}"
                )
            say(f"{job.name}: removing the slice of that name that {found.phase.value}")
            self._resources.delete(job.name)

    def create(self) -> None:
        name = self.config.name
        say(f"{name}: asking for {self._slice.name} in {self.config.zone}")
        for index, watch in enumerate(self._watches):
            try:
                watch.create()
                write_record(watch.job)
            except (UserError, RunAgain, OSError):
                for created in self._watches[: index + 1]:
                    created.cancel(seconds=0)
                raise
        say(f"{name}: asked; {self.jobs[0].folder}/ has what is known of it")

    def step(self) -> Outcome | None:
        """A service that does not answer ends nothing: the slices run without being watched."""
        for watch in self._watches:
            if watch.job.name in self._outcomes:
                continue
            try:
                outcome = watch.step()
            except RunAgain as error:
                say(f"{watch.job.name}: still waiting: {error}")
                continue
            except (UserError, OSError):
                say(f"{self.config.name}: left running. {self.advise()}")
                raise
            if outcome is not None:
                message = f"{watch.job.name}: ended with exit code {outcome.exit_code}: "
                self._outcomes[watch.job.name] = replace(outcome, message=message + outcome.message)
        if len(self._outcomes) < len(self._watches):
            return None
        ended = list(self._outcomes.values())
        return next((outcome for outcome in ended if outcome.exit_code != 0), ended[0])

    def find_created(self) -> Sequence[Job]:
        return [watch.job for watch in self._watches if watch.is_requested]

    def cancel(self) -> str:
        for watch in self._watches:
            watch.cancel()
        return "nothing is left running"

    def advise(self) -> str:
        return (
            f"It deletes its slice at its end, and after --max_hours={self.config.max_hours:g}; a "
            "slice that is taken away is not created again. See it: "
            f"{self.jobs_command('status')}; stop it: {self.jobs_command('cancel')}"
        )

    def name_logs(self) -> str:
        logs = self.jobs_command("logs", f"--bucket={self.config.bucket}")
        return f"its slice is deleted; see what it printed: {logs}"
