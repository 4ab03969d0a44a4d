"""Processes and threads beside the main one: pools of processes, background threads, stages."""

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
from trainer.streams import protect_streams

_TASKS_A_PROCESS = 4
_LOOK_SECONDS = 5.0


class WorkerPool(Protocol):
    """What runs tasks in parallel: processes of this machine, or the workers of a Beam runner."""

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """The function's results in order: for the first of all arguments, the second, …"""


class ProcessWorkers:
    """A `WorkerPool` of processes, each with at most a few tasks running or waiting.

    `Executor.map` takes all arguments at once and keeps every result until it is asked for, so its
    memory grows with the corpus.
    """

    def __init__(self, pool: ProcessPoolExecutor, num_workers: int) -> None:
        self._pool = pool
        self._max_waiting = _TASKS_A_PROCESS * num_workers

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """Arguments and results must pickle."""
        waiting: deque[Future[Any]] = deque()
        try:
            for task in zip(*arguments, strict=True):
                if len(waiting) == self._max_waiting:
                    yield self._result(waiting.popleft())
                waiting.append(self._submit(function, *task))
            while waiting:
                yield self._result(waiting.popleft())
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, as the system does when memory runs out; run the "
                "same command with fewer --num_workers, or on a machine with more memory"
            ) from None

    def _submit(self, *call: Any) -> "Future[Any]":
        """Blocks SIGINT for the process that this may start: a Ctrl-C reaches all of them.

        The parent handles it and ends these. Each of them would print a traceback of its own.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(*call)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _result(self, future: "Future[Any]") -> Any:
        """Waits for a result as long as all processes live.

        A process that is killed while it sends a result leaves the executor waiting for the rest,
        without an error.
        """
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if future.done():  # Raised by the function itself.
                    raise
            processes = list((self._pool._processes or {}).values())
            if any(process.exitcode is not None for process in processes):
                _kill(self._pool)
                raise BrokenProcessPool


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def process_pool(
    num_workers: int | None, prepare_worker: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessWorkers]:
    """A pool of processes, by default one per core, which end with the block.

    Each process first calls `prepare_worker` with `arguments`; both must pickle.
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
    except BaseException:
        _kill(pool)  # Nobody wants what they still do, which may take minutes.
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(prepare_worker: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    protect_streams()
    # One process per core already: threads inside each would only compete for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare_worker is not None:
        prepare_worker(*arguments)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: a parent that is killed cannot do it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def background_thread(work: Callable[[threading.Event], None], wait: bool = True) -> Iterator[None]:
    """Runs `work` in a daemon thread while the block runs; with `wait` the block waits for its end.

    `work` gets an event that is set when the block ends; it should return soon then.
    """
    stopped = threading.Event()
    thread = threading.Thread(target=work, args=(stopped,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        if wait:
            thread.join()


Item = TypeVar("Item")
_POLL_SECONDS = 0.1


def run_ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The same items in the same order, made in a thread that is up to `depth` of them ahead.

    An error in the thread is raised here. Closing the generator ends the thread after its current
    item and closes `items` there, so closing the last of several stages ends all of them.
    """
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)

    def put(is_item: bool, value: Any, stopped: threading.Event) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((is_item, value), timeout=_POLL_SECONDS)
                return

    def fill(stopped: threading.Event) -> None:
        iterator = None
        try:
            iterator = iter(items)
            for item in iterator:
                put(True, item, stopped)
                if stopped.is_set():
                    break
            put(False, None, stopped)
        except BaseException as error:  # Raised again where the items are taken.
            put(False, error, stopped)
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    with background_thread(fill):
        while True:
            is_item, value = waiting.get()
            if not is_item:
                break
            yield value
        if value is not None:
            raise value
