"""`submit tpu` by Google's own clients against fakes of Cloud TPU and Cloud Storage."""

import json
import sys
from collections.abc import Iterator

import fake_tpu
import grpc
import pytest
from fake_gcs import FakeStorage
from fake_tpu import LOST, FakeTpu, Fault
from google.cloud.tpu_v2 import types

from launch import package, slice_watch, submit_tpu, tpu_resources
from launch.job import Job, StoredFile
from launch.package import Package
from trainer import cli

BUCKET = "jobs-of-mine"
NAME = "projects/my-project/locations/us-central1-a/queuedResources/first"
FLAGS = [
    "--project=my-project",
    "--zone=us-central1-a",
    f"--bucket={BUCKET}",
    "--accelerator=v5e:2x2",
    "--name=first",
]
TRAIN = ["train", "--data_dir=gs://data/d", "--model_dir=gs://data/m"]
SUBMIT = ["submit", "tpu", *FLAGS, "--", *TRAIN]
CONTENTS = {"0123/multihot-0.1.0-py3-none-any.whl": b"wheel", "4567/tpu.txt": b"locked"}


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch, cloud: FakeStorage) -> Iterator[FakeTpu]:
    """The service without faults, a bucket beside it, and no time lost on waiting."""
    cloud.buckets[BUCKET] = {}
    cloud.locations[BUCKET] = "US-CENTRAL1"
    fake = FakeTpu()
    stored = [StoredFile(name, len(data), "5" * 64) for name, data in CONTENTS.items()]
    monkeypatch.setattr(package, "build", lambda environment: Package(*stored, CONTENTS))
    monkeypatch.setattr(tpu_resources, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(tpu_resources, "_LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(submit_tpu, "_POLL_SECONDS", 0.01)
    with fake_tpu.serve(fake) as address:
        monkeypatch.setenv(tpu_resources.ENDPOINT_VARIABLE, address)
        yield fake


class Slices:
    """What slices do: each active one logs, ends with an exit code, and deletes itself."""

    def __init__(self, tpu: FakeTpu, cloud: FakeStorage, *exit_codes: int) -> None:
        self.tpu, self.cloud, self.exit_codes = tpu, cloud, list(exit_codes)
        tpu.on_active = self.run

    def run(self, resource: types.QueuedResource) -> None:
        if resource.name not in self.tpu.resources or not self.exit_codes:
            return
        metadata = resource.tpu.node_spec[0].node.metadata
        job = Job.from_json(metadata["multihot-job"])
        place = f"multihot/{job.name}"
        mark = f"{job.submission}-{metadata['multihot-attempt']:0>3}"
        code = self.exit_codes.pop(0)
        ending = {"submission": job.submission, "attempt": 0, "host": 0, "exit_code": code}
        ending["reason"] = "last line"
        for index in range(3):
            name = f"{place}/logs/host-0/{mark}-17-{index:06d}.log"
            self.cloud.put(BUCKET, name, f"step {index}\n".encode())
        self.cloud.put(BUCKET, f"{place}/exit_code/host-0", json.dumps(ending).encode())
        self.tpu.remove(resource.name)


def run(arguments: list[str]) -> int:
    """Exit code of a command."""
    try:
        cli.main(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def with_flags(*flags: str) -> list[str]:
    return ["submit", "tpu", *FLAGS, *flags, "--", *TRAIN]


def test_a_job_runs_to_its_end_and_leaves_nothing(tpu, cloud, capsys):
    Slices(tpu, cloud, 0)
    assert run(with_flags("--follow")) == 0
    shown = capsys.readouterr().out
    assert "first waits for resources (WAITING_FOR_RESOURCES)" in shown
    assert "step 0\nstep 1\nstep 2\n" in shown
    assert shown.endswith("first: done; nothing is left running\n")
    assert tpu.resources == {}
    (request,) = tpu.created
    objects = cloud.buckets[BUCKET]
    for name, data in CONTENTS.items():
        assert objects[f"multihot/first/package/{name}"].data == data
    record = Job.from_json(objects["multihot/first/job.json"].data)
    assert record == Job.from_json(fake_tpu.metadata_of(request)["multihot-job"])
    assert record.commands == (tuple(TRAIN),)
    assert record.max_seconds == 24 * 3600
    # The operation was looked at until it was done: once too early.
    assert tpu.requests.count("GetOperation") == 2


def test_without_waiting_it_returns_once_the_slice_is_asked_for(tpu, capsys):
    assert run(with_flags("--no_wait")) == 0
    assert [*tpu.resources] == [NAME]
    assert "multihot jobs cancel --project=my-project" in capsys.readouterr().out
    assert "GetQueuedResource" in tpu.requests and len(tpu.created) == 1


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 2), (124, 2), (75, 75)])
def test_a_failed_job_ends_the_command_in_one_line(tpu, cloud, capsys, code, expected):
    Slices(tpu, cloud, code)
    assert run(SUBMIT) == expected
    error = capsys.readouterr().err.strip()
    assert f"first: ended with exit code {code}: last line" in error and "\n" not in error
    assert tpu.resources == {}


