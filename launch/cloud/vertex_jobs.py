"""Custom jobs of Vertex AI: their requests, and making, finding and ending them.

Worker pool 0 is the chief, one machine; pool 1 are the others. Vertex AI tells each who it is by
TF_CONFIG. A machine's container is a plain one with Python: what it runs is `bootstrap.py`, given
to Python as text, which installs the job's wheel and its locked dependencies and then runs the
job's commands, all of which is told to it as JSON in one variable. No shell is involved.

Imports Google's client only where it is used; the requests themselves are its messages.
MULTIHOT_VERTEX_ENDPOINT names another server, spoken to in the clear and without credentials.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from launch.accelerators import VertexMachine
from launch.job import JOB_LABEL, Job
from launch.launch_config import SubmitVertexConfig, parse_labels
from trainer.errors import RunAgain, UserError

ENDPOINT_VARIABLE = "MULTIHOT_VERTEX_ENDPOINT"
SUBMISSION_LABEL = "multihot-submission"
WORK_DIR = "/tmp/multihot"
ENDED = (
    "JOB_STATE_SUCCEEDED",
    "JOB_STATE_FAILED",
    "JOB_STATE_CANCELLED",
    "JOB_STATE_EXPIRED",
    "JOB_STATE_PARTIALLY_SUCCEEDED",
)
SUCCEEDED = "JOB_STATE_SUCCEEDED"
_STRATEGIES = {"on_demand": "STANDARD", "spot": "SPOT", "flex_start": "FLEX_START"}
_BOOTSTRAP = Path(__file__).parents[1] / "machine" / "bootstrap.py"
# Where Vertex AI's machines have NVIDIA's driver, which no package brings. CUDA itself comes as
# packages, whatever the image has of it.
_DRIVER = "/usr/local/nvidia/lib64:/usr/local/nvidia/lib"
_REQUEST_SECONDS = 60.0
_DEADLINE_SECONDS = 180.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 20.0

Answer = TypeVar("Answer")


def parent(project: str, region: str) -> str:
    """What Vertex AI calls a project's resources in a region."""
    return f"projects/{project}/locations/{region}"


def build_request(config: SubmitVertexConfig, machine: VertexMachine, job: Job) -> Any:
    """The CreateCustomJobRequest of a job.

    Args:
      config: the command's flags.
      machine: that they name.
      job: its record, which the machines get as it is.
    """
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
            # Workers that lose one of them stop by themselves and go on from the last checkpoint
            # together; alone, the one that comes back would find nobody to join.
            restart_job_on_worker_restart=config.num_machines > 1,
        ),
        service_account=config.service_account or "",
        network=config.network or "",
        base_output_directory=types.GcsDestination(output_uri_prefix=job.folder),
    )
    return types.CreateCustomJobRequest(
        parent=parent(config.project, config.region),
        custom_job=types.CustomJob(
            display_name=job.name,
            job_spec=spec,
            labels=labels_of(job) | parse_labels(config.labels),
        ),
    )


def to_dict(request: Any) -> dict[str, Any]:
    """A request as the service's REST API would get it: fields that are not set left out."""
    return json.loads(
        type(request).to_json(
            request, including_default_value_fields=False, use_integers_for_enums=False
        )
    )


def labels_of(job: Job) -> dict[str, str]:
    """The labels by which a custom job is known as ours, as whose, and from which submission."""
    return job.labels() | {SUBMISSION_LABEL: job.submission}


def _build_pool(config: SubmitVertexConfig, machine: VertexMachine, job: Job, replicas: int) -> Any:
    from google.cloud.aiplatform_v1 import types

    spec = types.MachineSpec(machine_type=machine.machine_type)
    # In the values of variables, Vertex AI takes $(NAME) for another one's value.
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
            args=["-", WORK_DIR],
            env=[types.EnvVar(name=name, value=environment[name]) for name in sorted(environment)],
        ),
    )


def make_client(region: str) -> Any:
    """A client of a region's service, with the machine's default credentials."""
    from google.cloud.aiplatform_v1.services.job_service import JobServiceClient

    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        address = f"{region}-aiplatform.googleapis.com"
        return JobServiceClient(client_options={"api_endpoint": address})
    import grpc
    from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceGrpcTransport

    return JobServiceClient(
        transport=JobServiceGrpcTransport(channel=grpc.insecure_channel(endpoint))
    )


