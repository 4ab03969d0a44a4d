"""The startup script of a slice's hosts, run for real in clean folders, against fakes."""

import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from booting import (
    BUCKET,
    DELETE,
    JOB,
    PLACE,
    TRAINING,
    check_model_folder,
    make_host,
    packed,
    set_job,
)

from launch.cloud import package
from launch.cloud.tpu_slices import make_metadata
from launch.machine.reports import Ending, State


def test_a_job_runs_in_a_clean_folder_and_the_slice_is_deleted(tmp_path):
    """The second command reads the first one's file, whose name a shell would expand."""
    odd = "a $(touch pwned)\"; touch 'pwned' `touch pwned` & #.jsonl"
    commands = (
        ("sample", f"--output={odd}", "--num_documents=120"),
        ("prepare", f"--input={odd}", "--data_dir=gs://data/d", "--vocab_size=300"),
    )
    with make_host(tmp_path, JOB) as host:
        job = packed(host.storage, dataclasses.replace(JOB, commands=commands))
        set_job(host, job)
        host.start()
        assert host.wait() == 0, host.logs()
        assert host.machine.deletes == [DELETE]
        assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 0
        state = json.loads(host.read("state/host-0.json"))
        assert (state["submission"], state["what"]) == (job.submission, "running prepare (2 of 2)")
        assert json.loads(host.read("state/done.json"))["num_done"] == 2
        text = host.logs()
        assert "host 0: running sample (1 of 2)" in text
        assert "120 documents" in text and "\r" not in text
        assert "host 0 ends with exit code 0" in host.read(
            f"logs/host-0/{job.submission}-000-startup.log"
        )
        assert "d/metadata.json" in host.storage.buckets["data"]
        assert not list(tmp_path.rglob("pwned"))
        assert (host.work / odd).exists()


def test_a_bootstrap_that_fails_leaves_its_exit_code_and_no_slice(tmp_path):
    with make_host(tmp_path, JOB, "import sys; print('no'); sys.exit(7)") as host:
        host.start()
        assert host.wait() == 7
        assert host.machine.deletes == [DELETE]
        ending = json.loads(host.read("exit_code/host-0"))
        assert (ending["exit_code"], ending["submission"]) == (7, JOB.submission)
        assert "no\n" in host.read(f"logs/host-0/{JOB.submission}-000-startup.log")


def test_a_package_that_is_not_the_submitted_one_is_not_run(tmp_path):
    with make_host(tmp_path, JOB) as host:
        job = packed(host.storage, JOB)
        host.storage.put(BUCKET, f"{PLACE}/package/{job.wheel.name}", b"another")
        set_job(host, job)
        host.start()
        assert host.wait() == 2
        assert host.machine.deletes == [DELETE]
        log = host.read(f"logs/host-0/{JOB.submission}-000-startup.log")
        assert f"expected {job.wheel.sha256}" in log


def test_a_host_of_a_pod_is_told_its_place_and_says_what_it_does(tmp_path):
    with make_host(
        tmp_path, JOB, "import json, sys; json.dump(sys.argv, open('argv', 'w'))"
    ) as host:
        endpoints = "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"
        host.machine.attributes |= {
            "agent-worker-number": "1",
            "worker-network-endpoints": endpoints,
            "multihot-attempt": "2",
        }
        host.start()
        assert host.wait() == 0
        program, job, work, *flags = json.loads((host.work / "argv").read_text())
        assert [program, job] == [str(host.work / name) for name in ("bootstrap.py", "job.json")]
        assert work == str(host.work)
        assert flags == ["--host=1", "--attempt=2", f"--endpoints={endpoints}"]
        state = State(**json.loads(host.read("state/host-1.json")))
        assert (state.submission, state.attempt, state.what) == (JOB.submission, 2, "installing")
        ending = Ending(**json.loads(host.read("exit_code/host-1")))
        assert (ending.host, ending.attempt, ending.exit_code) == (1, 2, 0)


