"""`multihot jobs`: the jobs of `submit tpu` and `submit vertex`, found by the labels on them.

Cloud TPU lists a slice as long as it exists, and Vertex AI a job for months. A job's folder in the
bucket has what its machines printed and how they ended.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from launch.cloud import vertex_jobs
from launch.cloud.calls import Place, explained
from launch.cloud.follow import JobLog, describe_state, print_table, read_records
from launch.cloud.tpu_slices import BUCKET, Phase, QueuedResources, describe
from launch.job import FOLDER, JOB_LABEL, Job, bucket_name
from launch.launch_config import JobsCancelConfig, JobsListConfig, JobsLogsConfig, JobsStatusConfig
from launch.machine.reports import Ending, State
from trainer.errors import UserError
from trainer.storage import gcs

_POLL_SECONDS = 10.0


@dataclass(frozen=True)
class FoundJob:
    """A slice or a custom job that `submit` created.

    `name` is its own; it differs from `group`, the user's, for a job of several slices. `is_alive`
    says whether it costs money or quota, or soon will. `bucket` is that of its folder.
    """

    name: str
    group: str
    place: str
    accelerator: str
    state: str
    is_alive: bool
    created: datetime | None
    bucket: str
    end: Callable[[], None]


def list_jobs(config: JobsListConfig) -> None:
    """Prints a table of the jobs; raises as `find`."""
    rows = [
        (item.name, item.place, item.accelerator, item.state, _date(item.created))
        for item in find(config)
    ]
    if config.bucket:
        known = {row[0] for row in rows}
        rows += [
            (job.name, job.folder, job.accelerator, _describe_end(job), _submission_date(job))
            for job in _read_jobs(bucket_name(config.bucket))
            if job.name not in known
        ]
    if not rows:
        print("no jobs of Multihot there")
        return
    print_table(("NAME", "WHERE", "ACCELERATOR", "STATE", "CREATED"), rows)


def show_status(config: JobsStatusConfig) -> None:
    """Prints the state of a job and of its machines; raises as `find`, UserError without one."""
    found = _newest(find(config))
    for item in found:
        print(
            f"{item.name}: {item.state} in {item.place}, on {item.accelerator}, since "
            f"{_date(item.created)}"
        )
    buckets = {item.name: item.bucket for item in found}
    if config.bucket and not found:
        buckets = {config.name: bucket_name(config.bucket)}
    records = [job for name, bucket in buckets.items() if (job := read_job(bucket, name))]
    if not found and not records:
        raise UserError(_no_job(config))
    for job in records:
        _show_machines(job)


def print_logs(config: JobsLogsConfig) -> None:
    """Prints a machine's output, with `config.follow` until it ends; raises as `show_status`."""
    bucket = bucket_name(config.bucket) if config.bucket else _find_bucket(config)
    job = read_job(bucket, config.name)
    if job is None:
        raise UserError(
            f"gs://{bucket}/{FOLDER}/{config.name}/job.json: not found; check --bucket and --name"
        )
    log = JobLog(job, config.host)
    while True:
        # The end is looked for first: a machine uploads its last output before it records its end.
        ended = config.host in read_records(job, Ending)
        print(log.read_new(), end="", flush=True)
        if ended or not config.follow:
            break
        time.sleep(_POLL_SECONDS)
    startup = log.read_startup()
    if startup:
        print(f"--- installation, last lines\n{startup}")


def cancel(config: JobsCancelConfig) -> None:
    """Ends jobs, and waits until their slices are deleted; raises as `find`."""
    found = find(config)
    if not found and config.name:
        raise UserError(_no_job(config))
    alive = [item for item in found if item.is_alive]
    for item in alive:
        item.end()
        print(f"{item.name}: ended in {item.place}", flush=True)
    if not alive:
        print("nothing to end; nothing is left running")


def find(config: Any) -> list[FoundJob]:
    """Our slices of `config.zone` and custom jobs of `config.region`, the newest first.

    If the command has a flag --name, those of that name. Raises UserError if a service refuses the
    call, and RunAgain if it does not answer.
    """
    found = list(_find_slices(config.project, config.zone)) if config.zone else []
    if config.region:
        found += _find_custom_jobs(config.project, config.region)
    group = getattr(config, "name", None)
    chosen = [item for item in found if group is None or item.group == group]
    return sorted(chosen, key=lambda item: _date(item.created), reverse=True)


