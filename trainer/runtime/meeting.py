"""The workers' first meeting, before any of them goes where it can only wait for the others.

Each listens at its address and calls at those of the others until it has met all of them. Only then
does TensorFlow take over, at the same address: in its own meeting a worker that waits for another
one does so for ever, deaf to signals, and cannot say for whom.
"""

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator

from trainer.errors import RunAgain
from trainer.runtime.cluster import Cluster

_CONNECT_SECONDS = 2.0
_REPLY_SECONDS = 5.0
_PAUSE_SECONDS = 0.2
_LONGEST_GREETING = 64


def meet(cluster: Cluster, seconds: float) -> None:
    """Returns once this worker has met every other one.

    A greeting names the cluster, so that neither TensorFlow's own server of a run that is still
    dying at that address, nor a worker of another job, is taken for one of these.

    Raises:
      RunAgain: after `seconds`, naming those who did not come.
    """
    end = time.monotonic() + seconds
    greeting = f"multihot {hashlib.sha256(repr(cluster.addresses).encode()).hexdigest()[:16]}"
    waiting = {index for index in range(cluster.num_workers) if index != cluster.index}
    with _listen(cluster, end) as server, _answering(server, cluster.index, greeting, waiting):
        while True:
            for index in sorted(waiting):
                if _call(cluster.addresses[index], cluster.index, greeting) == index:
                    waiting.discard(index)
            names = [cluster.name(index) for index in sorted(waiting)]
            if not names:
                return
            if time.monotonic() > end:
                raise RunAgain(
                    f"{', '.join(names)} did not come within --start_timeout={seconds:g} seconds; "
                    f"start all {cluster.num_workers} workers that {cluster.source} names by the "
                    "same command, and check that they reach each other"
                )
            time.sleep(_PAUSE_SECONDS)


def _listen(cluster: Cluster, end: float) -> socket.socket:
    """The socket at this worker's address; a process of the last run may still be leaving it."""
    port = int(cluster.addresses[cluster.index].rpartition(":")[2])
    while True:
        try:
            return socket.create_server(("", port), backlog=max(16, cluster.num_workers))
        except OSError as error:
            if time.monotonic() > end:
                raise RunAgain(
                    f"{cluster.name(cluster.index)}: cannot listen there: {error.strerror}; end "
                    "the program that does, or name another port"
                ) from error
            time.sleep(_PAUSE_SECONDS)


@contextlib.contextmanager
def _answering(
    server: socket.socket, index: int, greeting: str, waiting: set[int]
) -> Iterator[None]:
    """Answers callers in a thread, and takes them off `waiting`, until the block ends."""
    closing = threading.Event()
    server.settimeout(_PAUSE_SECONDS)

    def answer() -> None:
        while not closing.is_set():
            # What comes may be anybody: a port scan, a health check, a worker that was killed.
            with contextlib.suppress(OSError):
                caller, _ = server.accept()
                with caller:
                    caller.settimeout(_REPLY_SECONDS)
                    met = _exchange(caller, index, greeting)
                    if met is not None:
                        waiting.discard(met)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def _call(address: str, index: int, greeting: str) -> int | None:
    """Who answers at an address: the index of a worker of this cluster, or None."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as peer:
            peer.settimeout(_REPLY_SECONDS)
            return _exchange(peer, index, greeting)
    except OSError:
        return None


def _exchange(peer: socket.socket, index: int, greeting: str) -> int | None:
    """Sends this worker's greeting, and returns the index of that which comes back."""
    peer.sendall(f"{greeting} {index}\n".encode())
    received = b""
    while not received.endswith(b"\n") and len(received) < _LONGEST_GREETING:
        more = peer.recv(_LONGEST_GREETING)
        if not more:
            return None
        received += more
    said, _, number = received.decode("utf-8", "replace").strip().rpartition(" ")
    return int(number) if said == greeting and number.isdigit() else None
