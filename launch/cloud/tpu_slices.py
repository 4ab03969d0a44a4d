"""Queued resources of Cloud TPU: the requests that create them; creating, finding, deleting them.

Every call is repeated while the service is away. If the answer to a creation is lost, the repeated
request finds its own resource by the submission in the resource's metadata. MULTIHOT_TPU_ENDPOINT
names another server, called without encryption and without credentials.
"""

import contextlib
import dataclasses
import datetime
import enum
import importlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.accelerators import TpuSlice
from launch.cloud import calls
from launch.cloud.calls import Place, explain_status, explained
from launch.job import FOLDER, JOB_LABEL, Job, labels_of
from launch.launch_config import SubmitTpuConfig, parse_labels
from trainer.errors import RunAgain, UserError

API = "tpu.googleapis.com"
ENDPOINT_VARIABLE = "MULTIHOT_TPU_ENDPOINT"
# Keys of a slice's metadata.
SUBMISSION, BUCKET = "multihot-submission", "multihot-bucket"
_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
# Compute Engine's limit on a value.
_VALUE_BYTES = 256 << 10
_RETRY_SECONDS = 300.0
_CREATE_SECONDS = 600.0
_DELETE_SECONDS = 900.0


def resource_name(config: SubmitTpuConfig, name: str) -> str:
    """Full name of a job's queued resource."""
    return f"{calls.parent(config.project, config.zone)}/queuedResources/{name}"


def make_create_request(
    config: SubmitTpuConfig,
    slice_of_chips: TpuSlice,
    job: Job,
    attempt: int = 0,
    seconds_left: int | None = None,
) -> Any:
    """The CreateQueuedResourceRequest of a job, whose slice was taken away `attempt` times before.

    `seconds_left` are those of the job's `max_seconds`; default: all of them. The message is of the
    API's version that `version_of` names.
    """
    messages = _messages(version_of(config))
    parent = calls.parent(config.project, config.zone)
    node = _make_node(config, slice_of_chips, job)
    node.metadata = make_metadata(job, attempt, seconds_left)
    if config.python_url:
        node.metadata["multihot-python-url"] = config.python_url
    wait = datetime.timedelta(hours=config.max_wait_hours)
    resource = messages.QueuedResource(
        tpu={"node_spec": [{"parent": parent, "node_id": job.name, "node": node}]},
        queueing_policy={"valid_until_duration": wait},
    )
    if config.provisioning == "spot":
        resource.spot = messages.QueuedResource.Spot()
    if config.provisioning == "reserved":
        resource.guaranteed = messages.QueuedResource.Guaranteed(reserved=True)
    if config.reservation:
        prefix = "" if "/" in config.reservation else f"{parent}/reservations/"
        resource.reservation_name = prefix + config.reservation
    return messages.CreateQueuedResourceRequest(
        parent=parent,
        queued_resource_id=job.name,
        queued_resource=resource,
        # By which the service recognises a request that is repeated.
        request_id=str(uuid.uuid4()),
    )


def version_of(config: SubmitTpuConfig) -> str:
    """The version of the API that creates a slice: `v2`, whose messages know no reserved tier."""
    return "v2alpha1" if config.provisioning == "reserved" else "v2"


def _messages(version: str) -> Any:
    """The messages and the client of a version of the API."""
    return importlib.import_module(f"google.cloud.tpu_{version}")


def _make_node(config: SubmitTpuConfig, slice_of_chips: TpuSlice, job: Job) -> Any:
    messages = _messages(version_of(config))
    account = messages.ServiceAccount(scope=list(_SCOPES))
    if config.service_account:
        account.email = config.service_account
    return messages.Node(
        description=f"Multihot job {job.name}",
        accelerator_type=slice_of_chips.name,
        runtime_version=config.runtime_version or slice_of_chips.runtime_image,
        network_config=messages.NetworkConfig(
            network=config.network or "",
            subnetwork=config.subnetwork or "",
            enable_external_ips=config.external_ips,
        ),
        service_account=account,
        scheduling_config=messages.SchedulingConfig(
            spot=config.provisioning == "spot", reserved=config.provisioning == "reserved"
        ),
        labels=parse_labels(config.labels) | labels_of(job.group),
    )


def make_metadata(job: Job, attempt: int, seconds_left: int | None = None) -> dict[str, str]:
    """The metadata of a slice's hosts, which startup.sh reads.

    What its watchdog needs has keys of its own, because Bash cannot parse the record's JSON. Raises
    UserError for commands that are longer than a value of the metadata may be.
    """
    folder = Path(__file__).parents[1] / "machine"
    record = json.dumps(dataclasses.asdict(job), sort_keys=True)
    if len(record.encode()) > _VALUE_BYTES:
        raise UserError(
            f"the commands behind `--` have {len(record.encode())} bytes, more than the "
            f"{_VALUE_BYTES} that a slice can be given; name folders or globs instead of files"
        )
    return {
        "startup-script": (folder / "startup.sh").read_text(encoding="utf-8"),
        "multihot-bootstrap": (folder / "bootstrap.py").read_text(encoding="utf-8"),
        "multihot-job": record,
        "multihot-resource": job.resource,
        "multihot-max-seconds": str(job.max_seconds if seconds_left is None else seconds_left),
        "multihot-attempt": str(attempt),
        BUCKET: job.bucket,
        "multihot-folder": f"{FOLDER}/{job.name}",
        SUBMISSION: job.submission,
    }


class Phase(enum.Enum):
    """How far a queued resource has come."""

    ABSENT = "does not exist"
    WAITING = "waits for resources"
    CREATING = "is being created"
    ACTIVE = "is active"
    TAKEN_AWAY = "was taken away"
    FAILED = "has failed"
    DELETING = "is being deleted"


