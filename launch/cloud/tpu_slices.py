"""Queued resources of Cloud TPU: asked for, looked at, deleted; by Google's own client.

Every call is repeated while the service is away. A creation that was repeated because its answer
was lost finds its own work: the name is the job's, and what has that name says which submission it
belongs to.

MULTIHOT_TPU_ENDPOINT names another server, spoken to in the clear and without credentials.

The requests that create a job's queued resources, made without sending anything.
"""

import contextlib
import dataclasses
import enum
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.accelerators import TpuSlice
from launch.cloud.refusals import Place, explain_status, explained
from launch.job import FOLDER, JOB_LABEL, Job
from launch.launch_config import SubmitTpuConfig, parse_labels
from trainer.errors import RunAgain, UserError

API = "tpu.googleapis.com"
# What a slice's hosts read of their metadata.
SUBMISSION = "multihot-submission"
_JOB, _BOOTSTRAP, _RESOURCE = "multihot-job", "multihot-bootstrap", "multihot-resource"
_MAX_SECONDS, _ATTEMPT = "multihot-max-seconds", "multihot-attempt"
BUCKET, _FOLDER = "multihot-bucket", "multihot-folder"
_STARTUP_SCRIPT = "startup-script"
_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
# Compute Engine's limit on a value.
_VALUE_BYTES = 256 << 10


def resource_name(config: SubmitTpuConfig, name: str) -> str:
    """Full name of a job's queued resource."""
    return f"projects/{config.project}/locations/{config.zone}/queuedResources/{name}"


def make_create_request(
    config: SubmitTpuConfig,
    slice_of_chips: TpuSlice,
    job: Job,
    attempt: int = 0,
    seconds_left: int | None = None,
    request_id: str | None = None,
) -> Any:
    """The CreateQueuedResourceRequest of a job.

    Args:
      config: what the user asked for.
      slice_of_chips: that `config.accelerator` names.
      job: the slice's record.
      attempt: how often the slice was taken away before.
      seconds_left: of the job's `max_seconds`; default: all of them.
      request_id: by which the service knows a request that arrives twice; default: a new one.
    """
    import google.cloud.tpu_v2 as tpu_v2

    parent = f"projects/{config.project}/locations/{config.zone}"
    reserved = config.provisioning == "reserved"
    account = tpu_v2.ServiceAccount(scope=list(_SCOPES))
    if config.service_account:
        account.email = config.service_account
    node = tpu_v2.Node(
        description=f"Multihot job {job.name}",
        accelerator_type=slice_of_chips.name,
        runtime_version=config.runtime_version or slice_of_chips.runtime_image,
        network_config=tpu_v2.NetworkConfig(
            network=config.network or "",
            subnetwork=config.subnetwork or "",
            enable_external_ips=config.external_ips,
        ),
        service_account=account,
        scheduling_config=tpu_v2.SchedulingConfig(
            spot=config.provisioning == "spot", reserved=reserved
        ),
        labels=parse_labels(config.labels) | job.labels(),
        metadata=make_metadata(job, attempt, seconds_left),
    )
    resource = tpu_v2.QueuedResource(
        tpu={"node_spec": [{"parent": parent, "node_id": job.name, "node": node}]}
    )
    if config.provisioning == "spot":
        resource.spot = tpu_v2.QueuedResource.Spot()
    if reserved:
        resource.guaranteed = tpu_v2.QueuedResource.Guaranteed()
        if config.reservation:
            resource.reservation_name = (
                config.reservation
                if "/" in config.reservation
                else f"{parent}/reservations/{config.reservation}"
            )
    return tpu_v2.CreateQueuedResourceRequest(
        parent=parent,
        queued_resource_id=job.name,
        queued_resource=resource,
        request_id=request_id or str(uuid.uuid4()),
    )


def make_metadata(job: Job, attempt: int, seconds_left: int | None = None) -> dict[str, str]:
    """What the slice's hosts find in their metadata.

    The watchdog's part stands by itself, so that it needs no parser of JSON.

    Raises:
      UserError: for commands that are longer than a slice's metadata may be.
    """
    folder = Path(__file__).parents[1] / "machine"
    record = json.dumps(dataclasses.asdict(job), sort_keys=True)
    metadata = {
        _STARTUP_SCRIPT: (folder / "startup.sh").read_text(encoding="utf-8"),
        _BOOTSTRAP: (folder / "bootstrap.py").read_text(encoding="utf-8"),
        _JOB: record,
        _RESOURCE: job.resource,
        _MAX_SECONDS: str(job.max_seconds if seconds_left is None else seconds_left),
        _ATTEMPT: str(attempt),
        BUCKET: job.bucket,
        _FOLDER: f"{FOLDER}/{job.name}",
        SUBMISSION: job.submission,
    }
    if len(record.encode()) > _VALUE_BYTES:
        raise UserError(
            f"the commands behind `--` have {len(record.encode())} bytes, more than the "
            f"{_VALUE_BYTES} that a slice can be given; name folders or globs instead of files"
        )
    return metadata


