"""Which of a document's labels are chosen, and which of its scores are written, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selected:
    """Some labels of each of N documents.

    Attributes:
      columns: int64 [S], labels by number, one document's after the other's.
      bounds: int64 [N + 1]; document n has columns[bounds[n] : bounds[n + 1]].
    """

    columns: np.ndarray
    bounds: np.ndarray


def choose_labels(probabilities: np.ndarray, thresholds: np.ndarray) -> Selected:
    """The labels at or above their thresholds, in label order.

    Args:
      probabilities: float32 [N, L].
      thresholds: float64 [L]; NaN for a label that is never chosen.
    """
    rows, columns = np.nonzero(probabilities >= thresholds)
    return Selected(columns, _bounds(rows, len(probabilities)))


def select_scores(
    probabilities: np.ndarray, thresholds: np.ndarray, selection: tuple[str, float]
) -> Selected:
    """The labels whose scores are written: all in label order, else the highest score first.

    Args:
      probabilities: float32 [N, L].
      thresholds: float64 [L], for "chosen".
      selection: ("all", 0), ("chosen", 0), ("top", K) or ("above", P).
    """
    kind, number = selection
    count, size = probabilities.shape
    if kind == "all":
        return Selected(np.tile(np.arange(size), count), np.arange(count + 1) * size)
    if kind == "top":
        mask = _is_highest(probabilities, int(number))
    else:
        mask = probabilities >= (thresholds if kind == "chosen" else np.float64(number))
    # Only what is selected is sorted: of thousands of labels, a few.
    rows, columns = np.nonzero(mask)
    # Of equal scores the earlier label comes first.
    order = np.lexsort((columns, -probabilities[rows, columns], rows))
    return Selected(columns[order], _bounds(rows, count))


def values_of(probabilities: np.ndarray, selected: Selected) -> np.ndarray:
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
