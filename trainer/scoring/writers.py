"""The files of scores: gzipped JSON lines or Parquet, one row a document.

A row holds the document's id, its chosen labels, the selected scores and the kept columns. The
bytes of a file depend on its rows alone, however many of them are written at a time.
"""

import gzip
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = {"jsonl": ".jsonl.gz", "parquet": ".parquet"}
_GZIP_LEVEL = 6
# Documents x labels that are formatted at once, so that their text stays below 100 MB.
_CELLS_AT_ONCE = 1 << 20
# Documents, and documents x labels, of a row group of Parquet.
_ROWS_A_GROUP = 1 << 14
_CELLS_A_GROUP = 1 << 22


@dataclass(frozen=True)
class ResultLayout:
    """What a file of scores holds of each document.

    `format` is one of `ENDINGS`. A label is chosen at its threshold (float64 [L]) or above, never
    for NaN. `selection` says which scores to write: ("all", 0), ("chosen", 0) for those of the
    chosen labels, ("top", K) or ("above", P). None of the C kept columns is called `id`, `labels`
    or `scores`.
    """

    format: str
    labels: Sequence[str]
    thresholds: np.ndarray
    selection: tuple[str, float]
    kept_columns: Sequence[str] = ()

    def rows_at_once(self, num_cells: int) -> int:
        """How many documents have about so many scores, at least one."""
        return max(1, num_cells // max(1, len(self.labels)))


class DocumentScores(NamedTuple):
    """N documents: ids, probabilities (float32 [N, L]), tuples of the kept columns' values."""

    ids: Sequence[str]
    probabilities: np.ndarray
    kept: Sequence[tuple[Any, ...]]

    def rows(self, start: int, end: int) -> "DocumentScores":
        chosen = slice(start, end)
        return DocumentScores(self.ids[chosen], self.probabilities[chosen], self.kept[chosen])


class SelectedLabels(NamedTuple):
    """Some labels of each of N documents.

    `columns` (int64 [S]) are indices of labels, one document's after the other's. Document n has
    columns[bounds[n] : bounds[n + 1]]; `bounds` is int64 [N + 1].
    """

    columns: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> "SelectedLabels":
        """Those that a mask (bool [N, L]) names, in label order."""
        rows, columns = np.nonzero(mask)
        return cls(columns, np.searchsorted(rows, np.arange(len(mask) + 1)))

    @property
    def rows(self) -> np.ndarray:
        """The document of each, int64 [S]."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def values(self, probabilities: np.ndarray) -> np.ndarray:
        """Their probabilities (float32 [S]), out of those of all labels (float32 [N, L])."""
        return probabilities[self.rows, self.columns]

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each document's labels begin and end."""
        return itertools.pairwise(self.bounds.tolist())


def select_scores(probabilities: np.ndarray, layout: ResultLayout) -> SelectedLabels:
    """The labels of N documents whose scores are written.

    All labels come in label order, any other selection with the highest score first.
    """
    kind, number = layout.selection
    count, size = probabilities.shape
    if kind == "all":
        return SelectedLabels(np.tile(np.arange(size), count), np.arange(count + 1) * size)
    if kind == "top":
        mask = _is_highest(probabilities, int(number))
    else:
        mask = probabilities >= (layout.thresholds if kind == "chosen" else np.float64(number))
    # Only what is selected is sorted: of thousands of labels, a few.
    selected = SelectedLabels.of(mask)
    # Of equal scores the earlier label comes first.
    order = np.lexsort((selected.columns, -selected.values(probabilities), selected.rows))
    return SelectedLabels(selected.columns[order], selected.bounds)


def _is_highest(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Which are the `count` highest of their row, of equal ones the first: bool [N, L]."""
    size = probabilities.shape[1]
    if count >= size:
        return np.ones(probabilities.shape, bool)
    lowest = np.partition(probabilities, size - count, axis=1)[:, size - count, None]
    is_higher, is_equal = probabilities > lowest, probabilities == lowest
    room = count - is_higher.sum(axis=1, keepdims=True)
    return is_higher | (is_equal & (np.cumsum(is_equal, axis=1, dtype=np.int32) <= room))


def open_results(file: BinaryIO, layout: ResultLayout) -> "LineWriter | TableWriter":
    """Begins a file of scores in a file that is open for writing, and stays so.

    `close` writes what is not written yet; `discard`, in its place, drops it.
    """
    return LineWriter(file, layout) if layout.format == "jsonl" else TableWriter(file, layout)


class LineWriter:
    """Gzipped lines of `{"id": ..., "labels": [...], "scores": {...}, ...}`.

    They are formatted by hand: for a thousand labels `json.dumps` takes longer than the encoder
    does on an accelerator. Scores have six significant digits, more than bfloat16 or float32 sums
    carry.
    """

    def __init__(self, file: BinaryIO, layout: ResultLayout) -> None:
        self._layout = layout
        # Neither a name nor a time in the header: the bytes depend on the lines alone.
        self._file = gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)
        # The texts that are the same in every line.
        self._names = [json.dumps(label, ensure_ascii=False) for label in layout.labels]
        self._keys = [f"{name}: " for name in self._names]
        self._kept = [f", {json.dumps(name)}: " for name in layout.kept_columns]
        keys = ", ".join(f"{key.replace('%', '%%')}%.6g" for key in self._keys)
        self._all = f"{{{keys}}}"

    def write(self, documents: DocumentScores) -> None:
        """Adds documents."""
        for lines in self.format(documents):
            self._file.write(lines)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        if not self._file.closed:
            # GzipFile writes its end when it is closed or collected, to what may be closed by then.
            self._file.fileobj = io.BytesIO()
            self._file.close()

    def format(self, documents: DocumentScores) -> Iterator[bytes]:
        """The lines of N documents, some at a time, so that memory does not grow with N."""
        step = self._layout.rows_at_once(_CELLS_AT_ONCE)
        for start in range(0, len(documents.ids), step):
            yield self._format(documents.rows(start, start + step))

    def _format(self, documents: DocumentScores) -> bytes:
        chosen = SelectedLabels.of(documents.probabilities >= self._layout.thresholds)
        names = [self._names[column] for column in chosen.columns.tolist()]
        labels_of = [", ".join(names[start:end]) for start, end in chosen.spans()]
        scores_of = self._format_scores(documents.probabilities)
        lines = []
        for identifier, labels, scores, values in zip(
            documents.ids, labels_of, scores_of, documents.kept, strict=True
        ):
            # Ids are anybody's: escaped to ASCII, even half a surrogate pair survives.
            lines.append(f'{{"id": {json.dumps(identifier)}, "labels": [{labels}], ')
            lines.append(f'"scores": {scores}')
            lines += [key + _to_json(value) for key, value in zip(self._kept, values, strict=True)]
            lines.append("}\n")
        return "".join(lines).encode()

    def _format_scores(self, probabilities: np.ndarray) -> list[str]:
        """The selected scores of each document as a JSON object."""
        if self._layout.selection[0] == "all":
            return [self._all % tuple(row) for row in probabilities.tolist()]
        selected = select_scores(probabilities, self._layout)
        values = selected.values(probabilities).tolist()
        pairs = zip(selected.columns.tolist(), values, strict=True)
        texts = [f"{self._keys[column]}{value:.6g}" for column, value in pairs]
        return [f"{{{', '.join(texts[start:end])}}}" for start, end in selected.spans()]


class TableWriter:
    """Parquet with `id` (string), `labels` (list<string>), `scores` (map<string, float>), ….

    Kept columns follow as strings: text as it is, null as null, all else as JSON. All row groups
    but the last have the same number of rows, however many rows are written at a time.
    """

    def __init__(self, file: BinaryIO, layout: ResultLayout) -> None:
        self._layout = layout
        self._names = pa.array([_to_text(label) for label in layout.labels], pa.string())
        self._rows_a_group = min(_ROWS_A_GROUP, layout.rows_at_once(_CELLS_A_GROUP))
        self._schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("labels", pa.list_(pa.string())),
                pa.field("scores", pa.map_(pa.string(), pa.float32())),
                *(pa.field(_to_text(name), pa.string()) for name in layout.kept_columns),
            ]
        )
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[pa.RecordBatch] = []
        self._num_held = 0

    def write(self, documents: DocumentScores) -> None:
        start = 0
        while start < len(documents.ids):
            end = start + self._rows_a_group - self._num_held
            self._held.append(self._to_batch(documents.rows(start, end)))
            self._num_held += len(self._held[-1])
            if self._num_held == self._rows_a_group:
                self._write_group()
            start = end

    def close(self) -> None:
        if self._held:
            self._write_group()
        self._writer.close()

    def discard(self) -> None:
        # ParquetWriter writes its footer when it is collected, unless it counts as closed.
        self._writer.is_open = False

    def _write_group(self) -> None:
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        self._writer.write_table(table, row_group_size=self._rows_a_group)
        self._held, self._num_held = [], 0

    def _to_batch(self, documents: DocumentScores) -> pa.RecordBatch:
        chosen = SelectedLabels.of(documents.probabilities >= self._layout.thresholds)
        selected = select_scores(documents.probabilities, self._layout)
        scores = pa.array(selected.values(documents.probabilities), pa.float32())
        columns = [
            pa.array([_to_text(identifier) for identifier in documents.ids], pa.string()),
            pa.ListArray.from_arrays(*self._to_lists(chosen)),
            pa.MapArray.from_arrays(*self._to_lists(selected), scores),
        ]
        for index in range(len(self._layout.kept_columns)):
            texts = [_value_to_text(values[index]) for values in documents.kept]
            columns.append(pa.array(texts, pa.string()))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _to_lists(self, selected: SelectedLabels) -> tuple[pa.Array, pa.Array]:
        """Where each document's labels begin (int32 [N + 1]), and their names (string [S])."""
        return pa.array(selected.bounds, pa.int32()), self._names.take(pa.array(selected.columns))


def _to_json(value: Any) -> str:
    """A kept value as JSON; what JSON has no word for becomes null (NaN) or text (dates)."""
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_without_nan(value), default=str)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def _value_to_text(value: Any) -> str | None:
    if value is None:
        return None
    return _to_text(value if isinstance(value, str) else _to_json(value))


def _to_text(text: str) -> str:
    """Text that can be UTF-8: half a surrogate pair becomes an escape such as \\ud800."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
