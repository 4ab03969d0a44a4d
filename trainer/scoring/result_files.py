"""The files that scores are written to: gzipped JSON lines, or Parquet."""

import gzip
import io
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from trainer.scoring.result_lines import LineFormatter

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
    from trainer.scoring.writers import TableWriter

    return TableWriter(file, labels, thresholds, selection, kept_columns)
