"""`multihot submit vertex`: commands on machines of Vertex AI, which ends them with the job."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from launch.accelerators import VertexMachine, find_vertex_machine
from launch.cloud import package as packages
from launch.cloud import vertex_jobs
from launch.cloud.follow import JobLog, ask_to_leave, check_bucket, describe_state, read_records
from launch.cloud.package import Package, upload_request
from launch.cloud.refusals import Place, explained, shorten
from launch.job import SHARED, Job, bucket_name, new_submission
from launch.launch_config import SubmitVertexConfig
from launch.machine.reports import Ending, State
from launch.submit import Commands, parse_commands
from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.storage import gcs

API = "aiplatform.googleapis.com"
_POLL_SECONDS = 10.0
# Between two lines on what the chief does, where its output is not shown.
_REPORT_SECONDS = 60.0


def run(config: SubmitVertexConfig, arguments: Sequence[str]) -> None:
    """Runs commands on machines that Vertex AI creates and deletes for them.

    Args:
      config: the machines, and how to wait for them.
      arguments: what follows `--`.

    Raises:
      UserError: for what the user can mend, here or in the job.
      RunAgain: if the job was lost, or a service does not answer.
    """
    commands = parse_commands(arguments)
    machine = find_machine(config, commands)
    package = packages.build(machine.environment)
    job = make_job(config, machine, commands, package)
    request = vertex_jobs.build_request(config, machine, job)
    if config.dry_run:
        print(json.dumps(list_requests(request, job, package), indent=2))
        return
    with explained(place_of(config)):
        client = vertex_jobs.make_client(config.region)
        check_bucket(job.bucket, config.project, config.region)
        _check_name(client, config)
        packages.upload(job, package)
        made = None
        try:
            made = vertex_jobs.create(client, request)
            _check_alone(client, config, made)
            _write_record(job)
            _say(f"{config.name}: {made.name} is made; {job.folder}/")
            _say(f"{config.name}: to be seen at {console_url(made.name)}")
            if config.waits:
                _report(config, job, _wait_patiently(client, config, job, made.name))
            else:
                _say(_manual(config))
        except KeyboardInterrupt:
            _stop(client, config, request, job, made)


def find_machine(config: SubmitVertexConfig, commands: Commands) -> VertexMachine:
    """The machine that the flags name, after what speaks against it has been said.

    Raises:
      UserError: if there is none, or not so many, or not paid for that way.
    """
    machine = find_vertex_machine(config.accelerator)
    if machine.warning:
        print(f"warning: {machine.warning}", file=sys.stderr)
    if machine.spot_only and config.provisioning == "on_demand":
        raise UserError(
            f"--accelerator={machine.name}: Vertex AI has {machine.machine_type} as spot machines "
            "or by queue only; expected --provisioning=spot or --provisioning=flex_start beside it"
        )
    if config.num_machines > 1 and machine.environment == "tpu":
        raise UserError(
            f"--num_machines={config.num_machines}: expected 1 with TPUs; slices of several hosts "
            "are to be had by `multihot submit tpu`"
        )
    if config.num_machines > 1 and not any(command[0] in SHARED for command in commands):
        raise UserError(
            f"--num_machines={config.num_machines}: expected 1, because none of the commands "
            f"shares its work among machines; {' and '.join(SHARED)} do"
        )
    return machine


def make_job(
    config: SubmitVertexConfig,
    machine: VertexMachine,
    commands: Commands,
    package: Package,
    submission: str | None = None,
) -> Job:
    """The record of a submission."""
    return Job(
        name=config.name,
        group=config.name,
        submission=submission or new_submission(),
        bucket=bucket_name(config.bucket),
        commands=commands,
        environment=machine.environment,
        accelerator=machine.name,
        # Vertex AI ends the machines by itself, with the chief's container.
        resource="",
        wheel=package.wheel,
        requirements=package.requirements,
        max_restarts=config.max_restarts,
        max_seconds=max(60, round(config.max_hours * 3600)),
    )


def list_requests(request: Any, job: Job, package: Package) -> list[dict[str, Any]]:
    """Every request that a submission sends, in order, as JSON."""
    uploads = [
        upload_request(f"{job.folder}/package/{item.name}", if_generation=0, sha256=item.sha256)
        for item in (package.wheel, package.requirements)
    ]
    record = upload_request(f"{job.folder}/job.json", content=json.loads(job.to_json()))
    create = vertex_jobs.to_dict(request)
    return [*uploads, {"service": API, "method": "CreateCustomJob", "request": create}, record]


def _write_record(job: Job) -> None:
    """Leaves the record for whoever asks later; not before the name is this submission's."""
    gcs.upload(f"{job.folder}/job.json", job.to_json().encode())


def place_of(config: SubmitVertexConfig) -> Place:
    """What Vertex AI is asked for, for sentences about it."""
    return Place(
        api=API,
        project=config.project,
        location=config.region,
        what=f"the custom job {config.name}",
        role="roles/aiplatform.user",
        service_account=config.service_account,
        find_locations=f"gcloud compute accelerator-types list --project={config.project} "
        f"--filter=zone:{config.region}; regions: "
        "cloud.google.com/vertex-ai/docs/general/locations#accelerators",
        remove=_cancel_command(config),
    )


