"""Multi-label metrics, exact with tied scores (NumPy only).

The conventions, which CONVENTIONS states for readers of metrics.json, are scikit-learn's with
zero_division=0, and labels for which a ranking metric is undefined are left out and counted.
"""

import logging
from typing import Any

import numpy as np

from trainer.evaluation.document_metrics import mean_over_documents
from trainer.evaluation.probability_metrics import (
    CALIBRATION_BINS,
    is_counted,
    mean_of_defined,
    probability_metrics,
)
from trainer.evaluation.ranking import (
    average_precision,
    label_blocks,
    rank_cuts,
    rank_labels,
    roc_auc,
)

# Below this standard deviation of a label's log-odds over documents, its predictions are one.
CONSTANT_LOG_ODDS = 0.05

CONVENTIONS = {
    "prediction": "a label is predicted where its probability >= its threshold; null: never",
    "f1_precision_recall": "0 for 0/0; macro over all labels, weighted by their positives, samples "
    "over all documents",
    "average_precision": "sum of precision x gain of recall over distinct scores; labels without "
    "positives are left out of the mean",
    "roc_auc": "ties count one half; labels of one class are left out of the mean",
    "at_k": "among a document's k highest labels, equal scores in all their orders; 0 for a "
    "document without labels",
    "label_ranking_average_precision": "1 for a document without labels, or with all of them",
    "expected_calibration_error": f"{CALIBRATION_BINS} bins of equal mass, equal scores never "
    "parted; macro over labels of 1 to 50 % prevalence in the reported split",
    "brier_score": "mean over labels and documents of (probability - truth) squared",
    "log_loss": "mean over labels and documents, in nats; no probability nearer to 0 or 1 than "
    "2.2e-16",
    "before": "of the plain sigmoid of the logits, before any correction or fit",
}

_logger = logging.getLogger(__name__)


def compute_metrics(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    """All metrics of a split under `CONVENTIONS`.

    Args:
      probabilities: float [N, L].
      labels: bool [N, L].
      thresholds: float [L]; NaN for a label that is never predicted.

    Returns:
      Floats (NaN where undefined) and counts by name, and `per_label`, a dict of arrays [L]:
      `support`, `threshold`, `predicted`, `precision`, `recall`, `f1`, `average_precision`,
      `roc_auc`, `expected_calibration_error`, `brier_score` and `log_loss`.
    """
    labels = np.asarray(labels, bool)
    predicted = probabilities >= thresholds
    support = np.count_nonzero(labels, axis=0)
    overall, columns = decision_metrics(
        np.count_nonzero(predicted & labels, axis=0), np.count_nonzero(predicted, axis=0), support
    )
    precisions, areas = np.full((2, labels.shape[1]), np.nan)
    for block in label_blocks(*labels.shape):
        cuts = rank_labels(probabilities[:, block].T, labels[:, block].T)
        precisions[block], areas[block] = average_precision(cuts), roc_auc(cuts)
    pooled = rank_cuts(probabilities.ravel(), labels.ravel())
    probability_overall, probability_columns = probability_metrics(probabilities, labels)
    return {
        **overall,
        **ranking_metrics(precisions, areas, support),
        "micro_average_precision": float(average_precision(pooled)),
        "micro_roc_auc": float(roc_auc(pooled)),
        **mean_over_documents(probabilities, predicted, labels),
        **probability_overall,
        **count_labels(precisions, areas, support, len(labels)),
        "per_label": {"support": support, "threshold": np.asarray(thresholds)}
        | columns
        | {"average_precision": precisions, "roc_auc": areas}
        | probability_columns,
    }


def decision_metrics(
    true_positives: np.ndarray, predicted: np.ndarray, support: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Precision, recall and F1 of counts, int [L] each: overall, and as columns [L].

    Returns:
      `micro_f1`, `macro_recall`, `weighted_precision` and so on; and `predicted`, `precision`,
      `recall` and `f1` of each label, 0 for 0/0.
    """
    columns = _precision_recall_f1(true_positives, predicted, support)
    micro = _precision_recall_f1(true_positives.sum(), predicted.sum(), support.sum())
    overall = {}
    for name, values in columns.items():
        overall[f"micro_{name}"] = float(micro[name])
        overall[f"macro_{name}"] = float(values.mean())
        overall[f"weighted_{name}"] = float((values * support).sum() / max(support.sum(), 1))
    return overall, {"predicted": predicted} | columns


def ranking_metrics(
    precisions: np.ndarray, areas: np.ndarray, support: np.ndarray
) -> dict[str, float]:
    """Means over labels of average precision and ROC-AUC, float [L] with NaN where undefined."""
    return {
        "mean_average_precision": mean_of_defined(precisions),
        "weighted_average_precision": _weighted_mean(precisions, support),
        "macro_roc_auc": mean_of_defined(areas),
        "weighted_roc_auc": _weighted_mean(areas, support),
    }


def count_labels(
    precisions: np.ndarray, areas: np.ndarray, support: np.ndarray, num_documents: int
) -> dict[str, int]:
    """How many documents and labels there are, and how many labels each mean leaves out."""
    return {
        "documents": num_documents,
        "labels": len(support),
        "labels_without_positives": int(np.isnan(precisions).sum()),
        "labels_of_one_class": int(np.isnan(areas).sum()),
        "labels_in_calibration_error": int(is_counted(support / max(num_documents, 1)).sum()),
    }


def _precision_recall_f1(true_positives: Any, predicted: Any, support: Any) -> dict[str, Any]:
    """Precision, recall and F1 of counts (scalars or arrays), 0 for 0/0."""
    return {
        "precision": _ratio(true_positives, predicted),
        "recall": _ratio(true_positives, support),
        "f1": _ratio(2 * true_positives, predicted + support),
    }


def _ratio(numerator: Any, denominator: Any) -> Any:
    return numerator / np.maximum(denominator, 1)


def _weighted_mean(values: np.ndarray, support: np.ndarray) -> float:
    """Mean of what is not NaN, weighted by support; NaN without any."""
    defined = ~np.isnan(values)
    weights = support[defined]
    return float(values[defined] @ weights / weights.sum()) if weights.sum() else float("nan")


def warn_if_constant(log_odds_deviations: np.ndarray, num_documents: int) -> bool:
    """Warns if a model predicts the same for every document, and returns whether it does.

    Fine-tuning can collapse to label frequencies, with a loss that looks like progress.

    Args:
      log_odds_deviations: float [L], standard deviation of each label's log-odds over documents.
      num_documents: how many those are.
    """
    spread = log_odds_deviations.max()
    constant = num_documents > 1 and bool(spread < CONSTANT_LOG_ODDS)
    if constant:
        _logger.warning(
            "the model predicts the same for every document (the log-odds of no label vary by "
            "more than %.2g): it has learned label frequencies only; train longer, or with "
            "another --learning_rate",
            spread,
        )
    return constant
