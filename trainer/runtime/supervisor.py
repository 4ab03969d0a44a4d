"""A parent process that starts a run again when it ends otherwise than by itself.

It imports nothing heavy, so that nothing of TensorFlow's can take it down with its child.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from trainer.errors import INTERRUPTED, RUN_AGAIN, USER_FAULT

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
