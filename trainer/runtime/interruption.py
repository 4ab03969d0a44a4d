"""How a run is made to end: by a signal, by a notice, by a deadline; and how it starts again.

Python runs signal handlers between two bytecodes of the main thread, which may be minutes apart
when that thread is inside TensorFlow, and TensorFlow's preemption notifier swallows SIGTERM in runs
of several workers. So SIGTERM and SIGINT are blocked before any other thread exists, and a thread
of ours waits for them. TensorFlow's `PreemptionCheckpointHandler` is not used: it restores and
exits by itself, at moments of its own. Here all strategies agree on the step to stop after through
the all-reduce of the step.

`supervise` runs in a parent process. This file imports nothing heavy, so that a crash of TensorFlow
cannot take the parent down too.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trainer.errors import INTERRUPTED, RUN_AGAIN, USER_FAULT
from trainer.runtime.workers import background_thread
from trainer.streams import end_process, write_line


class Interruption:
    """Listens for requests to stop while its block runs; `reason` is what asked, empty before that.

    Before the first `on_request` there is nothing to save, so a request ends the process at once
    with exit code 75. Afterwards a request is answered by a line at once and calls the callbacks,
    and training stops after the current step, or sooner. A second SIGINT ends the process at once
    with exit code 130. A signal that is ignored stays ignored: `nohup` and shells without job
    control do so for background jobs.

    SIGTERM stays blocked after the block: the run is over, the process is about to end, and its
    exit code says more about the run than "killed by a signal".
    """

    def __init__(self) -> None:
        self.reason = ""
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._interrupts = 0
        self._closing = False
        self._mask: set[int] = set()
        self._signals = {
            number
            for number in (signal.SIGTERM, signal.SIGINT)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._notices = contextlib.ExitStack()
        # Standard error is redirected while TensorFlow is imported; this copy of it is not.
        self._standard_error = os.dup(2)

    def __enter__(self) -> "Interruption":
        # Every thread that starts from here on inherits the mask.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._thread.start()
        self._notices.enter_context(watch_maintenance(self.request))
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing = True
        self._notices.close()
        if self._signals:
            signal.pthread_kill(self._thread.ident or 0, min(self._signals))
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask | {signal.SIGTERM})
        os.close(self._standard_error)

    @property
    def requested(self) -> bool:
        """Whether the run is asked to stop."""
        return bool(self.reason)

    def on_request(self, callback: Callable[[], None]) -> None:
        """Adds what the first request calls, in a new thread; calls it now if a request came."""
        with self._lock:
            self._callbacks.append(callback)
            requested = self.requested
        if requested:
            callback()

    def request(self, reason: str) -> None:
        """Asks the run to stop, for that reason; only the first request counts."""
        with self._lock:
            if self.requested:
                return
            self.reason = reason
            callbacks = tuple(self._callbacks)
        if not callbacks:
            end_process(
                f"stopped by {reason} before the first step; run the same command again",
                RUN_AGAIN,
                self._standard_error,
            )
        message = f"{reason}: stopping after this step; a second SIGINT (Ctrl-C) quits at once"
        write_line(f"multihot train: {message}", self._standard_error)
        for callback in callbacks:
            # A callback may wait for the device; the next signal must not wait for the callback.
            threading.Thread(target=callback, daemon=True).start()

    def _listen(self) -> None:
        while self._signals:
            number = signal.sigwait(self._signals)
            if self._closing:
                return
            self._interrupts += number == signal.SIGINT
            if self._interrupts == 2:
                end_process("interrupted", INTERRUPTED, self._standard_error)
            self.request(signal.Signals(number).name)


_DEFAULT_HOST = "metadata.google.internal"
_PRODUCT_NAME = Path("/sys/class/dmi/id/product_name")
# Path below instance/, and the value that announces the end. A machine that migrates goes on.
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_INTERVAL = 3.0  # A spot machine ends 30 seconds after its notice.
# The server answers directly; a proxy of the environment would not reach it.
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def metadata_host(environment: Mapping[str, str]) -> str | None:
    """The metadata server's host; None on a machine that is not Google's."""
    if environment.get("GCE_METADATA_HOST"):
        return environment["GCE_METADATA_HOST"]
    try:
        return _DEFAULT_HOST if "Google" in _PRODUCT_NAME.read_text() else None
    except OSError:
        return None


def watch_maintenance(
    on_notice: Callable[[str], None], interval: float = _INTERVAL
) -> AbstractContextManager[None]:
    """Asks the metadata server every few seconds, in a thread, and passes on one notice's phrase.

    A notice that stands when the watch starts has stopped the run before this one already, up to an
    hour before the machine ends. It is not passed on, so that this run uses the time left.
    """
    host = metadata_host(os.environ)

    def watch(stopped: threading.Event) -> None:
        standing = {path for path in _NOTICES if _is_announced(host, path, interval)}
        while not stopped.wait(interval):
            for path in _NOTICES:
                announced = _is_announced(host, path, interval)
                if announced and path not in standing:
                    on_notice(f"a notice of this machine's end ({path})")
                    return
                if announced is False:
                    standing.discard(path)

    # A request may take an interval: the end of the run does not wait for it.
    return contextlib.nullcontext() if host is None else background_thread(watch, wait=False)


def _is_announced(host: str | None, path: str, timeout: float) -> bool | None:
    """Whether the notice stands; None if the server does not say."""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with _NO_PROXY.open(request, timeout=timeout) as answer:
            return answer.read().decode().strip() == _NOTICES[path]
    except (OSError, UnicodeDecodeError):
        return None


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


@contextlib.contextmanager
def exit_timer(seconds: float) -> Iterator[None]:
    """Ends this process with exit code 75, without a message, if the block takes too long.

    TensorFlow keeps Python's interpreter lock while it waits for a TPU or for other workers, so no
    thread and no signal handler of Python's can run. A POSIX timer calls C's `_exit` all the same.
    Print what is about to happen before the block. Without such timers (outside Linux) the block
    just runs. Seconds are rounded up to whole ones.
    """
    if sys.platform != "linux":
        yield
        return
    library, timer = ctypes.CDLL(None), ctypes.c_void_p()
    leave = ctypes.cast(library._exit, ctypes.c_void_p)
    event = _Event(value=RUN_AGAIN, notify=_SIGEV_THREAD, function=leave)
    times = _Times(value=math.ceil(seconds))
    failed = library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    if failed or library.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError("cannot make a POSIX timer")
    try:
        yield
    finally:
        library.timer_delete(timer)


_MAX_DELAY = 60.0
_STOPS = {signal.SIGTERM, signal.SIGINT}
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's <sys/prctl.h>


def supervise(command: Sequence[str], max_restarts: int, first_delay: float = 2.0) -> int:
    """Runs a command, and starts it again after a failure, up to `max_restarts` times.

    Some ends are final: success (0), a fault of the user's (2), a stop by the user, that is a
    signal to this process, which passes it on, or a second SIGINT (130). The first restart waits
    for `first_delay` seconds, each further one twice as long. Returns the last exit code; 128 + N
    if signal N ended it, as in a shell.
    """
    # Blocked signals stay pending, so none gets lost between two waits.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPS, signal.SIGCHLD})
    try:
        for restart in range(max_restarts + 1):
            code, is_stopped = _run_once(command, mask)
            if is_stopped or code in (0, USER_FAULT, INTERRUPTED) or restart == max_restarts:
                return code
            delay = min(first_delay * 2**restart, _MAX_DELAY)
            print(
                f"multihot train: ended with exit code {code}; starting again in {delay:g} seconds "
                f"(restart {restart + 1} of {max_restarts})",
                file=sys.stderr,
                flush=True,
            )
            if signal.sigtimedwait(_STOPS, delay) is not None:
                return RUN_AGAIN
        raise AssertionError("the last restart returns")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_once(command: Sequence[str], mask: set[int]) -> tuple[int, bool]:
    """(exit code, whether a signal to this process asked it to stop) of one run."""
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if sys.platform == "linux":
            # Linux sends this process SIGTERM when its parent is killed.
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != parent:  # It was killed before this call.
                os._exit(RUN_AGAIN)

    # In its own process group a Ctrl-C reaches the child once: through this process.
    with subprocess.Popen(command, preexec_fn=prepare, process_group=0) as child:
        is_stopped = False
        while child.poll() is None:
            number = signal.sigwait({*_STOPS, signal.SIGCHLD})
            if number in _STOPS:
                is_stopped = True
                child.send_signal(number)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, is_stopped
