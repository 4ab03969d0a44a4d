"""Ctrl-C during `submit tpu`, and several slices."""

import sys

import fake_tpu
import grpc
import pytest
from fake_grpc import Fault
from submitting import (
    FLAGS,
    SUBMIT,
    Slices,
    check_refusal,
    interrupt_next_sleep,
    run,
    with_flags,
)

from launch import submit
from launch.cloud import slice_watch, tpu_slices


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
    """The creation is not done yet, and the first deletions are refused."""
    tpu.operation_polls = 1000
    tpu.refused_deletes = 3
    tpu.states = [("CREATING",)]

    def interrupt(operation: object, seconds: float) -> None:
        monkeypatch.setattr(tpu_slices, "_wait_for", lambda *_: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_slices, "_wait_for", interrupt)
    monkeypatch.setattr(submit, "ask_to_leave", lambda name: False)
    assert run(SUBMIT) == 130
    assert tpu.requests.count("DeleteQueuedResource") == 4
    assert tpu.resources == {}
    assert "cancelled" in capsys.readouterr().out


def test_ctrl_c_ends_the_slices_that_are_there_and_waits_for_no_others(tpu, monkeypatch, capsys):
    """One slice of three has ended; the other two are deleted at once."""
    monkeypatch.setattr(slice_watch, "pauses", lambda first: iter([0.0]))
    monkeypatch.setattr(submit, "ask_to_leave", lambda name: False)
    interrupt_next_sleep(monkeypatch)
    tpu.states = [("ACTIVE",)]
    tpu.on_active = lambda resource: (
        tpu.remove(resource.name) if resource.name.endswith("-1") else None
    )
    score = ["score", "--model=gs://data/e", "--input=gs://data/i", "--output_dir=gs://data/o"]
    assert run(["submit", "tpu", *FLAGS, "--num_slices=3", "--", *score]) == 130
    assert tpu.requests.count("DeleteQueuedResource") == 2
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


def test_a_reserved_slice_is_created_by_the_version_that_knows_such(tpu, cloud):
    """The rest of its life is that of any other slice."""
    Slices(tpu, cloud, 0)
    assert run(with_flags("--provisioning=reserved", "--reservation=ours")) == 0
    (request,) = tpu.created
    assert type(request).__module__.startswith("google.cloud.tpu_v2alpha1.")
    assert request.queued_resource.guaranteed.reserved
    assert request.queued_resource.reservation_name.endswith("/reservations/ours")
    assert tpu.resources == {} and "GetQueuedResource" in tpu.requests
