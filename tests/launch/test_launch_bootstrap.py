"""bootstrap.py: downloads the job's package, checks it, and installs it into a Python that fits."""

import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from fake_gcs import FakeStorage
from fake_machine import FakeMachine, serve

from launch.machine import bootstrap

WHEEL = b"a wheel"
ITEM = {"name": "0123/a.whl", "bytes": len(WHEEL), "sha256": hashlib.sha256(WHEEL).hexdigest()}
JOB = {"name": "first", "bucket": "b"}
PLACE = "multihot/first/package/0123/a.whl"


@pytest.fixture
def store(cloud: FakeStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    """A bucket with a wheel, on a machine that has an account."""
    cloud.put("b", PLACE, WHEEL)
    monkeypatch.setattr(bootstrap, "FIRST_PAUSE_SECONDS", 0.001)
    with serve(FakeMachine({})) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        yield cloud


def test_a_file_is_fetched_once(store, tmp_path):
    path = bootstrap.fetch(JOB, ITEM, str(tmp_path))
    assert Path(path) == tmp_path / "a.whl" and Path(path).read_bytes() == WHEEL
    store.statuses["b"] = 403
    assert bootstrap.fetch(JOB, ITEM, str(tmp_path)) == path


@pytest.mark.parametrize("fault", ["429", "503", "reset before", "half"])
def test_a_store_that_is_away_is_asked_again(store, tmp_path, fault):
    faults = iter([fault] * 4)
    store.plan = lambda request: next(faults, "")
    assert Path(bootstrap.fetch(JOB, ITEM, str(tmp_path))).read_bytes() == WHEEL
    assert store.faults[fault] == 4


def test_half_a_file_is_never_taken(store, tmp_path, capsys):
    store.plan = lambda request: "half"
    with pytest.raises(SystemExit) as ended:
        bootstrap.fetch(JOB, ITEM, str(tmp_path))
    assert ended.value.code == 2 and store.faults["half"] == bootstrap.ATTEMPTS
    assert not (tmp_path / "a.whl").exists()


def test_another_file_is_not_taken(store, tmp_path, capsys):
    store.put("b", PLACE, b"another")
    with pytest.raises(SystemExit):
        bootstrap.fetch(JOB, ITEM, str(tmp_path))
    assert f"expected {ITEM['sha256']}" in capsys.readouterr().err
    assert not (tmp_path / "a.whl").exists()


def test_an_account_without_access_is_told_what_it_needs(store, tmp_path, capsys):
    store.statuses["b"] = 403
    with pytest.raises(SystemExit):
        bootstrap.fetch(JOB, ITEM, str(tmp_path))
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "--role=roles/storage.objectAdmin" in error


def test_an_image_without_a_new_python_gets_one(monkeypatch, tmp_path):
    """Ubuntu 22.04 has Python 3.10 only; uv installs 3.11, as often as GitHub has to be asked."""
    commands: list[tuple[list[str], int, str]] = []
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    monkeypatch.setattr(bootstrap, "fetch_uv", lambda work: "uv")
    monkeypatch.setattr(bootstrap, "run", lambda *item, **more: commands.append((*item, more)))
    environment = str(tmp_path / "environment")
    installer = bootstrap.make_environment(environment, str(tmp_path), with_pip=True)
    assert installer[:3] == ["uv", "pip", "install"]
    assert installer[-1] == f"{environment}/bin/python"
    ((command, more),) = commands
    assert command[:2] == ["uv", "venv"] and command[-1] == environment
    assert command[-4:-1] == ["--python", "3.11", "--managed-python"]
    assert more["attempts"] == bootstrap.ATTEMPTS and "--python_url=gs://" in more["remedy"]


def test_a_new_python_without_venv_is_used_all_the_same(monkeypatch, tmp_path):
    """Debian's and Ubuntu's need a package of their own for it."""
    commands: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "find_pythons", lambda work: ["/bin/false"])
    monkeypatch.setattr(bootstrap, "fetch_uv", lambda work: "uv")
    monkeypatch.setattr(bootstrap, "run", lambda command, **_: commands.append(command))
    bootstrap.make_environment(str(tmp_path / "environment"), str(tmp_path), with_pip=True)
    assert commands[0][-3:-1] == ["--python", "/bin/false"]


