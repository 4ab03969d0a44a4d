"""`multihot evaluate`: calibrates the best checkpoint, picks thresholds, and reports metrics.

Calibration and thresholds are fitted on one split and reported on another: nothing is fitted to the
reported split. A linear model stands beside, fitted to the training split. Scoring may be in a
narrower precision than training: then that is measured too, and gets thresholds of its own.
"""

import os
import sys
from typing import Any

import numpy as np

from trainer.data.metadata import (
    TRAIN_SPLIT,
    Metadata,
    load_metadata,
    split_fingerprint,
)
from trainer.errors import UserError, shorten
from trainer.evaluation import intervals, measurement, results
from trainer.evaluation.curves import collect
from trainer.evaluation.metrics import CONVENTIONS, warn_if_constant
from trainer.evaluation.thresholds import ThresholdRule
from trainer.linear.baseline import describe, find_baseline, label_frequencies, trivial_metrics
from trainer.linear.verdict import verdict
from trainer.run_config import EvaluateConfig
from trainer.runtime.devices import reuse_memory
from trainer.storage import filesystem
from trainer.training.checkpoint import LoadedRun, load_best
from trainer.training.held_out import Evaluated, Splits, evaluate_splits
from trainer.training.narrow import evaluate_narrow, narrow_precision, remove_narrow_files
from trainer.training.run_record import RunRecord


def run(config: EvaluateConfig) -> None:
    """Fits calibration and thresholds, reports, and writes the files of `evaluation/`.

    A UserError says that a split is missing, empty or fitted and reported at once, or that the
    checkpoint does not belong to the data.
    """
    metadata = load_metadata(config.data_dir)
    _check_splits(config, metadata)
    reuse_memory()
    best = load_best(config.model_dir)
    _check_same_data(config, metadata, best.record)
    narrow = narrow_precision(config)  # Says at once if it cannot be measured here.
    evaluated = evaluate_splits(Splits(config, metadata, best))
    _warn_if_constant(evaluated)

    settings = _settings(config, metadata, best)
    folder = os.path.join(config.model_dir, results.EVALUATION_FOLDER)
    filesystem.refuse_link(folder)
    filesystem.make_folder(folder)
    remove_narrow_files(folder)  # Their thresholds are those of the calibration before.
    metrics = _metrics_values(config, metadata, evaluated, find_baseline(config, metadata))
    files = {
        results.METRICS_FILE: metrics,
        results.CALIBRATION_FILE: _calibration_values(metadata, evaluated),
        results.CURVES_FILE: _curves(metadata, evaluated),
    }
    for name, values in files.items():
        results.write_json(folder, name, settings | values)
    _print_result(config, best.record, evaluated, metrics)
    if narrow is not None:
        evaluate_narrow(config, metadata, best, narrow, evaluated, settings)
    print("Wrote {}, {} and {} to {}".format(*files, folder))


def _print_result(
    config: EvaluateConfig, record: RunRecord, evaluated: Evaluated, metrics: dict[str, Any]
) -> None:
    """Prints the table, and whether the model or the baseline is ahead."""
    baseline = metrics["baseline"]
    columns = {
        config.split: evaluated.reported.metrics,
        **({} if baseline is None else {f"{config.split}, TF-IDF": baseline}),
        f"{config.calibration_split} (fitted)": evaluated.fitted.metrics,
        f"{config.split}, label frequencies": metrics["trivial"],
    }
    results.print_table(columns, metrics["intervals"], record.labels)
    if baseline is not None:
        print(verdict(metrics, baseline, record.train, record.model))


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
            name, expected = (shorten(item.labels[where]) for item in (metadata, record))
            found = f"label {where} is {name!r}, expected {expected!r}"
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


def _warn_if_constant(evaluated: Evaluated) -> None:
    logits = evaluated.reported.documents.logits
    deviations = evaluated.calibration.scale * np.std(logits, axis=0, dtype=np.float64)
    warn_if_constant(deviations, evaluated.reported.num_documents)