def test_an_account_that_could_not_delete_the_slice_is_told_before_the_job_runs(tmp_path):
    with make_host(tmp_path, JOB, "open('ran', 'w')") as host:
        host.machine.has_role = False
        host.start()
        assert host.wait() == 2
        assert not (host.work / "ran").exists()
        log = host.read(f"logs/host-0/{JOB.submission}-000-startup.log")
        assert "--role=roles/tpu.admin" in log
        assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 2
        # Once the account has the role, the watchdog gets its way.
        assert host.machine.deletes == []
        host.machine.has_role = True
        host.wait_for_delete()


def test_the_watchdog_deletes_a_slice_whose_time_is_over(tmp_path):
    """The job hangs; the first two deletions are refused, which the serial console tells."""
    job = dataclasses.replace(JOB, max_seconds=30)
    with make_host(tmp_path, job, "import time; time.sleep(600)") as host:
        host.machine.refused_deletes = 2
        host.start()
        host.wait_for_delete()
        assert host.machine.refusals == 2
        assert host.wait(20) == 143
        lines = (tmp_path / "console").read_text().splitlines()
        command = "delete first --force --zone=us-central1-a --project=p"
        assert len(lines) == 2 and all(line.endswith(command) for line in lines)
        ending = json.loads(host.read("exit_code/host-0"))
        assert (ending["exit_code"], ending["reason"]) == (124, "the time of --max_hours was over")


def test_the_watchdog_outlives_the_script(tmp_path):
    """The script is killed, as when memory runs out; its slice is deleted all the same."""
    job = dataclasses.replace(JOB, max_seconds=60)
    with make_host(tmp_path, job, "import time; time.sleep(600)") as host:
        host.start()
        while not (host.work / "job.pid").exists():
            time.sleep(0.02)
        assert host.process is not None
        host.process.kill()
        host.wait_for_delete()


def test_a_deletion_that_is_refused_at_the_end_is_asked_for_again(tmp_path):
    with make_host(tmp_path, JOB, "") as host:
        host.machine.refused_deletes = 3
        host.start()
        assert host.wait() == 0
        host.wait_for_delete()
        assert host.machine.refusals == 3
        assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 0


def test_a_machine_that_cannot_delete_its_slice_kills_the_job_and_shuts_itself_down(tmp_path):
    """The job ignores SIGTERM, and so does its child."""
    script = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); "
        "open(f'{os.getpid()}.job', 'w'); time.sleep(600)"
    )
    job = dataclasses.replace(JOB, max_seconds=600)
    with make_host(tmp_path, job, script) as host:
        host.environment["MULTIHOT_SPEED"] = "120"
        host.machine.refused_deletes = 10**9
        host.start()
        assert host.wait_for_shut_down() == "shutdown --poweroff now"
        running = [int(path.stem) for path in host.work.glob("*.job")]
        assert len(running) == 2 and not any(map(is_alive, running))
        assert host.process is not None and host.process.wait(10) == -9
        said = (tmp_path / "console").read_text()
        assert "its machine shuts down" in said
        assert "delete first --force --zone=us-central1-a --project=p" in said.splitlines()[-1]
        assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 124


