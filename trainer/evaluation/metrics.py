"""Multi-label metrics of decisions, rankings, probabilities and single documents (NumPy only).

Tied scores are treated exactly. The conventions, which `CONVENTIONS` states for readers of
metrics.json, are scikit-learn's with zero_division=0. Labels for which a ranking metric is
undefined are left out of its means and counted.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.evaluation import cuts

CALIBRATION_BINS = 10
CALIBRATION_PREVALENCE = (0.01, 0.5)
# What a probability of 0 or 1 counts as in a logarithm.
TINY = float(np.finfo(np.float64).eps)
TOP_K = (1, 3, 5)
# A model whose labels all have log-odds with a smaller standard deviation over documents predicts
# the same for every document.
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
# Cells of documents x labels that are compared at once.
BLOCK_CELLS = 1 << 18
_logger = logging.getLogger(__name__)


def compute_metrics(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    """All metrics under `CONVENTIONS`, of probabilities float [N, L] and labels bool [N, L].

    The thresholds are float [L]; NaN for a label that is never predicted. Returns floats (NaN where
    undefined) and counts by name, and `per_label`, a dict of arrays [L]: `support`, `threshold`,
    `predicted`, `precision`, `recall`, `f1`, `average_precision`, `roc_auc`,
    `expected_calibration_error`, `brier_score` and `log_loss`.
    """
    labels = np.asarray(labels, bool)
    predicted = probabilities >= thresholds
    counts = count_decisions(predicted, labels)
    support = counts[2]
    overall, columns = decision_metrics(counts)
    rankings = rank_every_label(probabilities, labels)
    pooled = cuts.rank_cuts(probabilities.ravel(), labels.ravel())
    micro = cuts.average_precision(pooled), cuts.roc_auc(pooled)
    of_probabilities, probability_columns = probability_metrics(probabilities, labels)
    return {
        **overall,
        **ranking_metrics(rankings, micro, support),
        **mean_over_documents(probabilities, predicted, labels),
        **of_probabilities,
        **count_labels(rankings, support, len(labels)),
        "per_label": {"support": support, "threshold": np.asarray(thresholds)}
        | columns
        | {"average_precision": rankings[0], "roc_auc": rankings[1]}
        | probability_columns,
    }


def count_decisions(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """True positives, predictions and positives of each label, int64 [3, L], of bool [N, L]."""
    matrices = predicted & labels, predicted, labels
    return np.stack([np.count_nonzero(matrix, axis=0) for matrix in matrices])


def decision_metrics(counts: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Precision, recall and F1 of `count_decisions`, 0 for 0/0: overall, and as columns [L].

    Overall ones are `micro_f1`, `macro_recall`, `weighted_precision` and so on; the columns have
    `predicted` too.
    """
    columns, micro = _precision_recall_f1(*counts), _precision_recall_f1(*counts.sum(axis=1))
    support = counts[2]
    overall = {}
    for name, values in columns.items():
        overall[f"micro_{name}"] = float(micro[name])
        overall[f"macro_{name}"] = float(values.mean())
        overall[f"weighted_{name}"] = float((values * support).sum() / max(support.sum(), 1))
    return overall, {"predicted": counts[1]} | columns


def _precision_recall_f1(true_positives: Any, predicted: Any, support: Any) -> dict[str, Any]:
    return {
        "precision": true_positives / np.maximum(predicted, 1),
        "recall": true_positives / np.maximum(support, 1),
        "f1": 2 * true_positives / np.maximum(predicted + support, 1),
    }


