"""Requests to stop: heard inside a long call, ended at once when repeated, passed on once."""

import contextlib
import http.server
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainer.runtime.interruption import Interruption, metadata_host, watch_maintenance

# A call that gives the interpreter lock back, as TensorFlow's do, and lets no handler run.
PROGRAM = """
import ctypes, sys
from trainer.runtime.interruption import Interruption
with Interruption() as interruption:
    import numpy
    if "training" in sys.argv:
        interruption.on_request(lambda: print("asked", interruption.reason, flush=True))
    print("ready", flush=True)
    left = 2
    while left:
        left = ctypes.CDLL(None).sleep(left)
    print("stopped", interruption.requested, flush=True)
ctypes.CDLL(None).sleep(1)
"""


def start(*arguments, interrupt=signal.SIG_DFL):
    """Starts the program; these tests may themselves run where SIGINT is ignored."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt),
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_main_thread_is_inside_a_call(number):
    process = start("training")
    began = time.monotonic()
    process.send_signal(number)
    assert process.stdout.readline() == f"asked {number.name}\n"
    assert time.monotonic() - began < 2
    out, err = process.communicate()
    assert process.returncode == 0 and out == "stopped True\n"
    assert err == (
        f"multihot train: {number.name}: stopping after this step; a second SIGINT (Ctrl-C) quits "
        "at once\n"
    )


def test_a_second_interrupt_quits_at_once():
    process = start("training")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked SIGINT\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and time.monotonic() - began < 2
    assert process.stderr.read().endswith("multihot train: error: interrupted\n")


def test_a_second_sigterm_changes_nothing():
    process = start("training")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 0 and out == "stopped True\n"


def test_before_the_first_step_a_request_ends_the_process():
    process = start()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75 and time.monotonic() - began < 2
    assert process.stderr.read() == (
        "multihot train: error: stopped by SIGTERM before the first step; run the same command "
        "again\n"
    )


def test_an_interrupt_that_is_ignored_stays_ignored():
    """As in a shell script's background job, which a Ctrl-C at the terminal is not meant for."""
    process = start("training", interrupt=signal.SIG_IGN)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 0 and out == "stopped False\n"


def test_a_sigterm_after_the_end_does_not_change_the_exit_code():
    process = start("training")
    assert process.stdout.readline() == "stopped False\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0


def test_a_callback_that_comes_late_is_called_at_once_and_interrupts_are_let_go_at_the_end():
    called = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Interruption() as interruption:
        interruption.on_request(lambda: called.append("first"))
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        interruption.request("a test")
        interruption.request("another")
        interruption.on_request(lambda: called.append("late"))
    assert sorted(called) == ["first", "late"] and interruption.reason == "a test"
    assert signal.pthread_sigmask(signal.SIG_SETMASK, mask) == mask | {signal.SIGTERM}


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server: 403 without its header, as Google's answers, and 503 while it is down."""

    values: dict[str, str] = {}
    is_down = False

    def do_GET(self):
        name = self.path.removeprefix("/computeMetadata/v1/instance/")
        code = 200 if self.headers["Metadata-Flavor"] == "Google" else 403
        self.send_response(503 if self.is_down else code)
        self.end_headers()
        self.wfile.write(self.values.get(name, "").encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def watch(monkeypatch, **values):
    """A metadata server with `values`, a watch over it, and what that passed on."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(Metadata, "is_down", False)
    monkeypatch.setattr(Metadata, "values", {"preempted": "FALSE", "maintenance-event": "NONE"})
    Metadata.values.update({name.replace("_", "-"): value for name, value in values.items()})
    notices = []
    try:
        with watch_maintenance(notices.append, interval=0.05):
            time.sleep(0.3)
            yield notices
    finally:
        server.shutdown()
        server.server_close()


def wait_for(notices):
    end = time.monotonic() + 5
    while not notices and time.monotonic() < end:
        time.sleep(0.02)
    return notices


@pytest.mark.parametrize(
    ("name", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_is_passed_on_once(monkeypatch, name, value):
    with watch(monkeypatch) as notices:
        assert notices == []
        Metadata.values[name] = value
        wait_for(notices)
        time.sleep(0.3)
        assert notices == [f"a notice of this machine's end ({name})"]


def test_a_migration_is_no_end(monkeypatch):
    with watch(monkeypatch) as notices:
        Metadata.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        time.sleep(0.3)
        assert notices == []


def test_a_notice_that_stopped_the_run_before_does_not_stop_this_one(monkeypatch):
    with watch(monkeypatch, maintenance_event="TERMINATE_ON_HOST_MAINTENANCE") as notices:
        assert notices == []
        Metadata.values["maintenance-event"] = "NONE"
        time.sleep(0.3)
        Metadata.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert len(wait_for(notices)) == 1


def test_a_server_that_is_down_for_a_while_is_asked_again(monkeypatch):
    with watch(monkeypatch) as notices:
        monkeypatch.setattr(Metadata, "is_down", True)
        Metadata.values["preempted"] = "TRUE"
        time.sleep(0.3)
        assert notices == []
        monkeypatch.setattr(Metadata, "is_down", False)
        assert len(wait_for(notices)) == 1


def test_only_a_machine_of_googles_is_asked(monkeypatch, tmp_path):
    product_name = tmp_path / "product_name"
    monkeypatch.setattr("trainer.runtime.interruption._PRODUCT_NAME", product_name)
    assert metadata_host({}) is None
    product_name.write_text("Standard PC\n")
    assert metadata_host({}) is None
    product_name.write_text("Google Compute Engine\n")
    assert metadata_host({}) == "metadata.google.internal"
    assert metadata_host({"GCE_METADATA_HOST": "here:80"}) == "here:80"
