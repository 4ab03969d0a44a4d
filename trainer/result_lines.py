"""Probabilities as JSON lines: the documents' chosen labels and scores, in text.

Written by hand rather than by `json.dumps`, which takes longer for a thousand labels than the
encoder does on an accelerator. Six significant digits: more than bfloat16 or float32 sums carry,
and short.
"""

import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np

# Documents x labels that are formatted at once, so that their text stays below 100 MB.
_CELLS_AT_ONCE = 1 << 20


class LineFormatter:
    """Formats documents as `{"id": ..., "labels": [...], "scores": {...}}` lines."""

    def __init__(
        self, labels: Sequence[str], thresholds: np.ndarray, selection: tuple[str, float]
    ) -> None:
        """Prepares the parts of a line that never change.

        Args:
          labels: L names.
          thresholds: float [L]; a label is chosen at this probability or above, never for NaN.
          selection: which scores to write: ("all", 0), ("top", K) or ("above", P).
        """
        self._names = [json.dumps(label, ensure_ascii=False) for label in labels]
        self._keys = [f"{name}: " for name in self._names]
        self._thresholds = np.asarray(thresholds, np.float64)
        self._kind, self._number = selection
        keys = ", ".join(f"{key.replace('%', '%%')}%.6g" for key in self._keys)
        self._all = f"{{{keys}}}"

    def format(self, ids: Sequence[str], probabilities: np.ndarray) -> Iterator[bytes]:
        """The lines of N documents, some at a time, so that memory does not grow with N.

        Args:
          ids: N ids.
          probabilities: float32 [N, L].
        """
        step = max(1, _CELLS_AT_ONCE // max(1, len(self._names)))
        for start in range(0, len(ids), step):
            yield self._format(ids[start : start + step], probabilities[start : start + step])

    def _format(self, ids: Sequence[str], probabilities: np.ndarray) -> bytes:
        chosen = _indices_by_row(probabilities >= self._thresholds)
        scores = self._format_scores(probabilities)
        lines = []
        for identifier, indices, text in zip(ids, chosen, scores, strict=True):
            labels = ", ".join([self._names[index] for index in indices])
            # Ids are anybody's: escaped to ASCII, even half a surrogate pair survives.
            lines.append(f'{{"id": {json.dumps(identifier)}, "labels": [{labels}], ')
            lines.append(f'"scores": {text}}}\n')
        return "".join(lines).encode()

    def _format_scores(self, probabilities: np.ndarray) -> list[str]:
        """The scores of each document as a JSON object: all in label order, else highest first."""
        if self._kind == "all":
            return [self._all % tuple(row) for row in probabilities.tolist()]
        if self._kind == "top":
            selected = _is_highest(probabilities, int(self._number))
        else:
            selected = probabilities >= np.float64(self._number)
        # Only what is selected is sorted and formatted: of thousands of labels, a few.
        rows, columns = np.nonzero(selected)
        values = probabilities[rows, columns]
        # Of equal scores the earlier label comes first.
        order = np.lexsort((columns, -values, rows))
        columns_and_values = zip(columns[order].tolist(), values[order].tolist(), strict=True)
        texts = [f"{self._keys[column]}{value:.6g}" for column, value in columns_and_values]
        return [f"{{{', '.join(texts[start:end])}}}" for start, end in _bounds(rows, selected)]


def _is_highest(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Which are the `count` highest of their row, of equal ones the first: bool [N, L]."""
    size = probabilities.shape[1]
    if count >= size:
        return np.ones(probabilities.shape, bool)
    lowest = np.partition(probabilities, size - count, axis=1)[:, size - count, None]
    is_higher, is_equal = probabilities > lowest, probabilities == lowest
    room = count - is_higher.sum(axis=1, keepdims=True)
    return is_higher | (is_equal & (np.cumsum(is_equal, axis=1, dtype=np.int32) <= room))


def _bounds(rows: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """For each row of `mask` where its entries begin and end in `rows`, which ascends."""
    return itertools.pairwise(np.searchsorted(rows, np.arange(len(mask) + 1)).tolist())


def _indices_by_row(mask: np.ndarray) -> list[list[int]]:
    """For each row of a bool [N, L] the columns that are true."""
    rows, columns = np.nonzero(mask)
    indices = columns.tolist()
    return [indices[start:end] for start, end in _bounds(rows, mask)]
