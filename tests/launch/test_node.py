"""The commands that a job's machines run, and what the machines report to the bucket."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from launch.cloud.follow import JobLog, describe_state, read_records
from launch.job import Job, StoredFile, check_name
from launch.machine import node
from launch.machine.node import Node, parse_endpoints, read_index
from launch.machine.reports import Ending, Reporter, State
from trainer.errors import RunAgain, UserError
from trainer.storage import gcs

NOTHING = StoredFile("none", 0, "0" * 64)
JOB = Job(
    name="first",
    group="first",
    submission="20240501t000000-a",
    bucket="b",
    commands=(("train", "--model_dir=gs://d/m"), ("export", "--export_dir=gs://d/e")),
    environment="tpu",
    accelerator="v5e:4x4",
    resource="projects/p/locations/z/queuedResources/first",
    wheel=NOTHING,
    requirements=NOTHING,
    max_restarts=2,
    max_seconds=600,
)
ADDRESSES = ["10.0.0.2", "10.0.0.3"]


class Processes:
    """Replaces the processes that a node starts: records their commands, returns given codes."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.started: list[list[str]] = []

    def run(self, command: list[str], what: str, shared: bool = True) -> int:
        self.started.append(list(command))
        return self.codes.pop(0)

    def names(self) -> list[str]:
        return [item[item.index("trainer.cli") + 1] for item in self.started]


def make_node(
    monkeypatch, tmp_path: Path, processes: Processes, host: int = 0, addresses=(), job: Job = JOB
) -> Node:
    monkeypatch.setattr(node, "_PAUSE_SECONDS", 0.0)
    made = Node(job, tmp_path, host, 0, addresses)
    monkeypatch.setattr(made, "_run_process", processes.run)
    return made


@pytest.mark.parametrize(
    ("codes", "expected", "names"),
    [
        ([0, 0], 0, ["train", "export"]),
        ([75, 75, 0, 0], 0, ["train", "train", "train", "export"]),
        ([75, 75, 75], 75, ["train", "train", "train"]),
        ([2], 2, ["train"]),
        ([0, 137], 137, ["train", "export"]),
    ],
)
def test_commands_run_in_order_and_again_after_exit_code_75(
    cloud, monkeypatch, tmp_path, codes, expected, names
):
    processes = Processes(*codes)
    assert make_node(monkeypatch, tmp_path, processes).run() == expected
    assert processes.names() == names


def test_the_machine_that_comes_after_goes_on_where_the_first_stopped(cloud, monkeypatch, tmp_path):
    first, second = Processes(0, 143), Processes(0)
    assert make_node(monkeypatch, tmp_path, first).run() == 143
    assert make_node(monkeypatch, tmp_path, second).run() == 0
    assert second.names() == ["export"]
    # Another submission of the same name begins from its beginning.
    other = dataclasses.replace(JOB, submission="20250501t000000-b")
    third = Processes(0, 0)
    assert make_node(monkeypatch, tmp_path, third, job=other).run() == 0
    assert third.names() == ["train", "export"]


def test_the_first_host_of_a_pod_takes_the_chips_of_all(cloud, monkeypatch, tmp_path):
    """The first host alone runs commands, with the addresses of all; the third look finds both."""
    looks = [["10.0.0.3"], ["10.0.0.3"], []]
    monkeypatch.setattr(node.Cluster, "find_missing", lambda self: looks.pop(0))
    log = tmp_path / "served"
    script = f"import time; open({str(log)!r}, 'a').write('x'); time.sleep(60)"
    monkeypatch.setattr(node, "runtime_command", lambda: [sys.executable, "-c", script])

    class Slow(Processes):
        def run(self, command: list[str], what: str, shared: bool = True) -> int:
            while not log.exists():
                time.sleep(0.01)
            return super().run(command, what, shared)

    processes = Slow(0, 0)
    assert make_node(monkeypatch, tmp_path, processes, addresses=ADDRESSES).run() == 0
    train, export = processes.started
    assert train[-1] == "--tpu=grpc://10.0.0.2:8470,grpc://10.0.0.3:8470"
    assert export[-1] == "--export_dir=gs://d/e"
    assert log.read_text() == "x" and looks == []


