"""Custom jobs of Vertex AI: the requests that create them; creating, finding and cancelling them.

Worker pool 0 is the chief, one machine; pool 1 holds the others. TF_CONFIG tells each its place.
Their container, any image with Python, runs the text of launch/machine/bootstrap.py, which reads
the job's record from a variable of the environment. No shell is involved. MULTIHOT_VERTEX_ENDPOINT
names another server, called without encryption and without credentials.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from launch.accelerators import VertexMachine
from launch.cloud import calls
from launch.job import JOB_LABEL, Job, labels_of
from launch.launch_config import SubmitVertexConfig, parse_labels
from trainer.errors import RunAgain, UserError

API = "aiplatform.googleapis.com"
ROLE = "roles/aiplatform.user"
ENDPOINT_VARIABLE = "MULTIHOT_VERTEX_ENDPOINT"
SUCCEEDED = "JOB_STATE_SUCCEEDED"
ENDED = (
    SUCCEEDED,
    "JOB_STATE_FAILED",
    "JOB_STATE_CANCELLED",
    "JOB_STATE_EXPIRED",
    "JOB_STATE_PARTIALLY_SUCCEEDED",
)
_SUBMISSION_LABEL = "multihot-submission"
_WORK_DIR = "/tmp/multihot"
_STRATEGIES = {"on_demand": "STANDARD", "spot": "SPOT", "flex_start": "FLEX_START"}
_BOOTSTRAP = Path(__file__).parents[1] / "machine" / "bootstrap.py"
# Where Vertex AI's machines have NVIDIA's driver, which no package contains. CUDA itself is
# installed as packages, whether the image has it or not.
_DRIVER = "/usr/local/nvidia/lib64:/usr/local/nvidia/lib"
_DEADLINE_SECONDS = 180.0

Answer = TypeVar("Answer")


def build_request(config: SubmitVertexConfig, machine: VertexMachine, job: Job) -> Any:
    """The CreateCustomJobRequest of a job, whose record is passed to the machines."""
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import duration_pb2

    pools = [_build_pool(config, machine, job, 1)]
    if config.num_machines > 1:
        pools.append(_build_pool(config, machine, job, config.num_machines - 1))
    spec = types.CustomJobSpec(
        worker_pool_specs=pools,
        scheduling=types.Scheduling(
            timeout=duration_pb2.Duration(seconds=job.max_seconds),
            strategy=types.Scheduling.Strategy[_STRATEGIES[config.provisioning]],
            # When one machine is lost, the others stop and all resume from the last checkpoint
            # together. A machine restarted alone would find no cluster to join.
            restart_job_on_worker_restart=config.num_machines > 1,
        ),
        service_account=config.service_account or "",
        network=config.network or "",
        base_output_directory=types.GcsDestination(output_uri_prefix=job.folder),
    )
    return types.CreateCustomJobRequest(
        parent=calls.parent(config.project, config.region),
        custom_job=types.CustomJob(
            display_name=job.name,
            job_spec=spec,
            labels=labels_of(job.group)
            | {_SUBMISSION_LABEL: job.submission}
            | parse_labels(config.labels),
        ),
    )


def _build_pool(config: SubmitVertexConfig, machine: VertexMachine, job: Job, replicas: int) -> Any:
    from google.cloud.aiplatform_v1 import types

    spec = types.MachineSpec(machine_type=machine.machine_type)
    # Vertex AI replaces $(NAME) in the value of a variable by another variable's value.
    record = job.to_json().replace("$", "\\u0024")
    environment = {"MULTIHOT_JOB": record, "PYTHONUNBUFFERED": "1"}
    if machine.accelerator_type:
        spec.accelerator_type = types.AcceleratorType[machine.accelerator_type]
        spec.accelerator_count = machine.accelerators
        environment |= {
            "LD_LIBRARY_PATH": _DRIVER,
            "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
            "NVIDIA_VISIBLE_DEVICES": "all",
        }
    if machine.tpu_topology:
        spec.tpu_topology = machine.tpu_topology
    return types.WorkerPoolSpec(
        machine_spec=spec,
        replica_count=replicas,
        disk_spec=types.DiskSpec(boot_disk_type="pd-ssd", boot_disk_size_gb=config.boot_disk_gb),
        container_spec=types.ContainerSpec(
            image_uri=config.container_image,
            command=["python3", "-c", _BOOTSTRAP.read_text(encoding="utf-8")],
            args=["-", _WORK_DIR],
            env=[types.EnvVar(name=name, value=environment[name]) for name in sorted(environment)],
        ),
    )


def make_client(region: str) -> Any:
    """A client of a region's service, with the machine's default credentials."""
    from google.cloud.aiplatform_v1.services.job_service import JobServiceClient

    options = {"api_endpoint": f"{region}-{API}"}
    return calls.make_client(JobServiceClient, ENDPOINT_VARIABLE, client_options=options)


def create(client: Any, request: Any) -> Any:
    """Creates exactly one custom job.

    Vertex AI has no identity for a request by which it could recognise a repeated one. So after a
    lost answer the jobs with the label of this submission are listed before the request is sent
    again. If there are several jobs in the end, all but the first are cancelled. Raises
    GoogleAPICallError if the service refuses the request, and RunAgain if it does not answer.
    """
    lost = None
    for pause in calls.pauses(seconds=_DEADLINE_SECONDS):
        try:
            made = client.create_custom_job(request=request, timeout=calls.CALL_SECONDS)
            return _cancel_others(client, request, made) if lost else made
        except calls.away() as error:
            _check_address(error)
            lost = error
            time.sleep(pause)
            if find_submission(client, request):
                return _cancel_others(client, request)
    raise _no_answer(lost)


def find_submission(client: Any, request: Any) -> list[Any]:
    """The jobs that a CreateCustomJobRequest has created; more than one if it was repeated."""
    submission = request.custom_job.labels[_SUBMISSION_LABEL]
    return _list(client, request.parent, _SUBMISSION_LABEL, submission)


def _cancel_others(client: Any, request: Any, made: Any = None) -> Any:
    """The first of a request's jobs; cancels the others. The list may not have `made` yet."""
    found = [made, *find_submission(client, request)]
    jobs = {job.name: job for job in found if job is not None}
    first, *others = sorted(jobs.values(), key=lambda job: (job.create_time, job.name))
    for other in others:
        print(f"warning: {other.name} was made twice over; ending it", file=sys.stderr)
        cancel(client, other.name)
    return first


