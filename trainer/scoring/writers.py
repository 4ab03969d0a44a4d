"""Probabilities as Parquet: the documents' ids, chosen labels, scores and kept columns.

Which of a document's labels are chosen, and which of its scores are written, in which order.

Probabilities as JSON lines: the documents' chosen labels, scores and kept columns, in text.

Written by hand rather than by `json.dumps`, which takes longer for a thousand labels than the
encoder does on an accelerator. Six significant digits: more than bfloat16 or float32 sums carry,
and short.

The files that scores are written to: gzipped JSON lines, or Parquet.
"""

import gzip
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class ScoreSelection:
    """Some labels of each of N documents.

    Attributes:
      columns: int64 [S], labels by number, one document's after the other's.
      bounds: int64 [N + 1]; document n has columns[bounds[n] : bounds[n + 1]].
    """

    columns: np.ndarray
    bounds: np.ndarray


def choose_labels(probabilities: np.ndarray, thresholds: np.ndarray) -> ScoreSelection:
    """The labels at or above their thresholds, in label order.

    Args:
      probabilities: float32 [N, L].
      thresholds: float64 [L]; NaN for a label that is never chosen.
    """
    rows, columns = np.nonzero(probabilities >= thresholds)
    return ScoreSelection(columns, _bounds(rows, len(probabilities)))


def select_scores(
    probabilities: np.ndarray, thresholds: np.ndarray, selection: tuple[str, float]
) -> ScoreSelection:
    """The labels whose scores are written: all in label order, else the highest score first.

    Args:
      probabilities: float32 [N, L].
      thresholds: float64 [L], for "chosen".
      selection: ("all", 0), ("chosen", 0), ("top", K) or ("above", P).
    """
    kind, number = selection
    count, size = probabilities.shape
    if kind == "all":
        return ScoreSelection(np.tile(np.arange(size), count), np.arange(count + 1) * size)
    if kind == "top":
        mask = _is_highest(probabilities, int(number))
    else:
        mask = probabilities >= (thresholds if kind == "chosen" else np.float64(number))
    # Only what is selected is sorted: of thousands of labels, a few.
    rows, columns = np.nonzero(mask)
    # Of equal scores the earlier label comes first.
    order = np.lexsort((columns, -probabilities[rows, columns], rows))
    return ScoreSelection(columns[order], _bounds(rows, count))


def values_of(probabilities: np.ndarray, selected: ScoreSelection) -> np.ndarray:
    """The probabilities (float32 [S]) of selected labels."""
    rows = np.repeat(np.arange(len(probabilities)), np.diff(selected.bounds))
    return probabilities[rows, selected.columns]