def test_uv_needs_no_pip_and_is_pinned_by_its_hash(store, monkeypatch, tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(bootstrap.UV_PROGRAM, "#!/bin/sh\nexit 7\n")
    store.put("b", "uv.whl", stream.getvalue())
    monkeypatch.setattr(bootstrap, "UV_URL", "gs://b/uv.whl")
    with pytest.raises(SystemExit):
        bootstrap.fetch_uv(str(tmp_path))
    assert not (tmp_path / "uv").exists()
    found = hashlib.sha256(stream.getvalue()).hexdigest()
    monkeypatch.setattr(bootstrap, "UV_SHA256", found)
    assert os.waitstatus_to_exitcode(os.system(bootstrap.fetch_uv(str(tmp_path)))) == 7


def put_python(store: FakeStorage, program: str) -> tuple[str, str]:
    """An archive of a Python whose program is a script; its name and its SHA-256."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        item = tarfile.TarInfo("python/bin/python3")
        item.size, item.mode = len(program), 0o755
        archive.addfile(item, io.BytesIO(program.encode()))
    store.put("b", "of/python.tar.gz", stream.getvalue())
    return "of/python.tar.gz", hashlib.sha256(stream.getvalue()).hexdigest()


def use_python(monkeypatch: pytest.MonkeyPatch, url: str, sha256: str = "") -> None:
    monkeypatch.setenv("MULTIHOT_PYTHON_URL", url + (sha256 and f"#sha256={sha256}"))


@pytest.mark.parametrize("way", ["gs, checked", "gs", "http"])
def test_a_python_of_the_users_own_is_used_instead_of_the_images(store, monkeypatch, tmp_path, way):
    name, sha256 = put_python(store, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    url = f"gs://b/{name}"
    if way == "http":
        address = os.environ["STORAGE_EMULATOR_HOST"]
        url = f"{address}/storage/v1/b/b/o/{quote(name, safe='')}?alt=media"
    use_python(monkeypatch, url, sha256 if "checked" in way else "")
    faults = iter(["503", "half"])
    store.plan = lambda request: next(faults, "")
    (found,) = bootstrap.find_pythons(str(tmp_path))
    assert found == str(tmp_path / "python" / "python" / "bin" / "python3")


@pytest.mark.parametrize(
    ("program", "sha256", "expected"),
    [
        ("#!/bin/sh\nexit 0\n", "0" * 64, f"expected {'0' * 64}"),
        ("#!/bin/sh\nexit 1\n", "", "no FOLDER/bin/python3 of Python 3.11 to 3.13 that runs"),
    ],
)
def test_another_python_than_the_one_asked_for_is_not_used(
    store, monkeypatch, tmp_path, capsys, program, sha256, expected
):
    name, _ = put_python(store, program)
    use_python(monkeypatch, f"gs://b/{name}", sha256)
    with pytest.raises(SystemExit) as ended:
        bootstrap.find_pythons(str(tmp_path))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and expected in error and error.count("\n") == 1


def test_a_command_that_fails_is_repeated_and_one_that_hangs_is_ended(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(bootstrap, "FIRST_PAUSE_SECONDS", 0.001)
    marks = tmp_path / "marks"
    script = f"echo >>{marks}; test $(wc -l <{marks}) -ge 3"
    bootstrap.run(["sh", "-c", script], attempts=3)
    assert len(marks.read_text()) == 3
    with pytest.raises(SystemExit):
        bootstrap.run(["false"], attempts=2, remedy="; do that")
    assert "false ended with exit code 1; do that" in capsys.readouterr().err
    monkeypatch.setattr(bootstrap, "INSTALL_SECONDS", 0.2)
    with pytest.raises(SystemExit):
        bootstrap.run(["sleep", "60"], attempts=3)
    assert "sleep 60 took more than 0.2 seconds" in capsys.readouterr().err


def test_what_is_installed_is_pinned_by_hashes(monkeypatch, tmp_path):
    commands: list[list[str]] = []
    monkeypatch.delenv("MULTIHOT_SITE_PACKAGES", raising=False)
    monkeypatch.setattr(bootstrap, "run", lambda command, **_: commands.append(command))

    def make_environment(environment: str, work: str, with_pip: bool) -> list[str]:
        Path(environment).mkdir()
        return ["install"]

    monkeypatch.setattr(bootstrap, "make_environment", make_environment)
    for _ in range(2):  # The second time, as after a reboot, all is there.
        python = bootstrap.install("a.whl", "tpu.txt", "0123", str(tmp_path))
        assert python == str(tmp_path / "environment" / "bin" / "python")
    assert commands == [
        ["install", "--require-hashes", "-r", "tpu.txt"],
        ["install", "--no-deps", "a.whl"],
    ]


def test_the_record_may_come_by_a_variable(store, monkeypatch, tmp_path):
    """A container has no metadata server; its job comes as a variable."""
    started: list[tuple] = []
    monkeypatch.setenv("MULTIHOT_JOB", json.dumps(JOB | {"wheel": ITEM, "requirements": ITEM}))
    monkeypatch.setattr(bootstrap, "install", lambda *_: "/environment/bin/python")
    monkeypatch.setattr(bootstrap.os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(bootstrap.os, "chdir", lambda folder: None)
    work = tmp_path / "work"
    bootstrap.main(["-", str(work), "--host=1"])
    ((program, arguments),) = started
    assert program == "/environment/bin/python"
    assert arguments[1:] == [
        "-m",
        "launch.machine.node",
        str(work / "job.json"),
        str(work),
        "--host=1",
    ]
    assert json.loads((work / "job.json").read_text())["name"] == "first"
