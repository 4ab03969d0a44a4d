"""What is reached without an encoder: TF-IDF with one logistic regression a label, or frequencies.

TF-IDF is fitted to the WordPieces that the model reads and to pairs of neighbouring ones, and then
calibrated and cut as the model is. Its time and memory are bounded by limits on documents, features
and labels. An evaluation of the same splits in the same way takes what an earlier one kept.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from trainer.data.metadata import TRAIN_SPLIT, Metadata, split_fingerprint
from trainer.data.records import Documents, leading_places, read_documents
from trainer.errors import UserError
from trainer.evaluation.calibration import fit_calibration, log_odds
from trainer.evaluation.measurement import ExactMeasurement, Predictions
from trainer.evaluation.metrics import compute_metrics
from trainer.evaluation.results import EVALUATION_FOLDER, as_json, without_labels, write_json
from trainer.evaluation.thresholds import ThresholdRule, fit_thresholds
from trainer.linear.logistic import fit_logistic
from trainer.run_config import EvaluateConfig
from trainer.storage.filesystem import add_checksum
from trainer.storage.own_files import Count, Number, fields, load, many, named

BASELINE_FILE = "baseline.json"
# Raised when the same documents give other figures, so that none is kept from before.
_VERSION = 2
# Labels beyond the most frequent ones are predicted at their frequency.
MAX_LABELS = 500
MAX_FEATURES = 1 << 18
INVERSE_STRENGTH = 10.0
# Documents x labels of each split that the baseline is measured on; exact metrics take about 100
# bytes for each.
MAX_SCORES = 10_000_000
# Their weights for all features take 128 MiB.
_LABELS_AT_ONCE = 128
_COLUMN = many(Number | None)
_KEPT = fields(
    settings=dict[str, Any],
    metrics=named(Count | Number | None),
    on_calibration_split=named(Count | Number | None),
    per_label=fields(average_precision=_COLUMN, f1=_COLUMN),
    train_documents=Count,
    train_split_documents=Count,
    features=Count,
    fitted_labels=Count,
    inverse_strength=Number,
)

_logger = logging.getLogger(__name__)


def count_features(**options: Any) -> TfidfVectorizer:
    """The features: sublinear TF-IDF of single terms and pairs that two documents have."""
    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, **options)


def fit_logits(
    train: csr_matrix,
    labels: np.ndarray,
    others: dict[str, csr_matrix],
    inverse_strength: float = INVERSE_STRENGTH,
    max_labels: int | None = None,
) -> dict[str, np.ndarray]:
    """Logits float32 [documents, L] by name, of one regression a label.

    Each is fitted to the features of N documents, float32, with labels bool [N, L], and predicts
    those of `others`. Only the `max_labels` most frequent labels are fitted (default: all); the
    logits of the others, and of labels of one class, are those of their frequency, with half a
    document on both sides. `inverse_strength` is scikit-learn's C.
    """
    counts = labels.sum(axis=0)
    constant = log_odds(counts, len(labels)).astype(np.float32)
    logits = {name: np.tile(constant, (rows.shape[0], 1)) for name, rows in others.items()}
    ranked = np.argsort(-counts, kind="stable")[:max_labels]
    for start in range(0, len(ranked), _LABELS_AT_ONCE):
        chosen = ranked[start : start + _LABELS_AT_ONCE]
        model = fit_logistic(train, labels[:, chosen], inverse_strength)
        for name, rows in others.items():
            logits[name][:, chosen] = model.logits(rows)
    return logits


def measure_baseline(
    train: Documents,
    fitted: Documents,
    reported: Documents,
    rule: ThresholdRule,
    calibrate: str = "labels",
) -> dict[str, Any]:
    """Fits on `train`, calibrates and cuts on `fitted`, and measures on both others.

    Returns the scalars of `ExactMeasurement` on `reported` under `metrics`, on `fitted` under
    `on_calibration_split`; average precision and F1 of each label on `reported`, float64 [L], under
    `per_label`; and what was fitted: documents, features, labels and strength. `calibrate` is a
    mode of `fit_calibration`. A UserError says that the training documents share no tokens.
    """
    vectorizer = count_features(
        lowercase=False, token_pattern=r"\S+", max_features=MAX_FEATURES, dtype=np.float32
    )
    try:
        features = vectorizer.fit_transform(_as_texts(train.tokens))
    except ValueError:
        raise UserError(
            f"no token occurs in two of {len(train.ids)} training documents, so there is no "
            "TF-IDF baseline"
        ) from None
    splits = {"fitted": fitted, "reported": reported}
    others = {name: vectorizer.transform(_as_texts(split.tokens)) for name, split in splits.items()}
    logits = fit_logits(features, train.labels, others, max_labels=MAX_LABELS)
    ones = np.ones(train.labels.shape[1])
    calibration = fit_calibration(logits["fitted"], fitted.labels, ones, calibrate)
    thresholds = fit_thresholds(calibration.probabilities(logits["fitted"]), fitted.labels, rule)
    measured = {}
    for name, split in splits.items():
        measurement = ExactMeasurement(calibration, thresholds)
        measurement.add(_as_predictions(split, logits[name]))
        measured[name] = measurement.result().metrics
    columns = measured["reported"]["per_label"]
    return {
        "metrics": without_labels(measured["reported"]),
        "on_calibration_split": without_labels(measured["fitted"]),
        "per_label": {name: columns[name] for name in ("average_precision", "f1")},
        "train_documents": len(train.ids),
        "features": features.shape[1],
        "fitted_labels": min(MAX_LABELS, train.labels.shape[1]),
        "inverse_strength": INVERSE_STRENGTH,
    }


def _as_texts(documents: Sequence[np.ndarray]) -> list[str]:
    """Token ids as words, of which scikit-learn makes pairs."""
    return [" ".join(map(str, tokens.tolist())) for tokens in documents]


def _as_predictions(documents: Documents, logits: np.ndarray) -> Predictions:
    places, slices = np.arange(len(logits)), np.zeros((len(logits), 0), str)
    return Predictions(documents.ids, places, logits, documents.labels, slices)


def find_baseline(config: EvaluateConfig, metadata: Metadata) -> dict[str, Any] | None:
    """What `measure_baseline` returns, as JSON has it, kept by an earlier evaluation or made now.

    It is kept in the evaluation's folder. None, with a line that says why, where there is nothing
    to fit it to; None without one for `--baseline_documents=0`.
    """
    if config.baseline_documents == 0:
        return None
    if TRAIN_SPLIT not in metadata.splits:
        _logger.warning("%s: no split %r, so no TF-IDF baseline", config.data_dir, TRAIN_SPLIT)
        return None
    names = (TRAIN_SPLIT, config.calibration_split, config.split)
    flags = ("calibration_split", "split", "calibrate", "min_support", "threshold_for",
             "thresholds", "baseline_documents")  # fmt: skip
    settings = {
        "version": _VERSION,
        "splits": {name: split_fingerprint(metadata, name) for name in names},
        **{name: getattr(config, name) for name in flags},
    }
    folder = os.path.join(config.model_dir, EVALUATION_FOLDER)
    kept = read_kept(os.path.join(folder, BASELINE_FILE), len(metadata.labels))
    if kept is not None and kept["settings"] == settings:
        return kept
    print("Fitting TF-IDF with logistic regression ...", flush=True)
    try:
        measured = measure_baseline(
            *_read_splits(config, metadata, names), ThresholdRule.of(config), config.calibrate
        )
    except UserError as error:
        # The evaluation is of the model: it does not fail where the training split is damaged.
        _logger.warning("%s: %s", config.data_dir, error)
        return None
    size = {"train_split_documents": metadata.split(TRAIN_SPLIT).documents}
    found: dict[str, Any] = as_json({"settings": settings} | measured | size)
    write_json(folder, BASELINE_FILE, add_checksum(found))
    return found


def _read_splits(
    config: EvaluateConfig, metadata: Metadata, names: Sequence[str]
) -> tuple[Documents, Documents, Documents]:
    """The leading documents of the training split and of both held-out ones."""
    held_out = min(config.baseline_documents, MAX_SCORES // len(metadata.labels))
    train, fitted, reported = (
        read_documents(
            config.data_dir, metadata, name, leading_places(metadata.split(name), max_read)
        )
        for name, max_read in zip(
            names, (config.baseline_documents, held_out, held_out), strict=True
        )
    )
    return train, fitted, reported


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json says of the baseline that was found: its scalars, and what was fitted."""
    inner = ("settings", "metrics", "per_label")
    return found["metrics"] | {name: found[name] for name in found if name not in inner}