def to_dict(request: Any) -> dict[str, Any]:
    """A request as the service's REST API would get it: fields that are not set left out."""
    return json.loads(
        type(request).to_json(
            request,
            including_default_value_fields=False,
            use_integers_for_enums=False,
            sort_keys=True,
        )
    )


ENDPOINT_VARIABLE = "MULTIHOT_TPU_ENDPOINT"
_CALL_SECONDS = 60.0
_RETRY_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_CREATE_SECONDS = 600.0
_DELETE_SECONDS = 900.0


class Phase(enum.Enum):
    """How far a queued resource has come."""

    ABSENT = "does not exist"
    WAITING = "waits for resources"
    CREATING = "is being created"
    ACTIVE = "is active"
    TAKEN_AWAY = "was taken away"
    FAILED = "has failed"
    DELETING = "is being deleted"


@dataclass(frozen=True)
class ResourceState:
    """A queued resource as it is now.

    Attributes:
      phase: how far it has come.
      state: Google's word for that.
      submission: which submission created it; "" if it is none of ours.
      job: the name that its user gave it; "" if it is none of ours.
      resource: all of it, None if it is absent.
    """

    phase: Phase
    state: str = ""
    submission: str = ""
    job: str = ""
    resource: Any = None


class QueuedResources:
    """The queued resources of a project and zone."""

    def __init__(self, project: str, zone: str, service_account: str | None = None) -> None:
        """Makes a client.

        Raises:
          UserError: without credentials.
        """
        self.parent = f"projects/{project}/locations/{zone}"
        self._project, self._zone = project, zone
        self._service_account = service_account
        with explained(self.place("Cloud TPU")):
            self._client = _make_client()

    def place(self, name: str) -> Place:
        """What errors about a queued resource of that name say."""
        of_zone = f"--zone={self._zone} --project={self._project}"
        return Place(
            api=API,
            project=self._project,
            location=self._zone,
            what=name,
            role="roles/tpu.admin",
            service_account=self._service_account,
            find_locations=f"gcloud compute tpus accelerator-types list {of_zone}; other zones: "
            f"gcloud compute tpus locations list --project={self._project}",
            remove=f"gcloud compute tpus queued-resources delete {name} --force {of_zone}",
        )

    def create(self, request: Any) -> None:
        """Asks for a queued resource, and waits until the service has taken the request.

        Raises:
          UserError: if it is refused, or another submission's has that name.
          RunAgain: if the service does not answer.
        """
        from google.api_core.exceptions import AlreadyExists

        name = request.queued_resource_id
        with explained(self.place(name)):
            try:
                operation = self._client.create_queued_resource(
                    request=request, retry=_retry(), timeout=_CALL_SECONDS
                )
                _wait_for(operation, _CREATE_SECONDS)
            except AlreadyExists:
                # Our own, if this is the second time that the request has arrived.
                wanted = request.queued_resource.tpu.node_spec[0].node.metadata[SUBMISSION]
                found = self.find(name)
                if found.submission != wanted or found.phase is Phase.DELETING:
                    raise

    def find(self, name: str) -> ResourceState:
        """The queued resource of that name, as it is now.

        Raises:
          UserError, RunAgain: if the service refuses to say, or does not answer.
        """
        from google.api_core.exceptions import NotFound

        with explained(self.place(name)):
            try:
                resource = self._client.get_queued_resource(
                    name=f"{self.parent}/queuedResources/{name}",
                    retry=_retry(),
                    timeout=_CALL_SECONDS,
                )
            except NotFound:
                return ResourceState(Phase.ABSENT)
            found = describe(resource)
            if found.phase is Phase.ACTIVE and self._is_lost(name):
                return ResourceState(
                    Phase.TAKEN_AWAY, found.state, found.submission, found.job, resource
                )
            return found

    def _is_lost(self, name: str) -> bool:
        """Whether the node of an active resource was taken away, which the latter hears later."""
        from google.api_core.exceptions import NotFound
        from google.cloud.tpu_v2 import Node

        lost = (Node.State.PREEMPTED, Node.State.TERMINATED, Node.State.STOPPED)
        try:
            node = self._client.get_node(
                name=f"{self.parent}/nodes/{name}", retry=_retry(), timeout=_CALL_SECONDS
            )
        except NotFound:
            return False
        return node.state in lost

    def list_ours(self) -> Iterator[Any]:
        """The queued resources whose labels mark them as ours.

        Raises:
          UserError, RunAgain: if the service refuses to say, or does not answer.
        """
        with explained(self.place("the queued resources")):
            pages = self._client.list_queued_resources(
                parent=self.parent, retry=_retry(), timeout=_CALL_SECONDS
            )
            for resource in pages:
                if describe(resource).job:
                    yield resource

    def failure(self, name: str, found: ResourceState) -> UserError | RunAgain:
        """Why a queued resource has failed, for the user."""
        error = found.resource.state.failed_data.error
        return explain_status(error.code, error.message, self.place(name))

    def delete(self, name: str) -> None:
        """Deletes a queued resource and its node, and waits until both are gone.

        One that is still being created may refuse that for a while, and is asked again.

        Raises:
          UserError, RunAgain: if the service refuses, does not answer, or does not get it done.
        """
        from google.api_core import exceptions

        request = {"name": f"{self.parent}/queuedResources/{name}", "force": True}
        deadline = time.monotonic() + _DELETE_SECONDS
        with explained(self.place(name)):
            for seconds in pauses(_FIRST_PAUSE_SECONDS):
                try:
                    operation = self._client.delete_queued_resource(
                        request=request, retry=_retry(), timeout=_CALL_SECONDS
                    )
                    _wait_for(operation, _DELETE_SECONDS)
                except exceptions.NotFound:
                    return
                except (exceptions.FailedPrecondition, exceptions.Aborted):
                    if time.monotonic() > deadline:
                        raise
                if self.find(name).phase is Phase.ABSENT:
                    return
                if time.monotonic() > deadline:
                    raise RunAgain(
                        f"{name}: is still there after {_DELETE_SECONDS:g} seconds; remove it: "
                        f"{self.place(name).remove}"
                    )
                time.sleep(seconds)