def find(client: Any, project: str, region: str, name: str | None = None) -> list[Any]:
    """Multihot's custom jobs of a region, or those of one name, the newest first.

    Raises GoogleAPICallError if the service refuses the request, RunAgain if it does not answer.
    """
    jobs = _list(client, calls.parent(project, region), JOB_LABEL, name)
    return sorted(jobs, key=lambda job: job.create_time, reverse=True)


def _list(client: Any, place: str, key: str, value: str | None) -> list[Any]:
    """The custom jobs with a label, of that value or of any.

    Nothing public says whether a filter may name a key with hyphens. Where it is refused, all jobs
    are listed; those with the label are told apart here in any case.
    """
    from google.api_core.exceptions import InvalidArgument
    from google.cloud.aiplatform_v1 import types

    def ask(condition: str) -> list[Any]:
        request = types.ListCustomJobsRequest(parent=place, filter=condition)
        return list(client.list_custom_jobs(request=request, timeout=calls.CALL_SECONDS))

    try:
        jobs = _call(lambda: ask(f"labels.{key}={value}" if value else f"labels.{key}:*"))
    except InvalidArgument:
        jobs = _call(lambda: ask(""))
    return [job for job in jobs if key in job.labels and value in (None, job.labels[key])]


def get(client: Any, name: str) -> Any:
    """A custom job as it is now, by its full name; raises as `find`."""
    return _call(lambda: client.get_custom_job(name=name, timeout=calls.CALL_SECONDS))


def describe(job: Any) -> str:
    """A custom job's state in words."""
    return str(job.state.name).removeprefix("JOB_STATE_").lower().replace("_", " ")


def cancel(client: Any, name: str) -> None:
    """Requests a custom job's end, which takes a moment; a job that has ended stays as it is."""
    from google.api_core.exceptions import FailedPrecondition

    try:
        _call(lambda: client.cancel_custom_job(name=name, timeout=calls.CALL_SECONDS))
    except FailedPrecondition:
        if get(client, name).state.name not in ENDED:
            raise


def _call(ask: Callable[[], Answer]) -> Answer:
    """The answer to an idempotent request, which is repeated while the service is away."""
    from google.api_core.exceptions import RetryError

    try:
        return calls.retry(_DEADLINE_SECONDS, on_error=_check_address)(ask)()
    except RetryError as error:
        raise _no_answer(getattr(error.cause, "message", error)) from None


def _no_answer(reason: object) -> RunAgain:
    return RunAgain(f"Vertex AI does not answer ({reason}); run the same command again")


def _check_address(error: Any) -> None:
    """Raises a UserError if the server's name does not resolve: there is no such region."""
    # Each region has a server of its own. gRPC reports a name that does not resolve as UNAVAILABLE.
    unknown = re.search(r"(?:errors resolving|resolution failed for) (\S+)-aipl", error.message)
    if unknown:
        raise UserError(
            f"--region={unknown[1]}: Vertex AI has no server of that name, or this machine is not "
            "online; regions: cloud.google.com/vertex-ai/docs/general/locations"
        )