def test_a_host_of_a_pod_that_never_serves_is_not_waited_for_for_ever(cloud, monkeypatch, tmp_path):
    monkeypatch.setattr(node, "_SERVERS_SECONDS", 0.0)
    monkeypatch.setattr(node, "runtime_command", lambda: [sys.executable, "-c", ""])
    monkeypatch.setattr(node.Cluster, "find_missing", lambda self: ["worker 2 (10.0.0.3:8470)"])
    processes = Processes()
    made = make_node(monkeypatch, tmp_path, processes, addresses=ADDRESSES)
    with made.reporter:
        assert made.run() == 75
    assert "gave up waiting for worker 2 (10.0.0.3:8470)" in JobLog(JOB).read_new()


def test_the_other_hosts_of_a_pod_serve_their_chips(cloud, monkeypatch, tmp_path):
    processes = Processes(1)
    assert make_node(monkeypatch, tmp_path, processes, host=1, addresses=ADDRESSES).run() == 1
    assert processes.started == [node.runtime_command()]


def test_machines_of_tf_config_all_train_and_the_first_does_the_rest(cloud, monkeypatch, tmp_path):
    processes = Processes(0)
    assert make_node(monkeypatch, tmp_path, processes, host=1).run() == 0
    assert processes.names() == ["train"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("nonsense", 0),
        ('{"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": "chief"'
         ', "index": 0}}', 0),
        ('{"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": "worker"'
         ', "index": 1}}', 2),
        ('{"cluster": {"worker": ["b:1", "c:1"]}, "task": {"type": "worker", "index": 1}}', 1),
    ],
)  # fmt: skip
def test_the_number_of_a_machine_by_tf_config(text, expected):
    assert read_index({"TF_CONFIG": text}) == expected


def test_endpoints_of_the_metadata_are_addresses_in_order():
    assert parse_endpoints("unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3") == ADDRESSES
    assert parse_endpoints("") == []


def test_output_comes_to_the_bucket_in_order_without_what_bars_drew_over(cloud):
    with Reporter(JOB, 0, 1, interval=0.05) as reporter:
        reporter.begin("running train (1 of 2)")
        reporter.take(b"first line\nbar:   0%\rbar:  50")
        time.sleep(0.3)
        reporter.take(b"%\rbar: 100%\nlast, without an end")
    text = JobLog(JOB).read_new()
    assert text == (
        "multihot: host 0: running train (1 of 2)\nfirst line\nbar: 100%\nlast, without an end\n"
    )
    (state,) = read_records(JOB, State).values()
    assert (state.attempt, state.what) == (1, "running train (1 of 2)")
    assert state.line == "last, without an end"
    assert 0 <= time.time() - state.time < 60


def test_a_log_is_read_as_it_comes(cloud):
    log = JobLog(JOB)
    assert log.read_new() == ""
    with Reporter(JOB, 0, 0, interval=0.02) as reporter:
        reporter.take(b"one\n")
        deadline = time.monotonic() + 10
        while (text := log.read_new()) == "" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert text == "one\n"
        reporter.take(b"two\n")
    assert log.read_new() == "two\n"
    assert log.read_new() == ""


def test_a_store_that_is_away_loses_nothing(cloud, monkeypatch, capfd):
    away = threading.Event()
    upload = gcs.upload

    def upload_or_fail(*arguments):
        if away.is_set():
            raise RunAgain("away")
        return upload(*arguments)

    monkeypatch.setattr(gcs, "upload", upload_or_fail)
    away.set()
    with Reporter(JOB, 0, 0, interval=0.02) as reporter:
        reporter.take(b"one\n")
        time.sleep(0.2)
        reporter.take(b"two\n")
        away.clear()
    assert JobLog(JOB).read_new() == "one\ntwo\n"
    assert "cannot report: away" in capfd.readouterr().out


