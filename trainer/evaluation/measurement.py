"""A split's metrics: exact where its predictions fit into memory, from histograms where not.

Calibration error, Brier score and log-loss of histograms, with bounds (NumPy only).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trainer.evaluation.calibration import BINS_PER_GROUP, Calibration, sigmoid
from trainer.evaluation.histograms import (
    BIN_WIDTH,
    CENTRES,
    LIMIT,
    LOWER_EDGES,
    NUM_BINS,
    UPPER_EDGES,
    Histograms,
    bound_average_precision,
    bound_roc_auc,
)
from trainer.evaluation.metrics import (
    CALIBRATION_BINS,
    TINY,
    compute_metrics,
    count_labels,
    decision_metrics,
    is_counted,
    mean_of_defined,
    probability_metrics,
    ranking_metrics,
    sum_over_documents,
)
from trainer.evaluation.predictions import CalibratedPredictions, Predictions, concatenate
from trainer.evaluation.ranking import average_precision, label_blocks, roc_auc


def binned_probability_metrics(
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


# What exact metrics take at their peak, for each document and label of what is held.
BYTES_PER_CELL = 100
# GiB that they may take, unless told otherwise.
EXACT_MEMORY = 4.0
# Cells of documents x labels of the sample that stands for a split that does not fit, and those
# whose probabilities are worked out at once.
SAMPLE_CELLS = 1 << 24
_BLOCK_CELLS = 1 << 18
_SAMPLE_SEED = 0
BINNED = (
    f"binned: log-odds after the exact correction in bins of {BIN_WIDTH:g} from {-LIMIT:g} to "
    f"{LIMIT:g} with open ends, those of the micro metrics after calibration; precision, recall, "
    "F1 and the metrics of single documents are exact; error_bounds and the _bound of each label "
    "hold the most that each of the others can be off by; threshold_shortfall is the most that a "
    "label's threshold, at the edge of a bin, can miss on the calibration split, and the global "
    "one is as good as if every score were moved by at most half a bin; calibration saw "
    f"logits moved by at most {BINS_PER_GROUP * BIN_WIDTH:g}, their mean kept; intervals, slices "
    "and trivial are of a uniform sample of documents"
)


def fits_exactly(num_documents: int, num_labels: int, gibibytes: float) -> bool:
    """Whether exact metrics of so many documents stay within so much memory."""
    return num_documents * num_labels * BYTES_PER_CELL <= gibibytes * 2**30


def deviations(logits: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Standard deviation of each label's calibrated log-odds over documents, float64 [L]."""
    return calibration.scale * np.std(logits, axis=0, dtype=np.float64)


@dataclass(frozen=True)
class Measured:
    """A split's metrics, and the documents to draw, resample and slice.

    Attributes:
      metrics: as `compute_metrics` has them; those of the raw sigmoid have names in `_before`; of
        a binned measurement there is `error_bounds` too, floats by the name of a metric.
      documents: all of the split, or a uniform sample.
      num_documents: of the split.
    """

    metrics: dict[str, Any]
    documents: Predictions
    num_documents: int

    def scored(self, calibration: Calibration) -> CalibratedPredictions:
        """The documents with their probabilities."""
        documents = self.documents
        return CalibratedPredictions(
            documents.ids,
            documents.indices,
            calibration.probabilities(documents.logits).astype(np.float32),
            sigmoid(documents.logits).astype(np.float32),
            documents.labels,
            self.num_documents,
            documents.slices,
        )


class Measurement(Protocol):
    """The metrics of a split whose predictions come block by block."""

    def add(self, block: Predictions) -> None:
        """Counts a block of documents."""

    def result(self) -> Measured:
        """The metrics of all documents that were added."""


class ExactMeasurement:
    """A `Measurement` that keeps all predictions."""

    def __init__(self, calibration: Calibration, thresholds: np.ndarray) -> None:
        self._calibration = calibration
        self._thresholds = thresholds
        self._blocks: list[Predictions] = []

    def add(self, block: Predictions) -> None:
        """Keeps a block of documents."""
        self._blocks.append(block)

    def result(self) -> Measured:
        """The metrics of all documents that were added."""
        documents = concatenate(self._blocks)
        logits, labels = documents.logits, documents.labels
        probabilities = self._calibration.probabilities(logits)
        metrics = compute_metrics(probabilities, labels, self._thresholds)
        before, columns = probability_metrics(sigmoid(logits), labels, "_before")
        metrics |= before
        metrics["per_label"] |= columns
        return Measured(metrics, documents, len(labels))