def create(client: Any, request: Any) -> Any:
    """Makes a custom job, one and no more.

    Vertex AI has no way to say that a request is the same as one before. So where an answer was
    lost, jobs with the label of this submission are looked for before it is sent again; and if
    there are several in the end, all but the first are ended.

    Raises:
      GoogleAPICallError: if the service refuses it.
      RunAgain: if it does not answer.
    """
    from google.api_core.exceptions import DeadlineExceeded, ServiceUnavailable

    lost = None
    for pause in _pauses():
        try:
            made = client.create_custom_job(request=request, timeout=_REQUEST_SECONDS)
            return _end_others(client, request, made) if lost else made
        except (ServiceUnavailable, DeadlineExceeded) as error:
            _check_address(error)
            lost = error
            time.sleep(pause)
            if find_submission(client, request):
                return _end_others(client, request)
    raise RunAgain(f"Vertex AI does not answer ({lost}); run the same command again")


def find_submission(client: Any, request: Any) -> list[Any]:
    """The jobs that a CreateCustomJobRequest has made, however often it arrived."""
    submission = request.custom_job.labels[SUBMISSION_LABEL]
    return _list(client, request.parent, f"labels.{SUBMISSION_LABEL}={submission}")


def _end_others(client: Any, request: Any, made: Any = None) -> Any:
    """The first of the jobs that a request has made, after the others have been ended.

    Args:
      client: of the service.
      request: that made them.
      made: one of them, should the list not have it yet.
    """
    jobs = {job.name: job for job in find_submission(client, request)}
    if made is not None:
        jobs.setdefault(made.name, made)
    first, *others = sorted(jobs.values(), key=lambda job: (job.create_time, job.name))
    for other in others:
        print(f"warning: {other.name} was made twice over; ending it", file=sys.stderr)
        cancel(client, other.name)
    return first


def find(client: Any, project: str, region: str, name: str | None = None) -> list[Any]:
    """Our custom jobs of a region, or those of one name, the newest first.

    Raises:
      GoogleAPICallError: if the service refuses it.
      RunAgain: if it does not answer.
    """
    condition = f"labels.{JOB_LABEL}={name}" if name else f"labels.{JOB_LABEL}:*"
    jobs = _list(client, parent(project, region), condition)
    return sorted(jobs, key=lambda job: job.create_time, reverse=True)


def _list(client: Any, place: str, condition: str) -> list[Any]:
    from google.cloud.aiplatform_v1 import types

    def ask() -> list[Any]:
        request = types.ListCustomJobsRequest(parent=place, filter=condition)
        return list(client.list_custom_jobs(request=request, timeout=_REQUEST_SECONDS))

    return with_retries(ask)


def get(client: Any, name: str) -> Any:
    """A custom job as it is now, by its full name."""
    return with_retries(lambda: client.get_custom_job(name=name, timeout=_REQUEST_SECONDS))


def describe(job: Any) -> str:
    """A custom job's state in words."""
    return str(job.state.name).removeprefix("JOB_STATE_").lower().replace("_", " ")


def cancel(client: Any, name: str) -> None:
    """Asks for a custom job's end, which takes a moment; nothing if it has ended."""
    from google.api_core.exceptions import FailedPrecondition

    try:
        with_retries(lambda: client.cancel_custom_job(name=name, timeout=_REQUEST_SECONDS))
    except FailedPrecondition:
        if get(client, name).state.name not in ENDED:
            raise


def with_retries(ask: Callable[[], Answer]) -> Answer:
    """What a request answers that may be repeated, after pauses while the service is away.

    Raises:
      GoogleAPICallError: if the service refuses it.
      RunAgain: if it does not answer.
    """
    from google.api_core.exceptions import DeadlineExceeded, ServiceUnavailable

    for pause in _pauses():
        try:
            return ask()
        except (ServiceUnavailable, DeadlineExceeded) as error:
            _check_address(error)
            lost = error
            time.sleep(pause)
    raise RunAgain(f"Vertex AI does not answer ({lost.message}); run the same command again")


def _check_address(error: Any) -> None:
    """Tells a region that is none, whose server has no address, from a service that is away.

    Raises:
      UserError: if the server's name is not known.
    """
    unknown = re.search(r"(?:errors resolving|resolution failed for) (\S+)-aipl", error.message)
    if unknown:
        raise UserError(
            f"--region={unknown[1]}: Vertex AI has no server of that name, or this machine is not "
            "online; regions: cloud.google.com/vertex-ai/docs/general/locations"
        )


def _pauses() -> Iterator[float]:
    """Growing pauses in seconds, until the deadline."""
    end = time.monotonic() + _DEADLINE_SECONDS
    pause = _FIRST_PAUSE_SECONDS
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
