"""What an evaluation writes: metrics.json and its neighbours, their slices, and a printed table."""

import json
import math
import os
from collections import Counter
from typing import Any

import numpy as np

from trainer.errors import shorten
from trainer.evaluation.metrics import (
    calibration_errors,
    count_decisions,
    decision_metrics,
    mean_of_defined,
    rank_every_label,
)
from trainer.storage.filesystem import write_atomically
from trainer.storage.own_files import Number, PositiveNumber, fields, many, named

EVALUATION_FOLDER = "evaluation"
METRICS_FILE = "metrics.json"
CALIBRATION_FILE = "calibration.json"
CURVES_FILE = "curves.json"
# Of scoring in a narrower precision: its metrics and thresholds, by precision.
NARROW_FILES = {"bfloat16": "bfloat16.json", "int8": "int8.json"}
# What the printed table shows, in its order.
HEADLINES = (
    *("mean_average_precision", "micro_average_precision", "macro_roc_auc"),
    *("micro_f1", "macro_f1", "samples_f1"),
    *("micro_precision", "micro_recall", "macro_precision", "macro_recall"),
    *("precision_at_1", "ndcg_at_5"),
    *("expected_calibration_error", "expected_calibration_error_before"),
    *("brier_score", "brier_score_before", "log_loss", "log_loss_before"),
)
# Names of labels that the last line of the table shows.
_SHOWN_LABELS = 20
# Values of a kept column that are reported one by one; the rest are reported together.
MAX_VALUES = 50
# What readers of calibration.json need of it; null stands for NaN.
CALIBRATION = fields(
    fingerprints=fields(checkpoint=str),
    scale=many(PositiveNumber),
    shift=many(Number),
    thresholds=many(Number | None),
)
# The same of a file of NARROW_FILES.
NARROW = fields(
    thresholds=many(Number | None),
    metrics=named(Number | None),
    difference=named(Number),
)


def slice_metrics(
    columns: tuple[str, ...],
    slices: np.ndarray,
    probabilities: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray,
) -> dict[str, Any]:
    """Metrics by value of each kept column, of which `slices`, str [N, C], has each document's.

    Probabilities are float [N, L], labels bool [N, L], thresholds float [L]. By column there are
    `values`, metrics by value, the most frequent first and at most `MAX_VALUES`; and `rest`, those
    of all other values together with their number `num_values`, or None. Macro-F1 is over the
    labels that are present.
    """

    def measure(chosen: np.ndarray) -> dict[str, Any]:
        return _measure(probabilities[chosen], labels[chosen], thresholds)

    tables = {}
    for column, values in zip(columns, slices.T, strict=True):
        # Equally frequent ones by name, so that the order of documents does not matter.
        ranked = sorted(Counter(values.tolist()).items(), key=lambda item: (-item[1], item[0]))
        shown = [value for value, _ in ranked[:MAX_VALUES]]
        others = ~np.isin(values, np.array(shown, values.dtype))
        rest = {"num_values": len(ranked) - len(shown)} | measure(others) if others.any() else None
        tables[column] = {"values": {v: measure(values == v) for v in shown}, "rest": rest}
    return tables


def _measure(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    counts = count_decisions(probabilities >= thresholds, labels)
    overall, columns = decision_metrics(counts)
    error, _, num_in_error = calibration_errors(probabilities, labels)
    is_present = counts[2] > 0
    return {
        "documents": len(labels),
        "labels_present": int(np.count_nonzero(is_present)),
        "micro_f1": overall["micro_f1"],
        "macro_f1": mean_of_defined(np.where(is_present, columns["f1"], np.nan)),
        "mean_average_precision": mean_of_defined(rank_every_label(probabilities, labels)[0]),
        "expected_calibration_error": error,
        "labels_in_calibration_error": num_in_error,
    }


def write_json(folder: str, name: str, values: dict[str, Any]) -> None:
    """Writes JSON atomically; NaN becomes null."""
    content = json.dumps(as_json(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(os.path.join(folder, name), content + "\n")


def as_json(value: Any) -> Any:
    """Nested values as JSON has them: arrays as lists, NaN as None."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def without_labels(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics overall."""
    return {name: value for name, value in metrics.items() if name != "per_label"}


def by_label(columns: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Columns [L] by name as rows by label."""
    return {
        label: {name: column[index].item() for name, column in columns.items()}
        for index, label in enumerate(labels)
    }


def print_table(
    columns: dict[str, dict[str, Any]],
    intervals: dict[str, tuple[float, float]],
    labels: tuple[str, ...],
) -> None:
    """Prints headline metrics by title, those of the reported split first, and what they leave out.

    The intervals, (low, high) by name, are of the reported split's metrics.
    """
    metrics = next(iter(columns.values()))
    width = max(map(len, HEADLINES))
    # A value has six characters.
    titles = {title: title.rjust(6) for title in columns}
    print(" " * width, *titles.values(), "95 % interval" if intervals else "", sep="  ")
    for name in HEADLINES:
        cells = [
            ("" if values.get(name) is None else f"{values[name]:.4f}").rjust(len(titles[title]))
            for title, values in columns.items()
        ]
        low, high = intervals.get(name, (math.nan, math.nan))
        cells.append("" if math.isnan(low) else f"{low:.4f} to {high:.4f}")
        print("  ".join([name.ljust(width), *cells]).rstrip())
    print(
        f"{metrics['documents']} documents, {metrics['labels']} labels: "
        f"{metrics['labels_without_positives']} without positives (left out of average precision),"
        f" {metrics['labels_of_one_class']} of one class (left out of ROC-AUC), "
        f"{metrics['labels_in_calibration_error']} in the calibration error"
    )
    if "error_bounds" in metrics:
        print("Binned; off by at most:", end=" ")
        bounds = {name: metrics["error_bounds"].get(name) for name in HEADLINES}
        print(*(f"{name} {bound:.4f}" for name, bound in bounds.items() if bound), sep=", ")
    never = np.flatnonzero(np.isnan(metrics["per_label"]["threshold"]))
    if len(never):
        shown = ", ".join(shorten(labels[index]) for index in never[:_SHOWN_LABELS])
        more = f" and {len(never) - _SHOWN_LABELS} more" if len(never) > _SHOWN_LABELS else ""
        print(f"Never predicted: {shown}{more}")
