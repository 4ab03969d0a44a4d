"""`submit vertex` with Google's clients against local fakes of Vertex AI and Cloud Storage."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import fake_vertex
import grpc
import pytest
from fake_grpc import LOST, Fault, faults
from fake_vertex import FakeVertex

from launch import submit, submit_vertex
from launch.cloud import calls, vertex_jobs
from launch.job import Job
from launch.launch_config import SubmitVertexConfig
from launch.machine.reports import Ending, State
from trainer.errors import RunAgain, UserError

TRAIN = ("train", "--data_dir=gs://my-bucket/data", "--model_dir=gs://my-bucket/run")
FLAGS = {
    "project": "my-project",
    "region": "europe-west4",
    "bucket": "my-bucket",
    "accelerator": "l4",
    "name": "my-job",
}


def make_config(**changes):
    return SubmitVertexConfig(**FLAGS | changes)


@pytest.fixture
def storage(cloud):
    """A bucket in europe-west4, and one elsewhere."""
    cloud.buckets = {"my-bucket": {}, "far-bucket": {}}
    cloud.locations = {"my-bucket": "EUROPE-WEST4", "far-bucket": "US-EAST1"}
    return cloud


@pytest.fixture
def vertex(monkeypatch, project):
    """Vertex AI, whose jobs reach their next state each time that they are read."""
    vertex = FakeVertex()
    for name in ("FIRST_PAUSE_SECONDS", "MAX_PAUSE_SECONDS"):
        monkeypatch.setattr(calls, name, 0.01)
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.01)
    with fake_vertex.serve(vertex) as address:
        monkeypatch.setenv(vertex_jobs.ENDPOINT_VARIABLE, address)
        yield vertex


def read_job(storage):
    return Job.from_json(storage.buckets["my-bucket"]["multihot/my-job/job.json"].data)


def put(storage, name, record):
    """What the chief writes to the job's folder."""
    storage.put("my-bucket", f"multihot/my-job/{name}", json.dumps(vars(record)).encode())


def test_from_the_command_to_the_end_of_the_job(storage, vertex, capsys):
    submit_vertex.run(make_config(num_machines=3), TRAIN)
    (request,) = vertex.created
    job = read_job(storage)
    assert job.commands == (TRAIN,) and job.environment == "gpu" and job.resource == ""
    for item in (job.wheel, job.requirements):
        stored = storage.buckets["my-bucket"][f"multihot/my-job/package/{item.name}"].data
        assert len(stored) == item.bytes > 10_000
    assert "tensorflow" in stored.decode() and "nvidia-cudnn" in stored.decode()
    sent = request.custom_job
    assert dict(sent.labels)["multihot-job"] == "my-job"
    assert dict(sent.labels)["multihot-submission"] == job.submission
    variables = {
        item.name: item.value for item in sent.job_spec.worker_pool_specs[0].container_spec.env
    }
    assert Job.from_json(variables["MULTIHOT_JOB"]) == job
    said = capsys.readouterr().out
    assert "projects/my-project/locations/europe-west4/customJobs/1000 is made" in said
    states = [line for line in said.splitlines() if line.startswith("my-job: ")][2:]
    assert states == [
        "my-job: queued",
        "my-job: pending",
        "my-job: running",
        "my-job: succeeded",
        "my-job: done; nothing is left running",
    ]


def test_missing_rights_are_said_before_anything_is_made(storage, vertex, project):
    """Those of an account are looked at if one is named; Vertex AI's own needs none granted."""
    account = "job@my-project.iam.gserviceaccount.com"
    project.accounts = {account: False}
    project.lacking = {account: {"storage.objects.create", "tpu.nodes.delete"}}
    with pytest.raises(UserError) as error:
        submit_vertex.run(make_config(service_account=account, no_wait=True), TRAIN)
    assert str(error.value) == (
        f"my-job: nothing was created. {account} lacks storage.objects.create in gs://my-bucket; "
        "grant it: gcloud storage buckets add-iam-policy-binding gs://my-bucket "
        f"--member=serviceAccount:{account} --role=roles/storage.objectAdmin"
    )
    project.lacking = {"owner@example.com": {"aiplatform.customJobs.create"}}
    with pytest.raises(UserError, match="--role=roles/aiplatform.user"):
        submit_vertex.run(make_config(), TRAIN)
    assert not vertex.created and storage.buckets["my-bucket"] == {}


