"""Arguments and results of tasks as files: JSON, with arrays beside it, and nothing that runs code.

One file holds one value: a `.npz` whose entry `value` is UTF-8 JSON and whose others are the arrays
that it refers to.
"""

import dataclasses
import json
import os
import uuid
import zipfile
from collections import Counter
from typing import Any

import numpy as np

from trainer.data.metadata import Shard
from trainer.errors import UserError
from trainer.preparation.scan import ScannedSegment
from trainer.preparation.shards import WrittenSegment
from trainer.preparation.statistics import Tally
from trainer.sources.rows import BadRow, Segment

# What is built again when a value is read; anything else is refused.
_RECORDS: dict[str, Any] = {
    kind.__name__: kind for kind in (BadRow, ScannedSegment, Segment, Shard, Tally, WrittenSegment)
}
_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


def save_value(path: str, value: Any) -> None:
    """Writes a value, so that the name is there only with all of it, whoever else writes it too."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_encode(value, arrays))
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    entries: dict[str, Any] = {f"array-{index}": array for index, array in enumerate(arrays)}
    entries["value"] = np.frombuffer(text.encode(), np.uint8)
    with open(aside, "wb") as file:
        np.savez(file, **entries)
    os.replace(aside, path)


def load_value(path: str) -> Any:
    """The value of a file that `save_value` wrote.

    Raises:
      UserError: if the file is not there or not whole.
    """
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
