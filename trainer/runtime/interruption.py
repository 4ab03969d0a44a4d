"""Requests to stop a run: SIGTERM, SIGINT, and notices that the machine is about to go.

Python runs signal handlers between two bytecodes of the main thread, which may be minutes apart
when that thread is inside TensorFlow, and TensorFlow's preemption notifier swallows SIGTERM in runs
of several workers. So both signals are blocked before any other thread exists, and a thread of ours
waits for them.

TensorFlow's `PreemptionCheckpointHandler` is not used: it restores and exits by itself, at moments
of its own. Here all strategies agree on the step to stop after through the all-reduce of the step.

Google Compute Engine's notices that this machine is about to be taken away.

A parent process that starts a run again when it ends otherwise than by itself.

It imports nothing heavy, so that nothing of TensorFlow's can take it down with its child.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from trainer.errors import INTERRUPTED, RUN_AGAIN, USER_FAULT, end_process


class Interruption:
    """Listens for requests to stop, from `__enter__` to `__exit__`.

    Until `on_request` is called there is nothing to save: a request ends the process at once, with
    exit code 75. From then on it is passed on, and whoever trains stops after the step under way. A
    second SIGINT ends the process at once, with exit code 130. A signal that is ignored, as `nohup`
    and shells without job control have it for background jobs, stays ignored.

    SIGTERM stays blocked after `__exit__`: the run is over, the process is about to end, and its
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
        self._maintenance = MaintenanceWatch(self.request)
        # Standard error is held back while TensorFlow is imported; what is said here is not.
        self._standard_error = os.dup(2)

    def __enter__(self) -> "Interruption":
        """Blocks the signals in this thread, and so in all that it starts from here on."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._thread.start()
        self._maintenance.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        self._maintenance.close()
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
        """Has `callback` called at the first request, in a thread of its own, or now if it came."""
        with self._lock:
            self._callbacks.append(callback)
            requested = self.requested
        if requested:
            callback()

    def request(self, reason: str) -> None:
        """Asks the run to stop; what comes after the first request changes nothing.

        Args:
          reason: what asks, for the line that the run ends with.
        """
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
        self._say(f"{reason}: stopping after this step; a second SIGINT (Ctrl-C) quits at once")
        for callback in callbacks:
            # A callback that waits for the device must not keep the next signal waiting.
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

    def _say(self, message: str) -> None:
        os.write(self._standard_error, f"multihot train: {message}\n".encode())


_DEFAULT_HOST = "metadata.google.internal"
_PRODUCT_NAME = Path("/sys/class/dmi/id/product_name")
# Path below instance/, and the value that announces the end; a machine that migrates lives on.
_NOTICES = {
    "preempted": "TRUE",
    "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
}
# A spot machine ends 30 seconds after its notice.
_INTERVAL = 3.0


def metadata_host(environment: Mapping[str, str]) -> str | None:
    """The metadata server's host, None on a machine that is not Google's."""
    if environment.get("GCE_METADATA_HOST"):
        return environment["GCE_METADATA_HOST"]
    try:
        return _DEFAULT_HOST if "Google" in _PRODUCT_NAME.read_text() else None
    except OSError:
        return None


class MaintenanceWatch:
    """Asks the metadata server every few seconds, in a thread, and passes one notice on.

    A notice that stands when the watch starts has already stopped the run before this one, as much
    as an hour ahead of the machine's end: it is not passed on, so that the time left is used.
    """

    def __init__(self, on_notice: Callable[[str], None], interval: float = _INTERVAL) -> None:
        """Args: on_notice: called with what was announced; interval: seconds."""
        self._on_notice = on_notice
        self._interval = interval
        self._host = metadata_host(os.environ)
        self._closing = threading.Event()
        # The server answers directly; a proxy of the environment would not reach it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self) -> None:
        """Starts the thread, on a machine of Google's."""
        if self._host is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Ends the thread, within an interval."""
        self._closing.set()

    def _watch(self) -> None:
        standing = {path for path in _NOTICES if self._is_announced(path)}
        while not self._closing.wait(self._interval):
            for path in _NOTICES:
                announced = self._is_announced(path)
                if announced and path not in standing:
                    self._on_notice(f"a notice of this machine's end ({path})")
                    return
                if announced is False:
                    standing.discard(path)

    def _is_announced(self, path: str) -> bool | None:
        """Whether the notice stands; None if the server does not say."""
        request = urllib.request.Request(
            f"http://{self._host}/computeMetadata/v1/instance/{path}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with self._opener.open(request, timeout=self._interval) as answer:
                return answer.read().decode().strip() == _NOTICES[path]
        except (OSError, UnicodeDecodeError):
            return None


_FIRST_DELAY = 2.0
_LONGEST_DELAY = 60.0
_STOPS = {signal.SIGTERM, signal.SIGINT}
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's <sys/prctl.h>


def supervise(command: Sequence[str], max_restarts: int, first_delay: float = _FIRST_DELAY) -> int:
    """Runs a command, and again as long as it fails and may be restarted.

    It is final that the command succeeds (0), that the user has to mend something (2), and that the
    user stopped it: by a signal to this process, which is passed on, or by a second SIGINT (130).

    Args:
      command: the program and its arguments.
      max_restarts: how often to start it again at most.
      first_delay: seconds before the first restart; each further delay is twice as long.

    Returns:
      The last exit code; 128 + N if signal N ended it, as shells say it.
    """
    # Waited for one at a time from here on. Blocked, none can get lost between two waits.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPS, signal.SIGCHLD})
    try:
        for restart in range(max_restarts + 1):
            code, is_stopped = _run_once(command, mask)
            if is_stopped or code in (0, USER_FAULT, INTERRUPTED) or restart == max_restarts:
                return code
            delay = min(first_delay * 2**restart, _LONGEST_DELAY)
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
        _end_with(parent)

    # In a process group of its own, a Ctrl-C reaches it once: through this process.
    with subprocess.Popen(command, preexec_fn=prepare, process_group=0) as child:
        is_stopped = False
        while child.poll() is None:
            number = signal.sigwait({*_STOPS, signal.SIGCHLD})
            if number in _STOPS:
                is_stopped = True
                child.send_signal(number)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, is_stopped


def _end_with(parent: int) -> None:
    """Has Linux stop this process by SIGTERM when its parent is killed, which cannot tell it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # It was killed before this call.
            os._exit(RUN_AGAIN)