def describe(resource: Any) -> ResourceState:
    """A queued resource in our words."""
    from google.cloud.tpu_v2 import QueuedResourceState

    phases = {
        "CREATING": Phase.CREATING,
        "ACCEPTED": Phase.WAITING,
        "WAITING_FOR_RESOURCES": Phase.WAITING,
        "PROVISIONING": Phase.CREATING,
        "ACTIVE": Phase.ACTIVE,
        "SUSPENDING": Phase.TAKEN_AWAY,
        "SUSPENDED": Phase.TAKEN_AWAY,
        "FAILED": Phase.FAILED,
        "DELETING": Phase.DELETING,
    }
    state = QueuedResourceState.State(resource.state.state).name
    node = resource.tpu.node_spec[0].node if resource.tpu.node_spec else None
    return ResourceState(
        phases.get(state, Phase.WAITING),
        state,
        node.metadata.get(SUBMISSION, "") if node else "",
        node.labels.get(JOB_LABEL, "") if node else "",
        resource,
    )


def pauses(first: float) -> Iterator[float]:
    """Seconds to wait, twice as long each time up to half a minute."""
    while True:
        yield first
        first = min(2 * first, _LONGEST_PAUSE_SECONDS)


def _make_client() -> Any:
    import google.cloud.tpu_v2 as tpu_v2

    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        return tpu_v2.TpuClient()
    import grpc
    from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

    return tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=grpc.insecure_channel(endpoint)))


def _retry() -> Any:
    """Repeats a call while the service is away; Google's client by itself repeats none of these."""
    from google.api_core import exceptions
    from google.api_core.retry import Retry, if_exception_type

    return Retry(
        if_exception_type(
            exceptions.ServiceUnavailable,
            exceptions.DeadlineExceeded,
            exceptions.InternalServerError,
        ),
        initial=_FIRST_PAUSE_SECONDS,
        maximum=_LONGEST_PAUSE_SECONDS,
        timeout=_RETRY_SECONDS,
    )


def _wait_for(operation: Any, seconds: float) -> None:
    """Waits for a long-running operation; one that takes longer is seen by what it changes.

    Raises:
      GoogleAPICallError: that the operation ended with.
    """
    from google.api_core.future.polling import DEFAULT_POLLING

    polling = DEFAULT_POLLING.with_delay(
        initial=_FIRST_PAUSE_SECONDS, maximum=_LONGEST_PAUSE_SECONDS
    )
    with contextlib.suppress(TimeoutError):
        operation.result(timeout=seconds, retry=_retry(), polling=polling)
