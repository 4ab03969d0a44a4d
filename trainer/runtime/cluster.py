"""The workers of a job, as TF_CONFIG or Slurm names them, and whether they answer.

A deadline for calls that hold Python's interpreter lock while they wait.

TensorFlow does so where a worker joins its cluster and one of the others does not come: no thread
of Python's runs any more, no signal handler either. A POSIX timer calls C's `_exit` all the same.

What keeps a worker from waiting for ever for one that has gone, and says which it is.

The workers' first meeting, before any of them goes where it can only wait for the others.

Each listens at its address and calls at those of the others until it has met all of them. Only then
does TensorFlow take over, at the same address: in its own meeting a worker that waits for another
one does so for ever, deaf to signals, and cannot say for whom.
"""

import contextlib
import ctypes
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import tensorflow as tf

from trainer.errors import RUN_AGAIN, RunAgain, UserError, end_process

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux's <signal.h>: what a timer does when it expires."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    ]


class _Times(ctypes.Structure):
    """`struct itimerspec`: seconds and nanoseconds, of the interval and of the first expiry."""

    _fields_ = [
        (name, ctypes.c_long) for name in ("interval", "interval_nano", "value", "value_nano")
    ]


class ExitTimer:
    """Ends this process with exit code 75, silently, if a block takes longer than it may.

    Say what is about to happen before the block. Does nothing where there are no such timers.
    """

    def __init__(self, seconds: float) -> None:
        """Args: seconds: that the block may take, rounded up to whole ones."""
        self._seconds = int(-(-seconds // 1))
        self._timer = ctypes.c_void_p()
        self._library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __enter__(self) -> "ExitTimer":
        if self._library is not None:
            leave = ctypes.cast(self._library._exit, ctypes.c_void_p)
            event = _Event(value=RUN_AGAIN, notify=_SIGEV_THREAD, function=leave)
            times = _Times(value=self._seconds)
            timer = ctypes.byref(self._timer)
            made = self._library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), timer)
            set_up = made or self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)
            if set_up != 0:
                raise OSError("cannot make a POSIX timer")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._library is not None:
            self._library.timer_delete(self._timer)


PROBE_SECONDS = 2.0
_EXPECTED = (
    '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}, with a '
    '"chief" beside the workers or not'
)
# Slurm jobs that share a node keep apart by their numbers, below the ports that Linux hands out.
_SLURM_PORTS = range(12_000, 32_000)
_SLURM_TASKS_A_NODE = 16


@dataclass(frozen=True)
class Cluster:
    """The workers of a job.

    Attributes:
      addresses: HOST:PORT of each, the chief's first.
      index: which of them this process is.
      source: who named them: TF_CONFIG or Slurm.
    """

    addresses: tuple[str, ...]
    index: int
    source: str

    @property
    def num_workers(self) -> int:
        """How many there are, this process among them."""
        return len(self.addresses)

    def name(self, index: int) -> str:
        """A worker for the user: `chief (HOST:PORT)`, `worker 1 (HOST:PORT)`."""
        return f"{f'worker {index}' if index else 'chief'} ({self.addresses[index]})"

    def find_missing(self, seconds: float = PROBE_SECONDS) -> list[str]:
        """The names of the other workers that accept no connection.

        Args:
          seconds: to wait for each; all are asked at once.
        """
        peers = [index for index in range(self.num_workers) if index != self.index]
        with ThreadPoolExecutor(max_workers=max(1, len(peers))) as pool:
            answers = pool.map(lambda index: _answers(self.addresses[index], seconds), peers)
        return [self.name(index) for index, there in zip(peers, answers, strict=True) if not there]


