"""`multihot jobs` over both services and the bucket: Google's own clients against local fakes."""

import json
import time
from types import SimpleNamespace

import fake_vertex
import grpc
import pytest
import submitting
from fake_grpc import Fault
from fake_vertex import FakeVertex

from launch import jobs
from launch.cloud import vertex_jobs
from launch.job import Job
from launch.machine.reports import Ending, State

TRAIN = ["--", "train", "--data_dir=gs://my-bucket/d", "--model_dir=gs://my-bucket/m"]
WHERE = ["--project=my-project", "--zone=us-central1-a", "--region=us-central1"]
NAMED = [*WHERE, "--name=first"]


@pytest.fixture
def cloud(cloud, monkeypatch):
    cloud.buckets["my-bucket"] = {}
    cloud.locations["my-bucket"] = "US-CENTRAL1"
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    return cloud


@pytest.fixture
def vertex(tpu, monkeypatch):
    fake = FakeVertex(states=("RUNNING",) * 1000)
    with fake_vertex.serve(fake) as address:
        monkeypatch.setenv(vertex_jobs.ENDPOINT_VARIABLE, address)
        yield fake


def run(*arguments):
    return submitting.run(list(arguments))


def submit(kind, name="first", **flags):
    """Submits a job without waiting for it."""
    own = {"tpu": ["--zone=us-central1-a", "--accelerator=v5e"]}
    own["vertex"] = ["--region=us-central1", "--accelerator=l4:2"]
    more = [f"--{flag}={value}" for flag, value in flags.items()]
    common = ["--project=my-project", "--bucket=my-bucket", f"--name={name}", "--no_wait"]
    assert run("submit", kind, *common, *own[kind], *more, *TRAIN) == 0


def read_record(cloud, name="first"):
    return Job.from_json(cloud.buckets["my-bucket"][f"multihot/{name}/job.json"].data)


def report(cloud, job, host=0, line="", exit_code=None, logs=()):
    """Writes what a machine reports to the bucket."""
    place = f"multihot/{job.name}"
    state = State(job.submission, 0, host, "running train (1 of 1)", line, time.time())
    cloud.put("my-bucket", f"{place}/state/host-{host}.json", json.dumps(vars(state)).encode())
    for index, text in enumerate(logs):
        name = f"{place}/logs/host-{host}/{job.submission}-000-17-{index:06d}.log"
        cloud.put("my-bucket", name, text.encode())
    if exit_code is not None:
        ending = json.dumps(vars(Ending(job.submission, 0, host, exit_code, line)))
        cloud.put("my-bucket", f"{place}/exit_code/host-{host}", ending.encode())


def test_the_list_has_slices_and_custom_jobs_and_what_only_the_bucket_knows(
    cloud, tpu, vertex, capsys
):
    submit("tpu", "slice")
    submit("vertex", "machines", num_machines=3)
    gone = read_record(cloud, "slice")
    gone = Job(**{**vars(gone), "name": "gone", "group": "gone"})
    cloud.put("my-bucket", "multihot/gone/job.json", gone.to_json().encode())
    report(cloud, gone, exit_code=0)
    cloud.put("my-bucket", "multihot/other/job.json", b'{"of": "another version"}')
    cloud.put("my-bucket", "multihot/gone/deeper/job.json", gone.to_json().encode())
    capsys.readouterr()
    assert run("jobs", "list", *WHERE, "--bucket=gs://my-bucket") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "WHERE", "ACCELERATOR", "STATE", "CREATED"]
    cells = {line.split()[0]: [part.strip() for part in line.split("  ") if part] for line in lines}
    assert sorted(cells) == ["gone", "machines", "slice"]
    assert cells["slice"][1:3] == ["Cloud TPU, us-central1-a", "v5litepod-4"]
    assert cells["machines"][1:4] == ["Vertex AI, us-central1", "3 x g2-standard-24", "running"]
    assert cells["gone"][1:4] == ["gs://my-bucket/multihot/gone", "v5e", "succeeded"]


def test_only_the_services_that_are_asked_for_are_asked(cloud, tpu, vertex, capsys):
    assert run("jobs", "list", "--project=my-project", "--zone=us-central1-a") == 0
    assert vertex.requests == [] and tpu.requests == ["ListQueuedResources"]
    assert run("jobs", "list", "--project=my-project", "--region=us-central1") == 0
    assert vertex.requests == ["ListCustomJobs"] and len(tpu.requests) == 1
    assert capsys.readouterr().out == "no jobs of Multihot there\n" * 2