def test_a_slice_that_does_not_delete_itself_is_deleted(tpu, cloud, monkeypatch, capsys):
    monkeypatch.setattr(slice_watch, "_GRACE_SECONDS", 0.0)
    Slices(tpu, cloud, 0)
    monkeypatch.setattr(tpu, "remove", lambda name, remove=tpu.remove: None)
    tpu.plan = lambda method: (
        monkeypatch.undo() if method == "DeleteQueuedResource" else None  # Deletes from now on.
    )
    assert run(SUBMIT) == 0
    assert "has not deleted itself" in capsys.readouterr().out
    assert tpu.resources == {}


def test_an_answer_that_is_lost_makes_no_second_slice(tpu, cloud):
    """503 after the work was done, three times: the name and the request's id tell."""
    Slices(tpu, cloud, 0)
    lost = iter([Fault(grpc.StatusCode.UNAVAILABLE, LOST)] * 3)
    tpu.plan = lambda method: next(lost, None) if method == "CreateQueuedResource" else None
    assert run(SUBMIT) == 0
    assert tpu.requests.count("CreateQueuedResource") == 4 and len(tpu.created) == 1


def test_a_service_that_forgets_the_request_makes_no_second_slice(tpu, cloud):
    """The repeated request finds the name taken, by the same submission."""
    Slices(tpu, cloud, 0)
    lost = iter([Fault(grpc.StatusCode.UNAVAILABLE, LOST)])

    def plan(method: str) -> Fault | None:
        tpu._by_request_id.clear()
        return next(lost, None) if method == "CreateQueuedResource" else None

    tpu.plan = plan
    assert run(SUBMIT) == 0
    assert tpu.requests.count("CreateQueuedResource") == 2 and len(tpu.created) == 1


def test_every_call_survives_times_without_an_answer(tpu, cloud):
    """Every second request is turned down before it is done."""
    Slices(tpu, cloud, 0)
    count = iter(range(1000))
    tpu.plan = lambda method: (
        Fault(grpc.StatusCode.UNAVAILABLE, "away") if next(count) % 2 else None
    )
    assert run(SUBMIT) == 0
    assert len(tpu.created) == 1 and tpu.resources == {}


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING", "preempted"])
def test_a_slice_that_is_taken_away_is_created_again(tpu, cloud, capsys, state):
    Slices(tpu, cloud, 0)
    away = ("PROVISIONING", "ACTIVE", state)
    if state == "preempted":  # The node knows before the resource does.
        away = ("ACTIVE", "ACTIVE")
        tpu.node_state = "PREEMPTED"
        tpu.plan = lambda method: (
            setattr(tpu, "node_state", "READY") if len(tpu.created) > 2 else None
        )
    exit_codes = tpu.on_active
    tpu.on_active = lambda resource: exit_codes(resource) if len(tpu.created) > 2 else None
    tpu.states = [away, away, fake_tpu.HAPPY]
    assert run(SUBMIT) == 0
    attempts = [fake_tpu.metadata_of(request)["multihot-attempt"] for request in tpu.created]
    assert attempts == ["0", "1", "2"]
    assert len({fake_tpu.record_of(request)["submission"] for request in tpu.created}) == 1
    assert "first is created again (restart 2 of 3)" in capsys.readouterr().out
    assert tpu.resources == {}


