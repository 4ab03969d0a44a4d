"""Probabilities as JSON lines: the documents' chosen labels and scores, in text.

Written by hand rather than by `json.dumps`, which takes longer for a thousand labels than the
encoder does on an accelerator. Six significant digits: more than bfloat16 or float32 sums carry,
and short.
"""

import itertools
import json
from collections.abc import Sequence

import numpy as np


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

    def format(self, ids: Sequence[str], probabilities: np.ndarray) -> bytes:
        """The lines of N documents.

        Args:
          ids: N ids.
          probabilities: float32 [N, L].
        """
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
        # Stable: of equal scores the earlier label comes first.
        order = np.argsort(-probabilities, axis=1, kind="stable")
        if self._kind == "top":
            order = order[:, : int(self._number)]
            counts = [order.shape[1]] * len(order)
        else:
            counts = (probabilities >= np.float64(self._number)).sum(axis=1).tolist()
        values = np.take_along_axis(probabilities, order, axis=1).tolist()
        return [
            f"{{{', '.join([f'{self._keys[i]}{value:.6g}' for i, value in pairs])}}}"
            for pairs in (
                zip(row[:count], row_values[:count], strict=True)
                for row, row_values, count in zip(order.tolist(), values, counts, strict=True)
            )
        ]


def _indices_by_row(mask: np.ndarray) -> list[list[int]]:
    """For each row of a bool [N, L] the columns that are true."""
    rows, columns = np.nonzero(mask)
    bounds = np.searchsorted(rows, np.arange(len(mask) + 1)).tolist()
    indices = columns.tolist()
    return [indices[start:end] for start, end in itertools.pairwise(bounds)]