def test_status_says_what_each_machine_does_or_how_it_ended(cloud, tpu, vertex, capsys):
    submit("vertex", num_machines=3)
    vertex.on_get = lambda job: None
    job = read_record(cloud)
    report(cloud, job, 0, "step 70 of 100, loss 0.12")
    report(cloud, job, 2, "no space left", exit_code=2)
    capsys.readouterr()
    assert run("jobs", "status", *NAMED) == 0
    said = capsys.readouterr().out
    assert "first: running in Vertex AI, us-central1, on 3 x g2-standard-24, since 20" in said
    assert "first: train --data_dir=gs://my-bucket/d --model_dir=gs://my-bucket/m\n" in said
    assert "  host 0: running train (1 of 1): step 70 of 100, loss 0.12\n" in said
    assert "  host 2: ended with exit code 2: no space left\n" in said


def test_a_slice_that_is_gone_is_known_by_its_bucket(cloud, tpu, vertex, capsys):
    submit("tpu")
    report(
        cloud, read_record(cloud), 0, "model folder of step 42", exit_code=0, logs=["a\n", "b\n"]
    )
    tpu.remove("projects/my-project/locations/us-central1-a/queuedResources/first")
    capsys.readouterr()
    assert run("jobs", "status", *NAMED) == 2
    assert "--name=first: no such job in --zone=us-central1-a" in capsys.readouterr().err
    assert run("jobs", "status", *NAMED, "--bucket=my-bucket") == 0
    assert "host 0: ended with exit code 0: model folder of step 42" in capsys.readouterr().out
    assert run("jobs", "logs", "--bucket=my-bucket", "--name=first") == 0
    assert capsys.readouterr().out == "a\nb\n"
    assert run("jobs", "logs", "--bucket=my-bucket", "--name=second") == 2
    assert "gs://my-bucket/multihot/second/job.json: not found" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tpu", "vertex"])
def test_logs_find_the_bucket_by_themselves_and_follow_to_the_end(
    cloud, tpu, vertex, capsys, monkeypatch, kind
):
    submit(kind)
    job = read_record(cloud)
    report(cloud, job, 1, logs=["one\n"])
    steps = iter([lambda: report(cloud, job, 1, logs=["one\n", "two\n"], exit_code=0)])
    # Not `time.sleep` itself: Google's clients sleep too where an answer is late.
    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=lambda _: next(steps)()))
    capsys.readouterr()
    place = "--zone=us-central1-a" if kind == "tpu" else "--region=us-central1"
    flags = ["--project=my-project", place, "--name=first", "--host=1", "--follow"]
    assert run("jobs", "logs", *flags) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_cancel_ends_what_has_the_name_and_nothing_else(cloud, tpu, vertex, capsys):
    submit("tpu")
    submit("tpu", "other")
    submit("vertex")
    submit("vertex", "another")
    capsys.readouterr()
    assert run("jobs", "cancel", *NAMED) == 0
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == [
        "first: ended in Cloud TPU, us-central1-a",
        "first: ended in Vertex AI, us-central1",
    ]
    assert [name.rpartition("/")[2] for name in tpu.resources] == ["other"]
    states = {job.display_name: job.state.name for job in vertex.jobs.values()}
    assert states == {"first": "JOB_STATE_CANCELLING", "another": "JOB_STATE_RUNNING"}


def test_cancel_all_leaves_nothing_running_and_may_be_repeated(cloud, tpu, vertex, capsys):
    submit("tpu")
    for name in ("a", "b", "c"):
        submit("vertex", name)
    assert run("jobs", "cancel", *WHERE, "--all") == 0
    client = vertex_jobs.make_client("us-central1")
    states = {vertex_jobs.get(client, name).state.name for name in vertex.jobs}
    assert not tpu.resources and states == {"JOB_STATE_CANCELLING"}
    capsys.readouterr()
    assert run("jobs", "cancel", *WHERE, "--all") == 0
    assert capsys.readouterr().out == "nothing to end; nothing is left running\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--project=my-project"], "expected one or more of --zone, --region, --bucket"),
        (["cancel", *WHERE], "expected either --name=NAME or --all"),
        (["cancel", *NAMED, "--all"], "expected either --name=NAME or --all"),
        (["cancel", *NAMED], "--name=first: no such job in --zone=us-central1-a --region=us-"),
        (["logs", "--name=first"], "--bucket is required, or --project with --zone or --region"),
        (["status", *NAMED, "--bucket=b c"], "--bucket=b c: expected the name of a bucket"),
    ],
)
def test_what_is_wrong_is_one_line(cloud, tpu, vertex, capsys, arguments, message):
    assert run("jobs", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_service_that_refuses_says_what_mends_it(cloud, vertex, capsys):
    refusal = "Vertex AI API has not been used in project my-project before or it is disabled."
    vertex.plan = lambda method: Fault(grpc.StatusCode.PERMISSION_DENIED, refusal)
    assert run("jobs", "list", "--project=my-project", "--region=us-central1") == 2
    error = capsys.readouterr().err
    assert "gcloud services enable aiplatform.googleapis.com --project=my-project" in error
