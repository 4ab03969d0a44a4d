"""What the commands that use Google Cloud are told: a frozen dataclass each, as in trainer/config.

Imports nothing heavy: `multihot --help` stands on this file too.
"""

import re
from dataclasses import dataclass
from typing import Any

from launch.job import bucket_name, check_name
from trainer.config import check_choices, option
from trainer.errors import UserError

PROVISIONING = ("on_demand", "spot", "reserved")
VERTEX_PROVISIONING = ("on_demand", "spot", "flex_start")


def check(condition: bool, flag: str, found: Any, expected: str) -> None:
    """Raises a UserError that names a flag, what it was and what was expected."""
    if not condition:
        raise UserError(f"--{flag}={found}: expected {expected}")


def check_project(project: str) -> None:
    """Checks a project's id; its number does as well."""
    check(
        re.fullmatch(r"([a-z][-a-z0-9.:]{4,60}[a-z0-9]|\d{6,20})", project) is not None,
        "project",
        project,
        "a project's id, as `gcloud projects list` shows it",
    )


def check_zone(zone: str) -> None:
    """Checks that a zone looks like one."""
    check(
        re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone) is not None,
        "zone",
        zone,
        "a zone such as us-central1-a",
    )


def check_region(region: str) -> None:
    """Checks that a region looks like one."""
    check(
        re.fullmatch(r"[a-z]+-[a-z]+\d+", region) is not None,
        "region",
        region,
        "a region such as us-central1",
    )