def test_output_is_shown_as_it_comes(storage, vertex, capsys):
    def print_more(job):
        if job.state.name == "JOB_STATE_RUNNING":
            job = read_job(storage)
            for number in range(2):
                name = f"multihot/my-job/logs/host-0/{job.submission}-000-{number:04d}.log"
                storage.put("my-bucket", name, f"line {number}\n".encode())

    vertex.on_get = print_more
    submit_vertex.run(make_config(follow=True), TRAIN)
    said = capsys.readouterr().out
    assert said.index("my-job: pending\n") < said.index("line 0\n")
    assert said.count("line 0\nline 1\n") == 1


def test_what_the_chief_does_is_said(storage, vertex, capsys):
    def work(_):
        job = read_job(storage)
        state = State(job.submission, 0, 0, "running train (1 of 1)", "step 7", time.time())
        put(storage, "state/host-0.json", state)

    vertex.on_get = work
    submit_vertex.run(make_config(), TRAIN)
    assert "my-job: running train (1 of 1): step 7\n" in capsys.readouterr().out


def test_no_waiting_says_how_to_look_and_how_to_end_it(storage, vertex, capsys):
    submit_vertex.run(make_config(no_wait=True), TRAIN)
    assert "GetCustomJob" not in vertex.requests
    said = capsys.readouterr().out
    where = "--project=my-project --region=europe-west4 --name=my-job"
    assert f"multihot jobs status {where}" in said and f"multihot jobs cancel {where}" in said


def test_a_job_that_fails_says_with_what_and_where_to_look(storage, vertex):
    vertex.states = ("RUNNING", "FAILED")
    vertex.error = "The replica workerpool0-0 exited with a non-zero status of 2."

    def end(_):
        job = read_job(storage)
        ending = Ending(job.submission, 0, 0, 2, "multihot train: error: --data_dir: not there")
        put(storage, "exit_code/host-0", ending)

    vertex.on_get = end
    with pytest.raises(UserError) as error:
        submit_vertex.run(make_config(), TRAIN)
    for part in (
        "my-job: failed: The replica workerpool0-0 exited with a non-zero status of 2",
        "the chief ended with exit code 2: multihot train: error: --data_dir: not there",
        "multihot jobs logs --project=my-project --region=europe-west4 --bucket=my-bucket "
        "--name=my-job",
        "gcloud ai custom-jobs stream-logs projects/my-project/locations/europe-west4/customJobs/",
    ):
        assert part in str(error.value)


def test_a_job_that_was_stopped_may_be_run_again(storage, vertex):
    vertex.states = ("RUNNING", "FAILED")

    def end(_):
        job = read_job(storage)
        put(storage, "exit_code/host-0", Ending(job.submission, 0, 0, 75, "lost worker 2"))

    vertex.on_get = end
    with pytest.raises(RunAgain, match="exit code 75: lost worker 2; run the same command again"):
        submit_vertex.run(make_config(), TRAIN)


def test_a_job_that_is_out_of_sight_goes_on(storage, vertex, monkeypatch):
    monkeypatch.setattr(vertex_jobs, "_DEADLINE_SECONDS", 0.1)
    away = Fault(grpc.StatusCode.UNAVAILABLE, "the backend is away")
    vertex.plan = lambda method: away if method == "GetCustomJob" else None
    with pytest.raises(RunAgain, match="my-job: out of sight, but it goes on .*jobs status"):
        submit_vertex.run(make_config(), TRAIN)
    assert [job.state.name for job in vertex.jobs.values()] == ["JOB_STATE_QUEUED"]


