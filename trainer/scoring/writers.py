"""The files of scores: gzipped JSON lines or Parquet, one row a document.

A row holds the document's id, its chosen labels, the selected scores and the kept columns. The
bytes of a file depend on its rows alone, however many of them are written at a time.
"""

import gzip
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.sources.rows import as_text

ENDINGS = {"jsonl": ".jsonl.gz", "parquet": ".parquet"}
_GZIP_LEVEL = 6
# Documents x labels that are formatted at once, and characters of the names that they may need, and
# of ids and kept values: some have thousands of labels, some long names, some whole texts.
_CELLS_AT_ONCE = 1 << 18
_NAMES_AT_ONCE = 1 << 25
_KEPT_AT_ONCE = 1 << 23
# A row group of Parquet ends with so many rows, or with so many bytes as a reader holds them.
_ROWS_A_GROUP = 1 << 14
_BYTES_A_GROUP = 1 << 26


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

    @property
    def rows_at_once(self) -> int:
        """How many documents are formatted at once, at least one."""
        # A name may be written twice: among the labels and among the scores.
        longest = 2 * sum(map(len, self.labels))
        by_names = _NAMES_AT_ONCE // max(1, longest)
        return max(1, min(by_names, _CELLS_AT_ONCE // max(1, len(self.labels))))


class DocumentScores(NamedTuple):
    """N documents: ids, probabilities (float32 [N, L]), tuples of the kept columns' values."""

    ids: Sequence[str]
    probabilities: np.ndarray
    kept: Sequence[tuple[Any, ...]]

    def rows(self, start: int, end: int) -> "DocumentScores":
        chosen = slice(start, end)
        return DocumentScores(self.ids[chosen], self.probabilities[chosen], self.kept[chosen])

    def pieces(self, max_rows: int) -> Iterator["DocumentScores"]:
        """Consecutive rows: as many at a time as bounds of their number and their text allow."""
        texts = zip(self.ids, self.kept, strict=True)
        sizes = [len(name) + sum(len(as_text(value)) for value in kept) for name, kept in texts]
        ends = np.cumsum(sizes, dtype=np.int64)
        start = 0
        while start < len(sizes):
            limit = ends[start] - sizes[start] + _KEPT_AT_ONCE
            end = min(start + max_rows, int(np.searchsorted(ends, limit, side="right")))
            end = max(start + 1, end)
            yield self.rows(start, end)
            start = end


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

    def sums(self, sizes: np.ndarray) -> np.ndarray:
        """The sum of its labels' sizes (int64 [L]) for each document, int64 [N]."""
        return np.diff(np.append(0, np.cumsum(sizes[self.columns]))[self.bounds])

    def join(self, texts: pa.Array) -> list[str]:
        """The texts of its labels (string [S]), those of a document joined by commas."""
        lists = pa.ListArray.from_arrays(pa.array(self.bounds, pa.int32()), texts)
        return pc.binary_join(lists, ", ").to_pylist()


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

    Arrow formats them: for a thousand labels `json.dumps` takes longer than the encoder does on an
    accelerator. A score is the shortest decimal that gives its float32 back, so the order of scores
    and their comparison with a threshold are the same before and after.
    """

    def __init__(self, file: BinaryIO, layout: ResultLayout) -> None:
        self._layout = layout
        # Neither a name nor a time in the header: the bytes depend on the lines alone.
        self._file = gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)
        names = [_to_text(json.dumps(label, ensure_ascii=False)) for label in layout.labels]
        self._names = pa.array(names, pa.string())
        self._keys = pa.array([f"{name}: " for name in names], pa.string())
        self._kept = [f", {json.dumps(name)}: " for name in layout.kept_columns]

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
        return map(self._format, documents.pieces(self._layout.rows_at_once))

    def _format(self, documents: DocumentScores) -> bytes:
        chosen = SelectedLabels.of(documents.probabilities >= self._layout.thresholds)
        labels_of = chosen.join(self._names.take(pa.array(chosen.columns)))
        scores_of = self._format_scores(documents.probabilities)
        lines = []
        for identifier, labels, scores, values in zip(
            documents.ids, labels_of, scores_of, documents.kept, strict=True
        ):
            # Ids are anybody's: escaped to ASCII, even half a surrogate pair survives.
            lines.append(f'{{"id": {json.dumps(identifier)}, "labels": [{labels}], ')
            lines.append(f'"scores": {{{scores}}}')
            lines += [key + _to_json(value) for key, value in zip(self._kept, values, strict=True)]
            lines.append("}\n")
        return "".join(lines).encode()

    def _format_scores(self, probabilities: np.ndarray) -> list[str]:
        """The selected scores of each document, as they stand in a JSON object."""
        selected = select_scores(probabilities, self._layout)
        scores = pa.array(selected.values(probabilities)).cast(pa.string())
        keys = self._keys.take(pa.array(selected.columns))
        return selected.join(pc.binary_join_element_wise(keys, scores, ""))


class TableWriter:
    """Parquet with `id` (string), `labels` (list<string>), `scores` (map<string, float>), ….

    Kept columns follow as strings: text as it is, null as null, all else as JSON. A row group ends
    after `_ROWS_A_GROUP` rows, or after the row that fills `_BYTES_A_GROUP`, however many rows are
    written at a time.
    """

    def __init__(self, file: BinaryIO, layout: ResultLayout) -> None:
        self._layout = layout
        self._names = pa.array([_to_text(label) for label in layout.labels], pa.string())
        self._sizes = pc.binary_length(self._names).to_numpy().astype(np.int64)
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
        self._rows_held = self._bytes_held = 0

    def write(self, documents: DocumentScores) -> None:
        for piece in documents.pieces(self._layout.rows_at_once):
            batch, sizes = self._to_batch(piece)
            while len(batch):
                ends = self._bytes_held + np.cumsum(sizes)
                # The first row that fills the group is its last.
                count = int(np.searchsorted(ends, _BYTES_A_GROUP)) + 1
                count = min(count, len(batch), _ROWS_A_GROUP - self._rows_held)
                self._held.append(batch.slice(0, count))
                self._rows_held += count
                self._bytes_held = int(ends[count - 1])
                if self._rows_held == _ROWS_A_GROUP or self._bytes_held >= _BYTES_A_GROUP:
                    self._write_group()
                batch, sizes = batch.slice(count), sizes[count:]

    def close(self) -> None:
        if self._held:
            self._write_group()
        self._writer.close()

    def discard(self) -> None:
        # ParquetWriter writes its footer when it is collected, unless it counts as closed.
        self._writer.is_open = False

    def _write_group(self) -> None:
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        self._writer.write_table(table, row_group_size=_ROWS_A_GROUP)
        self._held, self._rows_held, self._bytes_held = [], 0, 0

    def _to_batch(self, documents: DocumentScores) -> tuple[pa.RecordBatch, np.ndarray]:
        """N rows, and the bytes of each one's texts and scores, int64 [N]."""
        chosen = SelectedLabels.of(documents.probabilities >= self._layout.thresholds)
        selected = select_scores(documents.probabilities, self._layout)
        scores = pa.array(selected.values(documents.probabilities), pa.float32())
        texts = [pa.array([_to_text(identifier) for identifier in documents.ids], pa.string())]
        for index in range(len(self._layout.kept_columns)):
            values = [_value_to_text(values[index]) for values in documents.kept]
            texts.append(pa.array(values, pa.string()))
        labels = pa.ListArray.from_arrays(*self._to_lists(chosen))
        by_name = pa.MapArray.from_arrays(*self._to_lists(selected), scores)
        columns = [texts[0], labels, by_name, *texts[1:]]
        sizes = chosen.sums(self._sizes) + selected.sums(self._sizes + scores.type.byte_width)
        for column in texts:
            sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy()
        return pa.RecordBatch.from_arrays(columns, schema=self._schema), sizes

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
