"""Processes that share work: order, bounded queues, and what is said when one is killed."""

import os
import signal
import time

import pytest

from trainer.errors import UserError
from trainer.runtime import workers
from trainer.runtime.workers import process_pool
from trainer.sources.rows import allowed_rejections


def square(number):
    return number * number


def kill_itself(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def wait_long(number):
    if number == 0:
        return os.getpid()
    time.sleep(600)


def time_out(number):
    raise TimeoutError("of the function's own")


def test_results_come_in_order():
    with process_pool(2) as pool:
        assert list(pool.map(square, range(50))) == [number * number for number in range(50)]


def interrupt_itself(number):
    os.kill(os.getpid(), signal.SIGINT)
    return number


def test_an_interruption_is_the_parents_to_handle():
    with process_pool(2) as pool:
        assert list(pool.map(interrupt_itself, range(4))) == [0, 1, 2, 3]


def test_a_killed_process_is_one_line():
    with process_pool(2) as pool:
        with pytest.raises(UserError, match="a worker process was killed, .* fewer --num_workers"):
            list(pool.map(kill_itself, range(20)))


def test_a_killed_process_that_the_executor_has_not_heard_of_is_found(monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.05)
    with process_pool(1) as pool:
        results = pool.map(wait_long, range(2))
        process_id = next(results)
        # As if it had been killed while it sent a result: the executor is not told.
        manager = pool._pool._executor_manager_thread
        monkeypatch.setattr(manager, "terminate_broken", lambda cause: time.sleep(2))
        os.kill(process_id, signal.SIGKILL)
        with pytest.raises(UserError, match="a worker process was killed"):
            next(results)


def test_a_timeout_of_the_function_s_own_is_raised():
    with process_pool(1) as pool:
        with pytest.raises(TimeoutError, match="of the function's own"):
            list(pool.map(time_out, range(1)))


@pytest.mark.parametrize(
    ("limit", "rows", "allowed"),
    [(0.29, 100, 29), (0.001, 999, 0), (0.001, 1000, 1), (5, 100, 5), (0.0, 9, 0)],
)
def test_shares_of_rows_are_those_that_decimal_fractions_say(limit, rows, allowed):
    assert allowed_rejections(limit, rows) == allowed