def test_restarts_are_limited_and_share_the_time(tpu, capsys, monkeypatch):
    tpu.states = [("ACTIVE", "SUSPENDED")]
    clock = iter(range(0, 10**6, 500))
    monkeypatch.setattr(slice_watch.time, "monotonic", lambda: float(next(clock)))
    assert run(with_flags("--max_restarts=2", "--max_hours=10")) == 75
    error = capsys.readouterr().err
    assert "taken away 3 times, more often than --max_restarts=2" in error
    assert len(tpu.created) == 3 and tpu.resources == {}
    left = [int(fake_tpu.metadata_of(item)["multihot-max-seconds"]) for item in tpu.created]
    assert left[0] == 36000 and left[0] > left[1] > left[2]


def test_a_slice_whose_machine_never_started_is_deleted_after_its_time(tpu, monkeypatch, capsys):
    clock = iter(range(0, 10**7, 2000))
    monkeypatch.setattr(slice_watch.time, "monotonic", lambda: float(next(clock)))
    assert run(with_flags("--max_hours=1")) == 2
    assert "the time of --max_hours was over" in capsys.readouterr().err
    assert tpu.resources == {}


def test_a_slice_that_somebody_deleted_is_not_waited_for(tpu, capsys):
    tpu.on_active = lambda resource: tpu.remove(resource.name)
    assert run(SUBMIT) == 75
    assert "its slice was deleted before it had ended" in capsys.readouterr().err


REFUSALS = [
    (
        Fault(grpc.StatusCode.PERMISSION_DENIED, "Cloud TPU API is disabled", "SERVICE_DISABLED"),
        "gcloud services enable tpu.googleapis.com --project=my-project",
    ),
    (
        Fault(grpc.StatusCode.PERMISSION_DENIED, "Cloud TPU API has not been used in project 1"),
        "gcloud services enable tpu.googleapis.com --project=my-project",
    ),
    (
        Fault(grpc.StatusCode.PERMISSION_DENIED, "Permission 'tpu.nodes.create' denied"),
        "add-iam-policy-binding my-project --member=user:YOU --role=roles/tpu.admin",
    ),
    (
        Fault(grpc.StatusCode.PERMISSION_DENIED, "iam.serviceAccounts.actAs is required"),
        "--role=roles/iam.serviceAccountUser",
    ),
    (Fault(grpc.StatusCode.UNAUTHENTICATED, "no"), "gcloud auth application-default login"),
    (
        Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota limit 'TPUV5sPreemptible' exceeded"),
        "gcloud beta quotas preferences create --service=tpu.googleapis.com",
    ),
    (
        Fault(grpc.StatusCode.ALREADY_EXISTS, "Resource already exists"),
        "gcloud compute tpus queued-resources delete first --force --zone=us-central1-a",
    ),
    (
        Fault(grpc.StatusCode.NOT_FOUND, "Location us-central1-a is not found"),
        "gcloud compute tpus locations list --project=my-project",
    ),
    (
        Fault(grpc.StatusCode.INVALID_ARGUMENT, "acceleratorType v5litepod-4 is not in the zone"),
        "gcloud compute tpus accelerator-types list --zone=us-central1-a",
    ),
    (
        Fault(grpc.StatusCode.INVALID_ARGUMENT, "network 'n' was not found"),
        "gcloud compute networks subnets list --project=my-project",
    ),
    (
        Fault(grpc.StatusCode.NOT_FOUND, "Reservation r does not exist"),
        "gcloud compute reservations list --project=my-project",
    ),
]


def check_refusal(capsys: pytest.CaptureFixture, expected: str) -> None:
    error = capsys.readouterr().err.strip()
    assert error.startswith("multihot submit tpu: error: ") and "\n" not in error
    assert expected in error


@pytest.mark.parametrize(("fault", "expected"), REFUSALS)
def test_a_refusal_is_one_line_with_the_command_that_mends_it(tpu, capsys, fault, expected):
    tpu.plan = lambda method: fault if method == "CreateQueuedResource" else None
    assert run(SUBMIT) == 2
    check_refusal(capsys, expected)
    assert tpu.resources == {}


@pytest.mark.parametrize(("fault", "expected"), [item for item in REFUSALS if not item[0].reason])
def test_a_refusal_by_the_operation_reads_the_same(tpu, capsys, fault, expected):
    tpu.create_error = (fault.code, fault.message)
    assert run(SUBMIT) == 2
    check_refusal(capsys, expected)


def test_a_resource_that_fails_is_removed_and_says_why(tpu, capsys):
    tpu.states = [("WAITING_FOR_RESOURCES", "FAILED")]
    tpu.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded for v5e")
    assert run(SUBMIT) == 2
    check_refusal(capsys, "Quota exceeded for v5e")
    assert tpu.resources == {}


def test_a_service_that_is_away_for_good_says_to_run_again(tpu, capsys, monkeypatch):
    monkeypatch.setattr(tpu_resources, "_RETRY_SECONDS", 0.2)
    tpu.plan = lambda method: Fault(grpc.StatusCode.UNAVAILABLE, "away")
    assert run(SUBMIT) == 75
    assert "tpu.googleapis.com did not answer" in capsys.readouterr().err


def test_without_credentials_it_says_how_to_sign_in(tpu, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(tpu_resources.ENDPOINT_VARIABLE)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert run(SUBMIT) == 2
    check_refusal(capsys, "no Google credentials were found; sign in: gcloud auth application-")


def test_a_bucket_of_another_region_is_refused(tpu, cloud, capsys):
    cloud.locations[BUCKET] = "EUROPE-WEST4"
    assert run(SUBMIT) == 2
    check_refusal(
        capsys,
        f"gcloud storage buckets create gs://{BUCKET}-us-central1 --project=my-project "
        "--location=us-central1",
    )
    assert tpu.created == []


def test_a_multi_region_that_holds_the_zone_is_taken(tpu, cloud):
    cloud.locations[BUCKET] = "US"
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0


def test_a_bucket_that_does_not_exist_is_named(tpu, cloud, capsys):
    del cloud.buckets[BUCKET]
    assert run(SUBMIT) == 2
    check_refusal(capsys, "there is no such bucket; create it: gcloud storage buckets create gs://")


def test_two_submissions_of_one_name(tpu, capsys):
    assert run(with_flags("--no_wait")) == 0
    assert run(with_flags("--no_wait")) == 2
    check_refusal(capsys, "--name=first: a job of that name")
    assert len(tpu.created) == 1 and [*tpu.resources] == [NAME]


def test_two_submissions_at_the_same_moment(tpu, capsys, monkeypatch):
    """Neither sees the other's slice before it asks for its own: the service decides."""
    absent = tpu_resources.Found(tpu_resources.Phase.ABSENT)
    monkeypatch.setattr(submit_tpu, "_make_room", lambda *_: absent)
    assert run(with_flags("--no_wait")) == 0
    assert run(with_flags("--no_wait")) == 2
    check_refusal(capsys, "first exists already; take another --name")
    assert len(tpu.created) == 1 and [*tpu.resources] == [NAME]


def test_what_is_left_of_a_slice_that_was_taken_away_makes_room(tpu, cloud, capsys):
    tpu.states = [("SUSPENDED",), fake_tpu.HAPPY]
    assert run(with_flags("--no_wait")) == 0
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0
    assert "removing the slice of that name that was taken away" in capsys.readouterr().out


def test_a_name_that_is_none_of_ours_is_left_alone(tpu, capsys):
    tpu.resources[NAME] = types.QueuedResource(name=NAME)
    tpu._left[NAME] = ["ACTIVE"]
    assert run(SUBMIT) == 2
    check_refusal(capsys, "is not of Multihot's making")
    assert [*tpu.resources] == [NAME]


def interrupt_next_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C comes while the command waits between two looks."""

    def interrupt(_: object) -> None:
        monkeypatch.setattr(submit_tpu.time, "sleep", sleep)
        raise KeyboardInterrupt

    sleep = submit_tpu.time.sleep
    monkeypatch.setattr(submit_tpu.time, "sleep", interrupt)


@pytest.mark.parametrize(("answer", "left"), [("", 1), ("y", 1), ("c", 0), ("cancel", 0)])
def test_ctrl_c_asks_whether_to_leave_it_running(tpu, capsys, monkeypatch, answer, left):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    interrupt_next_sleep(monkeypatch)
    assert run(SUBMIT) == 130
    assert len(tpu.resources) == left
    shown = capsys.readouterr().out
    assert ("left running" if left else "cancelled; nothing is left running") in shown


def test_ctrl_c_without_a_terminal_leaves_it_running(tpu, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    interrupt_next_sleep(monkeypatch)
    assert run(SUBMIT) == 130
    assert len(tpu.resources) == 1


def test_ctrl_c_while_the_slice_is_being_created(tpu, capsys, monkeypatch):
    """The request has gone out, its operation is not done, and deleting is refused at first."""
    tpu.operation_polls = 1000
    tpu.refused_deletes = 3
    tpu.states = [("CREATING",)]

    def interrupt(operation: object, seconds: float) -> None:
        monkeypatch.setattr(tpu_resources, "_wait_for", lambda *_: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_resources, "_wait_for", interrupt)
    monkeypatch.setattr(submit_tpu, "ask_to_leave", lambda name: False)
    assert run(SUBMIT) == 130
    assert tpu.requests.count("DeleteQueuedResource") == 4
    assert tpu.resources == {}
    assert "cancelled" in capsys.readouterr().out


def test_several_slices_share_a_corpus(tpu, cloud):
    Slices(tpu, cloud, 0, 0, 0)
    score = ["score", "--model=gs://data/e", "--input=gs://data/i", "--output_dir=gs://data/o"]
    assert run(["submit", "tpu", *FLAGS, "--num_slices=3", "--", *score]) == 0
    records = [fake_tpu.record_of(request) for request in tpu.created]
    assert [record["name"] for record in records] == ["first-0", "first-1", "first-2"]
    assert [record["commands"][0][-2:] for record in records] == [
        [f"--worker_index={index}", "--num_workers=3"] for index in range(3)
    ]
    assert {record["group"] for record in records} == {"first"}
    assert tpu.resources == {}


def test_several_slices_are_all_made_or_none(tpu, capsys):
    tpu.plan = lambda method: (
        Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota")
        if method == "CreateQueuedResource" and len(tpu.created) == 2
        else None
    )
    score = ["score", "--model=gs://data/e", "--input=gs://data/i", "--output_dir=gs://data/o"]
    assert run(["submit", "tpu", *FLAGS, "--num_slices=3", "--", *score]) == 2
    check_refusal(capsys, "first-2: the quota of my-project in us-central1-a")
    assert len(tpu.created) == 2 and tpu.resources == {}


def test_several_slices_do_not_train(tpu, capsys):
    assert run(with_flags("--num_slices=2")) == 2
    check_refusal(capsys, "expected `score` alone")


def test_a_store_that_is_away_does_not_end_the_waiting(tpu, cloud, monkeypatch, capsys):
    """Twice the bucket does not answer; the slice is neither forgotten nor cancelled."""
    Slices(tpu, cloud, 0)
    from trainer import object_store
    from trainer.errors import RunAgain

    away = iter([True, True])
    read = slice_watch.read_records

    def read_or_fail(*arguments):
        if next(away, False):
            raise RunAgain("the store did not answer")
        return read(*arguments)

    monkeypatch.setattr(slice_watch, "read_records", read_or_fail)
    assert run(SUBMIT) == 0
    assert capsys.readouterr().out.count("still waiting: the store did not answer") == 2
    assert object_store.read_object(f"gs://{BUCKET}/multihot/first/exit_code/host-0")


def test_another_submissions_leavings_are_not_taken_for_this_ones(tpu, cloud, capsys):
    """An exit code and a log of an earlier job of that name lie in its folder."""
    old = {"submission": "20200101t000000-a", "attempt": 0, "host": 0, "exit_code": 1}
    old["reason"] = "old"
    cloud.put(BUCKET, "multihot/first/exit_code/host-0", json.dumps(old).encode())
    cloud.put(BUCKET, "multihot/first/logs/host-0/20200101t000000-a-000-1-0.log", b"old line\n")
    Slices(tpu, cloud, 0)
    assert run(with_flags("--follow")) == 0
    assert "old line" not in capsys.readouterr().out
