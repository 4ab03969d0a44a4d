"""What the commands that use Google Cloud are told: a frozen dataclass each, as in trainer/config.

Imports nothing heavy: `multihot --help` stands on this file too.

What `multihot jobs` is told: a frozen dataclass for each of its commands.

What `preflight` is told: a frozen dataclass, as in trainer/config. Imports nothing heavy.
"""

import re
from dataclasses import dataclass
from typing import Any

from launch.job import bucket_name, check_name
from trainer.config import HEADS, WINDOW_POOLINGS, LossConfig, OptimizerConfig, parse_row_groups
from trainer.errors import UserError
from trainer.flags import check_choices, option

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


STEPS = ("train", "score")
# BERT-base's vocabulary; and what is assumed of documents that are not there.
_VOCAB_SIZE, _NUM_LABELS, _MAX_SEQ_LENGTH, _MEAN_LENGTH = 30522, 100, 512, 128.0
_NUM_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class PreflightConfig:
    """`multihot preflight`: will the steps fit a TPU slice, and how fast; no TPU needed."""

    target: str = option(
        "", "TPU slice: v5e:2x2, v5e:4x4, v5p:2x2x1, v6e:2x2, …; a kind alone is one host.",
        required=True,
    )  # fmt: skip
    data_dir: str | None = option(
        None,
        "Folder that `multihot prepare` wrote, for labels, lengths and numbers of documents. "
        "Default: these are assumed, by the next five flags.",
    )
    num_labels: int | None = option(None, f"Labels, without --data_dir; default: {_NUM_LABELS}.")
    vocab_size: int | None = option(
        None,
        "WordPieces of an encoder from scratch, without --data_dir; default: "
        f"{_VOCAB_SIZE}, BERT-base's.",
    )
    max_seq_length: int | None = option(
        None, f"Longest window in tokens, without --data_dir; default: {_MAX_SEQ_LENGTH}."
    )
    mean_length: float | None = option(
        None,
        "Tokens of a document on average, without --data_dir; lengths are taken to be log-normal "
        f"about it. Default: {_MEAN_LENGTH:g}, or a quarter of --max_seq_length.",
    )
    num_documents: int | None = option(
        None,
        "Documents of the corpus, to train on and to score, without --data_dir; default: "
        f"{_NUM_DOCUMENTS}.",
    )
    init_checkpoint: str | None = option(
        None, "Folder or hub id of a pretrained BERT; default: the sizes below."
    )
    hidden_size: int = option(768, "Width of an encoder from scratch.")
    num_layers: int = option(12, "Layers of an encoder from scratch.")
    num_attention_heads: int = option(12, "Attention heads of an encoder from scratch.")
    intermediate_size: int = option(3072, "Feed-forward width of an encoder from scratch.")
    hidden_dropout: float = option(0.1, "Dropout rate of hidden states.")
    attention_dropout: float = option(0.1, "Dropout rate of attention probabilities.")
    head: str = option("cls", "What stands for a document, as `train` has it.", choices=HEADS)
    window_pooling: str = option(
        "max", "How windows become a document, as `train` has it.", choices=WINDOW_POOLINGS
    )
    precision: str = option(
        "auto", "auto: bfloat16.", choices=("auto", "float32", "mixed_bfloat16")
    )
    tokens_per_replica: int = option(4096, "Tokens of a micro-batch in training, padding included.")
    row_groups: str | None = option(
        None, "Rows of a micro-batch as ROWSxLENGTH,...; default: from the lengths."
    )
    gradient_accumulation: int = option(1, "Micro-batches a replica takes before an update.")
    num_train_epochs: float = option(3.0, "Passes over the training documents.")
    tokens_per_batch: int = option(8192, "Tokens of a micro-batch in scoring, padding included.")
    objective: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: tuple[str, ...] = option(STEPS, "Steps to compile: train, score, or both.")
    find_batch: bool = option(
        False, "Looks for the largest --tokens_per_replica that fits, by a few compilations more."
    )
    price_per_chip_hour: float | None = option(
        None, "Price of a chip for an hour, in any currency, to say what the corpus costs."
    )
    full_depth: bool = option(
        False,
        "Compiles all layers, which takes many minutes; default: two and three layers, from "
        "which memory and time are extended.",
    )
    least_effort: bool = option(
        False,
        "Compiles in about half the time; the program takes more memory and time than the one "
        "that a TPU would run.",
    )
    compiler: str | None = option(
        None,
        "Python of an environment with multihot[preflight] and without TensorFlow for TPUs; "
        "default: .venv-preflight, as `make compiler` makes it.",
    )
    costs: int = option(12, "Kinds of operations to list, those that take longest first.")
    output: str | None = option(None, "JSON file for all figures, local or gs://.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            "num_labels", "vocab_size", "max_seq_length", "mean_length", "num_documents",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            if self.data_dir is not None:
                raise UserError(f"--{name}={value}: --data_dir says that; leave one of them out")
            least = 8 if name == "max_seq_length" else 1
            _check(value >= least, name, value, f"at least {least}")
        for name in (
            "hidden_size", "num_layers", "num_attention_heads", "intermediate_size",
            "tokens_per_replica", "gradient_accumulation",
        ):  # fmt: skip
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of --num_attention_heads={self.num_attention_heads}",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "a rate in [0, 1)")
        self._check_rest()

    def _check_rest(self) -> None:
        _check(self.tokens_per_batch >= 8, "tokens_per_batch", self.tokens_per_batch, "8 or more")
        _check(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "more than 0")
        _check(
            bool(self.steps) and set(self.steps) <= set(STEPS),
            "steps",
            ",".join(self.steps),
            "train, score, or train,score",
        )
        price = self.price_per_chip_hour
        _check(price is None or price >= 0, "price_per_chip_hour", price, "0 or more")
        _check(self.costs >= 0, "costs", self.costs, "0 or more")
        if self.row_groups is not None:
            parse_row_groups(self.row_groups)
        if self.find_batch and self.row_groups is not None:
            raise UserError(
                f"--row_groups={self.row_groups}: --find_batch chooses the rows; leave one of them "
                "out"
            )
        if self.find_batch and "train" not in self.steps:
            raise UserError("--find_batch: looks at the train step; add train to --steps")

    def assumed(self) -> tuple[int, int, float, int]:
        """Labels, longest window, mean length and documents where there is no --data_dir."""
        longest = self.max_seq_length or _MAX_SEQ_LENGTH
        mean = self.mean_length or min(_MEAN_LENGTH, longest / 4)
        return (
            self.num_labels or _NUM_LABELS, longest, mean, self.num_documents or _NUM_DOCUMENTS,
        )  # fmt: skip

    def assumed_vocab_size(self) -> int:
        """WordPieces where there is no --data_dir; a checkpoint has its own number."""
        return self.vocab_size or (1 if self.init_checkpoint else _VOCAB_SIZE)


def _check(condition: bool, flag: str, found: object, expected: str) -> None:
    if not condition:
        raise UserError(f"--{flag}={found}: expected {expected}")