def test_a_process_is_run_and_its_end_recorded(cloud, monkeypatch, tmp_path):
    """A command that fails in a real process."""
    job = dataclasses.replace(
        JOB, environment="cpu", commands=(("sample", "--output=x.jsonl", "--num_documents=0"),)
    )
    path = tmp_path / "job.json"
    path.write_text(job.to_json())
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("PYTHONPATH", str(Path(node.__file__).parents[2]))
    try:
        assert node.main([str(path), str(tmp_path), "--host=0"]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    (ending,) = read_records(job, Ending).values()
    assert ending.exit_code == 2 and "multihot sample: error: --num_documents=0" in ending.reason
    assert json.loads((tmp_path / "exit_code.json").read_text())["exit_code"] == 2


def test_a_machine_that_is_taken_away_passes_the_signal_on(cloud, monkeypatch, tmp_path):
    """SIGTERM reaches the command, which ends with 0; the node ends with 75."""
    script = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=1)\n"
    script += "signal.pause()"
    stopping = Node(dataclasses.replace(JOB, max_restarts=0), tmp_path, 0, 0, ())
    monkeypatch.setattr(
        stopping,
        "_run_command",
        lambda *_: stopping._run_process([sys.executable, "-c", script], "x"),
    )
    take = stopping.reporter.take

    def take_and_stop(data: bytes) -> None:
        take(data)
        if b"up" in data:
            stopping.stop()

    monkeypatch.setattr(stopping.reporter, "take", take_and_stop)
    assert stopping.run() == 75


def test_a_silent_machine_is_said_to_be_silent():
    state = State("s", 0, 0, "running train (1 of 1)", "step 7", time=1000.0)
    assert describe_state(state, now=1010.0) == "running train (1 of 1): step 7"
    assert describe_state(state, now=1500.0).endswith("step 7 (silent for 500 s)")


def test_a_record_is_itself_again(tmp_path):
    assert Job.from_json(JOB.to_json()) == JOB
    with pytest.raises(UserError, match="not a record of this version"):
        Job.from_json("{}")
    for name in ("a", "a-1", "a" * 52):
        check_name(name)


def test_the_runtime_of_a_pods_host_knows_its_place(monkeypatch):
    from fake_machine import FakeMachine, serve

    from launch.machine import tpu_runtime

    machine = FakeMachine(
        {
            "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3",
            "agent-worker-number": "1",
        },
        ip="10.0.0.3",
    )
    with serve(machine) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        variables = tpu_runtime.slice_variables()
    assert variables["CLOUD_TPU_TASK_ID"] == "1"
    assert variables["TPU_MESH_CONTROLLER_ADDRESS"] == "10.0.0.2:8476"
    assert variables["TPU_HOSTNAME_OVERRIDE"] == "10.0.0.3"


def test_the_server_of_chips_opens_them(monkeypatch):
    """On the first host too, whose commands leave the chips to it."""
    from launch.machine import tpu_runtime

    seen = {}
    worker = types.SimpleNamespace(main=lambda _: seen.update(os.environ))
    tools = types.SimpleNamespace(grpc_tpu_worker=worker)
    monkeypatch.setitem(sys.modules, "tensorflow.python.tools", tools)
    monkeypatch.setattr(tpu_runtime, "slice_variables", lambda: {"CLOUD_TPU_TASK_ID": "0"})
    monkeypatch.setattr(tpu_runtime.tpu_environment, "prepare", lambda: seen.update(prepared="1"))
    monkeypatch.setenv("TPU_LOAD_LIBRARY", "0")
    monkeypatch.setenv("CLOUD_TPU_TASK_ID", "7")
    tpu_runtime.main()
    assert seen["TPU_LOAD_LIBRARY"] == "1" and seen["CLOUD_TPU_TASK_ID"] == "0" and seen["prepared"]


def test_job_records_need_no_installed_package():
    """bootstrap.py runs before anything is installed, with the standard library alone."""
    script = Path(node.__file__).with_name("bootstrap.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "/none/job.json", "/none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ModuleNotFoundError" not in done.stderr
    assert "/none" in done.stderr