def rows_at_once(labels: Sequence[str], cells: int) -> int:
    """How many documents have about so many scores, at least one."""
    return max(1, cells // max(1, len(labels)))


def _is_highest(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Which are the `count` highest of their row, of equal ones the first: bool [N, L]."""
    size = probabilities.shape[1]
    if count >= size:
        return np.ones(probabilities.shape, bool)
    lowest = np.partition(probabilities, size - count, axis=1)[:, size - count, None]
    is_higher, is_equal = probabilities > lowest, probabilities == lowest
    room = count - is_higher.sum(axis=1, keepdims=True)
    return is_higher | (is_equal & (np.cumsum(is_equal, axis=1, dtype=np.int32) <= room))


def _bounds(rows: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` rows where its entries begin and end in `rows`, which ascends."""
    return np.searchsorted(rows, np.arange(count + 1))


# Documents x labels that are formatted at once, so that their text stays below 100 MB.
_CELLS_AT_ONCE = 1 << 20


class LineFormatter:
    """Formats documents as `{"id": ..., "labels": [...], "scores": {...}, ...}` lines."""

    def __init__(
        self,
        labels: Sequence[str],
        thresholds: np.ndarray,
        selection: tuple[str, float],
        kept_columns: Sequence[str] = (),
    ) -> None:
        """Prepares the parts of a line that never change.

        Args:
          labels: L names.
          thresholds: float [L]; a label is chosen at this probability or above, never for NaN.
          selection: which scores to write, as `select_scores` takes it.
          kept_columns: C names of further fields, none of them one of a line's own.
        """
        self._labels = labels
        self._names = [json.dumps(label, ensure_ascii=False) for label in labels]
        self._keys = [f"{name}: " for name in self._names]
        self._thresholds = np.asarray(thresholds, np.float64)
        self._selection = selection
        self._kept = [f", {json.dumps(name)}: " for name in kept_columns]
        keys = ", ".join(f"{key.replace('%', '%%')}%.6g" for key in self._keys)
        self._all = f"{{{keys}}}"

    def format(
        self,
        ids: Sequence[str],
        probabilities: np.ndarray,
        kept: Sequence[tuple[Any, ...]] | None = None,
    ) -> Iterator[bytes]:
        """The lines of N documents, some at a time, so that memory does not grow with N.

        Args:
          ids: N ids.
          probabilities: float32 [N, L].
          kept: N tuples of the C kept columns' values; may be left out if there are none.
        """
        step = rows_at_once(self._labels, _CELLS_AT_ONCE)
        kept = kept or [()] * len(ids)
        for start in range(0, len(ids), step):
            end = start + step
            yield self._format(ids[start:end], probabilities[start:end], kept[start:end])

    def _format(
        self, ids: Sequence[str], probabilities: np.ndarray, kept: Sequence[tuple[Any, ...]]
    ) -> bytes:
        chosen = choose_labels(probabilities, self._thresholds)
        names = [self._names[column] for column in chosen.columns.tolist()]
        scores = self._format_scores(probabilities)
        lines = []
        bounds = itertools.pairwise(chosen.bounds.tolist())
        for identifier, (start, end), text, values in zip(ids, bounds, scores, kept, strict=True):
            labels = ", ".join(names[start:end])
            # Ids are anybody's: escaped to ASCII, even half a surrogate pair survives.
            lines.append(f'{{"id": {json.dumps(identifier)}, "labels": [{labels}], ')
            lines.append(f'"scores": {text}')
            lines += [key + to_json(value) for key, value in zip(self._kept, values, strict=True)]
            lines.append("}\n")
        return "".join(lines).encode()

    def _format_scores(self, probabilities: np.ndarray) -> list[str]:
        """The selected scores of each document as a JSON object."""
        if self._selection[0] == "all":
            return [self._all % tuple(row) for row in probabilities.tolist()]
        selected = select_scores(probabilities, self._thresholds, self._selection)
        values = values_of(probabilities, selected).tolist()
        pairs = zip(selected.columns.tolist(), values, strict=True)
        texts = [f"{self._keys[column]}{value:.6g}" for column, value in pairs]
        bounds = itertools.pairwise(selected.bounds.tolist())
        return [f"{{{', '.join(texts[start:end])}}}" for start, end in bounds]


def to_json(value: Any) -> str:
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

    def _take(self, selected: ScoreSelection) -> pa.Array:
        return self._names.take(pa.array(selected.columns))


def _offsets(selected: ScoreSelection) -> pa.Array:
    return pa.array(selected.bounds, pa.int32())


def _value_to_text(value: Any) -> str | None:
    if value is None:
        return None
    return _to_text(value if isinstance(value, str) else to_json(value))


def _to_text(text: str) -> str:
    """Text that can be UTF-8: half a surrogate pair becomes an escape such as \\ud800."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


ENDINGS = {"jsonl": ".jsonl.gz", "parquet": ".parquet"}
# Fields of a result that no kept column can be named as.
RESULT_FIELDS = ("id", "labels", "scores")
_GZIP_LEVEL = 6


class ResultWriter(Protocol):
    """One file of results being written; its bytes depend on nothing but the rows."""

    def write(
        self, ids: Sequence[str], probabilities: np.ndarray, kept: Sequence[tuple[Any, ...]]
    ) -> None:
        """Adds N documents.

        Args:
          ids: N ids.
          probabilities: float32 [N, L].
          kept: N tuples of the kept columns' values.
        """

    def close(self) -> None:
        """Writes what is left to write; the file stays open."""

    def discard(self) -> None:
        """In the place of `close`, before the file is closed: what is left stays unwritten."""


class _LineWriter:
    """JSON lines, compressed."""

    def __init__(self, file: BinaryIO, formatter: LineFormatter) -> None:
        self._formatter = formatter
        # Neither a name nor a time in the header: the bytes depend on the lines alone.
        self._file = gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)

    def write(
        self, ids: Sequence[str], probabilities: np.ndarray, kept: Sequence[tuple[Any, ...]]
    ) -> None:
        for lines in self._formatter.format(ids, probabilities, kept):
            self._file.write(lines)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        if not self._file.closed:
            self._file.fileobj = io.BytesIO()
            self._file.close()


def open_results(
    file: BinaryIO,
    format: str,
    labels: Sequence[str],
    thresholds: np.ndarray,
    selection: tuple[str, float],
    kept_columns: Sequence[str],
) -> ResultWriter:
    """Begins a file of results.

    Args:
      file: open for writing; `close` of the writer leaves it open.
      format: one of `ENDINGS`.
      labels: L names.
      thresholds: float64 [L]; a label is chosen at this probability or above, never for NaN.
      selection: which scores to write: ("all", 0), ("chosen", 0) for those of the chosen labels,
        ("top", K) or ("above", P).
      kept_columns: names of the further fields, none of `RESULT_FIELDS` among them.
    """
    if format == "jsonl":
        return _LineWriter(file, LineFormatter(labels, thresholds, selection, kept_columns))
    # Only for the one format: pyarrow takes a moment to load.

    return TableWriter(file, labels, thresholds, selection, kept_columns)
