"""Requests to stop a run: SIGTERM, SIGINT, and notices that the machine is about to go.

Python runs signal handlers between two bytecodes of the main thread, which may be minutes apart
when that thread is inside TensorFlow, and TensorFlow's preemption notifier swallows SIGTERM in runs
of several workers. So both signals are blocked before any other thread exists, and a thread of ours
waits for them.

TensorFlow's `PreemptionCheckpointHandler` is not used: it restores and exits by itself, at moments
of its own. Here all strategies agree on the step to stop after through the all-reduce of the step.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType

from trainer.errors import INTERRUPTED, RUN_AGAIN, end_process
from trainer.runtime.maintenance import MaintenanceWatch


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