_PHASES = {
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


@dataclass(frozen=True)
class ResourceState:
    """A queued resource as it is now.

    `state` is Google's name of its state, `job` the job's name as the user gave it, and `resource`
    Google's message. `submission` and `job` are "" if Multihot did not create it.
    """

    phase: Phase
    state: str = ""
    submission: str = ""
    job: str = ""
    resource: Any = None


class QueuedResources:
    """The queued resources of a project and zone.

    All methods raise UserError if the service refuses a call, and RunAgain if it does not answer.
    """

    def __init__(
        self,
        project: str,
        zone: str,
        service_account: str | None = None,
        others: Sequence[str] = (),
    ) -> None:
        """`others` are other zones that have such slices, for error messages."""
        self._parent = calls.parent(project, zone)
        self._project, self._zone = project, zone
        self._service_account = service_account
        self._others = others
        with explained(self.place("Cloud TPU")):
            self._client = self._connect("v2")

    @staticmethod
    def _connect(version: str) -> Any:
        return calls.make_client(_messages(version).TpuClient, ENDPOINT_VARIABLE)

    def place(self, name: str) -> Place:
        """What error messages about the queued resource of a name say."""
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
            find_images=f"gcloud compute tpus tpu-vm versions list {of_zone}",
            others=self._others,
        )

    def create(self, request: Any) -> None:
        """Requests a queued resource, and waits until the service has accepted the request.

        UserError also if another submission's resource has that name.
        """
        from google.api_core.exceptions import AlreadyExists

        name = request.queued_resource_id
        with explained(self.place(name)):
            try:
                # A version's client takes its own messages only.
                version = type(request).__module__.split(".")[2].removeprefix("tpu_")
                client = self._client if version == "v2" else self._connect(version)
                operation = client.create_queued_resource(request=request, **_options())
                _wait_for(operation, _CREATE_SECONDS)
            except AlreadyExists:
                # This submission's own resource, if the first answer was lost.
                wanted = request.queued_resource.tpu.node_spec[0].node.metadata[SUBMISSION]
                found = self.find(name)
                if found.submission != wanted or found.phase is Phase.DELETING:
                    raise

    def find(self, name: str) -> ResourceState:
        """The queued resource of that name, as it is now."""
        from google.api_core.exceptions import NotFound

        with explained(self.place(name)):
            try:
                resource = self._client.get_queued_resource(
                    name=f"{self._parent}/queuedResources/{name}", **_options()
                )
            except NotFound:
                return ResourceState(Phase.ABSENT)
            found = describe(resource)
            # The node's state shows a preemption earlier than that of the queued resource.
            if found.phase is Phase.ACTIVE and self._is_node_lost(name):
                return dataclasses.replace(found, phase=Phase.TAKEN_AWAY)
            return found

    def _is_node_lost(self, name: str) -> bool:
        from google.api_core.exceptions import NotFound
        from google.cloud.tpu_v2 import Node

        lost = (Node.State.PREEMPTED, Node.State.TERMINATED, Node.State.STOPPED)
        with contextlib.suppress(NotFound):
            node = self._client.get_node(name=f"{self._parent}/nodes/{name}", **_options())
            return node.state in lost
        return False

    def list_ours(self) -> Iterator[Any]:
        """The queued resources whose labels mark them as Multihot's."""
        with explained(self.place("the queued resources")):
            pages = self._client.list_queued_resources(parent=self._parent, **_options())
            for resource in pages:
                if describe(resource).job:
                    yield resource

    def failure(self, name: str, found: ResourceState) -> UserError | RunAgain:
        """Why a queued resource has failed, for the user."""
        error = found.resource.state.failed_data.error
        return explain_status(error.code, error.message, self.place(name))

    def delete(self, name: str) -> None:
        """Deletes a queued resource and its node, and waits until both are gone.

        The service may refuse this for a while for a resource that is still being created. The
        request is then repeated. RunAgain also if the resource is still there at the deadline.
        """
        from google.api_core import exceptions

        request = {"name": f"{self._parent}/queuedResources/{name}", "force": True}
        deadline = time.monotonic() + _DELETE_SECONDS
        with explained(self.place(name)):
            for pause in calls.pauses():
                try:
                    operation = self._client.delete_queued_resource(request=request, **_options())
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
                time.sleep(pause)


def describe(resource: Any) -> ResourceState:
    """The state of a queued resource, from Google's message."""
    from google.cloud.tpu_v2 import QueuedResourceState

    state = QueuedResourceState.State(resource.state.state).name
    node = resource.tpu.node_spec[0].node if resource.tpu.node_spec else None
    return ResourceState(
        _PHASES.get(state, Phase.WAITING),
        state,
        node.metadata.get(SUBMISSION, "") if node else "",
        node.labels.get(JOB_LABEL, "") if node else "",
        resource,
    )


def _options() -> dict[str, Any]:
    """Arguments of every call: how long one attempt may take, and how long it is repeated."""
    return {"retry": calls.retry(_RETRY_SECONDS), "timeout": calls.CALL_SECONDS}


def _wait_for(operation: Any, seconds: float) -> None:
    """Waits for an operation. A timeout is no error: the caller looks at the resource itself."""
    from google.api_core.future.polling import DEFAULT_POLLING

    polling = DEFAULT_POLLING.with_delay(
        initial=calls.FIRST_PAUSE_SECONDS, maximum=calls.MAX_PAUSE_SECONDS
    )
    with contextlib.suppress(TimeoutError):
        operation.result(timeout=seconds, retry=calls.retry(_RETRY_SECONDS), polling=polling)
