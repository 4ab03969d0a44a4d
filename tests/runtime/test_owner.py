"""One owner a folder: the second is refused by name, and a dead one keeps nobody waiting."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_gcs import random_faults
from preparing import ROWS, config, write_rows

from trainer import evaluate, export, prepare, train
from trainer.errors import UserError
from trainer.preparation.data_folder import owning
from trainer.run_config import EvaluateConfig, ExportConfig, TrainConfig
from trainer.runtime import owner
from trainer.runtime.owner import OWNER_FILE, owned

URL = f"gs://b/run/{OWNER_FILE}"
OWNER = rf"on {socket.gethostname()} \(process {os.getpid()}, since 20\d\d-\d\d-\d\d [\d:]+ UTC\)"
HOLD = """
import sys, time
from trainer.runtime import owner
owner._RENEWAL_SECONDS = 0.1
with owner.owned(sys.argv[1], "--model_dir=run", "train"):
    print("owned", flush=True)
    time.sleep(60)
"""


def refused(command, flag):
    return rf"^--{flag}: another `multihot {command}` is writing to it, {OWNER}; wait for it to end"


def hold(path):
    """A process of its own that owns a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "owned\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    """Renewals every tenth of a second, and a lease of a second."""
    for name, seconds in {"_RENEWAL": 0.1, "_LEASE": 1.0, "_LOOK": 0.02}.items():
        monkeypatch.setattr(owner, f"{name}_SECONDS", seconds)


@pytest.mark.parametrize("kind", ["local", "cloud"])
def test_a_second_owner_is_refused_and_the_next_one_is_not(request, quick, kind, tmp_path):
    path = str(tmp_path / "new" / OWNER_FILE)
    if kind == "cloud":
        path, _ = URL, request.getfixturevalue("cloud")
    for _ in range(2):
        with owned(path, "--model_dir=run", "train"):
            for _ in range(2):
                with pytest.raises(UserError, match=refused("train", "model_dir=run")):
                    with owned(path, "--model_dir=run", "train"):
                        pass
    if kind == "cloud":
        assert request.getfixturevalue("cloud").buckets["b"] == {}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["local", "cloud"])
def test_a_killed_owner_is_followed_at_once(request, kind, tmp_path, capsys):
    path = tmp_path / OWNER_FILE
    if kind == "cloud":
        path, _ = URL, request.getfixturevalue("cloud")
    process = hold(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with owned(str(path), "--model_dir=run", "train"):
        assert time.monotonic() - began < 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / OWNER_FILE).exists()


def test_an_owner_of_another_machine_that_does_not_renew_is_followed(cloud, quick, capsys):
    content = b"on vm-7 (process 1, since then)\n0-1-2 pid:[3] 1\n"
    for left in (content, b"", b"\xff\xfe\n\n", b"\x00" * 10_000):
        cloud.put("b", f"run/{OWNER_FILE}", left)
        began = time.monotonic()
        with owned(URL, "--model_dir=gs://b/run", "train"):
            assert 1 <= time.monotonic() - began < 4
        assert "waiting up to 1 seconds" in capsys.readouterr().out.replace("for up", "up")
        assert cloud.buckets["b"] == {}


def test_of_two_that_follow_a_dead_owner_one_is_refused(cloud, quick):
    cloud.put("b", f"run/{OWNER_FILE}", b"on vm-7\nx 1\n")
    both = threading.Barrier(2)

    def follow(_):
        both.wait()
        try:
            with owned(URL, "--model_dir=gs://b/run", "train"):
                time.sleep(1.5)
                return "owned"
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(follow, range(2)))
    assert re.match(refused("train", "model_dir=gs://b/run"), found[0]) and found[1] == "owned"


def test_an_owner_that_was_followed_ends_with_one_line(cloud):
    process = hold(URL)
    cloud.put("b", f"run/{OWNER_FILE}", b"on vm-7 (process 1, since then)\nx 1\n")
    assert process.wait(10) == 2
    assert process.stderr.read() == (
        "multihot train: error: --model_dir=run: another `multihot train` is writing to it, on "
        "vm-7 (process 1, since then); wait for it to end, or end it, or name another folder\n"
    )
    assert cloud.buckets["b"][f"run/{OWNER_FILE}"].data.startswith(b"on vm-7")


def test_an_owner_outlasts_a_store_that_fails(cloud, quick):
    with owned(URL, "--model_dir=gs://b/run", "train"):
        cloud.plan = random_faults(5, 0.4)
        time.sleep(2)
        cloud.plan = lambda _: ""
        assert cloud.buckets["b"][f"run/{OWNER_FILE}"].data.decode().endswith(f" {os.getpid()}\n")
    assert cloud.buckets["b"] == {}


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="^--model_dir=run: cannot be written .*; expected a folder"
    ):
        with owned(str(tmp_path / place / OWNER_FILE), "--model_dir=run", "train"):
            pass


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with owned(str(tmp_path / OWNER_FILE), "--model_dir=run", "train"):
        pass
    assert capsys.readouterr().err == (
        "warning: --model_dir=run: its file system has no locks (No locks available); see to it "
        "that no other command writes there meanwhile\n"
    )


def test_a_second_train_is_refused_before_any_work_and_other_commands_are_not(
    model, corpus, tmp_path, monkeypatch
):
    run = str(Path(model).parent / "run")
    files = {path: os.stat(path).st_mtime_ns for path in Path(run).rglob("*.*")}
    again = TrainConfig(data_dir=corpus, model_dir=run, hidden_size=4)
    with owned(os.path.join(run, OWNER_FILE), f"--model_dir={run}", "train"):
        with pytest.raises(UserError, match=refused("train", f"model_dir={run}")):
            train.run(again)
        found = {path: os.stat(path).st_mtime_ns for path in Path(run).rglob("*.*")}
        assert found.pop(Path(run, OWNER_FILE)) and found == files
        evaluate.run(EvaluateConfig(model_dir=run, data_dir=corpus))
        export.run(ExportConfig(model_dir=run, export_dir=str(tmp_path / "model")))
        # Of several workers the chief owns the folder that all of them share.
        for index in (1, 2):
            cluster = '{"cluster": {"worker": ["a:1", "b:1", "c:1"]}, "task": {"type": "worker", '
            monkeypatch.setenv("TF_CONFIG", cluster + f'"index": {index}}}}}')
            with train._owning(again):
                pass
    assert sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize("kind", ["local", "cloud"])
def test_a_second_prepare_is_refused_before_any_work(request, quick, kind, tmp_path):
    data = str(tmp_path / "data")
    if kind == "cloud":
        data, _ = "gs://b/data", request.getfixturevalue("cloud")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with owning(data):
        with pytest.raises(UserError, match=refused("prepare", f"data_dir={data}")):
            prepare.run(config(rows, data, split="all"))
    prepare.run(config(rows, data, split="all"))


@pytest.mark.parametrize("kind", ["local", "cloud"])
def test_a_second_export_is_refused_before_any_work(request, quick, kind, model, tmp_path):
    place = str(tmp_path / "model")
    if kind == "cloud":
        place, _ = "gs://b/model", request.getfixturevalue("cloud")
    flags = ExportConfig(model_dir=str(Path(model).parent / "run"), export_dir=place)
    with owned(f"{place}.{OWNER_FILE}", f"--export_dir={place}", "export"):
        with pytest.raises(UserError, match=refused("export", f"export_dir={place}")):
            export.run(flags)
