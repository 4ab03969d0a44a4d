"""`run_ahead`: order kept, bounded ahead, failures raised where items are taken, threads ended."""

import threading
import time

import pytest

from trainer.runtime.workers import run_ahead


def test_items_keep_their_order_through_two_stages():
    squares = run_ahead((number * number for number in run_ahead(range(500), 3)), 2)
    assert list(squares) == [number * number for number in range(500)]


def test_a_stage_is_never_further_ahead_than_its_queue():
    made = []

    def make():
        for number in range(100):
            made.append(number)
            yield number

    for taken, _ in enumerate(run_ahead(make(), depth=3)):
        time.sleep(0.001)
        # Three wait in the queue and one in the thread's hand, beside the one taken here.
        assert len(made) <= taken + 1 + 3 + 1
    assert len(made) == 100


def test_a_failure_is_raised_after_the_items_before_it():
    def fail():
        yield 1
        raise OSError("disk on fire")

    stream = run_ahead(run_ahead(fail(), 1), 1)
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk on fire"):
        next(stream)


def test_closing_the_last_stage_ends_all_threads():
    before = threading.active_count()
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    stream = run_ahead(run_ahead(endless(), 2), 2)
    assert next(stream) == 0
    assert threading.active_count() == before + 2
    stream.close()
    assert closed == [True]
    assert threading.active_count() == before


def test_items_that_cannot_be_begun_are_a_failure_too():
    class Broken:
        def __iter__(self):
            raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        list(run_ahead(Broken(), 1))
