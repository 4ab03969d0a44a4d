"""The workers of a job: who they are, their rendezvous, and what happens when one is lost.

TF_CONFIG or Slurm names the workers. Before TensorFlow connects them, `rendezvous` waits until each
has talked to every other one at the addresses that TensorFlow will use. TensorFlow's own start
waits for a missing worker without end, does not react to signals, and cannot name the worker.
During a run `naming_lost_workers` names the worker that TensorFlow's error is about; `peer_watch`
ends the process when no error comes.
"""

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.runtime.workers import background_thread
from trainer.storage.own_files import parse
from trainer.streams import end_process

_CONNECT_SECONDS = 2.0
_EXPECTED = (
    '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}, with a '
    '"chief" beside the workers or not'
)
# A job's number chooses its ports, so that jobs that share a node differ. Linux hands out higher
# ports to outgoing connections.
_SLURM_PORTS = range(12_000, 32_000)
_SLURM_TASKS_A_NODE = 16


@dataclass(frozen=True)
class Cluster:
    """The workers of a job: HOST:PORT of each, the chief's first, and this process's index.

    `source` is what named them: TF_CONFIG, Slurm or --tpu.
    """

    addresses: tuple[str, ...]
    index: int
    source: str

    @property
    def num_workers(self) -> int:
        """The number of workers, this process included."""
        return len(self.addresses)

    def name(self, index: int) -> str:
        """A worker's name in messages: `chief (HOST:PORT)`, `worker 1 (HOST:PORT)`."""
        return f"{f'worker {index}' if index else 'chief'} ({self.addresses[index]})"

    def find_missing(self) -> list[str]:
        """The names of the other workers that accept no connection; all are tried at once."""
        peers = [index for index in range(self.num_workers) if index != self.index]
        with ThreadPoolExecutor(max_workers=max(1, len(peers))) as pool:
            answers = list(pool.map(lambda index: _answers(self.addresses[index]), peers))
        return [self.name(index) for index, there in zip(peers, answers, strict=True) if not there]


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS)


def _answers(address: str) -> bool:
    try:
        with _connect(address):
            return True
    except OSError:
        return False


def read_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster in TF_CONFIG, else that of a Slurm step, else None; UserError for a wrong one."""
    text = environment.get("TF_CONFIG", "").strip()
    if text:
        return _parse_tf_config(text)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _parse_slurm(environment)
    return None


def _parse_tf_config(text: str) -> Cluster | None:
    """TF_CONFIG as a cluster; other keys (Vertex AI adds environment and job) are ignored."""
    config = parse(Any, text, "TF_CONFIG", f"expected {_EXPECTED}", what="is not JSON")
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
    except (TypeError, ValueError, OverflowError):
        index = -1
    if not 0 <= index < count:
        raise UserError(
            f"TF_CONFIG: this process is {kind!r} number {task.get('index')!r}, but the cluster "
            f"has {count} of them; expected an index below that"
        )
    return kind, index


def _parse_slurm(environment: Mapping[str, str]) -> Cluster:
    """The cluster of a Slurm step (`srun`), its tasks in order of rank.

    TensorFlow's own resolver does not serve: it sorts the nodes by name, so node 10 gets the rank
    of node 2, and it calls nvidia-smi even on machines without a GPU.
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


# What TensorFlow raises for a lost worker: from the collective that waits for it, from the
# coordination service, or because the cluster was restarted around this process.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)
# Raised for a lost worker, but also for faults of our own.
_PERHAPS_LOST = (tf.errors.InternalError, tf.errors.UnknownError, tf.errors.FailedPreconditionError)
_PROBE_INTERVAL = 5.0
_MAX_SILENT_PROBES = 4
# TensorFlow reports a lost worker within about 15 seconds. It gets this long to do so first, since
# its error says more.
_GRACE_SECONDS = 20.0


def describe_missing(missing: Sequence[str]) -> str:
    """`worker 1 (HOST:PORT) does not answer`, for one or several."""
    return f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not answer"


