"""Processes that share work: started fresh, ended with the process that started them."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol


class WorkerPool(Protocol):
    """Whatever does tasks beside each other: processes here, or a Beam runner's workers."""

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """The results of a function, in order, for the first of all arguments, the second, …"""


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def process_pool(
    num_workers: int | None, prepare_worker: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; what is still waiting is dropped when the block ends.

    Args:
      num_workers: processes; None for one a core.
      prepare_worker: called once in each process with `arguments`; both must pickle.
    """
    pool = ProcessPoolExecutor(
        max_workers=num_workers or count_cores(),
        # Forked copies of a process that runs threads (TensorFlow's, tokenizers') can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(prepare_worker, arguments),
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(prepare_worker: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # The processes are what is parallel: threads inside each would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare_worker is not None:
        prepare_worker(*arguments)


def _end_with_parent() -> None:
    """Ends this process once its parent has gone, which a killed parent cannot see to itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
