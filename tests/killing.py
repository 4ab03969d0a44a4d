"""Real `multihot` processes to kill, without waiting for TensorFlow's import each time.

A stage imports a command once, and then forks for every run: the child is what `multihot COMMAND`
is once its modules are imported, with a life of its own that SIGKILL ends at any moment.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_STAGE = """
import importlib, json, os, sys
from trainer import cli
importlib.import_module(f"trainer.{sys.argv[1]}")
print("ready", flush=True)
for line in sys.stdin:
    process = os.fork()
    if not process:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        first, arguments = json.loads(line)
        exec(first)
        cli.main(arguments)
        sys.exit()
    print(process, flush=True)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Stage:
    """Where runs of one command take place, one at a time."""

    def __init__(self, command: str, errors: Path, temporary: Path) -> None:
        self._command, self._errors = command, errors
        self._process = subprocess.Popen(
            [sys.executable, "-c", _STAGE, command, str(errors)],
            env=dict(os.environ) | {"TMPDIR": str(temporary)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, arguments: Sequence[str], first: str = "") -> None:
        """Begins a run, which executes `first`, a program in Python, before the command."""
        if self._process.poll() is None and not hasattr(self, "_child"):
            assert self._read() == "ready"
        self._process.stdin.write(json.dumps([first, [self._command, *arguments]]) + "\n")
        self._process.stdin.flush()
        self._child = int(self._read())

    def kill(self) -> None:
        """Kills the run, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        """Waits for the run's end, at most so long."""
        return bool(select.select([self._process.stdout], [], [], max(0.0, seconds))[0])

    def wait(self) -> int:
        """The run's exit code, -9 if it was killed."""
        return int(self._read())

    @property
    def errors(self) -> str:
        """What the run printed to standard error."""
        return self._errors.read_text()

    def close(self) -> None:
        """Ends the stage."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        return self._process.stdout.readline().strip()


@contextlib.contextmanager
def stages(command: str, number: int, folder: Path) -> Iterator[list[Stage]]:
    """Some stages of a command, whose temporary folder is `folder / "tmp"`."""
    (folder / "tmp").mkdir()
    made = [Stage(command, folder / f"errors-{i}", folder / "tmp") for i in range(number)]
    try:
        yield made
    finally:
        for stage in made:
            stage.close()


def run_and_kill(runs: Sequence[tuple[Stage, Sequence[str], float]]) -> list[int]:
    """Starts runs at once and kills each after its seconds, if it still lives; their exit codes."""
    start = time.monotonic()
    for stage, arguments, _ in runs:
        stage.start(arguments)
    for stage, _, seconds in sorted(runs, key=lambda run: run[2]):
        if not stage.ends_within(start + seconds - time.monotonic()):
            stage.kill()
    return [stage.wait() for stage, _, _ in runs]


def run_to_the_end(stage: Stage, arguments: Sequence[str]) -> float:
    """Runs without a kill; the seconds that it takes."""
    start = time.monotonic()
    stage.start(arguments)
    assert stage.wait() == 0, stage.errors
    return time.monotonic() - start


def read_tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their names in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }
