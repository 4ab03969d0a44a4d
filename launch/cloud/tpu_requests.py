"""The requests that create a job's queued resources, made without sending anything."""

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

from launch.accelerators import TpuSlice
from launch.job import FOLDER, Job
from launch.launch_config import SubmitTpuConfig, parse_labels
from trainer.errors import UserError

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
