"""Stages of a pipeline that run beside each other, each in a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

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