def _lost_worker(cluster: Cluster, what: str) -> str:
    return (
        f"lost a worker: {what}; run the same command again on all {cluster.num_workers} workers, "
        "to go on from the last checkpoint"
    )


def peer_watch(cluster: Cluster) -> AbstractContextManager[None]:
    """Ends this process with exit code 75 if a worker is lost and TensorFlow does not notice.

    A thread tries to connect to every other worker every 5 seconds. When one has not answered for
    20 seconds and TensorFlow reports nothing in 20 more, the process ends.
    """

    def watch(stopped: threading.Event) -> None:
        silent = 0
        while not stopped.wait(_PROBE_INTERVAL):
            missing = cluster.find_missing()
            silent = silent + 1 if missing else 0
            if silent == _MAX_SILENT_PROBES and not stopped.wait(_GRACE_SECONDS):
                end_process(_lost_worker(cluster, describe_missing(missing)), RUN_AGAIN)

    # A probe may take two seconds: the end of the run does not wait for it.
    return background_thread(watch, wait=False)


@contextlib.contextmanager
def naming_lost_workers(cluster: Cluster) -> Iterator[None]:
    """Turns TensorFlow's errors for a lost worker into `RunAgain`, which names it."""
    try:
        yield
    except (*_LOST, *_PERHAPS_LOST) as error:
        missing = cluster.find_missing()
        if not missing and isinstance(error, _PERHAPS_LOST):
            raise
        # A collective's message is long; the reason stands last, after the graph's traceback.
        lines = [line for line in str(error.message).splitlines() if line.strip()]
        said = next((line for line in lines if "abort" in line or "unhealthy" in line), lines[0])
        what = describe_missing(missing) if missing else f"all answer, but {said.strip()[:200]}"
        raise RunAgain(_lost_worker(cluster, what)) from error


_REPLY_SECONDS = 5.0
_PAUSE_SECONDS = 0.2
_MAX_GREETING_BYTES = 64


def rendezvous(cluster: Cluster, seconds: float) -> None:
    """Returns once this worker has exchanged greetings with every other one.

    The greeting names the cluster. So neither the TensorFlow server of an earlier run that is still
    ending at that address, nor a worker of another job, counts as one of these workers. After that
    many seconds `RunAgain` names the workers that did not come.
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
    """The socket at this worker's address; waits for a process of an earlier run to leave it."""
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


def _answering(
    server: socket.socket, index: int, greeting: str, waiting: set[int]
) -> AbstractContextManager[None]:
    """Answers callers in a thread, and removes them from `waiting`, until the block ends."""
    server.settimeout(_PAUSE_SECONDS)

    def answer(stopped: threading.Event) -> None:
        while not stopped.is_set():
            # Anything may connect: a port scan, a health check, a worker that was killed.
            with contextlib.suppress(OSError):
                caller, _ = server.accept()
                with caller:
                    met = _exchange(caller, index, greeting)
                    if met is not None:
                        waiting.discard(met)

    return background_thread(answer)


def _call(address: str, index: int, greeting: str) -> int | None:
    """The index of the worker of this cluster that answers at an address; None if none does."""
    try:
        with _connect(address) as peer:
            return _exchange(peer, index, greeting)
    except OSError:
        return None


def _exchange(peer: socket.socket, index: int, greeting: str) -> int | None:
    """Sends this worker's greeting; returns the index in the peer's, None if it is not one."""
    peer.settimeout(_REPLY_SECONDS)
    peer.sendall(f"{greeting} {index}\n".encode())
    received = b""
    while not received.endswith(b"\n") and len(received) < _MAX_GREETING_BYTES:
        more = peer.recv(_MAX_GREETING_BYTES)
        if not more:
            return None
        received += more
    said, _, number = received.decode("utf-8", "replace").strip().rpartition(" ")
    return int(number) if said == greeting and number.isdigit() else None
