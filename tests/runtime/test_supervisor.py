"""A run that is started again as often as it may be, and not when its end is final."""

import os
import signal
import subprocess
import sys
import time

import pytest

# Ends with the codes given, one a start, and counts its starts in a file.
CHILD = """
import os, signal, sys
path, codes = sys.argv[1], sys.argv[2].split(",")
with open(path, "a+") as file:
    file.seek(0)
    start = len(file.read())
    file.write("x")
code = int(codes[min(start, len(codes) - 1)])
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""
# Says when it is there, and ends with 75 when SIGTERM or SIGINT comes.
WAITER = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
print("ready", os.getpid(), flush=True)
print("got", signal.Signals(signal.sigwait([signal.SIGTERM, signal.SIGINT])).name, flush=True)
os._exit(75)
"""
SUPERVISOR = """
import sys
from trainer.runtime.interruption import supervise
sys.exit(supervise([sys.executable, "-c", *sys.argv[2:]], int(sys.argv[1]), first_delay=0.05))
"""
PARENT = """
import sys
from trainer.runtime.interruption import supervise
sys.exit(supervise([sys.executable, "-c", sys.argv[1]], 3, first_delay=float(sys.argv[2])))
"""


def run(tmp_path, codes, max_restarts):
    """The exit code, how often the child started, and what the supervisor wrote."""
    path = tmp_path / "starts"
    # In a process of its own: this one may have used gRPC, whose poller aborts a forked child now
    # and then ("epoll_wait error: Bad file descriptor").
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, str(max_restarts), CHILD, str(path), codes],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, len(path.read_text()), done.stderr


@pytest.mark.parametrize(
    ("codes", "max_restarts", "expected"),
    [
        ("0", 3, (0, 1)),
        ("75,1,0", 3, (0, 3)),
        ("-9,-11,0", 3, (0, 3)),
        ("75", 2, (75, 3)),
        ("-9", 1, (137, 2)),
        ("2", 3, (2, 1)),
        ("130", 3, (130, 1)),
        ("75,2", 3, (2, 2)),
    ],
)
def test_it_restarts_what_a_restart_can_help(tmp_path, codes, max_restarts, expected):
    assert run(tmp_path, codes, max_restarts)[:2] == expected


def test_a_restart_is_one_line_with_the_exit_code(tmp_path):
    assert run(tmp_path, "75,-9,0", 5)[2] == (
        "multihot train: ended with exit code 75; starting again in 0.05 seconds (restart 1 of 5)\n"
        "multihot train: ended with exit code 137; starting again in 0.1 seconds (restart 2 of 5)\n"
    )


def start_parent(program, delay="0.05"):
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, program, delay],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_final(number):
    parent = start_parent(WAITER)
    assert parent.stdout.readline().startswith("ready")
    parent.send_signal(number)
    out, err = parent.communicate(timeout=30)
    assert parent.returncode == 75 and out == f"got {number.name}\n" and err == ""


def test_a_signal_between_two_runs_is_final():
    parent = start_parent("import os; os._exit(75)", delay="60")
    assert "starting again in 60 seconds" in parent.stderr.readline()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent death signal")
def test_a_child_whose_parent_was_killed_is_asked_to_stop():
    parent = start_parent(WAITER)
    pid = int(parent.stdout.readline().split()[1])
    parent.kill()
    assert parent.stdout.readline() == "got SIGTERM\n"
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_train_restarts_itself(tmp_path):
    """The command line, with a child that fails before it has anything to resume."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "train", f"--data_dir={tmp_path}/none"]
        + [f"--model_dir={tmp_path}/run", "--max_restarts=3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"{tmp_path}/none" in done.stderr