def console_url(name: str) -> str:
    """Where a custom job is to be seen, by its full name."""
    _, project, _, region, _, number = name.split("/")
    return (
        f"https://console.cloud.google.com/vertex-ai/locations/{region}/training/{number}"
        f"?project={project}"
    )


def _check_name(client: Any, config: SubmitVertexConfig) -> None:
    """Refuses a name that a job has which has not ended; Vertex AI would take it twice.

    Raises:
      UserError: if there is one.
    """
    for job in vertex_jobs.find(client, config.project, config.region, config.name):
        if job.state.name not in vertex_jobs.ENDED:
            raise UserError(
                f"--name={config.name}: a job of that name has not ended "
                f"({vertex_jobs.describe(job)}); take another name, or end it: "
                f"{_cancel_command(config)}"
            )


def _check_alone(client: Any, config: SubmitVertexConfig, made: Any) -> None:
    """Ends a job again whose name another submission has taken at the same moment.

    Raises:
      UserError: if there is one that was made before it.
    """
    alive = [
        (job.create_time, job.name)
        for job in vertex_jobs.find(client, config.project, config.region, config.name)
        if job.state.name not in vertex_jobs.ENDED
    ]
    if alive and min(alive) < (made.create_time, made.name):
        vertex_jobs.cancel(client, made.name)
        raise UserError(
            f"--name={config.name}: another submission has taken that name at the same moment "
            f"({min(alive)[1]}); this one is cancelled; take another name"
        )


def _wait_patiently(client: Any, config: SubmitVertexConfig, job: Job, name: str) -> Any:
    """As `_wait`; a service that stays away is no reason to submit again."""
    try:
        return _wait(client, config, job, name)
    except RunAgain as error:
        raise RunAgain(
            f"{config.name}: out of sight, but it goes on ({error}). {_manual(config)}"
        ) from None


def _wait(client: Any, config: SubmitVertexConfig, job: Job, name: str) -> Any:
    """The custom job once it has ended; says meanwhile what is new."""
    log = JobLog(job) if config.follow else None
    said = ""
    reported, shown = 0.0, ""
    while True:
        found = vertex_jobs.get(client, name)
        if log is not None:
            print(log.read_new(), end="", flush=True)
        if vertex_jobs.describe(found) != said:
            said = vertex_jobs.describe(found)
            _say(f"{config.name}: {said}")
        if found.state.name in vertex_jobs.ENDED:
            return found
        if log is None and time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            state = read_records(job, State).get(0)
            line = describe_state(state) if state else ""
            if line != shown:
                shown = line
                _say(f"{config.name}: {line}")
        time.sleep(_POLL_SECONDS)


def _report(config: SubmitVertexConfig, job: Job, found: Any) -> None:
    """Says how it went, and ends the command as the job ended."""
    if found.state.name == vertex_jobs.SUCCEEDED:
        _say(f"{config.name}: done; nothing is left running")
        return
    chief = read_records(job, Ending).get(0)
    logs = (
        f"multihot jobs logs --project={config.project} --region={config.region} "
        f"--bucket={config.bucket} --name={config.name}; what the machines printed before "
        f"Multihot was installed: gcloud ai custom-jobs stream-logs {found.name}"
    )
    message = f"{config.name}: {vertex_jobs.describe(found)}"
    if found.error.message:
        message += f": {shorten(found.error.message)}"
    if chief is not None and chief.exit_code:
        message += f"; the chief ended with exit code {chief.exit_code}: {chief.reason}"
        if chief.exit_code == RUN_AGAIN:
            raise RunAgain(f"{message}; run the same command again to resume")
    raise UserError(f"{message}; see what it printed: {logs}")


def _stop(client: Any, config: SubmitVertexConfig, request: Any, job: Job, made: Any) -> NoReturn:
    """Asks what to do after a Ctrl-C, and does it.

    The job may have been made although its answer has not come.
    """
    jobs = [made] if made is not None else vertex_jobs.find_submission(client, request)
    if not jobs:
        _say(f"{config.name}: not made; nothing is left running")
    elif ask_to_leave(config.name):
        _write_record(job)
        _say(f"{config.name}: left running. {_manual(config)}")
    else:
        for item in jobs:
            vertex_jobs.cancel(client, item.name)
        _say(f"{config.name}: cancelled; Vertex AI ends its machines")
    raise KeyboardInterrupt


def _manual(config: SubmitVertexConfig) -> str:
    """What to do about a job that nobody waits for."""
    flags = f"--project={config.project} --region={config.region} --name={config.name}"
    return (
        f"Its machines end with it, and after --max_hours={config.max_hours:g}. See it: multihot "
        f"jobs status {flags} --bucket={config.bucket}; stop it: {_cancel_command(config)}"
    )


def _cancel_command(config: SubmitVertexConfig) -> str:
    flags = f"--project={config.project} --region={config.region} --name={config.name}"
    return f"multihot jobs cancel {flags}"


def _say(line: str) -> None:
    print(line, flush=True)
