"""`submit dataflow`: Beam's own runner against a local fake that accepts jobs and runs nothing."""

import json
import re
import signal
import subprocess
import sys

import fake_dataflow
import pytest
from fake_dataflow import FakeDataflow

from launch import submit_dataflow
from launch.cloud import package
from launch.launch_config import SubmitDataflowConfig
from trainer.errors import UserError

SCORE = (
    "score",
    "--model=gs://my-bucket/model",
    "--input=gs://my-bucket/corpus/a.jsonl",
    "--output_dir=gs://my-bucket/scores",
)
FLAGS = {
    "project": "my-project",
    "region": "europe-west4",
    "bucket": "my-bucket",
    "name": "my-scores",
}


@pytest.fixture
def storage(cloud, model, monkeypatch):
    """A bucket with a model and a corpus of three rows."""
    cloud.buckets = {"my-bucket": {}}
    cloud.put_folder("my-bucket", "model", model)
    rows = [json.dumps({"id": str(number), "text": f"row {number}"}) for number in range(3)]
    cloud.put("my-bucket", "corpus/a.jsonl", "\n".join(rows).encode())
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    return cloud


@pytest.fixture
def dataflow(monkeypatch):
    fake = FakeDataflow()
    with fake_dataflow.serve(fake) as address:
        monkeypatch.setenv(submit_dataflow.ENDPOINT_VARIABLE, address)
        yield fake


def test_the_job_brings_our_package_and_the_locks(storage, dataflow):
    dataflow.state = "JOB_STATE_FAILED"  # The fake runs nothing.
    config = SubmitDataflowConfig(
        **FLAGS,
        max_workers=7,
        labels=("team=search",),
        service_account="scorer@my-project.iam.gserviceaccount.com",
        external_ips=False,
    )
    with pytest.raises(UserError, match=r"--runner=DataflowRunner: the job ended as FAILED"):
        submit_dataflow.run(config, SCORE)
    (job,) = dataflow.jobs
    assert (job["name"], job["region"]) == ("my-scores", "europe-west4")
    assert job["labels"] == {
        "multihot-job": "my-scores",
        "multihot-version": "0-1-0",
        "team": "search",
    }
    environment = job["environment"]
    assert environment["serviceAccountEmail"] == "scorer@my-project.iam.gserviceaccount.com"
    (pool,) = environment["workerPools"]
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 7
    assert pool["machineType"] == "n1-standard-4"
    # One process a machine: each would hold a model of its own.
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    assert pool["ipConfiguration"] == 2  # WORKER_IP_PRIVATE
    staged = {
        name.rpartition("/")[2]: stored.data
        for name, stored in storage.buckets["my-bucket"].items()
        if name.startswith("multihot/my-scores/staging/")
    }
    assert staged["requirements.txt"] == package.read_requirements("beam")
    name, wheel = package.build_wheel()
    assert staged[name] == wheel and staged["extra_packages.txt"].decode().split() == [name]
    # Planned, and nothing pretended to be done.
    scores = [name for name in storage.buckets["my-bucket"] if name.startswith("scores/")]
    assert not any("part-" in name or "_SUCCESS" in name for name in scores) and scores


def test_an_image_of_ones_own_needs_nothing_installed():
    config = SubmitDataflowConfig(**FLAGS, sdk_container_image="eu-docker.pkg.dev/p/r/i:1")
    options = submit_dataflow.beam_options(config, "the.whl", "beam.txt")
    assert "--sdk_container_image=eu-docker.pkg.dev/p/r/i:1" in options
    assert not any("the.whl" in option or "beam.txt" in option for option in options)


@pytest.mark.long
def test_a_refusal_is_one_line_with_what_mends_it(storage, dataflow):
    message = "Dataflow API has not been used in project my-project before or it is disabled."
    dataflow.refusal = (403, message)
    with pytest.raises(UserError) as error:
        submit_dataflow.run(SubmitDataflowConfig(**FLAGS), SCORE)
    assert "gcloud services enable dataflow.googleapis.com --project=my-project" in str(error.value)
    assert not dataflow.jobs


def test_an_interruption_cancels_the_job(storage, dataflow):
    dataflow.state = "JOB_STATE_RUNNING"
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "submit", "dataflow", *flags, "--", *SCORE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What runs in a shell's background ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    interruptions = iter((signal.SIGINT,))
    dataflow.on_get = lambda: [process.send_signal(number) for number in interruptions]
    said, errors = process.communicate()
    assert process.returncode == 130, errors
    assert said.endswith("DataflowRunner: interrupted; cancelling the job\n")
    assert errors.endswith("multihot submit dataflow: error: interrupted\n")
    assert dataflow.cancelled == ["my-scores"]


def test_a_dry_run_opens_no_connection(monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    submit_dataflow.run(SubmitDataflowConfig(**FLAGS, dry_run=True), SCORE)
    request = json.loads(capsys.readouterr().out)
    assert request["command"] == list(SCORE)
    options = dict(
        option.removeprefix("--").split("=", 1) for option in reversed(request["beam_options"])
    )
    assert options["temp_location"] == "gs://my-bucket/multihot/my-scores/temp"
    assert options["extra_package"].endswith(".whl") and options["requirements_cache"] == "skip"


def test_nobody_signed_in_is_said(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(UserError, match="sign in: gcloud auth application-default login"):
        submit_dataflow.run(SubmitDataflowConfig(**FLAGS), SCORE)


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        (
            ("prepare", "--input=gs://b/a.jsonl", "--data_dir=gs://b/data"),
            "-- prepare: Dataflow runs `score` alone; submit the others with `multihot submit "
            "vertex --accelerator=cpu`",
        ),
        ((*SCORE, "--", *SCORE), "Dataflow runs `score` alone"),
        ((*SCORE, "--runner=DirectRunner"), "expected no --runner, --beam_options"),
        ((*SCORE, "--worker_index=0", "--num_workers=2"), "expected no --runner, --beam_options"),
    ],
)
def test_what_dataflow_does_not_run(commands, message):
    with pytest.raises(UserError, match=re.escape(message)):
        submit_dataflow.run(SubmitDataflowConfig(**FLAGS, dry_run=True), commands)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "europe"}, "--region=europe: expected a region"),
        ({"max_workers": 0}, "--max_workers=0: expected 1 to 4000"),
        ({"machine_type": "big"}, "--machine_type=big: expected a machine type"),
    ],
)
def test_flags_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        SubmitDataflowConfig(**FLAGS | changes)