def read_kept(path: str, num_labels: int) -> dict[str, Any] | None:
    """What an earlier evaluation kept; None if that is missing, damaged or of other labels."""

    def check(kept: dict[str, Any]) -> None:
        if {len(column) for column in kept["per_label"].values()} != {num_labels}:
            raise ValueError(f"not of {num_labels} labels")

    try:
        return dict(load(_KEPT, path, "", is_sealed=True, check=check))
    except (FileNotFoundError, UserError):
        return None


def label_frequencies(metadata: Metadata, otherwise: str) -> np.ndarray:
    """Share of documents with each label, float64 [L], in the training split, or in the split
    `otherwise` where the data folder has no training split."""
    split = metadata.split(TRAIN_SPLIT if TRAIN_SPLIT in metadata.splits else otherwise)
    return np.array(split.label_counts, np.float64) / max(split.documents, 1)


def trivial_metrics(
    frequencies: np.ndarray, fit_labels: np.ndarray, labels: np.ndarray, rule: ThresholdRule
) -> dict[str, Any]:
    """Metrics of predicting each label's frequency, float [L], for every document.

    Thresholds are fitted to `fit_labels`, bool [M, L], as the model's are; `labels`, bool [N, L],
    are reported on.
    """
    thresholds = fit_thresholds(np.broadcast_to(frequencies, fit_labels.shape), fit_labels, rule)
    return compute_metrics(np.broadcast_to(frequencies, labels.shape), labels, thresholds)