def _settings(config: EvaluateConfig, metadata: Metadata, best: LoadedRun) -> dict[str, Any]:
    """What every file says first: what was evaluated, and how."""
    names = (config.calibration_split, config.split)
    return {
        "split": config.split,
        "calibration_split": config.calibration_split,
        "calibrate": config.calibrate,
        "threshold_for": config.threshold_for,
        "threshold_scope": config.thresholds,
        "min_support": config.own_min_support,
        "fingerprints": {
            "checkpoint": best.fingerprint,
            "tokenizer": metadata.tokenizer_fingerprint,
            "splits": {name: split_fingerprint(metadata, name) for name in names},
        },
    }


def _metrics_values(
    config: EvaluateConfig,
    metadata: Metadata,
    evaluated: Evaluated,
    baseline: dict[str, Any] | None,
) -> dict[str, Any]:
    """What metrics.json says of the reported split, and of others beside it."""
    reported, fitted, thresholds = evaluated.reported, evaluated.fitted, evaluated.thresholds
    documents = reported.documents
    probabilities = evaluated.calibration.probabilities(documents.logits)
    trivial = trivial_metrics(
        label_frequencies(metadata, otherwise=config.calibration_split),
        fitted.documents.labels,
        documents.labels,
        ThresholdRule.of(config),
    )
    columns = dict(reported.metrics["per_label"])
    for name in ("support", "precision", "recall", "f1"):
        columns[f"{name}_on_calibration_split"] = fitted.metrics["per_label"][name]
    if evaluated.shortfalls is not None:
        columns["threshold_shortfall"] = evaluated.shortfalls
    if baseline is not None:
        for name, column in baseline["per_label"].items():
            columns[f"baseline_{name}"] = np.array(column, np.float64)
    never = np.flatnonzero(np.isnan(thresholds))
    return results.without_labels(reported.metrics) | {
        "method": "exact" if evaluated.shortfalls is None else measurement.BINNED,
        **_intervals(config, reported, probabilities, thresholds),
        "never_predicted": [metadata.labels[index] for index in never],
        "on_calibration_split": results.without_labels(fitted.metrics),
        "trivial": results.without_labels(trivial),
        "baseline": None if baseline is None else describe(baseline),
        "slices": results.slice_metrics(
            metadata.slice_columns, documents.slices, probabilities, documents.labels, thresholds
        ),
        "per_label": results.by_label(columns, metadata.labels),
        "conventions": CONVENTIONS,
    }


def _intervals(
    config: EvaluateConfig,
    reported: measurement.Measured,
    probabilities: np.ndarray,
    thresholds: np.ndarray,
) -> dict[str, Any]:
    """`intervals`, (low, high) by metric, and `intervals_of`, what they come from."""
    labels = reported.documents.labels
    resamples = intervals.count_resamples(config.resamples, *labels.shape)
    ends = {}
    if resamples:
        resampled = intervals.resample_metrics(probabilities, labels, thresholds, resamples)
        ends = intervals.confidence_intervals(
            reported.metrics, resampled, len(labels), reported.num_documents
        )
    about = {"level": intervals.LEVEL, "resamples": resamples, "documents": len(labels)}
    return {"intervals": ends, "intervals_of": about}


def _calibration_values(metadata: Metadata, evaluated: Evaluated) -> dict[str, Any]:
    return {
        "labels": list(metadata.labels),
        "scale": evaluated.calibration.scale,
        "shift": evaluated.calibration.shift,
        "thresholds": evaluated.thresholds,
    }


def _curves(metadata: Metadata, evaluated: Evaluated) -> dict[str, Any]:
    reported = evaluated.reported.calibrated(evaluated.calibration)
    fitted = evaluated.fitted.calibrated(evaluated.calibration)
    return collect(reported, fitted, evaluated.thresholds, metadata.labels)


if __name__ == "__main__":
    from trainer.cli import main

    main(["evaluate", *sys.argv[1:]])
