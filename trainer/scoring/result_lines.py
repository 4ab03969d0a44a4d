"""Probabilities as JSON lines: the documents' chosen labels, scores and kept columns, in text.

Written by hand rather than by `json.dumps`, which takes longer for a thousand labels than the
encoder does on an accelerator. Six significant digits: more than bfloat16 or float32 sums carry,
and short.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.scoring.selected_scores import choose_labels, rows_at_once, select_scores, values_of

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
