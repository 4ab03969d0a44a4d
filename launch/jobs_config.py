"""What `multihot jobs` is told: a frozen dataclass for each of its commands."""

from dataclasses import dataclass
from typing import Any

from launch.job import bucket_name, check_name
from launch.launch_config import check, check_project, check_region, check_zone
from trainer.config import check_choices, option
from trainer.errors import UserError


@dataclass(frozen=True)
class JobsListConfig:
    """`multihot jobs list`: the jobs that `submit` has made and their states."""

    project: str = option("", "Google Cloud project.", required=True)
    zone: str | None = option(None, "Zone whose Cloud TPU slices are listed.")
    region: str | None = option(None, "Region whose Vertex AI jobs are listed.")
    bucket: str | None = option(
        None, "Bucket whose folder multihot/ is listed too: it knows slices that are gone."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        _check_places(self, need=("zone", "region", "bucket"))


@dataclass(frozen=True)
class JobsStatusConfig:
    """`multihot jobs status`: what a job and each of its machines is doing."""

    project: str = option("", "Google Cloud project.", required=True)
    name: str = option("", "Name of the job.", required=True)
    zone: str | None = option(None, "Zone of its Cloud TPU slice.")
    region: str | None = option(None, "Region of its Vertex AI machines.")
    bucket: str | None = option(None, "Its bucket; needed where its slice is gone.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_name(self.name)
        _check_places(self, need=("zone", "region", "bucket"))


@dataclass(frozen=True)
class JobsLogsConfig:
    """`multihot jobs logs`: what a machine of a job has printed."""

    project: str | None = option(None, "Google Cloud project, where --bucket is not given.")
    name: str = option("", "Name of the job.", required=True)
    zone: str | None = option(None, "Zone of its Cloud TPU slice, where --bucket is not given.")
    region: str | None = option(None, "Region of its machines, where --bucket is not given.")
    bucket: str | None = option(None, "Its bucket.")
    host: int = option(0, "Which of its machines, from 0.")
    follow: bool = option(False, "Go on until that machine has ended.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_name(self.name)
        if self.bucket is None and self.project is None:
            raise UserError("--bucket is required, or --project with --zone or --region")
        _check_places(self, need=("bucket", "zone", "region"))
        check(self.host >= 0, "host", self.host, "0 or more")


@dataclass(frozen=True)
class JobsCancelConfig:
    """`multihot jobs cancel`: ends a job, or all of them, and what was created for it."""

    project: str = option("", "Google Cloud project.", required=True)
    name: str | None = option(None, "Name of the job.")
    all: bool = option(False, "End every job that `submit` has made there, whoever made it.")
    zone: str | None = option(None, "Zone whose Cloud TPU slices are deleted.")
    region: str | None = option(None, "Region whose Vertex AI jobs are ended.")

    def __post_init__(self) -> None:
        check_choices(self)
        if (self.name is None) != self.all:
            raise UserError("expected either --name=NAME or --all")
        if self.name is not None:
            check_name(self.name)
        _check_places(self, need=("zone", "region"))


def _check_places(config: Any, need: tuple[str, ...]) -> None:
    """Checks where jobs are looked for, and that at least one place is given."""
    if config.project is not None:
        check_project(config.project)
    if config.zone is not None:
        check_zone(config.zone)
    if config.region is not None:
        check_region(config.region)
    if getattr(config, "bucket", None) is not None:
        bucket_name(config.bucket)
    if not any(getattr(config, name) for name in need):
        raise UserError(f"expected one or more of {', '.join(f'--{name}' for name in need)}")
