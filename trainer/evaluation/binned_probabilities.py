"""Calibration error, Brier score and log-loss of histograms, with bounds (NumPy only)."""

from typing import Any

import numpy as np

from trainer.evaluation.calibration import sigmoid
from trainer.evaluation.histograms import CENTRES, LOWER_EDGES, UPPER_EDGES, Histograms
from trainer.evaluation.probability_metrics import (
    CALIBRATION_BINS,
    TINY,
    is_counted,
    mean_of_defined,
)


def probability_metrics(
    histograms: Histograms, scale: np.ndarray, shift: np.ndarray, suffix: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, float]]:
    """What `probability_metrics` gives of documents, of their histograms.

    Args:
      histograms: of L labels.
      scale, shift: float [L], from the histograms' log-odds to those of the probabilities to judge.
      suffix: of the names.

    Returns:
      The metrics overall, as columns [L], and the bound of each overall one's error.
    """
    names = ("expected_calibration_error", "brier_score", "log_loss")
    rows = np.array(
        [
            _of_label(histograms.of_labels(slice(index, index + 1)), scale[index], shift[index])
            for index in range(len(scale))
        ]
    )
    num_documents = histograms.documents[0].sum(dtype=np.int64)
    counted = is_counted(histograms.support / max(num_documents, 1))
    overall, columns, bounds = {}, {}, {}
    for place, name in enumerate(names):
        columns[name + suffix] = rows[:, 2 * place]
        of_mean = counted if place == 0 else np.ones_like(counted)
        overall[name + suffix] = mean_of_defined(rows[of_mean, 2 * place])
        bounds[name + suffix] = mean_of_defined(rows[of_mean, 2 * place + 1])
    return overall, columns, bounds


def _of_label(label: Histograms, scale: float, shift: float) -> list[float]:
    """Each metric of one label, followed by its bound."""
    positives = label.positives[0].astype(np.float64)
    negatives = label.documents[0] - positives
    lowest, highest = label.lowest[0], label.highest[0]
    used = np.flatnonzero(label.documents[0])
    if len(used) == 0:
        return [float("nan")] * 6
    positives, negatives = positives[used], negatives[used]
    low = sigmoid(scale * np.clip(LOWER_EDGES[used], lowest, highest) + shift)
    high = sigmoid(scale * np.clip(UPPER_EDGES[used], lowest, highest) + shift)
    middle = sigmoid(scale * np.clip(CENTRES[used], lowest, highest) + shift)
    probabilities = np.stack([middle, low, high])
    error, error_bound = _calibration_error(positives, negatives, probabilities)
    brier = _mean_of_bins(positives, negatives, (1 - probabilities) ** 2, probabilities**2)
    inside = np.clip(probabilities, TINY, 1 - TINY)
    loss = _mean_of_bins(positives, negatives, -np.log(inside), -np.log1p(-inside))
    return [error, error_bound, *brier, *loss]


def _mean_of_bins(
    positives: np.ndarray, negatives: np.ndarray, if_positive: np.ndarray, if_negative: np.ndarray
) -> tuple[float, float]:
    """Mean over documents of a quantity that is monotone within bins, and its error's bound.

    Args:
      positives, negatives: float [B], documents of each bin.
      if_positive, if_negative: float [3, B], at the middle and both ends of each bin.
    """
    total = positives.sum() + negatives.sum()
    value = positives @ if_positive[0] + negatives @ if_negative[0]
    furthest = [np.abs(ends[1:] - ends[0]).max(axis=0) for ends in (if_positive, if_negative)]
    return value / total, (positives @ furthest[0] + negatives @ furthest[1]) / total


def _calibration_error(
    positives: np.ndarray, negatives: np.ndarray, probabilities: np.ndarray
) -> tuple[float, float]:
    """Expected calibration error of one label's nonempty bins, and its error's bound.

    The bins of equal mass start at histogram bins. What the error is off by: the probabilities'
    distance from the middles; and, twice, the sum of (probability - truth) over the documents
    that another edge would put on its other side, all of one bin and no more than lie between the
    bin's start and the edge's rank: at most those negatives, or those positives.
    """
    middle, low, high = probabilities
    documents = positives + negatives
    ends = np.cumsum(documents)
    total = ends[-1]
    ranks = np.arange(1, CALIBRATION_BINS) * int(total) // CALIBRATION_BINS
    holding = np.searchsorted(ends, ranks, side="right")
    starts = np.unique(np.append(0, holding))
    gaps = np.add.reduceat(documents * middle - positives, starts)
    moved = ranks - (ends[holding] - documents[holding])
    misplaced = np.maximum(
        np.minimum(negatives[holding], moved) * high[holding],
        np.minimum(positives[holding], moved) * (1 - low[holding]),
    )
    rounded = documents @ np.maximum(high - middle, middle - low)
    bound = (rounded + 2 * misplaced.sum()) / total
    return np.abs(gaps).sum() / total, min(bound, 1.0)