@dataclass(frozen=True)
class SubmitTpuConfig:
    """`multihot submit tpu`: commands on a Cloud TPU slice that is created and deleted for them."""

    project: str = option("", "Google Cloud project that pays.", required=True)
    zone: str = option("", "Zone of the slice, such as us-central1-a.", required=True)
    bucket: str = option(
        "", "Bucket of the zone's region for package, logs and state.", required=True
    )
    accelerator: str = option(
        "", "Slice: a type or topology such as v5litepod-4 or v5e:2x2.", required=True
    )
    name: str = option("", "Name of the job, and of what is created for it.", required=True)
    provisioning: str = option(
        "on_demand",
        "How the slice is paid for: on_demand; spot, cheaper and taken away at any time; or "
        "reserved, from a reservation of yours.",
        choices=PROVISIONING,
    )
    reservation: str | None = option(
        None, "Reservation to take the slice from; default: any that fits."
    )
    runtime_version: str | None = option(
        None, "Image of the slice's hosts; default: the one of the table of accelerators."
    )
    service_account: str | None = option(
        None, "Account that the slice runs as; default: the project's Compute Engine account."
    )
    network: str | None = option(None, "Network of the slice; default: the project's default.")
    subnetwork: str | None = option(None, "Subnetwork of the slice.")
    external_ips: bool = option(
        True,
        "Whether hosts have external addresses; without, the network needs Cloud NAT, as hosts "
        "install packages.",
    )
    labels: tuple[str, ...] = option(
        (), "Further labels as KEY=VALUE, comma-separated, for instance for billing."
    )
    num_slices: int = option(
        1, "Slices, each of which scores its share; for `score` alone, which shares by parts."
    )
    max_hours: float = option(
        24.0, "Hours after which the slice deletes itself, whatever happens; restarts included."
    )
    max_restarts: int = option(
        3, "Times to create the slice again, and resume, after it was taken away."
    )
    wait: bool = option(
        True, "Wait for the end, and create the slice again if it is taken away meanwhile."
    )
    no_wait: bool = option(False, "Return once the slice is asked for; the same as --nowait.")
    follow: bool = option(False, "While waiting, print what the job prints.")
    dry_run: bool = option(
        False, "Print every request as it would be sent, and send nothing; needs no credentials."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_project(self.project)
        check_zone(self.zone)
        check_name(self.name)
        bucket_name(self.bucket)
        for flag in ("service_account", "network", "subnetwork", "reservation", "runtime_version"):
            value = getattr(self, flag)
            check(
                value is None or re.fullmatch(r"[\w.@:/-]+", value) is not None,
                flag,
                value,
                "letters, digits and - _ . @ : /",
            )
        check(
            self.reservation is None or self.provisioning == "reserved",
            "reservation",
            self.reservation,
            "--provisioning=reserved beside it",
        )
        check(1 <= self.num_slices <= 100, "num_slices", self.num_slices, "1 to 100 slices")
        check(0 < self.max_hours <= 720, "max_hours", self.max_hours, "above 0 and at most 720")
        check(0 <= self.max_restarts <= 1000, "max_restarts", self.max_restarts, "0 to 1000")
        check(self.waits or not self.follow, "follow", "true", "no --no_wait: following is waiting")
        parse_labels(self.labels)

    @property
    def waits(self) -> bool:
        """Whether the command stays until the job's end."""
        return self.wait and not self.no_wait


@dataclass(frozen=True)
class SubmitVertexConfig:
    """`multihot submit vertex`: commands on machines of Vertex AI: GPUs, a v5e host, or CPUs."""

    project: str = option("", "Google Cloud project that pays.", required=True)
    region: str = option("", "Region of the machines, such as us-central1.", required=True)
    bucket: str = option("", "Bucket of that region for package, logs and state.", required=True)
    accelerator: str = option(
        "",
        "A machine's GPUs, KIND or KIND:NUMBER of t4, v100, l4, a100, a100-80gb and h100; its TPU "
        "chips, v5e:1x1, v5e:2x2 or v5e:2x4; or none, cpu:NUMBER of virtual CPUs.",
        required=True,
    )
    name: str = option("", "Name of the job.", required=True)
    num_machines: int = option(
        1, "Machines that share the work: one is the chief, the others its workers."
    )
    provisioning: str = option(
        "on_demand",
        "How the machines are paid for: on_demand; spot, cheaper and taken away at any time; or "
        "flex_start, which waits until all of them are free.",
        choices=VERTEX_PROVISIONING,
    )
    container_image: str = option(
        "python:3.11-slim",
        "Image of the machines' container, from Docker Hub or Artifact Registry: any with Python "
        "3.11 to 3.13; Multihot and its locked dependencies are installed into it at the start.",
    )
    boot_disk_gb: int = option(100, "Disk of each machine in GB.")
    service_account: str | None = option(
        None, "Account that the job runs as; default: Vertex AI's own for custom code."
    )
    network: str | None = option(
        None,
        "Network that the machines are peered with: projects/NUMBER/global/networks/NAME; "
        "default: none.",
    )
    labels: tuple[str, ...] = option(
        (), "Further labels as KEY=VALUE, comma-separated, for instance for billing."
    )
    max_hours: float = option(24.0, "Hours after which Vertex AI ends the job, whatever happens.")
    max_restarts: int = option(
        3, "Times to run a command again, which resumes, after a machine was lost."
    )
    wait: bool = option(True, "Wait for the end.")
    no_wait: bool = option(False, "Return once the job is made; the same as --nowait.")
    follow: bool = option(False, "While waiting, print what the job prints.")
    dry_run: bool = option(
        False, "Print every request as it would be sent, and send nothing; needs no credentials."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_project(self.project)
        check_region(self.region)
        check_name(self.name)
        bucket_name(self.bucket)
        for flag in ("service_account", "network", "container_image"):
            value = getattr(self, flag)
            check(
                value is None or re.fullmatch(r"[\w.@:/-]+", value) is not None,
                flag,
                value,
                "letters, digits and - _ . @ : /",
            )
        check(
            self.network is None
            or re.fullmatch(r"projects/\d+/global/networks/[-a-z0-9]+", self.network) is not None,
            "network",
            self.network,
            "projects/NUMBER/global/networks/NAME, with the project's number as `gcloud projects "
            "describe` shows it",
        )
        check(1 <= self.num_machines <= 1000, "num_machines", self.num_machines, "1 to 1000")
        check(self.boot_disk_gb >= 100, "boot_disk_gb", self.boot_disk_gb, "100 or more")
        check(0 < self.max_hours <= 720, "max_hours", self.max_hours, "above 0 and at most 720")
        check(0 <= self.max_restarts <= 1000, "max_restarts", self.max_restarts, "0 to 1000")
        check(self.waits or not self.follow, "follow", "true", "no --no_wait: following is waiting")
        parse_labels(self.labels)

    @property
    def waits(self) -> bool:
        """Whether the command stays until the job's end."""
        return self.wait and not self.no_wait


@dataclass(frozen=True)
class SubmitDataflowConfig:
    """`multihot submit dataflow`: `score` of a corpus by many workers of Dataflow."""

    project: str = option("", "Google Cloud project that pays.", required=True)
    region: str = option("", "Region of the workers, such as us-central1.", required=True)
    bucket: str = option(
        "", "Bucket of that region for the package and Beam's temporary files.", required=True
    )
    name: str = option("", "Name of the job.", required=True)
    max_workers: int = option(10, "Most machines that Dataflow may take at once.")
    machine_type: str = option("n1-standard-4", "Compute Engine's type of the machines.")
    sdk_container_image: str | None = option(
        None,
        "Image of Beam's SDK with multihot[cpu,beam] installed; default: Beam's own, into which "
        "each worker installs Multihot and its locked dependencies when it starts.",
    )
    service_account: str | None = option(
        None, "Account that the workers run as; default: the project's Compute Engine account."
    )
    subnetwork: str | None = option(
        None, "Subnetwork of the workers: regions/REGION/subnetworks/NAME; default: Dataflow's."
    )
    external_ips: bool = option(
        True, "Whether workers have external addresses; without, they need Cloud NAT to install."
    )
    labels: tuple[str, ...] = option(
        (), "Further labels as KEY=VALUE, comma-separated, for instance for billing."
    )
    dry_run: bool = option(
        False, "Print what would be run and how, and touch nothing; needs no credentials."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_project(self.project)
        check_region(self.region)
        check_name(self.name)
        bucket_name(self.bucket)
        check(1 <= self.max_workers <= 4000, "max_workers", self.max_workers, "1 to 4000")
        check(
            re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", self.machine_type) is not None,
            "machine_type",
            self.machine_type,
            "a machine type such as n1-standard-4",
        )
        for flag in ("service_account", "subnetwork", "sdk_container_image"):
            value = getattr(self, flag)
            check(
                value is None or re.fullmatch(r"[\w.@:/-]+", value) is not None,
                flag,
                value,
                "letters, digits and - _ . @ : /",
            )
        parse_labels(self.labels)


def parse_labels(labels: tuple[str, ...]) -> dict[str, str]:
    """`--labels` as a dictionary.

    Raises:
      UserError: for what Google Cloud would not take, and for names that mark our own.
    """
    parsed = {}
    for item in labels:
        key, _, value = item.partition("=")
        valid = re.fullmatch(r"[a-z][-a-z0-9_]{0,62}", key) and re.fullmatch(
            r"[-a-z0-9_]{0,63}", value
        )
        check(
            valid is not None and not key.startswith("multihot"),
            "labels",
            item,
            "KEY=VALUE of at most 63 lower-case letters, digits, - and _, and no key that begins "
            "with multihot",
        )
        parsed[key] = value
    return parsed
