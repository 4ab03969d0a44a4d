"""Bootstrap confidence intervals of the headline metrics (NumPy only).

A resample draws as many documents as there are, with replacement (Efron 1979), each with all of
its labels. It is held as counts, how often each document was drawn, and many resamples are worked
on at once.
"""

from dataclasses import dataclass

import numpy as np

from trainer.evaluation.cuts import share
from trainer.evaluation.metrics import equal_mass_starts, is_counted

LEVEL = 0.95
# Counts of documents x resamples that are worked on at once, and of documents x labels x resamples
# in all. Large splits are resampled less often: their intervals are narrow.
_BLOCK_COUNTS = 1 << 18
_TOTAL_COUNTS = 4e8
_MIN_RESAMPLES = 100


@dataclass(frozen=True)
class _Ranked:
    """One label's N documents by rising score, with P positives in G groups of equal scores.

    `order`, int64 [N], are the documents by rising score, and all places are in this order:
    `positive`, int64 [P], of the positives; `starts` and `ends`, int64 [G], of the groups with a
    positive; `bins`, int64, of the first of each calibration bin. `first_positives`, int64 [G], is
    where each group starts among the P. `gaps`, float32 [N], are probability - truth.
    """

    order: np.ndarray
    positive: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first_positives: np.ndarray
    gaps: np.ndarray
    bins: np.ndarray


def count_resamples(max_resamples: int, num_documents: int, num_labels: int) -> int:
    """How often to resample: `max_resamples` for small splits, down to a hundred for large ones."""
    affordable = int(_TOTAL_COUNTS / max(num_documents * num_labels, 1))
    return min(max_resamples, max(_MIN_RESAMPLES, affordable))


def resample_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray,
    num_resamples: int,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The headline metrics of resampled documents, float64 [num_resamples] by name.

    Probabilities are float [N, L], labels bool [N, L], thresholds float [L] (NaN: never predicted).
    The calibration error keeps the bins, and its mean the labels, of the documents themselves. A
    metric is NaN where a resample leaves it undefined.
    """
    random = np.random.default_rng(seed)
    num_documents = len(labels)
    ranked = [_rank(p, y) for p, y in zip(probabilities.T, labels.T, strict=True)]
    predicted = probabilities >= thresholds
    decisions = np.stack([predicted & labels, predicted, labels]).astype(np.float32)
    in_error = is_counted(labels.mean(axis=0))
    blocks = []
    width = max(1, _BLOCK_COUNTS // num_documents)
    for start in range(0, num_resamples, width):
        size = min(width, num_resamples - start)
        drawn = random.integers(0, num_documents, (size, num_documents))
        drawn += num_documents * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_documents)
        counts = np.ascontiguousarray(counts.reshape(size, num_documents).T, np.int32)
        blocks.append(_metrics_of(ranked, decisions, in_error, counts))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _rank(probabilities: np.ndarray, positive: np.ndarray) -> _Ranked:
    order = np.argsort(probabilities)
    scores, positive = probabilities[order].astype(np.float64), positive[order]
    places = np.flatnonzero(positive)
    values, first_positives = np.unique(scores[places], return_index=True)
    return _Ranked(
        order,
        places,
        np.searchsorted(scores, values, side="left"),
        np.searchsorted(scores, values, side="right"),
        first_positives,
        (scores - positive).astype(np.float32),
        equal_mass_starts(scores),
    )


def _metrics_of(
    ranked: list[_Ranked], decisions: np.ndarray, in_error: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics of R resamples; `counts`, int32 [N, R], is how often each document was drawn.

    `decisions` are true positives, predictions and positives, float32 [3, N, L]; `in_error`, bool
    [L], says which labels the macro calibration error is over.
    """
    # Whole numbers below 2^24 are exact in float32.
    weights = counts.astype(np.float32)
    right, predicted, support = ((matrix.T @ weights).astype(np.float64) for matrix in decisions)
    precisions, areas = np.full((2, len(ranked), counts.shape[1]), np.nan)
    errors = np.full((len(ranked), counts.shape[1]), np.nan)
    for index, label in enumerate(ranked):
        drawn = counts[label.order]
        if len(label.positive):
            precisions[index], areas[index] = _ranking_metrics(label, drawn)
        if in_error[index]:
            gaps = np.add.reduceat(label.gaps[:, None] * drawn, label.bins, axis=0)
            errors[index] = np.abs(gaps).sum(axis=0) / len(counts)
    return {
        "micro_f1": 2 * right.sum(axis=0) / np.maximum((predicted + support).sum(axis=0), 1),
        "macro_f1": (2 * right / np.maximum(predicted + support, 1)).mean(axis=0),
        "mean_average_precision": _mean_of_defined(precisions),
        "macro_roc_auc": _mean_of_defined(areas),
        "expected_calibration_error": _mean_of_defined(errors),
    }


def _ranking_metrics(label: _Ranked, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and ROC-AUC, float64 [R], of a label with positives in R resamples.

    `drawn`, int32 [N, R], is how often each document was drawn, by rising score.
    """
    below = np.zeros((len(drawn) + 1, drawn.shape[1]), np.int32)
    np.cumsum(drawn, axis=0, out=below[1:])
    positives = np.add.reduceat(drawn[label.positive], label.first_positives, axis=0)
    as_high = np.cumsum(positives[::-1], axis=0)[::-1]
    total, all_positives = len(drawn), as_high[0]
    predicted = total - below[label.starts]
    precision = (positives * (as_high / np.maximum(predicted, 1))).sum(axis=0)
    negatives_below = below[label.starts] - (all_positives - as_high)
    tied = below[label.ends] - below[label.starts] - positives
    won = (positives * (negatives_below + tied / 2)).sum(axis=0)
    pairs = all_positives.astype(np.float64) * (total - all_positives)
    return share(precision, all_positives), share(won, pairs)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Means over labels [L, R] of what is not NaN, [R]."""
    defined = ~np.isnan(values)
    sums = np.where(defined, values, 0).sum(axis=0)
    return np.where(defined.any(axis=0), sums / np.maximum(defined.sum(axis=0), 1), np.nan)


def confidence_intervals(
    values: dict[str, float], resampled: dict[str, np.ndarray], num_sampled: int, num_documents: int
) -> dict[str, tuple[float, float]]:
    """95 % intervals: the resamples' percentiles, moved so that their mean is the value itself.

    Resampling adds noise to noise, which makes a calibration error larger and a macro-F1 smaller
    than they are; the move takes that back. Where only `num_sampled` of the values' `num_documents`
    were resampled, the spread is scaled by the root of their share. The ends (low, high), by name,
    are in [0, 1]; NaN where a metric is undefined.
    """
    narrowing = np.sqrt(num_sampled / num_documents)
    intervals = {}
    for name, draws in resampled.items():
        defined = draws[~np.isnan(draws)]
        if len(defined) == 0 or np.isnan(values[name]):
            intervals[name] = (float("nan"), float("nan"))
            continue
        ends = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - defined.mean()
        low, high = np.clip(values[name] + narrowing * ends, 0, 1)
        intervals[name] = (float(low), float(high))
    return intervals