def read_job(bucket: str, name: str) -> Job | None:
    """The record of a job, None if there is none; UserError if it is of another version."""
    text = gcs.read_object(f"gs://{bucket}/{FOLDER}/{name}/job.json")
    return None if text is None else Job.from_json(text)


def _find_slices(project: str, zone: str) -> Iterator[FoundJob]:
    resources = QueuedResources(project, zone)
    for resource in resources.list_ours():
        seen = describe(resource)
        name = resource.name.rpartition("/")[2]
        node = resource.tpu.node_spec[0].node
        yield FoundJob(
            name=name,
            group=seen.job,
            place=f"Cloud TPU, {zone}",
            accelerator=node.accelerator_type,
            state=seen.phase.value,
            # A slice that was taken away costs nothing, but occupies quota and its name.
            is_alive=seen.phase is not Phase.DELETING,
            created=resource.create_time,
            bucket=node.metadata.get(BUCKET, ""),
            end=partial(resources.delete, name),
        )


def _find_custom_jobs(project: str, region: str) -> list[FoundJob]:
    place = Place(
        api=vertex_jobs.API,
        project=project,
        location=region,
        what="the custom jobs",
        role=vertex_jobs.ROLE,
        service_account=None,
        find_locations="cloud.google.com/vertex-ai/docs/general/locations",
        remove=f"multihot jobs cancel --project={project} --region={region} --all",
    )
    with explained(place):
        client = vertex_jobs.make_client(region)
        jobs = vertex_jobs.find(client, project, region)
        return [_read_custom_job(client, region, place, job) for job in jobs]


def _read_custom_job(client: Any, region: str, place: Place, job: Any) -> FoundJob:
    spec = job.job_spec.worker_pool_specs[0].machine_spec
    machines = sum(pool.replica_count for pool in job.job_spec.worker_pool_specs)

    def end() -> None:
        with explained(place):
            vertex_jobs.cancel(client, job.name)

    return FoundJob(
        name=job.display_name,
        group=job.labels[JOB_LABEL],
        place=f"Vertex AI, {region}",
        accelerator=f"{machines} x {spec.machine_type}",
        state=vertex_jobs.describe(job),
        is_alive=job.state.name not in vertex_jobs.ENDED,
        created=job.create_time,
        bucket=job.job_spec.base_output_directory.output_uri_prefix.split("/")[2],
        end=end,
    )


def _newest(found: list[FoundJob]) -> list[FoundJob]:
    """The newest job of each name; Vertex AI keeps earlier ones."""
    newest: dict[str, FoundJob] = {}
    for item in found:
        newest.setdefault(item.name, item)
    return list(newest.values())


def _read_jobs(bucket: str) -> list[Job]:
    """All job records in a bucket that this version can read."""
    urls = [
        item.url
        for item in gcs.list_objects(f"gs://{bucket}/{FOLDER}/")
        if item.url.count("/") == 5 and item.url.endswith("/job.json")
    ]
    jobs = []
    for text in gcs.read_objects(urls):
        try:
            jobs.append(Job.from_json(text or b""))
        except UserError:
            continue  # Of another version.
    return jobs


def _find_bucket(config: JobsLogsConfig) -> str:
    for item in find(config):
        return item.bucket
    raise UserError(_no_job(config))


def _no_job(config: Any) -> str:
    places = [
        f"--{name}={value}"
        for name in ("zone", "region", "bucket")
        if (value := getattr(config, name, None))
    ]
    return (
        f"--name={config.name}: no such job in {' '.join(places)}; `multihot jobs list` shows what "
        "there is"
    )


def _show_machines(job: Job) -> None:
    print(f"{job.name}: {' -- '.join(' '.join(command) for command in job.commands)}")
    print(f"{job.name}: {job.folder}/")
    states, endings = read_records(job, State), read_records(job, Ending)
    for host in sorted({*states, *endings}):
        if host in endings:
            ending = endings[host]
            print(f"  host {host}: ended with exit code {ending.exit_code}: {ending.reason}")
        else:
            print(f"  host {host}: {describe_state(states[host])}")
    if not states and not endings:
        print("  no machine has said anything yet")


def _describe_end(job: Job) -> str:
    endings = read_records(job, Ending)
    if not endings:
        return "no end recorded"
    worst = max(ending.exit_code for ending in endings.values())
    return "succeeded" if worst == 0 else f"ended with exit code {worst}"


def _date(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment else ""


def _submission_date(job: Job) -> str:
    return _date(datetime.strptime(job.submission.partition("-")[0], "%Y%m%dt%H%M%S"))
