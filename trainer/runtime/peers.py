"""What keeps a worker from waiting for ever for one that has gone, and says which it is."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType

import tensorflow as tf

from trainer.errors import RUN_AGAIN, RunAgain, end_process
from trainer.runtime.cluster import Cluster

# What TensorFlow raises where a peer is gone: from the collective that waits for it, from the
# coordination service, or because the cluster was restarted around this process.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)
# Raised for a lost peer too, but also for faults of ours.
_PERHAPS_LOST = (tf.errors.InternalError, tf.errors.UnknownError, tf.errors.FailedPreconditionError)


def describe_missing(missing: Sequence[str]) -> str:
    """`worker 1 (HOST:PORT) does not answer`, for one or several."""
    return f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not answer"


class PeerWatch:
    """Ends this process with exit code 75 if a peer stays away and TensorFlow does not notice.

    TensorFlow reports a lost worker from the collective operation that waits for it, within about
    15 seconds. This is what holds when it does not: every peer is asked for a connection every few
    seconds, and one that was silent for `silence` seconds in a row ends the process after `grace`
    more, which leaves TensorFlow the time to say it better.
    """

    def __init__(
        self, cluster: Cluster, interval: float = 5.0, silence: float = 20.0, grace: float = 20.0
    ) -> None:
        """Args: cluster: whose peers to watch; interval, silence, grace: seconds."""
        self._cluster = cluster
        self._interval = interval
        self._probes = max(1, round(silence / interval))
        self._grace = grace
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeerWatch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()

    def _watch(self) -> None:
        silent = 0
        while not self._closing.wait(self._interval):
            missing = self._cluster.find_missing()
            silent = silent + 1 if missing else 0
            if silent == self._probes and not self._closing.wait(self._grace):
                end_process(lost_worker(self._cluster, describe_missing(missing)), RUN_AGAIN)


def lost_worker(cluster: Cluster, what: str) -> str:
    """The line for a run that lost a worker."""
    return (
        f"lost a worker: {what}; run the same command again on all {cluster.num_workers} workers, "
        "to go on from the last checkpoint"
    )


@contextlib.contextmanager
def naming_lost_workers(cluster: Cluster) -> Iterator[None]:
    """Turns TensorFlow's errors for a lost worker into a line that names it."""
    try:
        yield
    except (*_LOST, *_PERHAPS_LOST) as error:
        missing = cluster.find_missing()
        if not missing and isinstance(error, _PERHAPS_LOST):
            raise
        # The last words of a collective's long message, behind the graph's traceback.
        lines = [line for line in str(error.message).splitlines() if line.strip()]
        said = next((line for line in lines if "abort" in line or "unhealthy" in line), lines[0])
        what = describe_missing(missing) if missing else f"all answer, but {said.strip()[:200]}"
        raise RunAgain(lost_worker(cluster, what)) from error
