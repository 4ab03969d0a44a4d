"""The workers of a job, as TF_CONFIG or Slurm names them, and whether they answer."""

import json
import re
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError

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