class Sample:
    """A uniform sample of a split's documents, the same whatever order they come in."""

    def __init__(self, num_documents: int, num_labels: int) -> None:
        size = min(num_documents, max(1, SAMPLE_CELLS // num_labels))
        random = np.random.default_rng(_SAMPLE_SEED)
        self._chosen = random.choice(num_documents, size, replace=False)
        self._blocks: list[Predictions] = []

    def add(self, block: Predictions) -> None:
        """Keeps those of the block's documents that the sample has."""
        self._blocks.append(block.chosen(np.isin(block.indices, self._chosen)))

    def documents(self) -> Predictions:
        """The sample, in the order of the shards."""
        return concatenate(self._blocks)


class StreamedMeasurement:
    """A `Measurement` in memory that does not grow with the documents."""

    def __init__(
        self,
        num_documents: int,
        log_weights: np.ndarray,
        calibration: Calibration,
        thresholds: np.ndarray,
    ) -> None:
        """Starts without documents.

        Args:
          num_documents: that will come.
          log_weights: float64 [L], taken off the logits before they are binned.
          calibration: of the raw logits.
          thresholds: float64 [L], NaN: never predicted.
        """
        num_labels = len(log_weights)
        self._num_documents = num_documents
        self._log_weights = log_weights
        self._calibration = calibration
        self._thresholds = thresholds
        self._histograms = Histograms.empty(num_labels)
        self._pooled = Histograms.empty(1, np.uint64)
        self._counts = np.zeros((3, num_labels), np.int64)
        self._sums: dict[str, float] = {}
        self._sample = Sample(num_documents, num_labels)

    def add(self, block: Predictions) -> None:
        """Counts a block of documents."""
        self._sample.add(block)
        self._histograms.add(block.logits - self._log_weights, block.labels)
        rows = max(1, _BLOCK_CELLS // len(self._log_weights))
        for start in range(0, len(block.ids), rows):
            part = slice(start, start + rows)
            self._add_decisions(block.logits[part], block.labels[part])

    def _add_decisions(self, logits: np.ndarray, labels: np.ndarray) -> None:
        calibration = self._calibration
        log_odds = calibration.scale * logits + calibration.shift
        self._pooled.add(log_odds.reshape(-1, 1), labels.reshape(-1, 1))
        probabilities = sigmoid(log_odds)
        predicted = probabilities >= self._thresholds
        self._counts += [
            np.count_nonzero(matrix, axis=0) for matrix in (predicted & labels, predicted, labels)
        ]
        sums = sum_over_documents(probabilities, predicted, labels)
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}

    def result(self) -> Measured:
        """The metrics of all that was added, with the bounds of those that are binned."""
        right, num_predicted, support = self._counts
        overall, columns = decision_metrics(right, num_predicted, support)
        ranking, ranking_columns, bounds = self._ranking(support)
        calibration, log_weights = self._calibration, self._log_weights
        after = self._of_probabilities(
            calibration.scale, calibration.shift + calibration.scale * log_weights, ""
        )
        before = self._of_probabilities(np.ones_like(log_weights), log_weights, "_before")
        means = {name: value / self._num_documents for name, value in self._sums.items()}
        precisions, areas = (ranking_columns[name] for name in ("average_precision", "roc_auc"))
        metrics = {
            **overall,
            **ranking,
            **means,
            **after[0],
            **before[0],
            **count_labels(precisions, areas, support, self._num_documents),
            "error_bounds": bounds | after[2] | before[2],
            "per_label": {"support": support, "threshold": self._thresholds}
            | columns
            | ranking_columns
            | after[1]
            | before[1],
        }
        return Measured(metrics, self._sample.documents(), self._num_documents)

    def _of_probabilities(self, scale: np.ndarray, shift: np.ndarray, suffix: str) -> Any:
        return binned_probability_metrics(self._histograms, scale, shift, suffix)

    def _ranking(
        self, support: np.ndarray
    ) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
        """Average precision and ROC-AUC: overall, as columns, and the bounds of the overall."""
        names = "average_precision", "roc_auc"
        values, bounds = np.full((2, 2, len(support)), np.nan)
        for block in label_blocks(NUM_BINS, len(support)):
            cuts = self._histograms.of_labels(block).cuts()
            values[:, block] = average_precision(cuts), roc_auc(cuts)
            bounds[:, block] = bound_average_precision(cuts, values[0, block]), bound_roc_auc(cuts)
        pooled = self._pooled.cuts()
        micro = average_precision(pooled)
        overall = ranking_metrics(values[0], values[1], support)
        # The means of bounds bound the means, weighted alike.
        of_means = ranking_metrics(bounds[0], bounds[1], support)
        of_micro = bound_average_precision(pooled, micro), bound_roc_auc(pooled)
        overall |= {
            "micro_average_precision": float(micro[0]),
            "micro_roc_auc": float(roc_auc(pooled)[0]),
        }
        of_means |= {
            f"micro_{name}": float(bound[0]) for name, bound in zip(names, of_micro, strict=True)
        }
        columns = dict(zip(names, values, strict=True))
        columns |= {f"{name}_bound": row for name, row in zip(names, bounds, strict=True)}
        return overall, columns, of_means