def is_alive(pid: int) -> bool:
    """Whether a process is there; one that nobody has waited for is not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_metadata_that_come_late_are_waited_for(tmp_path):
    with make_host(tmp_path, JOB, "") as host:
        host.machine.has_metadata = False
        host.start()
        time.sleep(2)
        assert (host.work / "watchdog.pid").exists() and not (host.work / "deadline").exists()
        host.machine.has_metadata = True
        assert host.wait() == 0
        assert host.machine.deletes == [DELETE]
        limits = [int((host.work / name).read_text()) for name in ("limit", "deadline")]
        assert limits[0] < limits[1]


def test_a_machine_whose_disk_is_broken_deletes_its_slice(tmp_path):
    """Nothing can be written where the script keeps its files: it keeps them in memory."""
    memory = Path("/dev/shm/multihot")
    if memory.exists():
        pytest.skip(f"{memory} is in use")
    with make_host(tmp_path, JOB, "import os; print(os.getcwd())") as host:
        host.work.write_text("no folder")
        try:
            host.start()
            assert host.wait() == 0
            assert host.machine.deletes == [DELETE]
            assert f"{memory}\n" in host.read(f"logs/host-0/{JOB.submission}-000-startup.log")
        finally:
            host.kill()
            shutil.rmtree(memory)


def test_the_users_python_is_told_to_the_bootstrap(tmp_path):
    script = "import os; open('url', 'w').write(os.environ['MULTIHOT_PYTHON_URL'])"
    odd = "gs://b/$(touch pwned);`touch pwned`"
    with make_host(tmp_path, JOB, script) as host:
        host.machine.attributes["multihot-python-url"] = odd
        host.start()
        assert host.wait() == 0
        assert (host.work / "url").read_text() == odd
        assert not list(tmp_path.rglob("pwned"))


def test_a_machine_that_is_taken_away_deletes_nothing_and_may_come_back(tmp_path):
    """SIGTERM is passed on; the next boot keeps the deadline."""
    hangs = "import time; print('runs', flush=True); time.sleep(600)"
    with make_host(tmp_path, JOB, hangs) as host:
        host.start()
        log = host.work / "startup.log"
        while not (log.exists() and "runs" in log.read_text()):
            time.sleep(0.02)
        assert host.process is not None
        host.process.terminate()
        assert host.wait(10) == 143
        assert host.machine.deletes == []
        assert not any(name.startswith("exit_code/") for name in host.names())
        deadline = (host.work / "deadline").read_text()
        host.kill()
        host.machine.attributes["multihot-bootstrap"] = "import sys; sys.exit(0)"
        host.start()
        while not host.machine.deletes:
            assert (host.work / "deadline").read_text() == deadline or host.machine.deletes
            time.sleep(0.02)
        assert host.wait() == 0
        assert json.loads(host.read("exit_code/host-0"))["exit_code"] == 0


def test_no_token_and_nothing_of_the_users_is_in_the_script():
    """The scripts are the same for every job, and the metadata has no token."""
    other = dataclasses.replace(JOB, name="other", commands=(("sample", "--output=x"),))
    one, two = make_metadata(JOB, 0), make_metadata(other, 1)
    for name in ("startup-script", "multihot-bootstrap"):
        assert one[name] == two[name]
    assert "token" not in "".join(one[name] for name in one if name.startswith("multihot-job"))


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; apt-get install shellcheck")
    script = Path(package.__file__).parents[1] / "machine" / "startup.sh"
    done = subprocess.run([program, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.long
def test_a_model_is_trained_measured_and_exported_on_a_clean_host(tmp_path):
    """What `make tpu-train` submits, small, on CPUs: the model folder lies in the bucket."""
    with make_host(tmp_path, JOB) as host:
        set_job(host, packed(host.storage, dataclasses.replace(JOB, commands=TRAINING)))
        host.start()
        assert host.wait(900) == 0, host.logs()
        assert host.machine.deletes == [DELETE]
        check_model_folder(host)


@pytest.mark.long
def test_a_command_that_fails_on_a_clean_host_leaves_its_words_and_no_slice(tmp_path):
    commands = (("train", "--data_dir=gs://data/none", "--model_dir=gs://data/m"),)
    with make_host(tmp_path, JOB) as host:
        set_job(host, packed(host.storage, dataclasses.replace(JOB, commands=commands)))
        host.start()
        assert host.wait(300) == 2
        assert host.machine.deletes == [DELETE]
        ending = json.loads(host.read("exit_code/host-0"))
        assert ending["exit_code"] == 2
        assert "multihot train: error: gs://data/none" in ending["reason"]
