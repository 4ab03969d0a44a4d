"""The settings of `submit` and `jobs`, without heavy imports: `multihot --help` reads this file."""

import re
from dataclasses import dataclass
from typing import ClassVar

from launch.job import bucket_name, check_name
from trainer.errors import UserError
from trainer.flags import CheckedConfig, changed_option, check_flag, option

_PROJECT = {
    # An id, or the number that a project has beside it.
    "pattern": r"[a-z][-a-z0-9.:]{4,60}[a-z0-9]|\d{6,20}",
    "expected": "a project's id, as `gcloud projects list` shows it",
}
_ZONE = {"pattern": r"[a-z]+-[a-z]+\d+-[a-z]", "expected": "a zone such as us-central1-a"}
_REGION = {"pattern": r"[a-z]+-[a-z]+\d+", "expected": "a region such as us-central1"}
_RESOURCE = {"pattern": r"[\w.@:/-]+", "expected": "letters, digits and - _ . @ : /"}


def parse_labels(labels: tuple[str, ...]) -> dict[str, str]:
    """`--labels` as a dict; UserError for what Google Cloud does not take, and for our own keys."""
    expected = (
        "KEY=VALUE of at most 63 lower-case letters, digits, - and _, and no key that begins with "
        "multihot"
    )
    for item in labels:
        valid = re.fullmatch(r"(?!multihot)[a-z][-a-z0-9_]{0,62}(=[-a-z0-9_]{0,63})?", item)
        check_flag(valid is not None, "labels", item, expected)
    return {key: value for key, _, value in (item.partition("=") for item in labels)}


@dataclass(frozen=True)
class SubmitConfig(CheckedConfig):
    """The flags that all `submit` commands share."""

    project: str = option("", "Google Cloud project that pays.", required=True, **_PROJECT)
    bucket: str = option(
        "",
        "Bucket of the same region for package, logs and state.",
        required=True,
        check=bucket_name,
    )
    name: str = option(
        "", "Name of the job, and of what is created for it.", required=True, check=check_name
    )
    service_account: str | None = option(
        None,
        "Account that the machines run as; default: the project's Compute Engine account.",
        **_RESOURCE,
    )
    labels: tuple[str, ...] = option(
        (),
        "Further labels as KEY=VALUE, comma-separated, for instance for billing.",
        check=parse_labels,
    )
    dry_run: bool = option(
        False, "Print what would be sent or run, and do nothing else; needs no credentials."
    )


@dataclass(frozen=True)
class WaitingSubmitConfig(SubmitConfig):
    """The flags of the `submit` commands that can wait for the job's end."""

    max_hours: float = option(
        24.0,
        "Hours after which the slice or the job is ended, whatever happens; restarts included.",
        above=0,
        at_most=720,
        expected="above 0 and at most 720",
    )
    max_restarts: int = option(
        3,
        "Times to run a command again, which resumes, after a machine was lost.",
        at_least=0,
        at_most=1000,
    )
    check_rights: bool = option(
        True,
        "Look for rights that are missing before anything is created, yours and those of the "
        "account of the machines.",
    )
    wait: bool = option(True, "Wait for the end.")
    no_wait: bool = option(False, "Return once the job is asked for; the same as --nowait.")
    follow: bool = option(False, "While waiting, print what the job prints.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(
            self.waits or not self.follow, "follow", "true", "no --no_wait: following is waiting"
        )

    @property
    def waits(self) -> bool:
        """Whether the command stays until the job's end."""
        return self.wait and not self.no_wait


