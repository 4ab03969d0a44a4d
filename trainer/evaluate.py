"""`multihot evaluate`: the best checkpoint's probabilities made honest, cut, and measured.

Calibration and thresholds are fitted on one split and reported on another; nothing that is fitted
sees the reported split.
"""

import hashlib
import json
import math
import os
import sys
from typing import Any

import numpy as np

from trainer import storage
from trainer.atomic import write_atomically
from trainer.calibration import fit_calibration, fit_thresholds, sigmoid
from trainer.checkpoint import LoadedRun, RunRecord, load_best
from trainer.config import EvaluateConfig
from trainer.errors import UserError
from trainer.metrics import CONVENTIONS, calibration_errors, compute_metrics, warn_if_constant
from trainer.packing import choose_packing
from trainer.predictor import Predictions, Predictor
from trainer.records import Metadata, load_metadata, naming_damaged_shards

EVALUATION_FOLDER = "evaluation"
METRICS_FILE = "metrics.json"
CALIBRATION_FILE = "calibration.json"
TRAIN_SPLIT = "train"

# What the printed table shows, in its order.
HEADLINES = (
    "mean_average_precision",
    "micro_average_precision",
    "macro_roc_auc",
    "micro_f1",
    "macro_f1",
    "micro_precision",
    "micro_recall",
    "macro_precision",
    "macro_recall",
    "expected_calibration_error",
    "expected_calibration_error_before",
)


def run(config: EvaluateConfig) -> None:
    """Fits calibration and thresholds, reports, and writes both files of `evaluation/`.

    Raises:
      UserError: if the splits are not there or are not apart, or the checkpoint does not belong to
        the data.
    """
    metadata = load_metadata(config.data_dir)
    _check_splits(config, metadata)
    best = load_best(config.model_dir)
    _check_same_data(config, metadata, best.record)
    fit, report = config.calibration_split, config.split
    predictions = _predict(config, metadata, best)
    fit_logits, fit_labels = predictions[fit].logits, predictions[fit].labels
    logits, labels = predictions[report].logits, predictions[report].labels

    calibration = fit_calibration(fit_logits, fit_labels, best.pos_weights, config.calibrate)
    fit_probabilities = calibration.probabilities(fit_logits)
    thresholds = fit_thresholds(fit_probabilities, fit_labels, config.min_support)
    probabilities = calibration.probabilities(logits)
    warn_if_constant(probabilities)
    metrics = measure(probabilities, logits, labels, thresholds)
    fitted = measure(fit_probabilities, fit_logits, fit_labels, thresholds)
    frequencies = label_frequencies(metadata, otherwise=fit)
    trivial = trivial_metrics(frequencies, fit_labels, labels, config.min_support)

    settings = {
        "split": report,
        "calibration_split": fit,
        "calibrate": config.calibrate,
        "min_support": config.min_support,
        "fingerprints": {
            "checkpoint": best.fingerprint,
            "tokenizer": metadata.tokenizer_fingerprint,
            "splits": {name: split_fingerprint(metadata, name) for name in (fit, report)},
        },
    }
    report_values = _without_labels(metrics) | {
        "on_calibration_split": _without_labels(fitted),
        "trivial": _without_labels(trivial),
        "per_label": _by_label(metrics["per_label"], metadata.labels),
        "conventions": CONVENTIONS,
    }
    calibration_values = {
        "labels": list(metadata.labels),
        "scale": calibration.scale,
        "shift": calibration.shift,
        "thresholds": thresholds,
    }
    folder = os.path.join(config.model_dir, EVALUATION_FOLDER)
    storage.make_folder(folder)
    _write_json(os.path.join(folder, METRICS_FILE), settings | report_values)
    _write_json(os.path.join(folder, CALIBRATION_FILE), settings | calibration_values)
    _print_table(config, metadata, metrics, fitted, trivial)
    print(f"Wrote {METRICS_FILE} and {CALIBRATION_FILE} to {folder}")


def _predict(config: EvaluateConfig, metadata: Metadata, best: LoadedRun) -> dict[str, Predictions]:
    """Predictions of both splits by name.

    Raises:
      UserError: if a logit is not finite.
    """
    names = (config.calibration_split, config.split)
    # Rows to hold the documents of these splits, which may be longer than those of training.
    histogram = np.sum([metadata.split(name).length_histogram for name in names], axis=0)
    num_tokens = max(best.packing.num_tokens, len(histogram) + 7)
    predictor = Predictor(best.model, choose_packing(histogram.tolist(), num_tokens))
    predictions = {}
    for name in names:
        with naming_damaged_shards(config.data_dir, metadata, name):
            predictions[name] = predictor.predict_split(config.data_dir, metadata, name)
        if not np.isfinite(predictions[name].logits).all():
            raise UserError(
                f"{config.model_dir}: the best checkpoint's logits on {name!r} are not finite; "
                "train again with a lower --learning_rate"
            )
    return predictions


