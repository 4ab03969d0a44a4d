"""The rendezvous: workers that meet, one that does not come, strangers at a worker's address."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from trainer.errors import RunAgain
from trainer.runtime.cluster import Cluster, rendezvous
from trainer.runtime.interruption import exit_timer


def free_ports(count):
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return tuple(f"127.0.0.1:{server.getsockname()[1]}" for server in servers)


def rendezvous_in_threads(addresses, delays, seconds):
    """What `rendezvous` said to each worker: None, or its error."""
    ends = [None] * len(delays)

    def work(index):
        time.sleep(delays[index])
        try:
            rendezvous(Cluster(addresses, index, "TF_CONFIG"), seconds)
        except RunAgain as error:
            ends[index] = str(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_four_workers_meet_however_late_one_of_them_comes():
    began = time.monotonic()
    assert rendezvous_in_threads(free_ports(4), [0, 0.3, 1.5, 0.1], 20) == [None] * 4
    assert 1.5 <= time.monotonic() - began < 10


def test_who_does_not_come_is_named():
    addresses = free_ports(3)
    ends = rendezvous_in_threads(addresses, [0, 0], 1.0)
    for said in ends:
        assert said.startswith(f"worker 2 ({addresses[2]}) did not come within --start_timeout=1 ")


def test_a_stranger_at_a_workers_address_is_not_met():
    """TensorFlow's server of a run that is still dying there speaks first, and says no greeting."""
    addresses = free_ports(2)
    host, port = addresses[1].split(":")
    with socket.create_server((host, int(port))) as stranger:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = stranger.accept()
                    with caller:
                        caller.sendall(b"\0\0\6\4\0\0\0\0\0\n")

        threading.Thread(target=answer, daemon=True).start()
        (said,) = rendezvous_in_threads(addresses, [0], 1.0)
    assert said.startswith(f"worker 1 ({addresses[1]}) did not come")


def test_workers_that_were_told_of_different_clusters_do_not_meet():
    one, two, three = free_ports(3)
    ends = {}

    def work(addresses, index):
        try:
            rendezvous(Cluster(addresses, index, "TF_CONFIG"), 1.0)
        except RunAgain as error:
            ends[index] = str(error)

    other = threading.Thread(target=work, args=((one, two, three), 1))
    other.start()
    work((one, two), 0)
    other.join()
    assert "worker 1" in ends[0] and "chief" in ends[1]


def test_an_address_that_is_taken_is_named():
    addresses = free_ports(2)
    with socket.create_server(("", int(addresses[0].split(":")[1]))):
        (said,) = rendezvous_in_threads(addresses, [0], 0.5)
    assert said.startswith(f"chief ({addresses[0]}): cannot listen there: Address already in use")


def test_the_timer_ends_a_process_that_holds_the_interpreter_lock():
    """`PyDLL` calls without giving the lock back: no other thread of Python's can run."""
    script = (
        "import ctypes\n"
        "from trainer.runtime.interruption import exit_timer\n"
        "with exit_timer(0.5):\n"
        "    pass\n"
        "print('within the time', flush=True)\n"
        "with exit_timer(1.0):\n"
        "    ctypes.PyDLL(None).sleep(30)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stdout == "within the time\n"
    assert time.monotonic() - began < 10


def test_a_timer_that_did_not_expire_is_gone():
    with exit_timer(1.0):
        pass
    time.sleep(1.5)
    with pytest.raises(ZeroDivisionError), exit_timer(30.0):
        raise ZeroDivisionError