@dataclass(frozen=True)
class SubmitTpuConfig(WaitingSubmitConfig):
    """`multihot submit tpu`: commands on a Cloud TPU slice that is created and deleted for them."""

    zone: str = option("", "Zone of the slice, such as us-central1-a.", required=True, **_ZONE)
    accelerator: str = option(
        "", "Slice: a type or topology such as v5litepod-4 or v5e:2x2.", required=True
    )
    provisioning: str = option(
        "on_demand",
        "How the slice is paid for: on_demand; spot, cheaper and taken away at any time; or "
        "reserved, from a reservation of yours.",
        choices=("on_demand", "spot", "reserved"),
    )
    reservation: str | None = option(
        None, "Reservation to take the slice from; default: any that fits.", **_RESOURCE
    )
    runtime_version: str | None = option(
        None,
        "Image of the slice's hosts; default: the one of the table of accelerators.",
        **_RESOURCE,
    )
    python_url: str | None = option(
        None,
        "Archive of Python 3.11 to 3.13 that the slice's hosts use: gs:// or https://, ending in "
        "#sha256=HEX if it is to be checked; default: the image's own, or one from GitHub.",
        pattern=r"(gs|https)://[^\s#]+(#sha256=[0-9a-f]{64})?",
        expected="gs://BUCKET/FILE or https://…, with #sha256= and 64 hexadecimal digits or "
        "without",
    )
    network: str | None = option(
        None, "Network of the slice; default: the project's default.", **_RESOURCE
    )
    subnetwork: str | None = option(None, "Subnetwork of the slice.", **_RESOURCE)
    external_ips: bool = option(
        True,
        "Whether hosts have external addresses; without, the network needs Cloud NAT, as hosts "
        "install packages.",
    )
    num_slices: int = option(
        1,
        "Slices, each of which scores its share; for `score` alone, which shares by parts.",
        at_least=1,
        at_most=100,
        unit="slices",
    )
    allow_experimental: bool = option(
        False,
        "Take a slice of several hosts: nobody has shown that TensorFlow runs there, and Google's "
        "own tests of it leave such slices out.",
    )
    # A slice bills while it exists, also one that can neither be seen nor delete itself.
    max_hours: float = changed_option(WaitingSubmitConfig, "max_hours", 3.0)
    max_wait_hours: float = option(
        24.0,
        "Hours after which a request that no slice is free for is given up.",
        above=0,
        at_most=720,
        expected="above 0 and at most 720",
    )
    max_restarts: int = changed_option(
        WaitingSubmitConfig,
        "max_restarts",
        help="Times to create the slice again, and resume, after it was taken away.",
    )
    wait: bool = changed_option(
        WaitingSubmitConfig,
        "wait",
        help="Wait for the end, and create the slice again if it is taken away meanwhile.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.reservation is None or self.provisioning == "reserved"
        self.expect(fits, "reservation", "--provisioning=reserved beside it")


@dataclass(frozen=True)
class SubmitVertexConfig(WaitingSubmitConfig):
    """`multihot submit vertex`: commands on machines of Vertex AI: GPUs, a v5e host, or CPUs."""

    region: str = option(
        "", "Region of the machines, such as us-central1.", required=True, **_REGION
    )
    accelerator: str = option(
        "",
        "A machine's GPUs, KIND or KIND:NUMBER of t4, v100, l4, a100, a100-80gb and h100; its TPU "
        "chips, v5e:1x1, v5e:2x2 or v5e:2x4; or none, cpu:NUMBER of virtual CPUs.",
        required=True,
    )
    num_machines: int = option(
        1,
        "Machines that share the work: one is the chief, the others its workers.",
        at_least=1,
        at_most=1000,
    )
    provisioning: str = option(
        "on_demand",
        "How the machines are paid for: on_demand; spot, cheaper and taken away at any time; or "
        "flex_start, which waits until all of them are free.",
        choices=("on_demand", "spot", "flex_start"),
    )
    container_image: str = option(
        "python:3.11-slim",
        "Image of the machines' container, from Docker Hub or Artifact Registry: any with Python "
        "3.11 to 3.13; Multihot and its locked dependencies are installed into it at the start.",
        **_RESOURCE,
    )
    boot_disk_gb: int = option(
        100, "Disk of each machine in GB.", at_least=100, expected="100 or more"
    )
    service_account: str | None = changed_option(
        SubmitConfig,
        "service_account",
        help="Account that the job runs as; default: Vertex AI's own for custom code.",
    )
    network: str | None = option(
        None,
        "Network that the machines are peered with: projects/NUMBER/global/networks/NAME; "
        "default: none.",
        pattern=r"projects/\d+/global/networks/[-a-z0-9]+",
        expected="projects/NUMBER/global/networks/NAME, with the project's number as `gcloud "
        "projects describe` shows it",
    )


@dataclass(frozen=True)
class SubmitDataflowConfig(SubmitConfig):
    """`multihot submit dataflow`: `score` of a corpus by many workers of Dataflow."""

    region: str = option(
        "", "Region of the workers, such as us-central1.", required=True, **_REGION
    )
    bucket: str = changed_option(
        SubmitConfig,
        "bucket",
        help="Bucket of that region for the package and Beam's temporary files.",
    )
    max_workers: int = option(
        10, "Most machines that Dataflow may take at once.", at_least=1, at_most=4000
    )
    machine_type: str = option(
        "n1-standard-4",
        "Compute Engine's type of the machines.",
        pattern=r"[a-z0-9]+(-[a-z0-9]+)+",
        expected="a machine type such as n1-standard-4",
    )
    sdk_container_image: str | None = option(
        None,
        "Image of Beam's SDK with multihot[cpu,beam] installed; default: Beam's own, into which "
        "each worker installs Multihot and its locked dependencies when it starts.",
        **_RESOURCE,
    )
    subnetwork: str | None = option(
        None,
        "Subnetwork of the workers: regions/REGION/subnetworks/NAME; default: Dataflow's.",
        **_RESOURCE,
    )
    external_ips: bool = option(
        True, "Whether workers have external addresses; without, they need Cloud NAT to install."
    )


@dataclass(frozen=True)
class SubmitCheckConfig(CheckedConfig):
    """`multihot submit check`: what a project lacks for a job, with the commands that mend it."""

    project: str = changed_option(SubmitConfig, "project")
    bucket: str = changed_option(
        SubmitConfig, "bucket", help="Bucket for package, logs and state, and for data and model."
    )
    accelerator: str = option(
        "v5e:2x2", "Slice as of `submit tpu`, or else a machine as of `submit vertex`."
    )
    zone: str | None = option(None, "Zone of the slice, such as us-central1-a.", **_ZONE)
    region: str | None = option(
        None, "Region of the machines of Vertex AI; default: that of --zone.", **_REGION
    )
    provisioning: str = option(
        "on_demand",
        "How it would be paid for, which decides the quota: on_demand; spot and flex_start, which "
        "share one; or reserved.",
        choices=("on_demand", "spot", "flex_start", "reserved"),
    )
    service_account: str | None = changed_option(SubmitConfig, "service_account")
    network: str | None = changed_option(SubmitTpuConfig, "network")
    runtime_version: str | None = changed_option(SubmitTpuConfig, "runtime_version")


@dataclass(frozen=True)
class JobsConfig(CheckedConfig):
    """Where a `jobs` command looks for jobs: at least one of `PLACES` has to be given."""

    PLACES: ClassVar[tuple[str, ...]] = ("zone", "region", "bucket")

    project: str | None = option(None, "Google Cloud project.", **_PROJECT)
    zone: str | None = option(None, "Zone of Cloud TPU slices.", **_ZONE)
    region: str | None = option(None, "Region of Vertex AI jobs.", **_REGION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in self.PLACES):
            raise UserError(f"expected one or more of {', '.join(f'--{n}' for n in self.PLACES)}")


@dataclass(frozen=True)
class JobsListConfig(JobsConfig):
    """`multihot jobs list`: the jobs that `submit` has made and their states."""

    project: str = changed_option(JobsConfig, "project", "", required=True)
    bucket: str | None = option(
        None,
        "Bucket whose folder multihot/ is listed too: it knows slices that are gone.",
        check=bucket_name,
    )


@dataclass(frozen=True)
class JobsStatusConfig(JobsConfig):
    """`multihot jobs status`: what a job and each of its machines is doing."""

    project: str = changed_option(JobsConfig, "project", "", required=True)
    name: str = option("", "Name of the job.", required=True, check=check_name)
    bucket: str | None = option(
        None, "Its bucket; needed where its slice is gone.", check=bucket_name
    )


@dataclass(frozen=True)
class JobsLogsConfig(JobsConfig):
    """`multihot jobs logs`: what a machine of a job has printed."""

    PLACES = ("bucket", "zone", "region")

    project: str | None = changed_option(
        JobsConfig, "project", help="Google Cloud project, where --bucket is not given."
    )
    name: str = option("", "Name of the job.", required=True, check=check_name)
    bucket: str | None = option(
        None,
        "Its bucket; without it, --project with --zone or --region finds the job.",
        check=bucket_name,
    )
    host: int = option(0, "Which of its machines, from 0.", at_least=0)
    follow: bool = option(False, "Go on until that machine has ended.")

    def __post_init__(self) -> None:
        if self.bucket is None and self.project is None:
            raise UserError("--bucket is required, or --project with --zone or --region")
        super().__post_init__()


@dataclass(frozen=True)
class JobsCancelConfig(JobsConfig):
    """`multihot jobs cancel`: ends a job, or all of them, and what was created for it."""

    PLACES = ("zone", "region")

    project: str = changed_option(JobsConfig, "project", "", required=True)
    name: str | None = option(None, "Name of the job.", check=check_name)
    all: bool = option(False, "End every job that `submit` has made there, whoever made it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.name is None) != self.all:
            raise UserError("expected either --name=NAME or --all")
