"""Metrics of the documents that share a value of a kept column (NumPy only)."""

from collections import Counter
from typing import Any

import numpy as np

from trainer.evaluation.metrics import decision_metrics
from trainer.evaluation.probability_metrics import calibration_errors, mean_of_defined
from trainer.evaluation.ranking import average_precision, label_blocks, rank_labels

# Values of a column that are reported one by one; the rest are reported together.
MAX_VALUES = 50


def slice_metrics(
    columns: tuple[str, ...],
    slices: np.ndarray,
    probabilities: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray,
) -> dict[str, Any]:
    """Metrics by value of each kept column.

    Args:
      columns: C names.
      slices: str [N, C], each document's values; empty for a missing one.
      probabilities: float [N, L].
      labels: bool [N, L].
      thresholds: float [L]; NaN for a label that is never predicted.

    Returns:
      By column: `values`, metrics by value, the commonest first and at most `MAX_VALUES`; `rest`,
      those of all other values together with their number `num_values`, or None.
    """

    def measure(chosen: np.ndarray) -> dict[str, Any]:
        return _measure(probabilities[chosen], labels[chosen], thresholds)

    tables = {}
    for column, values in zip(columns, slices.T, strict=True):
        # Equally common ones by name, so that the order of documents does not matter.
        ranked = sorted(Counter(values.tolist()).items(), key=lambda item: (-item[1], item[0]))
        shown = [value for value, _ in ranked[:MAX_VALUES]]
        others = ~np.isin(values, np.array(shown, values.dtype))
        rest = {"num_values": len(ranked) - len(shown)} | measure(others) if others.any() else None
        tables[column] = {"values": {v: measure(values == v) for v in shown}, "rest": rest}
    return tables


def _measure(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    """Micro-F1, macro-F1 over labels with positives, average precision and calibration error."""
    predicted = probabilities >= thresholds
    support = np.count_nonzero(labels, axis=0)
    right = np.count_nonzero(predicted & labels, axis=0)
    overall, columns = decision_metrics(right, np.count_nonzero(predicted, axis=0), support)
    precisions = np.concatenate(
        [
            average_precision(rank_labels(probabilities[:, block].T, labels[:, block].T))
            for block in label_blocks(*labels.shape)
        ]
    )
    error, _, num_in_error = calibration_errors(probabilities, labels)
    return {
        "documents": len(labels),
        "labels_present": int(np.count_nonzero(support)),
        "micro_f1": overall["micro_f1"],
        "macro_f1": mean_of_defined(np.where(support > 0, columns["f1"], np.nan)),
        "mean_average_precision": mean_of_defined(precisions),
        "expected_calibration_error": error,
        "labels_in_calibration_error": num_in_error,
    }
