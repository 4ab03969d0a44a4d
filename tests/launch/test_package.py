"""The package that a job's machines install: its bytes, its SHA-256 and its upload."""

import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fake_gcs import random_faults
from test_node import JOB

from launch.cloud import package
from launch.cloud.package import Package
from launch.job import Job, StoredFile
from trainer.errors import UserError

ROOT = Path(package.__file__).parents[2]


@pytest.fixture(scope="module")
def wheel() -> tuple[str, bytes]:
    return package.build_wheel()


def contents(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_what_a_machine_needs(wheel):
    name, data = wheel
    assert name == "multihot-0.1.0-py3-none-any.whl"
    files = contents(data)
    for path in (
        "launch/machine/node.py",
        "launch/machine/startup.sh",
        "launch/accelerators.json",
        "launch/requirements/tpu.txt",
        "trainer/cli.py",
        "trainer/reporting/templates/report.html",
    ):
        if path.startswith("launch/requirements/"):
            source = ROOT / path.removeprefix("launch/")
        else:
            source = ROOT / path
        assert files[path] == source.read_bytes()
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in files)


def test_the_same_source_gives_the_same_bytes_and_the_clone_is_left_as_it_was(wheel):
    before = sorted(os.listdir(ROOT))
    package.build_wheel.cache_clear()
    assert package.build_wheel() == wheel
    assert sorted(os.listdir(ROOT)) == before


def test_a_package_lies_under_its_fingerprint(wheel):
    built = package.build("tpu")
    for item in (built.wheel, built.requirements):
        data = built.contents[item.name]
        assert item.sha256 == hashlib.sha256(data).hexdigest()
        assert item.name.startswith(item.sha256[:16] + "/") and item.bytes == len(data)


def test_the_requirements_pin_tensorflow_for_tpus_and_a_libtpu_that_it_can_load():
    """The one whose version of PJRT is nearest to TensorFlow's (tests/runtime/
    test_tpu_environment.py); tensorflow-tpu 2.20 aborts on import next to 0.0.34 and later."""
    text = package.read_requirements("tpu").decode()
    assert re.search(r"^tensorflow-tpu==2\.20\.\d+ ", text, re.MULTILINE)
    found = re.search(r"^libtpu==0\.0\.(\d+) ", text, re.MULTILINE)
    assert found is not None and int(found[1]) == 20
    names = re.findall(r"^[a-z0-9].*?==", text, re.MULTILINE)
    # Each has hashes, so that pip refuses everything else.
    assert len(re.findall(r"^[a-z0-9][^\n]*\\\n +--hash=sha256:", text, re.MULTILINE)) == len(names)


def test_an_environment_without_a_lock_is_named():
    with pytest.raises(UserError, match="requirements/none.txt: not found"):
        package.read_requirements("none")


def test_an_installed_multihot_gives_its_wheel_too(wheel, tmp_path):
    """The wheel packed from installed files has the same files as the one they came from."""
    path = tmp_path / wheel[0]
    path.write_bytes(wheel[1])
    installed = tmp_path / "installed"
    with zipfile.ZipFile(path) as archive:  # What pip does with a wheel, RECORD aside.
        archive.extractall(installed)
    script = (
        "import sys; from launch.cloud import package;"
        "built = package.build('tpu'); assert not package._ROOT.joinpath('setup.py').exists();"
        "sys.stdout.buffer.write(built.contents[built.wheel.name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        check=True,
    )
    before, after = contents(wheel[1]), contents(done.stdout)
    record = "multihot-0.1.0.dist-info/RECORD"
    assert sorted(before) == sorted(after)
    assert {name for name in before if before[name] != after[name]} <= {record}
    # The same files with the same hashes, in whatever order.
    assert sorted(before[record].splitlines()) == sorted(after[record].splitlines())


def small_package(text: bytes = b"wheel") -> Package:
    stored = [
        StoredFile(f"0123/{name}", len(data), hashlib.sha256(data).hexdigest())
        for name, data in (("a.whl", text), ("tpu.txt", b"locked"))
    ]
    return Package(*stored, {stored[0].name: text, stored[1].name: b"locked"})


def test_a_package_is_uploaded_once_whatever_goes_wrong(cloud):
    """Of 40 requests with faults, none makes a second generation."""
    cloud.plan = random_faults(5, 0.3)
    for _ in range(4):
        package.upload(JOB, small_package())
    objects = cloud.buckets["b"]
    assert {name: item.data for name, item in objects.items()} == {
        "multihot/first/package/0123/a.whl": b"wheel",
        "multihot/first/package/0123/tpu.txt": b"locked",
    }
    assert sum(cloud.faults.values()) > 0


def test_a_file_that_somebody_else_put_there_is_replaced(cloud):
    cloud.put("b", "multihot/first/package/0123/a.whl", b"another")
    package.upload(JOB, small_package())
    assert cloud.buckets["b"]["multihot/first/package/0123/a.whl"].data == b"wheel"


def test_a_job_says_where_its_package_lies():
    assert Job.from_json(JOB.to_json()).folder == "gs://b/multihot/first"
