"""Submitting jobs to a fake of Cloud TPU, and what its slices do."""

import json
import time
from types import SimpleNamespace

import pytest
from fake_gcs import FakeStorage
from fake_tpu import FakeTpu
from google.cloud.tpu_v2 import types

from launch import submit
from launch.cloud import package
from launch.job import Job, StoredFile
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
PACKAGE = {"0123/multihot-0.1.0-py3-none-any.whl": b"wheel", "4567/tpu.txt": b"locked"}


def use_small_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submissions bring `PACKAGE`, which takes no time to build."""
    stored = [StoredFile(name, len(data), "5" * 64) for name, data in PACKAGE.items()]
    made = package.Package(*stored, PACKAGE)
    monkeypatch.setattr(package, "build", lambda environment: made)


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


def check_refusal(capsys: pytest.CaptureFixture, expected: str) -> None:
    error = capsys.readouterr().err.strip()
    assert error.startswith("multihot submit tpu: error: ") and "\n" not in error
    assert expected in error


def interrupt_next_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C comes while the command waits between two looks."""

    def interrupt(_: float) -> None:
        monkeypatch.setattr(submit, "time", time)
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "time", SimpleNamespace(sleep=interrupt))