def rank_every_label(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision and ROC-AUC of each label, float64 [2, L] with NaN where undefined."""
    values = np.full((2, labels.shape[1]), np.nan)
    for block in cuts.label_blocks(*labels.shape):
        ranked = cuts.rank_labels(probabilities[:, block].T, labels[:, block].T)
        values[:, block] = cuts.average_precision(ranked), cuts.roc_auc(ranked)
    return values


def ranking_metrics(
    rankings: np.ndarray, micro: Sequence[Any], support: np.ndarray
) -> dict[str, float]:
    """Average precision and ROC-AUC overall, from those of each label and the micro ones.

    `rankings`, float [2, L], are NaN where undefined. `support`, int [L], weights the labels.
    """
    precisions, areas = rankings
    return {
        "mean_average_precision": mean_of_defined(precisions),
        "weighted_average_precision": _weighted_mean(precisions, support),
        "macro_roc_auc": mean_of_defined(areas),
        "weighted_roc_auc": _weighted_mean(areas, support),
        "micro_average_precision": float(micro[0]),
        "micro_roc_auc": float(micro[1]),
    }


def count_labels(rankings: np.ndarray, support: np.ndarray, num_documents: int) -> dict[str, int]:
    """How many documents and labels there are, and how many labels each mean leaves out."""
    without_positives, of_one_class = np.isnan(rankings).sum(axis=1)
    return {
        "documents": num_documents,
        "labels": len(support),
        "labels_without_positives": int(without_positives),
        "labels_of_one_class": int(of_one_class),
        "labels_in_calibration_error": int(is_counted(support / max(num_documents, 1)).sum()),
    }


def mean_of_defined(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _weighted_mean(values: np.ndarray, support: np.ndarray) -> float:
    """Mean of what is not NaN, weighted by support; NaN without any."""
    defined = ~np.isnan(values)
    weights = support[defined]
    return float(values[defined] @ weights / weights.sum()) if weights.sum() else float("nan")


def probability_metrics(
    probabilities: np.ndarray, labels: np.ndarray, suffix: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Calibration error, Brier score and log-loss of [N, L], overall and as columns [L]."""
    error, errors, _ = calibration_errors(probabilities, labels)
    columns = {
        f"expected_calibration_error{suffix}": errors,
        f"brier_score{suffix}": brier_scores(probabilities, labels),
        f"log_loss{suffix}": log_losses(probabilities, labels),
    }
    overall = {name: float(values.mean()) for name, values in columns.items()}
    return overall | {f"expected_calibration_error{suffix}": error}, columns


def calibration_errors(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray, int]:
    """The macro mean of the expected calibration error, the error of every label, float64 [L], and
    the number of labels in the mean: those of 1 to 50 % prevalence. NaN if there are none."""
    columns = zip(probabilities.T, labels.T, strict=True)
    errors = np.array([calibration_error(*column) for column in columns])
    counted = is_counted(labels.mean(axis=0))
    return mean_of_defined(errors[counted]), errors, int(counted.sum())


def calibration_error(probabilities: np.ndarray, positive: np.ndarray) -> float:
    """Expected calibration error of one label over bins of equal mass (Nixon et al. 2019).

    It is the mean over documents [N] of |mean probability - share of positives| of their bin.
    Documents of equal probability stay in one bin, so their order does not matter.
    """
    order = np.argsort(probabilities)
    ranked = probabilities[order].astype(np.float64)
    gaps = np.add.reduceat(ranked - positive[order], equal_mass_starts(ranked))
    return float(np.abs(gaps).sum() / len(ranked))


def equal_mass_starts(ranked: np.ndarray) -> np.ndarray:
    """Where the bins of equal mass start in rising scores, float [N]; equal ones are not parted."""
    edges = np.arange(1, CALIBRATION_BINS) * len(ranked) // CALIBRATION_BINS
    edges = np.searchsorted(ranked, ranked[edges], side="left")
    return np.unique(np.append(0, edges))


def is_counted(prevalence: np.ndarray) -> np.ndarray:
    """Which labels the macro calibration error is a mean over, by their share of documents."""
    low, high = CALIBRATION_PREVALENCE
    return (low <= prevalence) & (prevalence <= high)


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared difference of probability and truth of every label (Brier 1950), float64 [L]."""
    return np.mean(np.square(np.asarray(probabilities, np.float64) - labels), axis=0)


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean cross-entropy of every label in nats, float64 [L]."""
    inside = np.clip(np.asarray(probabilities, np.float64), TINY, 1 - TINY)
    return -np.mean(np.log(np.where(labels, inside, 1 - inside)), axis=0)


def mean_over_documents(
    scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """The means of `score_documents` over all documents, a block of them at a time."""
    rows = max(1, BLOCK_CELLS // labels.shape[1])
    sums: dict[str, float] = {}
    for start in range(0, max(len(labels), 1), rows):
        block = slice(start, start + rows)
        values = score_documents(scores[block], predicted[block], labels[block])
        sums = {name: sums.get(name, 0.0) + float(value.sum()) for name, value in values.items()}
    return {name: value / max(len(labels), 1) for name, value in sums.items()}


def score_documents(
    scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric of every document, float64 [D] by name, of arrays [D, L].

    They are the `samples_` metrics (0 for 0/0), `subset_accuracy`, `hamming_loss`, `precision_at_k`
    and `ndcg_at_k` for k of `TOP_K`, and `label_ranking_average_precision`.
    """
    right = np.count_nonzero(predicted & labels, axis=1)
    num_predicted = np.count_nonzero(predicted, axis=1)
    support = np.count_nonzero(labels, axis=1)
    wrong = num_predicted + support - 2 * right
    ranked = np.sort(scores, axis=1)
    samples = _precision_recall_f1(right, num_predicted, support)
    values = {f"samples_{name}": value for name, value in samples.items()} | {
        "subset_accuracy": (wrong == 0).astype(np.float64),
        "hamming_loss": wrong / labels.shape[1],
        "label_ranking_average_precision": _ranking_precision(scores, labels, ranked),
    }
    gains = _expected_gains(scores, labels, ranked)
    discounts = 1 / np.log2(np.arange(2, gains.shape[1] + 2))
    ideal = np.append(0.0, np.cumsum(discounts))
    for k in TOP_K:
        reached = min(k, gains.shape[1])
        best = ideal[np.minimum(support, reached)]
        values[f"precision_at_{k}"] = gains[:, :reached].sum(axis=1) / k
        gain = gains[:, :reached] @ discounts[:reached]
        values[f"ndcg_at_{k}"] = np.divide(gain, best, out=np.zeros_like(gain), where=best > 0)
    return values


def _expected_gains(scores: np.ndarray, labels: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """The chance that a label at rank 1 to K is true, float64 [D, K], over the orders of ties.

    Documents with tied scores have no one order; averaging over them (McSherry and Najork 2008,
    "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
    Scores") leaves nothing to the order of the labels.
    """
    depth = min(max(TOP_K), scores.shape[1])
    top = ranked[:, : -depth - 1 : -1]
    tied = np.count_nonzero(top[:, :, None] == top[:, None, :], axis=2)
    # The ties of the last of them may continue below the top K.
    tied = np.where(
        top == top[:, -1:], np.count_nonzero(scores == top[:, -1:], axis=1)[:, None], tied
    )
    documents, columns = np.nonzero(labels)
    is_tied = scores[documents, columns][:, None] == top[documents]
    true = np.empty(top.shape)
    for rank in range(depth):
        true[:, rank] = np.bincount(documents, is_tied[:, rank], minlength=len(labels))
    return true / tied


def _ranking_precision(scores: np.ndarray, labels: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Mean over a document's labels of the precision at their rank, float64 [D]."""
    precision = np.ones(len(labels))
    for document, positive in enumerate(labels):
        mine = np.sort(scores[document, positive])
        if 0 < len(mine) < len(positive):
            # How many labels score as high as each of the document's own, and how many own ones.
            as_high = len(positive) - np.searchsorted(ranked[document], mine)
            true = len(mine) - np.searchsorted(mine, mine)
            precision[document] = (true / as_high).mean()
    return precision


def warn_if_constant(log_odds_deviations: np.ndarray, num_documents: int) -> bool:
    """Warns if a model predicts the same for every document, and returns whether it does.

    Fine-tuning can collapse to label frequencies, with a loss that looks like progress. The
    deviations, float [L], are the standard deviations of each label's log-odds over documents.
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
