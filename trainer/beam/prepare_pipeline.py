"""`prepare` by Beam: workers of a runner in the place of a pool of processes.

`prepare` maps pure functions over row ranges and shards, and makes decisions between the passes
that need all results. So each pass is one pipeline that maps such a function, and the shards are
the local command's, byte for byte.

Arguments and results are files of the work folder: a pipeline's own graph is limited to some
megabytes. Each is a `.npz` whose entry `value` is UTF-8 JSON and whose other entries are the arrays
that it refers to. Reading it runs no code, as reading a pickle would.
"""

import dataclasses
import json
import os
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from trainer.beam.runners import NAMESPACE, BeamRunner, marked_faults
from trainer.data.metadata import Shard
from trainer.errors import UserError
from trainer.preparation.scan import ScannedRange
from trainer.preparation.shards import WrittenRange
from trainer.preparation.statistics import SplitStatistics
from trainer.sources.input_files import Extent
from trainer.sources.rows import BadRow, RowRange

# The types that a value may hold.
_RECORDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (BadRow, Extent, ScannedRange, RowRange, Shard, SplitStatistics, WrittenRange)
}
_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


def save_value(path: str, value: Any) -> None:
    """Writes a value whole or not at all, even where several workers write the same file."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_encode(value, arrays))
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    entries: dict[str, Any] = {f"array-{index}": array for index, array in enumerate(arrays)}
    entries["value"] = np.frombuffer(text.encode(), np.uint8)
    with open(aside, "wb") as file:
        np.savez(file, **entries)
    os.replace(aside, path)


def load_value(path: str) -> Any:
    """The value of a file that `save_value` wrote; a UserError if it is not there or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return _decode(json.loads(file["value"].tobytes()), file)
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not there or not whole ({error}); expected the result of a worker; the data "
            "folder has to be one that all workers share"
        ) from None


def _encode(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):
        arrays.append(np.asarray(value))
        return {"array": len(arrays) - 1}
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        fields = value._fields if name == "BadRow" else [f.name for f in dataclasses.fields(value)]
        return {name: [_encode(getattr(value, field), arrays) for field in fields]}
    if isinstance(value, Counter):
        return {"counter": dict(value)}
    assert name in _CONTAINERS, name
    items = sorted(value) if isinstance(value, set) else value
    return {name: [_encode(item, arrays) for item in items]}


def _decode(value: Any, arrays: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[f"array-{content}"]
    if kind == "counter":
        return Counter(content)
    items = [_decode(item, arrays) for item in content]
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](items)
    return _RECORDS[kind](*items)


class BeamPool:
    """Maps functions over tasks by a Beam runner, as a pool of processes does by processes.

    All workers have to share the folder `work_dir`.
    """

    def __init__(self, runner: BeamRunner, work_dir: str) -> None:
        self._runner = runner
        self._work_dir = os.path.abspath(work_dir)
        self._num_calls = 0

    def map(self, function: Callable[..., Any], /, *arguments: Iterable[Any]) -> Iterator[Any]:
        """Calls a function with the first of all arguments, with the second of all, and so on.

        The function has to pickle. The results come in order, once all are there. A UserError,
        RunAgain or OSError of a call is raised here.
        """
        self._num_calls += 1
        folder = os.path.join(self._work_dir, f"call-{self._num_calls}")
        os.mkdir(folder)
        num_tasks = 0
        for num_tasks, task in enumerate(zip(*arguments, strict=True), 1):
            save_value(_path(folder, "task", num_tasks - 1), task)
        if num_tasks:
            name = getattr(function, "func", function).__name__
            print(f"{self._runner}: {num_tasks:,} tasks of {name}", flush=True)
            self._runner.run(
                lambda pipeline: (
                    pipeline
                    | "Tasks" >> beam.Create(range(num_tasks))
                    | "Spread" >> beam.Reshuffle()
                    | "Call" >> beam.Map(_call, function, folder)
                )
            )
        return (load_value(_path(folder, "result", index)) for index in range(num_tasks))


def _path(folder: str, kind: str, index: int) -> str:
    return os.path.join(folder, f"{kind}-{index:06d}.npz")


def _call(index: int, function: Callable[..., Any], folder: str) -> None:
    """Does one task; a call that Beam repeats leaves the same files."""
    with marked_faults():
        result = function(*load_value(_path(folder, "task", index)))
        save_value(_path(folder, "result", index), result)
    for name, count in _counts(result).items():
        Metrics.counter(NAMESPACE, name).inc(count)


def _counts(result: Any) -> dict[str, int]:
    """What a result adds to the counters."""
    if isinstance(result, ScannedRange):
        usable, rejected = len(result.positions), len(result.rejected)
        return {"rows": usable + rejected, "rejected": rejected}
    if isinstance(result, WrittenRange):
        lengths = result.statistics.length_histogram.sum(axis=0)
        documents = int(result.statistics.window_histogram.sum())
        return {"documents": documents, "tokens": int((lengths * range(len(lengths))).sum())}
    if isinstance(result, Shard):
        return {"shards": 1, "bytes": result.bytes}
    return {"files": 1}