def _answers(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except OSError:
        return False


def read_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that TF_CONFIG names, else the one of a Slurm step, else None.

    Args:
      environment: the process's variables.

    Raises:
      UserError: for a TF_CONFIG or Slurm variables that name no cluster that Multihot can run on.
    """
    text = environment.get("TF_CONFIG", "").strip()
    if text:
        return _parse_tf_config(text)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _parse_slurm(environment)
    return None


def _parse_tf_config(text: str) -> Cluster | None:
    """TF_CONFIG as a cluster; keys that others add (Vertex AI: environment, job) are ignored."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"TF_CONFIG: is not JSON ({error}); expected {_EXPECTED}") from None
    if not isinstance(config, dict) or not isinstance(config.get("cluster", {}), dict):
        raise UserError(f"TF_CONFIG={text}: expected {_EXPECTED}")
    jobs = config.get("cluster", {})
    if not jobs:
        return None
    unknown = sorted(set(jobs) - {"chief", "master", "worker", "evaluator"})
    if unknown:
        raise UserError(
            f"TF_CONFIG: names {', '.join(unknown)} tasks; Multihot runs on a chief and workers "
            "that all train alike: leave the others out"
        )
    offsets: dict[str, int] = {}
    addresses: list[str] = []
    for job in ("chief", "master", "worker"):
        offsets[job] = len(addresses)
        addresses += _check_addresses(job, jobs.get(job, []))
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG: names an address twice in {', '.join(addresses)}")
    kind, index = _parse_task(config.get("task"), jobs)
    return Cluster(tuple(addresses), offsets[kind] + index, "TF_CONFIG")


def _check_addresses(job: str, found: Any) -> list[str]:
    valid = isinstance(found, list) and all(
        isinstance(item, str) and re.fullmatch(r"(\[[^\]]+\]|[^\s:]+):\d{1,5}", item)
        for item in found
    )
    if not valid:
        raise UserError(f"TF_CONFIG: cluster.{job} is {found!r}; expected a list of HOST:PORT")
    return found


def _parse_task(task: Any, jobs: dict[str, list[str]]) -> tuple[str, int]:
    """(job, index within the job) of this process."""
    if not isinstance(task, dict) or "type" not in task:
        raise UserError(f"TF_CONFIG: task is {task!r}; expected {_EXPECTED}")
    kind = task["type"]
    if kind == "evaluator":
        raise UserError(
            "TF_CONFIG: this process is an evaluator; Multihot's workers evaluate themselves: "
            "start no evaluator (on Vertex AI, no worker pool 3)"
        )
    count = len(jobs.get(kind, [])) if isinstance(kind, str) else 0
    try:
        index = int(task.get("index", 0))
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < count:
        raise UserError(
            f"TF_CONFIG: this process is {kind!r} number {task.get('index')!r}, but the cluster "
            f"has {count} of them; expected an index below that"
        )
    return kind, index


def _parse_slurm(environment: Mapping[str, str]) -> Cluster:
    """The cluster of a Slurm step (`srun`), its tasks in order of rank.

    TensorFlow's own resolver sorts the nodes by name, so that the tenth node takes the rank of the
    second; and it asks nvidia-smi even where there is no GPU.
    """
    names = ("STEP_NODELIST", "STEP_TASKS_PER_NODE", "PROCID", "NODEID", "LOCALID", "JOB_ID")
    missing = [f"SLURM_{name}" for name in names if f"SLURM_{name}" not in environment]
    if missing:
        raise UserError(f"Slurm: {', '.join(missing)} not set; start the workers with srun")
    nodes, counts, rank, node, local, job = (environment[f"SLURM_{name}"] for name in names)
    hosts, tasks = _expand_hosts(nodes), _expand_counts(counts)
    if len(hosts) != len(tasks):
        raise UserError(
            f"Slurm: SLURM_STEP_NODELIST={nodes} names {len(hosts)} nodes, but "
            f"SLURM_STEP_TASKS_PER_NODE={counts} counts {len(tasks)}"
        )
    first_port = _SLURM_PORTS[int(job) * _SLURM_TASKS_A_NODE % len(_SLURM_PORTS)]
    places = [(where, task) for where, count in enumerate(tasks) for task in range(count)]
    if int(rank) >= len(places) or places[int(rank)] != (int(node), int(local)):
        raise UserError(
            f"Slurm: task {rank} is number {local} on node {node}, which is not how blocks are "
            "dealt; start the workers with srun --distribution=block"
        )
    addresses = tuple(f"{hosts[where]}:{first_port + task}" for where, task in places)
    return Cluster(addresses, int(rank), "Slurm")


def _expand_counts(text: str) -> list[int]:
    """Slurm's tasks a node: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected counts as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_hosts(text: str) -> list[str]:
    """Slurm's list of nodes, in its order: `n[08-10],gpu` is [n08, n09, n10, gpu]."""
    hosts = [host for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) for host in _expand(item)]
    if not hosts or any(re.search(r"[\[\]\s]", host) for host in hosts):
        raise UserError(f"SLURM_STEP_NODELIST={text}: expected nodes as n[08-10],gpu")
    return hosts


