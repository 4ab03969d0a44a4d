"""Hosts of slices that boot for real in clean folders, against fakes of what is around them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    max_seconds=600,
)
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
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
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
    installed = Path(util.find_spec("tensorflow").origin).parents[1]
    with serve(machine) as address, fake_gcs.serve(storage, str(tmp_path)) as environment:
        # No HOME, as Google's agent starts it.
        environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "GCE_METADATA_HOST": address,
            "MULTIHOT_TPU_URL": f"http://{address}",
            "MULTIHOT_WORK": str(tmp_path / "work"),
            "MULTIHOT_CONSOLE": str(tmp_path / "console"),
            "MULTIHOT_PAUSE": "1",
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