def _check_splits(config: EvaluateConfig, metadata: Metadata) -> None:
    if config.calibration_split == config.split:
        raise UserError(
            f"--calibration_split={config.calibration_split} is --split too: thresholds would be "
            "reported on what they were fitted to; name two different splits"
        )
    if config.calibration_split == TRAIN_SPLIT:
        raise UserError(
            f"--calibration_split={TRAIN_SPLIT}: the model has seen it; name a held-out split"
        )
    for flag in ("calibration_split", "split"):
        name = getattr(config, flag)
        if metadata.split(name).documents == 0:
            raise UserError(f"--{flag}={name}: the split has no documents; prepare it again")


def _check_same_data(config: EvaluateConfig, metadata: Metadata, record: RunRecord) -> None:
    remedy = "evaluate on data prepared with the labels and tokenizer of the training data"
    if metadata.labels != record.labels:
        pairs = zip(metadata.labels, record.labels, strict=False)
        where = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        found = f"{len(metadata.labels)} labels, expected {len(record.labels)}"
        if where is not None:
            found = (
                f"label {where} is {metadata.labels[where]!r}, expected {record.labels[where]!r}"
            )
        raise UserError(
            f"{config.data_dir}: not the labels that {config.model_dir} was trained with "
            f"({found}); {remedy}"
        )
    if metadata.tokenizer_fingerprint != record.tokenizer_fingerprint:
        raise UserError(
            f"{config.data_dir}: tokenizer {metadata.tokenizer_fingerprint[:12]}, but "
            f"{config.model_dir} was trained with {record.tokenizer_fingerprint[:12]}; {remedy}"
        )
    if metadata.max_seq_length > record.model.max_position_embeddings:
        raise UserError(
            f"{config.data_dir}: --max_seq_length={metadata.max_seq_length}, but the model in "
            f"{config.model_dir} takes {record.model.max_position_embeddings} tokens; {remedy}"
        )


def measure(
    probabilities: np.ndarray, logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    """`compute_metrics`, and the calibration error that the raw logits [N, L] would have had."""
    metrics = compute_metrics(probabilities, labels, thresholds)
    error, errors, _ = calibration_errors(sigmoid(logits), labels)
    metrics["expected_calibration_error_before"] = error
    metrics["per_label"]["expected_calibration_error_before"] = errors
    return metrics


def label_frequencies(metadata: Metadata, otherwise: str) -> np.ndarray:
    """Share of documents with each label, float64 [L], in the training split, or in the split
    `otherwise` where the data folder has no training split."""
    split = metadata.split(TRAIN_SPLIT if TRAIN_SPLIT in metadata.splits else otherwise)
    return np.array(split.label_counts, np.float64) / max(split.documents, 1)


def trivial_metrics(
    frequencies: np.ndarray, fit_labels: np.ndarray, labels: np.ndarray, min_support: int
) -> dict[str, Any]:
    """Metrics of predicting each label's frequency for every document.

    Args:
      frequencies: float [L], of the training split.
      fit_labels: bool [M, L], that thresholds are fitted to, as the model's are.
      labels: bool [N, L], to report on.
      min_support: as for `fit_thresholds`.
    """

    def everywhere(documents: int) -> np.ndarray:
        return np.broadcast_to(frequencies, (documents, len(frequencies)))

    thresholds = fit_thresholds(everywhere(len(fit_labels)), fit_labels, min_support)
    return compute_metrics(everywhere(len(labels)), labels, thresholds)


def split_fingerprint(metadata: Metadata, name: str) -> str:
    """SHA-256 (hex) of a split's labels, tokenizer and shards, as metadata.json lists them."""
    shards = [(shard.documents, shard.checksum) for shard in metadata.split(name).shards]
    identity = [metadata.labels, metadata.tokenizer_fingerprint, shards]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _write_json(path: str, values: dict[str, Any]) -> None:
    """Writes JSON atomically; NaN becomes null."""
    content = json.dumps(_as_json(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, content + "\n")


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _without_labels(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "per_label"}


def _by_label(columns: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {
        label: {name: column[index].item() for name, column in columns.items()}
        for index, label in enumerate(labels)
    }


def _print_table(
    config: EvaluateConfig,
    metadata: Metadata,
    metrics: dict[str, Any],
    fitted: dict[str, Any],
    trivial: dict[str, Any],
) -> None:
    columns = {
        config.split: metrics,
        f"{config.calibration_split} (fitted)": fitted,
        f"{config.split}, label frequencies": trivial,
    }
    width = max(map(len, HEADLINES))
    print(" " * width, *columns, sep="  ")
    for name in HEADLINES:
        cells = [
            f"{values[name]:.4f}".rjust(len(title)) if name in values else " " * len(title)
            for title, values in columns.items()
        ]
        print(name.ljust(width), *cells, sep="  ")
    print(
        f"{metrics['documents']} documents, {metrics['labels']} labels: "
        f"{metrics['labels_without_positives']} without positives (left out of average precision),"
        f" {metrics['labels_of_one_class']} of one class (left out of ROC-AUC), "
        f"{metrics['labels_in_calibration_error']} in the calibration error"
    )
    never = np.flatnonzero(np.isnan(metrics["per_label"]["threshold"]))
    if len(never):
        print("Never predicted:", ", ".join(metadata.labels[index] for index in never))


if __name__ == "__main__":
    from trainer.cli import main

    main(["evaluate", *sys.argv[1:]])
