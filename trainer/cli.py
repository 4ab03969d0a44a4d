"""`multihot COMMAND --flag=value …`: finds the command's module, imports it, and runs it.

A command's name is one word or two (`submit tpu`). `submit` takes the commands to submit after a
`--`. This file imports nothing heavy, so that help answers at once. Exit codes:

  0    done
  1    nothing is known to be missing, but something could not be checked (`submit check`)
  2    something that the user can fix, in one line on standard error
  3    a step needs more memory than its accelerator has (`preflight`)
  75   stopped, nothing lost: run the same command again (EX_TEMPFAIL of sysexits.h). `train` ends
       so after SIGTERM, a first SIGINT, a notice that its machine is taken away, or the loss of a
       worker; every command does when a store does not answer
  130  interrupted: by SIGINT, in `train` by a second one

Any other exception is a fault of ours and shows its traceback. A reader of the output that goes
away changes neither the work nor the exit code; `jobs`, which only prints, ends then.
"""

import contextlib
import difflib
import errno
import importlib
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from trainer import config
from trainer.errors import (
    INTERRUPTED,
    USER_FAULT,
    DoesNotFit,
    NotChecked,
    RunAgain,
    UserError,
)
from trainer.flags import describe_flags, parse_flags
from trainer.run_config import TrainConfig
from trainer.runtime import tpu_environment
from trainer.storage import filesystem
from trainer.streams import end_process, protect_streams

# The commands of `launch`: where each one's config and function are. They are strings because
# `launch` imports `trainer`, and because a command's module is imported only when it runs.
_LAUNCH_COMMANDS = {
    "preflight": ("launch.preflight_config:PreflightConfig", "launch.preflight.command:run"),
    "submit tpu": ("launch.launch_config:SubmitTpuConfig", "launch.submit_tpu:run"),
    "submit vertex": ("launch.launch_config:SubmitVertexConfig", "launch.submit_vertex:run"),
    "submit dataflow": ("launch.launch_config:SubmitDataflowConfig", "launch.submit_dataflow:run"),
    "submit check": ("launch.launch_config:SubmitCheckConfig", "launch.submit_check:run"),
    "jobs list": ("launch.launch_config:JobsListConfig", "launch.jobs:list_jobs"),
    "jobs status": ("launch.launch_config:JobsStatusConfig", "launch.jobs:show_status"),
    "jobs logs": ("launch.launch_config:JobsLogsConfig", "launch.jobs:print_logs"),
    "jobs cancel": ("launch.launch_config:JobsCancelConfig", "launch.jobs:cancel"),
}
# In the order in which a user meets them.
COMMANDS = (*config.COMMANDS, *_LAUNCH_COMMANDS)
# The commands that take others after `--`.
_SUBMITTING = ("submit tpu", "submit vertex", "submit dataflow")
# The commands that do nothing but print.
_PRINTING = ("submit check", "jobs list", "jobs status", "jobs logs")

# The error line for each package that an extra installs.
_EXTRAS = {
    "tensorflow": "TensorFlow is not installed; install one of multihot[cpu], multihot[gpu], "
    "multihot[tpu] with pip",
    "apache_beam": "Apache Beam is not installed, and --runner names one of its runners; install "
    "multihot[beam] with pip, or leave --runner out",
    "onnx": "the package onnx is not installed, and --formats asks for ONNX; install "
    "multihot[onnx] with pip, or leave --formats out",
    "google.cloud.tpu_v2": "Google's client for Cloud TPU is not installed; install "
    "multihot[cloud] with pip",
    "google.cloud.aiplatform_v1": "Google's client for Vertex AI is not installed; install "
    "multihot[cloud] with pip",
}
# To remove temporary files after a Ctrl-C.
_SECONDS_TO_END = 8.0
_STARTUP_LINES = (
    b"All log messages before absl::InitializeLog()",
    b"oneDNN custom operations are on",
)


def config_of(command: str) -> type:
    """The config dataclass of one of `COMMANDS`."""
    if command in config.COMMANDS:
        return config.COMMANDS[command]
    return pkgutil.resolve_name(_LAUNCH_COMMANDS[command][0])