@pytest.mark.parametrize(
    ("code", "answer", "messages"),
    [
        ("PERMISSION_DENIED", "Permission 'aiplatform.customJobs.create' denied on resource",
         ["permission denied", "--role=roles/aiplatform.user"]),
        ("PERMISSION_DENIED", "You do not have permission to act as service account x",
         ["--role=roles/iam.serviceAccountUser"]),
        ("PERMISSION_DENIED",
         "Vertex AI API has not been used in project my-project before or it is disabled.",
         ["gcloud services enable aiplatform.googleapis.com --project=my-project"]),
        ("RESOURCE_EXHAUSTED",
         "The following quota metrics exceed quota limits: "
         "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus",
         ["quota of my-project in europe-west4", "custom_model_training_nvidia_l4_gpus"]),
        ("INVALID_ARGUMENT", "Machine type g2-standard-12 is not supported in region",
         ["europe-west4 does not offer it", "gcloud compute accelerator-types list"]),
        ("NOT_FOUND", "The service account does not exist",
         ["gcloud iam service-accounts list --project=my-project"]),
        ("UNAUTHENTICATED", "bad token", ["gcloud auth application-default login"]),
    ],
)  # fmt: skip
def test_refusals_are_one_line_with_what_mends_them(storage, vertex, code, answer, messages):
    vertex.plan = faults("CreateCustomJob", Fault(getattr(grpc.StatusCode, code), answer))
    with pytest.raises(UserError) as error:
        submit_vertex.run(make_config(), TRAIN)
    line = str(error.value)
    assert all(message in line for message in messages), line
    assert "\n" not in line and not vertex.jobs


def test_a_region_that_is_none_is_named(storage, vertex):
    """gRPC's answer for a name that does not resolve."""
    answer = Fault(
        grpc.StatusCode.UNAVAILABLE,
        "errors resolving mars-north1-aiplatform.googleapis.com:443: [field:hostname lookup "
        "error:address lookup failed: Domain name not found]",
    )
    vertex.plan = lambda method: answer
    with pytest.raises(UserError, match="--region=mars-north1: Vertex AI has no server of that"):
        submit_vertex.run(make_config(), TRAIN)
    assert vertex.requests == ["ListCustomJobs"]


def test_nobody_signed_in_is_said(storage, monkeypatch, tmp_path):
    monkeypatch.delenv(vertex_jobs.ENDPOINT_VARIABLE, raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    for name, value in (("HOME", tmp_path), ("CLOUDSDK_CONFIG", tmp_path), ("NO_GCE_CHECK", True)):
        monkeypatch.setenv(name, str(value).lower() if value is True else str(value))
    with pytest.raises(UserError, match="sign in: gcloud auth application-default login"):
        submit_vertex.run(make_config(), TRAIN)


def test_an_answer_that_was_lost_makes_no_second_job(storage, vertex):
    lost = Fault(grpc.StatusCode.UNAVAILABLE, LOST)
    vertex.plan = faults("CreateCustomJob", Fault(grpc.StatusCode.UNAVAILABLE, "away"), lost)
    submit_vertex.run(make_config(), TRAIN)
    assert len(vertex.jobs) == 1 and vertex.requests.count("CreateCustomJob") == 2


def test_a_name_is_taken_until_its_job_has_ended(storage, vertex):
    vertex.states = ("RUNNING", "RUNNING")
    submit_vertex.run(make_config(no_wait=True), TRAIN)
    with pytest.raises(UserError, match=r"--name=my-job: .* not ended \(running\).*jobs cancel"):
        submit_vertex.run(make_config(), TRAIN)
    assert len(vertex.jobs) == 1
    client, (name,) = vertex_jobs.make_client("europe-west4"), vertex.jobs
    vertex_jobs.cancel(client, name)
    vertex_jobs.get(client, name)
    vertex.states = fake_vertex.HAPPY
    submit_vertex.run(make_config(), TRAIN)
    assert len(vertex.jobs) == 2


def test_of_two_submissions_at_one_moment_the_first_is_left(storage, vertex):
    """The other job appears after the name was found free."""
    create = vertex.create

    def create_after_another(request):
        other = type(request)(request)
        other.custom_job.labels["multihot-submission"] = "another"
        create(other)
        return create(request)

    vertex.create = create_after_another
    with pytest.raises(UserError, match="another submission has taken that name"):
        submit_vertex.run(make_config(), TRAIN)
    states = [job.state.name for job in vertex.jobs.values()]
    assert states == ["JOB_STATE_QUEUED", "JOB_STATE_CANCELLING"]
    assert "multihot/my-job/job.json" not in storage.buckets["my-bucket"]


@pytest.mark.parametrize(
    ("changes", "commands", "message"),
    [
        ({"bucket": "far-bucket"}, TRAIN, "lies in us-east1, but the job runs in europe-west4"),
        ({"bucket": "no-bucket"}, TRAIN, "there is no such bucket; create it: gcloud storage"),
        ({"accelerator": "h200"}, TRAIN, "--accelerator=h200: no such machine"),
        ({"accelerator": "h100:1"}, TRAIN, "expected --provisioning=spot or --provisioning=flex"),
        ({"accelerator": "t4", "provisioning": "flex_start"}, TRAIN,
         "--accelerator=t4:1: Vertex AI has no flex_start for it; expected one of l4, a100, "),
        ({"accelerator": "cpu:4", "provisioning": "flex_start"}, TRAIN, "no flex_start for it"),
        ({"accelerator": "l4", "provisioning": "flex_start", "max_hours": 169.0}, TRAIN,
         "--max_hours=169: expected at most 168 with --provisioning=flex_start"),
        ({"accelerator": "v5e", "num_machines": 2}, TRAIN,
         "--num_machines=2: expected 1 with TPUs"),
        ({"num_machines": 2}, ("report", TRAIN[2]), "--num_machines=2: expected 1, because none"),
        ({}, (), "expected a command behind `--`"),
        ({}, ("trian",), "did you mean train"),
        ({}, ("train", "--data_dir=data", TRAIN[2]), "lies on this machine"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_sent(storage, vertex, changes, commands, message):
    with pytest.raises(UserError, match=message):
        submit_vertex.run(make_config(**changes), commands)
    assert not vertex.created and not storage.buckets["my-bucket"]


def test_what_is_not_proven_warns(storage, vertex, capsys):
    submit_vertex.run(make_config(accelerator="v5e", no_wait=True), TRAIN)
    assert "warning: v5e on Vertex AI" in capsys.readouterr().err
    assert read_job(storage).environment == "tpu"


def test_an_interruption_while_the_answer_is_out_finds_the_job(storage, vertex, monkeypatch):
    """The job exists although its answer was lost; it is left running, or cancelled."""
    vertex.plan = faults("CreateCustomJob", Fault(grpc.StatusCode.UNAVAILABLE, LOST))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vertex_jobs.time, "sleep", interrupt)
    for answer, states in ((True, ["QUEUED"]), (False, ["QUEUED", "CANCELLING"])):
        vertex.plan = faults("CreateCustomJob", Fault(grpc.StatusCode.UNAVAILABLE, LOST))
        monkeypatch.setattr(submit, "ask_to_leave", lambda name, answer=answer: answer)
        name = "left" if answer else "ended"
        with pytest.raises(KeyboardInterrupt):
            submit_vertex.run(make_config(name=name), TRAIN)
        found = [job.state.name for job in vertex.jobs.values()]
        assert found == [f"JOB_STATE_{state}" for state in states]
        assert (f"multihot/{name}/job.json" in storage.buckets["my-bucket"]) is answer


def test_ctrl_c_asks_and_cancels_a_job_that_is_pending(storage, vertex):
    """The whole command in its own process, on a terminal."""
    vertex.states = ("PENDING",) * 1000
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "trainer.cli", "submit", "vertex", *flags, "--", *TRAIN]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What runs in a shell's background ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line == "my-job: pending\n":
                process.send_signal(signal.SIGINT)
                os.write(ours, b"c\n")
        process.wait(60)
    os.close(ours)
    os.close(theirs)
    text = "".join(said)
    assert "my-job: leave it running?" in text and "my-job: cancelled" in text
    assert process.returncode == 130
    (job,) = vertex.jobs.values()
    assert job.state.name == "JOB_STATE_CANCELLING"


def test_a_dry_run_prints_the_requests_and_touches_nothing(tmp_path):
    """Without credentials; any connection would go to a proxy that does not exist, and fail."""
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, "-m", "trainer.cli", "submit", "vertex", *flags, "--dry_run"]
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"HOME": str(tmp_path), "NO_GCE_CHECK": "true"}
    environment.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
    done = subprocess.run(
        [*command, "--", *TRAIN], env=environment, capture_output=True, text=True, check=True
    )
    requests = json.loads(done.stdout)
    assert [request["method"] for request in requests] == (
        ["Insert", "Insert", "CreateCustomJob", "Insert"]
    )
    record = requests[3]["content"]
    assert record["commands"] == [list(TRAIN)] and record["accelerator"] == "l4:1"
    create = requests[2]["request"]
    assert create["parent"] == "projects/my-project/locations/europe-west4"
    (pool,) = create["customJob"]["jobSpec"]["workerPoolSpecs"]
    assert pool["machineSpec"]["acceleratorType"] == "NVIDIA_L4"
