"""A deadline for calls that hold Python's interpreter lock while they wait.

TensorFlow does so where a worker joins its cluster and one of the others does not come: no thread
of Python's runs any more, no signal handler either. A POSIX timer calls C's `_exit` all the same.
"""

import ctypes
import sys
from types import TracebackType

from trainer.errors import RUN_AGAIN

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