def summarize(command: str) -> str:
    """One line on a command: the first line of its config's docstring."""
    return (config_of(command).__doc__ or "").splitlines()[0].partition(": ")[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command, by default this process's; SystemExit, not 0, unless it succeeds."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    only_prints = " ".join(arguments[:2]) in _PRINTING
    protect_streams(end_with_reader=only_prints)
    try:
        try:
            _answer(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not (only_prints and error.errno in (errno.EPIPE, errno.EIO)):
            _fail("multihot", *(_explain(error) or (str(error), USER_FAULT)))


def _answer(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "-help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        print(f"multihot {importlib.import_module('trainer').__version__}")
        return
    command, arguments, submitted = _split(arguments)
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        _fail("multihot", f"{command}: no such command; {hint}", USER_FAULT)
    if any(argument in ("-h", "--help", "-help") for argument in arguments):
        print(_usage(command))
        return
    _run(command, arguments, submitted)


def _split(arguments: list[str]) -> tuple[str, list[str], list[str]]:
    """Name of the command, its own arguments, and those behind `--` for what it submits."""
    end = 1
    if any(name.startswith(f"{arguments[0]} ") for name in COMMANDS):  # A first word of two.
        end += len(arguments) > 1 and not arguments[1].startswith("-")
    name, rest = " ".join(arguments[:end]), arguments[end:]
    if name in _SUBMITTING and "--" in rest:
        place = rest.index("--")
        return name, rest[:place], rest[place + 1 :]
    return name, rest, []


def _run(command: str, arguments: Sequence[str], submitted: Sequence[str]) -> None:
    name = f"multihot {command}"
    # TensorFlow reads this when it is imported; a user who wants its log lines sets it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tpu_environment.prepare()
    try:
        parsed: Any = parse_flags(config_of(command), arguments)
        if command == "train":
            _train(parsed, arguments)
        elif command in _SUBMITTING:
            _find(command)(parsed, submitted)
        else:
            # What was started elsewhere may take more time to end.
            runner = getattr(parsed, "runner", config.LOCAL_RUNNER)
            is_local = command in config.COMMANDS and runner == config.LOCAL_RUNNER
            with _ending_soon(command) if is_local else contextlib.nullcontext():
                _find(command)(parsed)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A second one would show a traceback.
        _fail(name, "interrupted", INTERRUPTED)
    except Exception as error:
        if command in _PRINTING and isinstance(error, BrokenPipeError):
            raise
        ending = _explain(error)
        if ending is None:
            raise
        if command == "train" and isinstance(error, RunAgain):
            # TensorFlow's own shutdown would call workers that may be gone.
            sys.stdout.flush()
            end_process(*ending)
        _fail(name, *ending)


def _train(parsed: TrainConfig, arguments: Sequence[str]) -> None:
    if parsed.max_restarts:
        from trainer.runtime.interruption import supervise

        child = [sys.executable, "-m", "trainer.cli", "train", *arguments, "--max_restarts=0"]
        sys.exit(supervise(child, parsed.max_restarts))
    from trainer.runtime.interruption import Interruption

    # Before TensorFlow and NumPy start threads, which would take the signals otherwise.
    with Interruption() as interruption:
        _find("train")(parsed, interruption)


@contextlib.contextmanager
def _ending_soon(command: str) -> Iterator[None]:
    """Ends this process some seconds after a Ctrl-C, whatever the block is doing then.

    Python raises KeyboardInterrupt between two bytecodes of the main thread, which may stay inside
    TensorFlow for minutes. Python's handler in C, however, writes to the pipe at once.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        with open(read, "rb", buffering=0) as signals:
            if signals.read(1):
                time.sleep(_SECONDS_TO_END)
                end_process("interrupted", INTERRUPTED, command=command)

    previous = signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write)


def _find(command: str) -> Callable[..., None]:
    """The function of a command, its module imported."""
    _, place = _LAUNCH_COMMANDS.get(command, ("", f"trainer.{command}:run"))
    with _without_startup_lines():
        return pkgutil.resolve_name(place)


@contextlib.contextmanager
def _without_startup_lines() -> Iterator[None]:
    """Keeps TensorFlow's startup messages off standard error while it is imported.

    TensorFlow 2.21 prints them before it reads the log level that should hide them. So standard
    error goes to a file meanwhile, and all other lines are passed on afterwards.
    """
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        yield
        return
    import tempfile

    standard_error = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(standard_error, 2)
            os.close(standard_error)
            held.seek(0)
            with contextlib.suppress(OSError):  # Perhaps nobody reads it.
                for line in held:
                    if not any(words in line for words in _STARTUP_LINES):
                        os.write(2, line)


def _explain(error: Exception) -> tuple[str, int] | None:
    """The error line and the exit code for what a user can act on; None for a fault of ours."""
    if isinstance(error, UserError | DoesNotFit | NotChecked | RunAgain):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return _EXTRAS[error.name], USER_FAULT
    if isinstance(error, OSError):
        if error.strerror is None:
            return str(error), USER_FAULT
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror.lower()}", USER_FAULT
    store_error = filesystem.explain(error)
    if store_error is not None:
        return _explain(store_error)
    return (str(error), USER_FAULT) if _is_file_system_error(error) else None


def _is_file_system_error(error: Exception) -> bool:
    """Whether TensorFlow reports a file that it cannot create, write or find room for."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None:
        return False
    kinds = tensorflow.errors
    if isinstance(error, kinds.ResourceExhaustedError):  # Also said of memory, which is no file.
        return "No space left" in str(error)
    return isinstance(error, kinds.PermissionDeniedError | kinds.FailedPreconditionError) and (
        error.op is None
    )


def _fail(name: str, message: str, code: int) -> NoReturn:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {command:<{width}}  {summarize(command)}" for command in COMMANDS)
    return (
        f"Usage: multihot COMMAND --flag=value ...\n\nCommands:\n{lines}\n\n"
        "`multihot COMMAND --help` lists the flags of a command."
    )


def _usage(command: str) -> str:
    behind = " -- COMMAND --flag=value ..." if command in _SUBMITTING else ""
    return (
        f"Usage: multihot {command} --flag=value ...{behind}\n\n{summarize(command)}\n\n"
        f"Flags:\n{describe_flags(config_of(command))}"
    )


if __name__ == "__main__":
    main()
