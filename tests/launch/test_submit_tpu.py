"""`submit tpu` by Google's own clients against fakes of Cloud TPU and Cloud Storage."""

import json

import fake_tpu
import grpc
import pytest
from fake_grpc import LOST, Fault
from submitting import (
    BUCKET,
    NAME,
    PACKAGE,
    SUBMIT,
    TRAIN,
    Slices,
    run,
    with_flags,
)

from launch.cloud import slice_watch
from launch.job import Job


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
    for name, data in PACKAGE.items():
        assert objects[f"multihot/first/package/{name}"].data == data
    record = Job.from_json(objects["multihot/first/job.json"].data)
    assert record == Job.from_json(fake_tpu.metadata_of(request)["multihot-job"])
    assert record.commands == (tuple(TRAIN),)
    assert record.max_seconds == 3 * 3600
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
    """Three answers of 503 after the slice was created; the request's identity tells."""
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
    """Every second request is refused with UNAVAILABLE."""
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
    clock = iter(range(0, 10**6, 100))
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


def test_a_slice_without_a_word_is_deleted_by_the_client(tpu, cloud, monkeypatch, capsys):
    """One whose account may not write to the bucket could neither tell nor delete itself."""
    clock = iter(range(0, 10**7, 100))
    monkeypatch.setattr(slice_watch.time, "monotonic", lambda: float(next(clock)))
    assert run(with_flags("--max_hours=10")) == 2
    error = capsys.readouterr().err
    assert "active for 20 minutes without a word in gs://" in error
    assert "add-iam-policy-binding gs://" in error and "roles/storage.objectAdmin" in error
    assert tpu.resources == {}


def test_a_slice_that_has_spoken_may_be_silent(tpu, cloud, monkeypatch, capsys):
    """Its first report, or the log of a start that failed, is enough: the watchdog has it then."""
    clock = iter(range(0, 10**7, 100))
    monkeypatch.setattr(slice_watch.time, "monotonic", lambda: float(next(clock)))
    asked = []

    def read_records(job, kind):
        asked.append(kind)
        return {0: "a report"} if kind is slice_watch.State else {}

    monkeypatch.setattr(slice_watch, "read_records", read_records)
    assert run(with_flags("--max_hours=1")) == 2
    assert "the time of --max_hours was over" in capsys.readouterr().err
    assert asked.count(slice_watch.State) == 1
    assert tpu.resources == {}


def test_a_slice_that_somebody_deleted_is_not_waited_for(tpu, capsys):
    tpu.on_active = lambda resource: tpu.remove(resource.name)
    assert run(SUBMIT) == 75
    assert "its slice was deleted before it had ended" in capsys.readouterr().err


def test_a_store_that_is_away_does_not_end_the_waiting(tpu, cloud, monkeypatch, capsys):
    """The bucket does not answer twice; the slice keeps running and is still watched."""
    Slices(tpu, cloud, 0)
    from trainer.errors import RunAgain
    from trainer.storage import gcs

    away = iter([True, True])
    read = slice_watch.read_records

    def read_or_fail(*arguments):
        if next(away, False):
            raise RunAgain("the store did not answer")
        return read(*arguments)

    monkeypatch.setattr(slice_watch, "read_records", read_or_fail)
    assert run(SUBMIT) == 0
    assert capsys.readouterr().out.count("still waiting: the store did not answer") == 2
    assert gcs.read_object(f"gs://{BUCKET}/multihot/first/exit_code/host-0")


def test_another_submissions_leavings_are_not_taken_for_this_ones(tpu, cloud, capsys):
    """An exit code and a log of an earlier job of that name lie in its folder."""
    old = {"submission": "20200101t000000-a", "attempt": 0, "host": 0, "exit_code": 1}
    old["reason"] = "old"
    cloud.put(BUCKET, "multihot/first/exit_code/host-0", json.dumps(old).encode())
    cloud.put(BUCKET, "multihot/first/logs/host-0/20200101t000000-a-000-1-0.log", b"old line\n")
    Slices(tpu, cloud, 0)
    assert run(with_flags("--follow")) == 0
    assert "old line" not in capsys.readouterr().out
