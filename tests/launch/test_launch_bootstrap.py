"""bootstrap.py: downloads the job's package, checks it, and installs it into a Python that fits."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

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
    """Ubuntu 22.04 has Python 3.10 only; uv, pinned by its hash, installs 3.11."""
    commands: list[list[str]] = []
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    monkeypatch.setattr(bootstrap, "run", commands.append)
    environment = str(tmp_path / "environment")
    installer = bootstrap.make_environment(environment, str(tmp_path), with_pip=True)
    uv = str(tmp_path / "uv" / "bin" / "uv")
    assert installer[:3] == [uv, "pip", "install"]
    assert installer[-1] == f"{environment}/bin/python"
    get, make = commands
    assert get[:4] == [sys.executable, "-m", "pip", "install"] and "--require-hashes" in get
    assert (tmp_path / "uv.txt").read_text().count("--hash=sha256:") == 1
    assert make[0] == uv and make[1] == "venv" and make[-1] == environment


def test_what_is_installed_is_pinned_by_hashes(monkeypatch, tmp_path):
    commands: list[list[str]] = []
    monkeypatch.delenv("MULTIHOT_SITE_PACKAGES", raising=False)
    monkeypatch.setattr(bootstrap, "run", commands.append)

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