def _expand(item: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[]*)\[([\d,-]+)\](.*)", item)
    if match is None:
        yield item
        return
    before, ranges, after = match.groups()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand(after):
                yield f"{before}{number:0{len(first)}d}{rest}"


# What TensorFlow raises where a peer is gone: from the collective that waits for it, from the
# coordination service, or because the cluster was restarted around this process.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)
# Raised for a lost peer too, but also for faults of ours.
_PERHAPS_LOST = (tf.errors.InternalError, tf.errors.UnknownError, tf.errors.FailedPreconditionError)


def describe_missing(missing: Sequence[str]) -> str:
    """`worker 1 (HOST:PORT) does not answer`, for one or several."""
    return f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not answer"


class PeerWatch:
    """Ends this process with exit code 75 if a peer stays away and TensorFlow does not notice.

    TensorFlow reports a lost worker from the collective operation that waits for it, within about
    15 seconds. This is what holds when it does not: every peer is asked for a connection every few
    seconds, and one that was silent for `silence` seconds in a row ends the process after `grace`
    more, which leaves TensorFlow the time to say it better.
    """

    def __init__(
        self, cluster: Cluster, interval: float = 5.0, silence: float = 20.0, grace: float = 20.0
    ) -> None:
        """Args: cluster: whose peers to watch; interval, silence, grace: seconds."""
        self._cluster = cluster
        self._interval = interval
        self._probes = max(1, round(silence / interval))
        self._grace = grace
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeerWatch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()

    def _watch(self) -> None:
        silent = 0
        while not self._closing.wait(self._interval):
            missing = self._cluster.find_missing()
            silent = silent + 1 if missing else 0
            if silent == self._probes and not self._closing.wait(self._grace):
                end_process(lost_worker(self._cluster, describe_missing(missing)), RUN_AGAIN)


def lost_worker(cluster: Cluster, what: str) -> str:
    """The line for a run that lost a worker."""
    return (
        f"lost a worker: {what}; run the same command again on all {cluster.num_workers} workers, "
        "to go on from the last checkpoint"
    )


@contextlib.contextmanager
def naming_lost_workers(cluster: Cluster) -> Iterator[None]:
    """Turns TensorFlow's errors for a lost worker into a line that names it."""
    try:
        yield
    except (*_LOST, *_PERHAPS_LOST) as error:
        missing = cluster.find_missing()
        if not missing and isinstance(error, _PERHAPS_LOST):
            raise
        # The last words of a collective's long message, behind the graph's traceback.
        lines = [line for line in str(error.message).splitlines() if line.strip()]
        said = next((line for line in lines if "abort" in line or "unhealthy" in line), lines[0])
        what = describe_missing(missing) if missing else f"all answer, but {said.strip()[:200]}"
        raise RunAgain(lost_worker(cluster, what)) from error


_CONNECT_SECONDS = 2.0
_REPLY_SECONDS = 5.0
_PAUSE_SECONDS = 0.2
_LONGEST_GREETING = 64


def rendezvous(cluster: Cluster, seconds: float) -> None:
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
