"""`multihot submit check`: what is missing in a project before a job is paid for, in one table.

Nothing is created and nothing is changed. A service that may not be asked gives a line of its own.
"""

from launch import accelerators
from launch.accelerators import VertexMachine, find_slice, find_vertex_machine
from launch.cloud import tpu_slices, vertex_jobs
from launch.cloud.calls import explained
from launch.cloud.findings import Finding, State, place_of
from launch.cloud.follow import look_at_bucket, print_table, region_of
from launch.cloud.permissions import IAM, PROJECTS, STORAGE
from launch.cloud.project import Project, Zone
from launch.cloud.rest import Rest
from launch.cloud.rights import OF_CUSTOM_JOBS, OF_SLICES, Needs, Rights
from launch.job import bucket_name
from launch.launch_config import SubmitCheckConfig
from trainer.errors import NotChecked, RunAgain, UserError

_COMPUTE = "compute.googleapis.com"
_NETWORK = "default"
_SPOT = ("spot", "flex_start")  # They share their quotas.


def run(config: SubmitCheckConfig) -> None:
    """Prints what a project has and lacks.

    Raises a UserError if something is missing or nobody is signed in, NotChecked if something could
    not be looked at.
    """
    place = place_of(PROJECTS, config.project, f"project {config.project}", "roles/browser")
    with explained(place):
        findings = _check_slice(config) if _is_slice(config) else _check_machine(config)
    rows = [(item.state.value, item.subject, item.line) for item in findings]
    print_table(("STATE", "WHAT", "FOUND"), rows)
    counts = {state: sum(item.state is state for item in findings) for state in State}
    missing, unknown = counts[State.MISSING], counts[State.UNKNOWN]
    if missing:
        more = f", {unknown} could not be checked" if unknown else ""
        raise UserError(f"{missing} of {len(findings)} are missing{more}; see the table")
    if unknown:
        raise NotChecked(f"{unknown} of {len(findings)} could not be checked; see the table")


def _is_slice(config: SubmitCheckConfig) -> bool:
    """Whether the accelerator is a slice of Cloud TPU rather than a machine of Vertex AI."""
    kind = config.accelerator.partition(":")[0].partition("-")[0]
    names = {item.name.partition("-")[0] for item in accelerators.tpu_slices()}
    return kind in names or kind in accelerators.tpu_kinds()


def _check_slice(config: SubmitCheckConfig) -> list[Finding]:
    if config.zone is None:
        raise UserError(f"--zone is required with --accelerator={config.accelerator}")
    found = find_slice(config.accelerator)
    resources = tpu_slices.QueuedResources(
        config.project, config.zone, config.service_account, found.kind.zones
    )
    zone = Zone(resources.place(f"zone {config.zone}"))
    rest = Rest()
    project = Project(rest, config.project)
    quota = found.spot_quota if config.provisioning in _SPOT else found.quota
    # Quotas count what the names of slices count: chips of v5e and v6e, cores of v4 and v5p.
    needed = int(found.name.rpartition("-")[2])
    findings = [
        *project.check_services((tpu_slices.API, _COMPUTE, STORAGE, PROJECTS, IAM)),
        *_check_rights(config, rest, OF_SLICES),
        _check_bucket(config, region_of(config.zone)),
        project.check_network(config.network or _NETWORK),
        zone.check_accelerator(found.name),
        zone.check_image(config.runtime_version or found.runtime_image),
    ]
    if config.provisioning != "reserved":  # A reservation is paid for, and has its own limit.
        findings.append(
            project.check_quota(
                tpu_slices.API,
                config.zone,
                needed,
                lambda item: item["quotaId"].startswith(f"{quota}PerProjectPer"),
            )
        )
    return findings


def _check_machine(config: SubmitCheckConfig) -> list[Finding]:
    region = config.region or (region_of(config.zone) if config.zone else None)
    if region is None:
        raise UserError(f"--region is required with --accelerator={config.accelerator}")
    machine = find_vertex_machine(config.accelerator)
    rest = Rest()
    project = Project(rest, config.project)
    metric = f"{vertex_jobs.API}/{_name_metric(config, machine)}"
    return [
        *project.check_services((vertex_jobs.API, _COMPUTE, STORAGE, PROJECTS, IAM)),
        *_check_rights(config, rest, OF_CUSTOM_JOBS),
        _check_bucket(config, region),
        project.check_quota(
            vertex_jobs.API,
            region,
            machine.accelerators or int(machine.name.partition(":")[2]),
            lambda item: item.get("metric") == metric,
        ),
    ]


def _name_metric(config: SubmitCheckConfig, machine: VertexMachine) -> str:
    """The name of Vertex AI's quota for a machine; flex_start uses up that of spot machines."""
    kind = machine.name.partition(":")[0].replace("-", "_")
    named = {"gpu": f"nvidia_{kind}_gpus", "tpu": f"tpu_{kind}", "cpu": "cpus"}
    prefix = "preemptible_" if config.provisioning in _SPOT else ""
    return f"custom_model_training_{prefix}{named[machine.environment]}"


def _check_rights(config: SubmitCheckConfig, rest: Rest, needs: Needs) -> list[Finding]:
    rights = Rights(rest, config.project, bucket_name(config.bucket), needs)
    findings = rights.check_caller()
    # Vertex AI's own account for custom code comes with rights that nobody has to grant.
    if needs is OF_SLICES or config.service_account:
        findings += rights.check_account(config.service_account)
    return findings


def _check_bucket(config: SubmitCheckConfig, region: str) -> Finding:
    try:
        return look_at_bucket(bucket_name(config.bucket), config.project, region)
    except (RunAgain, OSError) as error:
        return Finding(State.UNKNOWN, f"gs://{bucket_name(config.bucket)}", str(error))
