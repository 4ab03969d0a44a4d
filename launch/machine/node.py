"""Runs a job's commands on one of its machines, and reports to the job's folder in the bucket.

    python -m launch.machine.node JOB_FILE WORK_DIR [--host=K] [--attempt=A] [--endpoints=…]

A command that ends with exit code 75 ("run again") is restarted, up to the job's --max_restarts.
Commands that were done before the machine was taken away are not run again.

On a slice of several hosts the first host runs the commands. Its TensorFlow uses the chips of the
others through a server that runs there (launch/machine/tpu_runtime.py). With TF_CONFIG, all
machines run `train` and `score`, which share their work, and the first machine runs the rest.

A machine that is taken away gets SIGTERM. This module passes it on to the command and ends with
exit code 75, because the job has not ended. Nothing here deletes anything.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.job import SHARED, Job
from launch.machine.reports import Reporter
from trainer.errors import RUN_AGAIN
from trainer.runtime.cluster import Cluster
from trainer.streams import protect_streams

RUNTIME_PORT = 8470
_PAUSE_SECONDS = 30.0
_OF_CLUSTER = ("TF_CONFIG", "CLUSTER_SPEC")
_POLL_SECONDS = 0.5
# Each host installs the package on its own, some of them later than the first.
_SERVERS_SECONDS = 1800.0


class Node:
    """One machine of a job."""

    def __init__(self, job: Job, work: Path, host: int, attempt: int, addresses: Sequence[str]):
        """See `main`; addresses: of the slice's hosts in order, none for other machines."""
        self.job = job
        self.work = work
        self.host = host
        self.addresses = tuple(addresses)
        self.reporter = Reporter(job, host, attempt)
        self.stopping = False
        self._child: subprocess.Popen[bytes] | None = None

    def stop(self, *_: object) -> None:
        """Ends the command; the handler of SIGTERM."""
        self.stopping = True
        if self._child is not None:
            self._child.terminate()

    def run(self) -> int:
        """Runs this machine's part of the job; returns the exit code."""
        if len(self.addresses) <= 1:
            code = self._run_commands()
        elif self.host > 0:
            code = self._run_process(runtime_command(), "serving its chips to host 0")
        else:
            with _serve_chips(self.work / "runtime.log"):
                code = self._await_servers() or self._run_commands()
        return RUN_AGAIN if self.stopping else code

    def _run_commands(self) -> int:
        """Runs the commands that are not done yet, up to the first that fails; its exit code."""
        num_done = self.reporter.read_num_done()
        for index, command in enumerate(self.job.commands):
            if index < num_done:
                self.reporter.say(f"{command[0]} was done before")
            elif self.host == 0 or command[0] in SHARED:
                code = self._run_command(index, command)
                if code != 0:
                    return code
                if self.host == 0:
                    self.reporter.record_num_done(index + 1)
        return 0

    def _await_servers(self) -> int:
        """Waits until all hosts of a slice serve their chips; returns an exit code."""
        hosts = tuple(f"{address}:{RUNTIME_PORT}" for address in self.addresses)
        cluster = Cluster(("this host", *hosts), 0, "the slice")
        self.reporter.begin(f"waiting for {len(hosts)} hosts to serve their chips")
        deadline = time.monotonic() + _SERVERS_SECONDS
        while not self.stopping and (missing := cluster.find_missing()):
            if time.monotonic() > deadline:
                self.reporter.say(f"gave up waiting for {', '.join(missing)}")
                return RUN_AGAIN
            self._sleep(_POLL_SECONDS)
        return 0

    def _run_command(self, index: int, command: tuple[str, ...]) -> int:
        """Runs one command, and restarts it while it ends with exit code 75."""
        what = f"running {command[0]} ({index + 1} of {len(self.job.commands)})"
        arguments = [sys.executable, "-u", "-m", "trainer.cli", *self._complete(command)]
        for restart in range(self.job.max_restarts + 1):
            code = self._run_process(arguments, what, shared=command[0] in SHARED)
            if code != RUN_AGAIN or self.stopping or restart == self.job.max_restarts:
                return code
            self.reporter.say(
                f"{command[0]} ended with exit code {code}; starting it again in "
                f"{_PAUSE_SECONDS:g} seconds (restart {restart + 1} of {self.job.max_restarts})"
            )
            self._sleep(_PAUSE_SECONDS)
            if self.stopping:
                return code
        raise AssertionError("the last restart returns")

    def _complete(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """A command with --tpu for all hosts of the slice, if it can use them and has none."""
        if len(self.addresses) <= 1 or command[0] not in SHARED:
            return command
        if any(flag.lstrip("-").partition("=")[0] == "tpu" for flag in command[1:]):
            return command
        hosts = ",".join(f"grpc://{address}:{RUNTIME_PORT}" for address in self.addresses)
        return (*command, f"--tpu={hosts}")

    def _run_process(self, command: Sequence[str], what: str, shared: bool = True) -> int:
        """Runs a process that does `what`, and passes its output to the reporter.

        Returns its exit code; 128 plus the signal's number if a signal ended it, as in shells. The
        variables that name the other machines are for commands that share their work.
        """
        self.reporter.begin(what)
        variables = {
            name: value for name, value in os.environ.items() if shared or name not in _OF_CLUSTER
        }
        if len(self.addresses) > 1:
            # Only one process can open the chips: the server, through which commands use them.
            variables["TPU_LOAD_LIBRARY"] = "0"
        with subprocess.Popen(
            command,
            cwd=self.work,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as child:
            self._child = child
            if self.stopping:
                child.terminate()
            assert child.stdout is not None
            while data := os.read(child.stdout.fileno(), 1 << 16):
                self.reporter.take(data)
        self._child = None
        code = child.returncode
        return code if code >= 0 else 128 - code

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stopping:
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _serve_chips(log: Path) -> Iterator[None]:
    """Serves this host's chips; the server's output stays on this machine."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            runtime_command(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def runtime_command() -> list[str]:
    """The command that serves a host's chips."""
    return [sys.executable, "-m", "launch.machine.tpu_runtime"]


def parse_endpoints(text: str) -> list[str]:
    """The addresses in the metadata's `worker-network-endpoints`: `unknown:unknown:10.0.0.5,…`."""
    return [item.rpartition(":")[2].strip() for item in text.split(",") if item.strip()]


def read_index(environment: dict[str, str]) -> int:
    """This machine's index by TF_CONFIG: 0 is the chief; 0 also without TF_CONFIG."""
    try:
        config = json.loads(environment.get("TF_CONFIG") or "{}")
        task = config.get("task", {})
        before = len(config["cluster"].get("chief", [])) if task["type"] == "worker" else 0
        return before + int(task["index"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a machine's part of a job; returns the exit code."""
    protect_streams()
    parser = argparse.ArgumentParser(prog="python -m launch.machine.node")
    parser.add_argument("job_file", type=Path)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--host", type=int, default=read_index(dict(os.environ)))
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--endpoints", default="")
    parsed = parser.parse_args(arguments)
    job = Job.from_json(parsed.job_file.read_text(encoding="utf-8"))
    addresses = parse_endpoints(parsed.endpoints) if job.environment == "tpu" else []
    node = Node(job, parsed.work_dir, parsed.host, parsed.attempt, addresses)
    signal.signal(signal.SIGTERM, node.stop)
    with node.reporter:
        code = node.run()
    if not node.stopping:
        node.reporter.record_exit_code(code, parsed.work_dir / "exit_code.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
