"""Probabilities as Parquet: the documents' ids, chosen labels, scores and kept columns."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.scoring.result_lines import to_json
from trainer.scoring.selected_scores import (
    Selected,
    choose_labels,
    rows_at_once,
    select_scores,
    values_of,
)

# Documents, and documents x labels, of a row group.
_ROWS_A_GROUP = 1 << 14
_CELLS_A_GROUP = 1 << 22


class TableWriter:
    """Writes rows `id` (string), `labels` (list<string>), `scores` (map<string, float>), ….

    Kept columns follow as strings: text as it is, null as null, all else as JSON. Row groups have
    the same number of rows however the rows come, so the file's bytes depend on the rows alone.
    """

    def __init__(
        self,
        file: BinaryIO,
        labels: Sequence[str],
        thresholds: np.ndarray,
        selection: tuple[str, float],
        kept_columns: Sequence[str],
    ) -> None:
        """Begins a file; the arguments are those of `open_results`."""
        self._names = pa.array([_to_text(label) for label in labels], pa.string())
        self._thresholds = np.asarray(thresholds, np.float64)
        self._selection = selection
        self._rows_a_group = min(_ROWS_A_GROUP, rows_at_once(labels, _CELLS_A_GROUP))
        self._schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("labels", pa.list_(pa.string())),
                pa.field("scores", pa.map_(pa.string(), pa.float32())),
                *(pa.field(_to_text(name), pa.string()) for name in kept_columns),
            ]
        )
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[pa.RecordBatch] = []
        self._num_held = 0

    def write(
        self, ids: Sequence[str], probabilities: np.ndarray, kept: Sequence[tuple[Any, ...]]
    ) -> None:
        """Adds N documents; see `ResultWriter.write`."""
        start = 0
        while start < len(ids):
            end = start + self._rows_a_group - self._num_held
            self._held.append(
                self._to_batch(ids[start:end], probabilities[start:end], kept[start:end])
            )
            self._num_held += len(self._held[-1])
            if self._num_held == self._rows_a_group:
                self._write_group()
            start = end

    def close(self) -> None:
        """Writes what is held and the footer; the file stays open."""
        if self._held:
            self._write_group()
        self._writer.close()

    def discard(self) -> None:
        """See `ResultWriter.discard`."""
        self._writer.is_open = False

    def _write_group(self) -> None:
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        self._writer.write_table(table, row_group_size=self._rows_a_group)
        self._held, self._num_held = [], 0

    def _to_batch(
        self, ids: Sequence[str], probabilities: np.ndarray, kept: Sequence[tuple[Any, ...]]
    ) -> pa.RecordBatch:
        chosen = choose_labels(probabilities, self._thresholds)
        selected = select_scores(probabilities, self._thresholds, self._selection)
        scores = pa.array(values_of(probabilities, selected), pa.float32())
        columns = [
            pa.array([_to_text(identifier) for identifier in ids], pa.string()),
            pa.ListArray.from_arrays(_offsets(chosen), self._take(chosen)),
            pa.MapArray.from_arrays(_offsets(selected), self._take(selected), scores),
        ]
        for index in range(len(self._schema) - len(columns)):
            texts = [_value_to_text(values[index]) for values in kept]
            columns.append(pa.array(texts, pa.string()))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _take(self, selected: Selected) -> pa.Array:
        return self._names.take(pa.array(selected.columns))


def _offsets(selected: Selected) -> pa.Array:
    return pa.array(selected.bounds, pa.int32())


def _value_to_text(value: Any) -> str | None:
    if value is None:
        return None
    return _to_text(value if isinstance(value, str) else to_json(value))


def _to_text(text: str) -> str:
    """Text that can be UTF-8: half a surrogate pair becomes an escape such as \\ud800."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
