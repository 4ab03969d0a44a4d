"""Multi-label metrics, exact with tied scores (NumPy only).

The conventions, which CONVENTIONS states for readers of metrics.json, are scikit-learn's with
zero_division=0, and labels for which a ranking metric is undefined are left out and counted.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

CALIBRATION_BINS = 10
CALIBRATION_PREVALENCE = (0.01, 0.5)

# Below this standard deviation of a label's log-odds over documents, its predictions are one.
CONSTANT_LOG_ODDS = 0.05

CONVENTIONS = {
    "prediction": "a label is predicted where its probability >= its threshold; null: never",
    "f1_precision_recall": "0 for 0/0; macro over all labels",
    "average_precision": "sum of precision x gain of recall over distinct scores; labels without "
    "positives are left out of the mean",
    "roc_auc": "ties count one half; labels of one class are left out of the mean",
    "expected_calibration_error": f"{CALIBRATION_BINS} bins of equal mass, equal scores never "
    "parted; macro over labels of 1 to 50 % prevalence in the reported split",
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cuts:
    """Every way to cut a list of scores in two, from the strictest down.

    Attributes:
      scores: float [C], the distinct scores, falling; cut c predicts all that score as high.
      predicted: int64 [C], how many that is.
      true_positives: int64 [C], how many of them are positive.
      positives: positives in the whole list.
    """

    scores: np.ndarray
    predicted: np.ndarray
    true_positives: np.ndarray
    positives: int


def rank_cuts(scores: np.ndarray, positive: np.ndarray) -> Cuts:
    """The cuts of scores, float [N], whose true classes are `positive`, bool [N]."""
    order = np.argsort(-scores)
    ranked = scores[order]
    last_of_ties = np.append(ranked[1:] != ranked[:-1], True) if len(ranked) else np.zeros(0, bool)
    ends = np.flatnonzero(last_of_ties)
    true_positives = np.cumsum(positive[order], dtype=np.int64)[ends]
    return Cuts(ranked[ends], ends + 1, true_positives, int(np.count_nonzero(positive)))


def average_precision(cuts: Cuts) -> float:
    """Average precision; NaN without positives."""
    if cuts.positives == 0:
        return float("nan")
    gained = np.diff(cuts.true_positives, prepend=0)
    return float(np.sum(gained * (cuts.true_positives / cuts.predicted)) / cuts.positives)


def roc_auc(cuts: Cuts) -> float:
    """Area under the ROC curve, by trapezoids between cuts; NaN if there is only one class."""
    negatives = (int(cuts.predicted[-1]) if len(cuts.predicted) else 0) - cuts.positives
    if cuts.positives == 0 or negatives == 0:
        return float("nan")
    true_positives = np.append(0, cuts.true_positives)
    false_positives = np.append(0, cuts.predicted - cuts.true_positives)
    heights = true_positives[1:] + true_positives[:-1]
    area = np.sum(np.diff(false_positives) * heights, dtype=np.float64) / 2
    return float(area / (cuts.positives * negatives))


def calibration_error(probabilities: np.ndarray, positive: np.ndarray) -> float:
    """Expected calibration error of one label over bins of equal mass (Nixon et al. 2019).

    Documents of equal probability stay in one bin, so their order does not matter.

    Args:
      probabilities: float [N].
      positive: bool [N].

    Returns:
      Mean over documents of |mean probability - share of positives| of their bin.
    """
    order = np.argsort(probabilities)
    ranked = probabilities[order].astype(np.float64)
    edges = np.arange(1, CALIBRATION_BINS) * len(ranked) // CALIBRATION_BINS
    edges = np.searchsorted(ranked, ranked[edges], side="left")
    starts = np.unique(np.append(0, edges))
    gaps = np.add.reduceat(ranked - positive[order], starts)
    return float(np.abs(gaps).sum() / len(ranked))


def calibration_errors(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray, int]:
    """Expected calibration error of every label, and its macro mean.

    Args:
      probabilities: float [N, L].
      labels: bool [N, L].

    Returns:
      The mean over labels of 1 to 50 % prevalence (NaN if there are none), float64 [L], and the
      number of labels in the mean.
    """
    errors = np.array(
        [calibration_error(p, y) for p, y in zip(probabilities.T, labels.T, strict=True)]
    )
    low, high = CALIBRATION_PREVALENCE
    prevalence = labels.mean(axis=0)
    counted = (low <= prevalence) & (prevalence <= high)
    return _mean(errors[counted]), errors, int(counted.sum())


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
      `support`, `threshold`, `precision`, `recall`, `f1`, `average_precision`, `roc_auc` and
      `expected_calibration_error`.
    """
    labels = np.asarray(labels, bool)
    predicted = probabilities >= thresholds
    true_positives = np.count_nonzero(predicted & labels, axis=0)
    num_predicted = np.count_nonzero(predicted, axis=0)
    support = np.count_nonzero(labels, axis=0)
    per_label = _precision_recall_f1(true_positives, num_predicted, support)
    micro = _precision_recall_f1(true_positives.sum(), num_predicted.sum(), support.sum())
    cuts = [rank_cuts(p, y) for p, y in zip(probabilities.T, labels.T, strict=True)]
    per_label["average_precision"] = np.array([average_precision(cut) for cut in cuts])
    per_label["roc_auc"] = np.array([roc_auc(cut) for cut in cuts])
    error, errors, num_in_error = calibration_errors(probabilities, labels)
    per_label["expected_calibration_error"] = errors
    return {
        "micro_f1": float(micro["f1"]),
        "macro_f1": float(per_label["f1"].mean()),
        "micro_precision": float(micro["precision"]),
        "micro_recall": float(micro["recall"]),
        "macro_precision": float(per_label["precision"].mean()),
        "macro_recall": float(per_label["recall"].mean()),
        "mean_average_precision": _mean(per_label["average_precision"]),
        "micro_average_precision": average_precision(
            rank_cuts(probabilities.ravel(), labels.ravel())
        ),
        "macro_roc_auc": _mean(per_label["roc_auc"]),
        "expected_calibration_error": error,
        "documents": len(labels),
        "labels": labels.shape[1],
        "labels_without_positives": int(np.isnan(per_label["average_precision"]).sum()),
        "labels_of_one_class": int(np.isnan(per_label["roc_auc"]).sum()),
        "labels_in_calibration_error": num_in_error,
        "per_label": {"support": support, "threshold": np.asarray(thresholds)} | per_label,
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


def _mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def warn_if_constant(probabilities: np.ndarray) -> bool:
    """Warns if a model predicts the same for every document, and returns whether it does.

    Fine-tuning can collapse to label frequencies, with a loss that looks like progress.

    Args:
      probabilities: float [N, L].
    """
    inside = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    spread = np.std(np.log(inside) - np.log1p(-inside), axis=0).max()
    constant = len(probabilities) > 1 and bool(spread < CONSTANT_LOG_ODDS)
    if constant:
        _logger.warning(
            "the model predicts the same for every document (the log-odds of no label vary by "
            "more than %.2g): it has learned label frequencies only; train longer, or with "
            "another --learning_rate",
            spread,
        )
    return constant
