"""A slice's startup script and bootstrap, as they are, in a root like that of its image.

From boot to the model folder in the bucket and the deletion; and, on a fast clock, with what is
around the machine refused throughout.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import clean_root
import pytest
from booting import BUCKET, DELETE, JOB, TRAINING, check_model_folder, packed, set_job
from clean_root import RootHost, boot_in

pytestmark = pytest.mark.long

SPEED = 30
# A machine that is refused everything may cost no more.
MOST_SECONDS = 1800.0
# Where a tool finds nobody who answers.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root, beside an archive of Python 3.11."""
    if reason := clean_root.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("clean")
    try:
        try:
            made = clean_root.make_root(folder)
        except OSError as error:
            pytest.skip(f"Debian's packages are out of reach: {error}")
        with clean_root.apt_locked(made):
            yield made
    finally:
        shutil.rmtree(folder)


def set_python(host: RootHost) -> None:
    """Puts the archive of Python into the bucket, and names it to the host."""
    data = (host.folder.parent / "python.tar.gz").read_bytes()
    host.storage.put("data", "python/cpython-3.11.tar.gz", data)
    host.machine.attributes["multihot-python-url"] = (
        f"gs://data/python/cpython-3.11.tar.gz#sha256={hashlib.sha256(data).hexdigest()}"
    )


def reach_index(root: Path) -> None:
    """Skips the test where the package index is out of reach."""
    command = "curl -sSfo /dev/null --cacert /authorities.pem https://pypi.org/simple/uv/"
    found = clean_root.ask(root, command)
    if found.returncode != 0:
        pytest.skip(f"the package index is out of reach: {found.stderr.strip()}")


def test_the_root_is_as_poor_as_the_images(root):
    version = clean_root.ask(root, "python3 -c 'import sys; print(sys.version_info < (3, 11))'")
    assert version.stdout == "True\n"
    for command in ("python3 -m pip --version", "python3 -m venv /tmp/venv", "which python3.11"):
        assert clean_root.ask(root, command).returncode != 0
    locked = clean_root.ask(root, "apt-get install -y python3-venv")
    assert locked.returncode != 0 and "Could not get lock" in locked.stderr


def test_a_model_is_trained_from_boot_to_deletion(root, tmp_path):
    """Python comes from the user's bucket, uv and all packages from the index."""
    with boot_in(root, tmp_path, JOB, speed=1) as host:
        reach_index(root)
        set_job(host, packed(host.storage, dataclasses.replace(JOB, commands=TRAINING)))
        set_python(host)
        host.start()
        host.wait_for_end(2400)
        assert host.machine.deletes == [DELETE], host.read_log()
        check_model_folder(host)
        assert "installed in" in host.read(f"logs/host-0/{JOB.submission}-000-startup.log")
        assert host.console == ""


def test_a_python_that_cannot_be_fetched_deletes_the_slice(root, tmp_path):
    with boot_in(root, tmp_path, JOB, SPEED) as host:
        reach_index(root)
        set_job(host, packed(host.storage, JOB))
        host.environment |= {"UV_PYTHON_INSTALL_MIRROR": NOWHERE, "UV_HTTP_RETRIES": "0"}
        host.start()
        host.wait_for_end(300)
        assert host.machine.deletes == [DELETE]
        log = host.read(f"logs/host-0/{JOB.submission}-000-startup.log")
        assert "give an archive of Python within reach: --python_url=gs://" in log
        assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 2


def refuse_metadata(host: RootHost) -> None:
    host.machine.has_metadata = False


def refuse_bucket(host: RootHost) -> None:
    host.storage.statuses[BUCKET] = 403


def break_bucket(host: RootHost) -> None:
    host.storage.statuses[BUCKET] = 503


def refuse_role(host: RootHost) -> None:
    host.machine.has_role = False


def refuse_deletions(host: RootHost) -> None:
    host.machine.refused_deletes = 10**9


def refuse_bucket_and_deletions(host: RootHost) -> None:
    refuse_bucket(host)
    refuse_deletions(host)


@pytest.mark.parametrize(
    ("refuse", "is_deleted", "said"),
    [
        (refuse_metadata, False, "cannot learn which slice it is"),
        (refuse_bucket, True, ""),
        (break_bucket, True, ""),
        (refuse_role, False, "was refused its own deletion"),
        (refuse_deletions, False, "was refused its own deletion"),
        (refuse_bucket_and_deletions, False, "was refused its own deletion"),
    ],
)
def test_what_is_refused_throughout_costs_half_an_hour(root, tmp_path, refuse, is_deleted, said):
    with boot_in(root, tmp_path, JOB, SPEED) as host:
        set_job(host, packed(host.storage, JOB))
        set_python(host)
        refuse(host)
        if refuse is refuse_deletions:  # A job that ends at once; installing takes its time.
            host.machine.attributes["multihot-bootstrap"] = ""
        host.start()
        seconds = SPEED * host.wait_for_end(120)
        assert seconds <= MOST_SECONDS
        assert host.machine.deletes == ([DELETE] if is_deleted else [])
        assert (root / "shut-down").exists() != is_deleted
        assert said in host.console
        if not is_deleted:
            last = host.console.splitlines()[-1]
            assert "its machine shuts down" in last and "gcloud compute tpus" in last
