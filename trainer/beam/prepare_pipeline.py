"""The workers of a Beam runner in the place of a pool of processes.

`prepare` is pure functions of segments and shards that leave large things in files of the work
folder, with decisions between them that need all results. So its Beam pipelines are these functions
mapped, one pipeline a pass, and its shards are the local command's, byte for byte. Arguments and
results are files of that folder too: a pipeline's own graph is limited to some megabytes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from trainer.beam.exchange import load_value, save_value
from trainer.beam.faults import marked_faults
from trainer.beam.runners import NAMESPACE, BeamRunner
from trainer.data.metadata import Shard
from trainer.preparation.scan import ScannedSegment
from trainer.preparation.shards import WrittenSegment


class BeamPool:
    """Maps functions over tasks by a Beam runner, as a pool of processes does by processes."""

    def __init__(self, runner: BeamRunner, work_dir: str) -> None:
        """Makes the pool.

        Args:
          runner: what runs the pipelines.
          work_dir: a folder that all workers share.
        """
        self._runner = runner
        self._work_dir = os.path.abspath(work_dir)
        self._num_calls = 0

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """Calls a function, which pickles, with the first of all arguments, the second, and so on.

        Returns:
          The results in order, once all are there.

        Raises:
          UserError, RunAgain, OSError: what a call raised.
        """
        self._num_calls += 1
        folder = os.path.join(self._work_dir, f"call-{self._num_calls}")
        os.mkdir(folder)
        num_tasks = 0
        for num_tasks, task in enumerate(zip(*arguments, strict=True), 1):
            save_value(_task_path(folder, num_tasks - 1), task)
        if num_tasks:
            print(f"{self._runner}: {num_tasks:,} tasks of {_name(function)}", flush=True)
            build = partial(_build, function=function, folder=folder, num_tasks=num_tasks)
            counters = self._runner.run(build)
            shown = (f"{name} {count:,}" for name, count in sorted(counters.items()))
            print(f"{self._runner}: {', '.join(shown)}", flush=True)
        return (load_value(_result_path(folder, index)) for index in range(num_tasks))


def _name(function: Any) -> str:
    return getattr(function, "func", function).__name__


def _task_path(folder: str, index: int) -> str:
    return os.path.join(folder, f"task-{index:06d}.npz")


def _result_path(folder: str, index: int) -> str:
    return os.path.join(folder, f"result-{index:06d}.npz")


def _build(
    pipeline: beam.Pipeline, function: Callable[..., Any], folder: str, num_tasks: int
) -> None:
    (
        pipeline
        | "Tasks" >> beam.Create(range(num_tasks))
        | "Spread" >> beam.Reshuffle()
        | "Call" >> beam.Map(_call, function, folder)
    )


def _call(index: int, function: Callable[..., Any], folder: str) -> None:
    """Does one task; done again, it leaves the same files."""
    with marked_faults():
        result = function(*load_value(_task_path(folder, index)))
        save_value(_result_path(folder, index), result)
    for name, count in _counts(result).items():
        Metrics.counter(NAMESPACE, name).inc(count)


def _counts(result: Any) -> dict[str, int]:
    """What a result adds to the counters."""
    if isinstance(result, ScannedSegment):
        usable, rejected = len(result.positions), len(result.rejected)
        return {"rows": usable + rejected, "rejected": rejected}
    if isinstance(result, WrittenSegment):
        lengths = result.tally.length_histogram.sum(axis=0)
        documents = int(result.tally.window_histogram.sum())
        return {"documents": documents, "tokens": int((lengths * range(len(lengths))).sum())}
    if isinstance(result, Shard):
        return {"shards": 1, "bytes": result.bytes}
    return {"files": 1}
