"""Processes that share work: started fresh, ended with the process that started them.

Stages of a pipeline that run beside each other, each in a thread of its own.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from trainer.errors import UserError

_TASKS_A_PROCESS = 4
_LOOK_SECONDS = 5.0


class WorkerPool(Protocol):
    """Whatever does tasks beside each other: processes here, or a Beam runner's workers."""

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """The results of a function, in order, for the first of all arguments, the second, …"""


class ProcessWorkers:
    """A pool of processes, each with few tasks under way or waiting to be taken.

    (`Executor.map` takes all arguments at once and keeps every result that comes before it is asked
    for: memory that grows with the corpus.)
    """

    def __init__(self, pool: ProcessPoolExecutor, num_workers: int) -> None:
        self._pool = pool
        self._most = _TASKS_A_PROCESS * num_workers

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """See `WorkerPool`; what is passed and returned must pickle."""
        waiting: deque[Future[Any]] = deque()
        try:
            for task in zip(*arguments, strict=True):
                if len(waiting) == self._most:
                    yield self._result(waiting.popleft())
                waiting.append(self._pool.submit(function, *task))
            while waiting:
                yield self._result(waiting.popleft())
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, as the system does when memory runs out; run the "
                "same command with fewer --num_workers, or on a machine with more memory"
            ) from None

    def _result(self, future: "Future[Any]") -> Any:
        """A result, waited for as long as all processes live.

        (One that is killed in the middle of sending a result leaves the executor waiting for the
        rest of it, and nobody hears of it.)
        """
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if future.done():  # Raised by the function itself.
                    raise
            processes = list((self._pool._processes or {}).values())
            if any(process.exitcode is not None for process in processes):
                for process in processes:
                    process.kill()
                raise BrokenProcessPool


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def process_pool(
    num_workers: int | None, prepare_worker: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessWorkers]:
    """A pool of processes; what is still waiting is dropped when the block ends.

    Args:
      num_workers: processes; None for one a core.
      prepare_worker: called once in each process with `arguments`; both must pickle.
    """
    num_workers = num_workers or count_cores()
    pool = ProcessPoolExecutor(
        max_workers=num_workers,
        # Forked copies of a process that runs threads (TensorFlow's, tokenizers') can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(prepare_worker, arguments),
    )
    try:
        yield ProcessWorkers(pool, num_workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(prepare_worker: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # The process that started these ends them; each would print a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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


Item = TypeVar("Item")
_POLL_SECONDS = 0.1


def run_ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The same items in the same order, made in a thread that is up to `depth` of them ahead.

    What fails there is raised here. Closing the generator ends the thread after the item that it
    is at, and closes `items` in it, so a chain of stages ends from its last one back.
    """
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(is_item: bool, value: Any) -> None:
        while not stopped.is_set():
            try:
                waiting.put((is_item, value), timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def fill() -> None:
        iterator = None
        try:
            iterator = iter(items)
            for item in iterator:
                put(True, item)
                if stopped.is_set():
                    break
            put(False, None)
        except BaseException as error:  # Raised again where the items are taken.
            put(False, error)
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = waiting.get()
            if not is_item:
                break
            yield value
        if value is not None:
            raise value
    finally:
        stopped.set()
        thread.join()
