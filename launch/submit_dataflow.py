"""`multihot submit dataflow`: `score` as a Beam pipeline that Dataflow runs.

It is `multihot score --runner=DataflowRunner` with Beam's options filled in. Workers download the
project's wheel and the locked requirements from the bucket and install them when they start. An
interrupted run cancels its job; the same command then scores what is missing.
MULTIHOT_DATAFLOW_ENDPOINT names another server, called without credentials.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launch.cloud import package
from launch.cloud.calls import Place, explained
from launch.job import FOLDER, bucket_name, labels_of
from launch.launch_config import SubmitDataflowConfig, parse_labels
from launch.submit import parse_commands
from trainer.config import LOCAL_RUNNER, ScoreConfig
from trainer.errors import UserError
from trainer.flags import parse_flags

_RUNNER = "DataflowRunner"
_ENVIRONMENT = "beam"
# Dataflow would start a process for each virtual CPU, each with its own copy of the model. With a
# BERT-base a process takes 1.7 GB (measured; TensorFlow and Beam alone 0.7 GB). With a BERT-large,
# whose weights have 1 GB more in two copies, four do not fit into the 15 GB of an n1-standard-4.
# TensorFlow uses all CPUs from one process.
_ONE_PROCESS = "no_use_multiple_sdk_containers"
ENDPOINT_VARIABLE = "MULTIHOT_DATAFLOW_ENDPOINT"


def run(config: SubmitDataflowConfig, arguments: Sequence[str]) -> None:
    """Scores a corpus with Dataflow; `arguments` is what follows `--`: `score` and its flags.

    Raises UserError for what the user can correct, and RunAgain if a service does not answer.
    """
    score_config = _parse_score(arguments)
    if config.dry_run:
        wheel, _ = package.build_wheel()
        options = beam_options(config, wheel, f"{_ENVIRONMENT}.txt")
        request = {"runner": _RUNNER, "beam_options": options, "command": list(arguments)}
        print(json.dumps(request, indent=2))
        return
    from trainer import score

    with _write_package() as (wheel, requirements), explained(place_of(config)):
        options = beam_options(config, wheel, requirements) + _find_server()
        score.run(replace(score_config, runner=_RUNNER, beam_options=tuple(options)))


def _find_server() -> list[str]:
    """Options that name the server and the credentials."""
    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    if endpoint:
        return [f"--dataflow_endpoint={endpoint}", "--no_auth"]
    import google.auth

    # Fails if nobody is signed in. Beam would call the service anonymously, and be refused.
    google.auth.default()
    return []


def _parse_score(arguments: Sequence[str]) -> ScoreConfig:
    (name, *flags), *more = parse_commands(arguments)
    if name != "score" or more:
        raise UserError(
            f"-- {name}: Dataflow runs `score` alone; submit the others with `multihot submit "
            "vertex --accelerator=cpu`, where one machine prepares at full speed"
        )
    config = parse_flags(ScoreConfig, flags)
    if config.runner != LOCAL_RUNNER or config.num_workers is not None:
        raise UserError(
            "-- score: expected no --runner, --beam_options or --num_workers, which `submit "
            "dataflow` decides"
        )
    return config


def beam_options(config: SubmitDataflowConfig, wheel: str, requirements: str) -> list[str]:
    """Beam's options for a job; the workers install the local files `wheel` and `requirements`."""
    folder = f"gs://{bucket_name(config.bucket)}/{FOLDER}/{config.name}"
    options = [
        f"--project={config.project}",
        f"--region={config.region}",
        f"--job_name={config.name}",
        f"--temp_location={folder}/temp",
        f"--staging_location={folder}/staging",
        f"--max_num_workers={config.max_workers}",
        f"--worker_machine_type={config.machine_type}",
        f"--experiments={_ONE_PROCESS}",
    ]
    labels = labels_of(config.name) | parse_labels(config.labels)
    options += [f"--labels={key}={value}" for key, value in labels.items()]
    if config.sdk_container_image:
        options.append(f"--sdk_container_image={config.sdk_container_image}")
    else:
        # Workers download the locked packages themselves. With a cache, Beam would download all of
        # them to this machine and upload them to the bucket first.
        options += [
            f"--extra_package={wheel}",
            f"--requirements_file={requirements}",
            "--requirements_cache=skip",
        ]
    if config.service_account:
        options.append(f"--service_account_email={config.service_account}")
    if config.subnetwork:
        options.append(f"--subnetwork={config.subnetwork}")
    if not config.external_ips:
        options.append("--no_use_public_ips")
    return options


def place_of(config: SubmitDataflowConfig) -> Place:
    """What error messages about the Dataflow job say."""
    where = f"--project={config.project} --region={config.region}"
    return Place(
        api="dataflow.googleapis.com",
        project=config.project,
        location=config.region,
        what=f"the Dataflow job {config.name}",
        role="roles/dataflow.developer",
        service_account=config.service_account,
        find_locations=f"gcloud compute machine-types list --project={config.project} "
        f"--filter=name={config.machine_type}",
        remove=f"gcloud dataflow jobs list {where} --status=active, then gcloud dataflow jobs "
        f"cancel ID {where}",
    )


@contextmanager
def _write_package() -> Iterator[tuple[str, str]]:
    """Local paths of the wheel and the requirements, which exist while the job is started."""
    with tempfile.TemporaryDirectory() as folder:
        built = package.build(_ENVIRONMENT)
        paths = []
        for item in (built.wheel, built.requirements):
            path = Path(folder, Path(item.name).name)
            path.write_bytes(built.contents[item.name])
            paths.append(str(path))
        yield paths[0], paths[1]
