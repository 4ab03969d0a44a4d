"""Hosts of slices that boot for real in clean folders, against fakes of what is around them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path

import fake_gcs
from fake_gcs import FakeStorage
from fake_machine import FakeMachine, serve

from launch.cloud import package
from launch.cloud.tpu_slices import make_metadata
from launch.job import Job, StoredFile

BUCKET = "jobs-of-mine"
RESOURCE = "projects/p/locations/us-central1-a/queuedResources/first"
PLACE = "multihot/first"
NOTHING = StoredFile("none", 0, "0" * 64)
JOB = Job(
    name="first",
    group="first",
    submission="20240501t000000-a",
    bucket=BUCKET,
    commands=(),
    environment="cpu",
    accelerator="v5e:2x2",
    resource=RESOURCE,
    wheel=NOTHING,
    requirements=NOTHING,
    max_restarts=0,
    max_seconds=36000,
)
# What `make tpu-train` submits, small.
TRAINING = (
    ("sample", "--output=s.jsonl", "--num_documents=400"),
    ("prepare", "--input=s.jsonl", "--data_dir=gs://data/d", "--vocab_size=512")
    + ("--max_seq_length=64", "--num_shards=1"),
    ("train", "--data_dir=gs://data/d", "--model_dir=gs://data/m", "--hidden_size=16")
    + ("--num_layers=1", "--num_attention_heads=2", "--intermediate_size=32")
    + ("--tokens_per_replica=512", "--num_train_epochs=0.3", "--jit_compile=false"),
    ("evaluate", "--model_dir=gs://data/m", "--data_dir=gs://data/d", "--resamples=0"),
    ("export", "--model_dir=gs://data/m", "--export_dir=gs://data/e"),
)
# How often faster than others the hosts' clock runs.
SPEED = 30
DELETE = f"/v2/{RESOURCE}?force=true"


@dataclasses.dataclass
class Host:
    """A host that boots: its folder, its surroundings, its bucket."""

    machine: FakeMachine
    storage: FakeStorage
    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen | None = None

    @property
    def work(self) -> Path:
        """What the script keeps on its disk."""
        return self.folder / "work"

    def start(self) -> None:
        """What Google's agent does: takes the script from the metadata, and runs it."""
        script = self.folder / "startup-script"
        script.write_text(self.machine.attributes["startup-script"])
        self.process = subprocess.Popen(
            ["bash", str(script)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self, seconds: float = 100.0) -> int:
        """Exit code of the script; its watchdog lives on."""
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        """What the end of the machine does: everything ends."""
        if self.process is None:
            return
        groups = [self.process.pid]
        with suppress(OSError):
            groups.append(int((self.work / "job.pid").read_text()))
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()

    def read(self, name: str) -> str:
        """An object of the job's folder."""
        return self.storage.buckets[BUCKET][f"{PLACE}/{name}"].data.decode()

    def names(self) -> list[str]:
        """Names of the job's objects."""
        return [name.removeprefix(PLACE + "/") for name in self.storage.buckets[BUCKET]]

    def logs(self) -> str:
        """What the job has printed."""
        names = (name for name in self.names() if name.startswith("logs/host-0/"))
        return "".join(map(self.read, sorted(names)))

    def wait_for_shut_down(self, seconds: float = 60.0) -> str:
        """Returns the first command that ended the machine, once one has."""
        path, deadline = self.folder / "shut-down", time.monotonic() + seconds
        while not (path.exists() and path.read_text().endswith("\n")):
            assert time.monotonic() < deadline, (self.work / "watchdog.log").read_text()
            time.sleep(0.05)
        return path.read_text().splitlines()[0]

    def wait_for_delete(self, seconds: float = 20.0) -> None:
        """Returns when a deletion was taken."""
        deadline = time.monotonic() + seconds
        while not self.machine.deletes:
            assert time.monotonic() < deadline, (self.work / "startup.log").read_text()
            time.sleep(0.05)


@contextmanager
def make_host(tmp_path: Path, job: Job, bootstrap: str | None = None) -> Iterator[Host]:
    """A host of a job; with a bootstrap of the test's own, or the real one."""
    machine = FakeMachine(make_metadata(job, attempt=0))
    if bootstrap is not None:
        machine.attributes["multihot-bootstrap"] = bootstrap
    storage = FakeStorage({BUCKET: {}, "data": {}})
    programs = tmp_path / "programs"
    programs.mkdir()
    # Whatever the image calls it.
    (programs / "python3.11").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    (programs / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    for name in ("shutdown", "poweroff"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"{tmp_path}/shut-down"\n')
        (programs / name).chmod(0o755)
    installed = Path(util.find_spec("tensorflow").origin).parents[1]
    with serve(machine) as address, fake_gcs.serve(storage, str(tmp_path)) as environment:
        # No HOME, as Google's agent starts it.
        environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "GCE_METADATA_HOST": address,
            "MULTIHOT_TPU_URL": f"http://{address}",
            "MULTIHOT_WORK": str(tmp_path / "work"),
            "MULTIHOT_CONSOLE": str(tmp_path / "console"),
            "MULTIHOT_SPEED": str(SPEED),
            "MULTIHOT_SITE_PACKAGES": str(installed),
        }
        host = Host(machine, storage, tmp_path, environment)
        try:
            yield host
        finally:
            host.kill()


def packed(storage: FakeStorage, job: Job) -> Job:
    """The job with the project's package in its folder."""
    built = package.build("cpu")
    for name, data in built.contents.items():
        storage.put(BUCKET, f"{PLACE}/package/{name}", data)
    return dataclasses.replace(job, wheel=built.wheel, requirements=built.requirements)


def set_job(host: Host, job: Job) -> None:
    """Gives a host that has not booted yet its job."""
    host.machine.attributes.update(make_metadata(job, attempt=0))


def check_model_folder(host: Host) -> None:
    """`TRAINING` has run to its end: a model folder is in the bucket, and the exit code is 0."""
    from safetensors.numpy import load

    data = host.storage.buckets["data"]
    assert json.loads(data["e/multihot.json"].data)["calibration"]
    assert load(data["e/model.safetensors"].data)["classifier.weight"].shape[1] == 16
    assert "e/saved_model/saved_model.pb" in data
    assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 0
