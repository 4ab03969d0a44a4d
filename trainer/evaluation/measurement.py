"""A model's predictions for a split beside the true labels, and the split's metrics (NumPy only).

Metrics are exact where the predictions fit into memory. Where they do not, metrics come from
histograms of log-odds, each with a bound on its error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation import metrics
from trainer.evaluation.calibration import BINS_PER_GROUP, Calibration, sigmoid
from trainer.evaluation.cuts import (
    BIN_WIDTH,
    CENTRES,
    LIMIT,
    LOWER_EDGES,
    NUM_BINS,
    UPPER_EDGES,
    Cuts,
    Histograms,
    average_precision,
    bound_average_precision,
    bound_roc_auc,
    label_blocks,
    roc_auc,
)


@dataclass(frozen=True)
class Predictions:
    """What a model says of N documents of a split.

    `indices`, int64 [N], are their places in the order of the shards; logits are float32 [N, L],
    labels bool [N, L], and slices, str [N, C], the values of the kept columns.
    """

    ids: list[str]
    indices: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    slices: np.ndarray

    def chosen(self, places: np.ndarray) -> "Predictions":
        """Some of the documents, by their places here (int64 or bool)."""
        ids = np.array(self.ids, object)[places].tolist()
        return Predictions(ids, *(getattr(self, name)[places] for name in _ARRAYS))


_ARRAYS = ("indices", "logits", "labels", "slices")


def concatenate(blocks: Iterable[Predictions]) -> Predictions:
    """The documents of at least one block, in the order of the shards."""
    blocks = list(blocks)
    columns = [[getattr(block, name) for block in blocks] for name in _ARRAYS]
    ids = [document_id for block in blocks for document_id in block.ids]
    joint = Predictions(ids, *map(np.concatenate, columns))
    return joint.chosen(np.argsort(joint.indices))


@dataclass(frozen=True)
class CalibratedPredictions:
    """Documents of one split, in the split's reading order, beside their true labels.

    All of them, or where they do not fit into memory a uniform sample without replacement of the
    `num_documents`. `indices`, int64 [N], are each one's place in the reading order, rising. The
    probabilities are calibrated, the raw ones the plain sigmoid of the logits, float32 [N, L];
    labels are bool [N, L].
    """

    ids: list[str]
    indices: np.ndarray
    probabilities: np.ndarray
    raw_probabilities: np.ndarray
    labels: np.ndarray
    num_documents: int


# What exact metrics take at their peak, for each document and label that is held.
BYTES_PER_CELL = 100
# GiB that they may take, unless told otherwise.
EXACT_MEMORY = 4.0
# Cells of documents x labels of the sample that stands for a split that does not fit.
SAMPLE_CELLS = 1 << 24
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


@dataclass(frozen=True)
class Measured:
    """A split's metrics, and its documents to draw, resample and slice: all, or a uniform sample.

    The metrics are those of `compute_metrics`; those of the raw sigmoid have names in `_before`. A
    binned measurement has `error_bounds` too, floats by the name of a metric. `num_documents` is
    that of the whole split.
    """

    metrics: dict[str, Any]
    documents: Predictions
    num_documents: int

    def calibrated(self, calibration: Calibration) -> CalibratedPredictions:
        """The documents with their probabilities."""
        documents = self.documents
        return CalibratedPredictions(
            documents.ids,
            documents.indices,
            calibration.probabilities(documents.logits).astype(np.float32),
            sigmoid(documents.logits).astype(np.float32),
            documents.labels,
            self.num_documents,
        )


class ExactMeasurement:
    """The metrics of a split whose predictions come block by block and are all kept."""

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
        after = metrics.compute_metrics(probabilities, labels, self._thresholds)
        before, columns = metrics.probability_metrics(sigmoid(logits), labels, "_before")
        per_label = {"per_label": after["per_label"] | columns}
        return Measured(after | before | per_label, documents, len(labels))


class StreamedMeasurement:
    """`ExactMeasurement` by histograms, in memory that does not grow with the documents.

    It keeps a uniform sample of the split, the same for any order of its documents.
    """

    def __init__(
        self,
        num_documents: int,
        log_weights: np.ndarray,
        calibration: Calibration,
        thresholds: np.ndarray,
    ) -> None:
        """Starts without documents. Log-weights, float64 [L], come off logits before binning."""
        num_labels = len(log_weights)
        self._num_documents = num_documents
        self._log_weights = log_weights
        self._calibration = calibration
        self._thresholds = thresholds
        self._histograms = Histograms.empty(num_labels)
        self._pooled = Histograms.empty(1, np.uint64)
        self._counts = np.zeros((3, num_labels), np.int64)
        self._sums: dict[str, float] = {}
        size = min(num_documents, max(1, SAMPLE_CELLS // num_labels))
        random = np.random.default_rng(_SAMPLE_SEED)
        self._sampled = random.choice(num_documents, size, replace=False)
        self._sample: list[Predictions] = []

    def add(self, block: Predictions) -> None:
        """Counts a block of documents."""
        self._sample.append(block.chosen(np.isin(block.indices, self._sampled)))
        self._histograms.add(block.logits - self._log_weights, block.labels)
        rows = max(1, metrics.BLOCK_CELLS // len(self._log_weights))
        for start in range(0, len(block.ids), rows):
            part = slice(start, start + rows)
            self._add_decisions(block.logits[part], block.labels[part])

    def _add_decisions(self, logits: np.ndarray, labels: np.ndarray) -> None:
        log_odds = self._calibration.scale * logits + self._calibration.shift
        self._pooled.add(log_odds.reshape(-1, 1), labels.reshape(-1, 1))
        probabilities = sigmoid(log_odds)
        predicted = probabilities >= self._thresholds
        self._counts += metrics.count_decisions(predicted, labels)
        for name, values in metrics.score_documents(probabilities, predicted, labels).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())

    def result(self) -> Measured:
        """The metrics of all documents that were added, with the bounds of the binned ones."""
        scale, log_weights, support = self._calibration.scale, self._log_weights, self._counts[2]
        shift = self._calibration.shift + scale * log_weights
        overall, columns = metrics.decision_metrics(self._counts)
        values, bounds = self._rank_every_label()
        pooled = _rank(self._pooled.cuts())[..., 0]
        after = binned_probability_metrics(self._histograms, scale, shift)
        before = binned_probability_metrics(
            self._histograms, np.ones_like(scale), log_weights, "_before"
        )
        # The means of bounds, weighted like the values, bound the means.
        of_rankings = metrics.ranking_metrics(bounds, pooled[1], support)
        measured = {
            **overall,
            **metrics.ranking_metrics(values, pooled[0], support),
            **{name: value / self._num_documents for name, value in self._sums.items()},
            **after[0],
            **before[0],
            **metrics.count_labels(values, support, self._num_documents),
            "error_bounds": of_rankings | after[2] | before[2],
            "per_label": {"support": support, "threshold": self._thresholds}
            | columns
            | {"average_precision": values[0], "roc_auc": values[1]}
            | {"average_precision_bound": bounds[0], "roc_auc_bound": bounds[1]}
            | after[1]
            | before[1],
        }
        return Measured(measured, concatenate(self._sample), self._num_documents)

    def _rank_every_label(self) -> np.ndarray:
        """Average precision and ROC-AUC of each label, and their bounds, float64 [2, 2, L]."""
        ranked = np.full((2, 2, len(self._log_weights)), np.nan)
        for block in label_blocks(NUM_BINS, len(self._log_weights)):
            ranked[..., block] = _rank(self._histograms.of_labels(block).cuts())
        return ranked


Measurement = ExactMeasurement | StreamedMeasurement


def _rank(cuts: Cuts) -> np.ndarray:
    """Average precision and ROC-AUC of lists of scores, and their bounds, float64 [2, 2, ...]."""
    precision = average_precision(cuts)
    bounds = bound_average_precision(cuts, precision), bound_roc_auc(cuts)
    return np.array([(precision, roc_auc(cuts)), bounds])


def binned_probability_metrics(
    histograms: Histograms, scale: np.ndarray, shift: np.ndarray, suffix: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, float]]:
    """`probability_metrics` of documents of which there are histograms only.

    Scale and shift, float [L], take the histograms' log-odds to those of the probabilities to
    judge. Returns the metrics overall, as columns [L], and the bound of each overall one's error.
    """
    names = ("expected_calibration_error", "brier_score", "log_loss")
    labels = [histograms.of_labels(slice(index, index + 1)) for index in range(len(scale))]
    rows = np.array([_of_label(*label) for label in zip(labels, scale, shift, strict=True)])
    num_documents = histograms.documents[0].sum(dtype=np.int64)
    counted = metrics.is_counted(histograms.support / max(num_documents, 1))
    overall, columns, bounds = {}, {}, {}
    for place, name in enumerate(names):
        columns[name + suffix] = rows[:, 2 * place]
        of_mean = counted if place == 0 else np.ones_like(counted)
        overall[name + suffix] = metrics.mean_of_defined(rows[of_mean, 2 * place])
        bounds[name + suffix] = metrics.mean_of_defined(rows[of_mean, 2 * place + 1])
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
    inside = np.clip(probabilities, metrics.TINY, 1 - metrics.TINY)
    loss = _mean_of_bins(positives, negatives, -np.log(inside), -np.log1p(-inside))
    return [error, error_bound, *brier, *loss]


def _mean_of_bins(
    positives: np.ndarray, negatives: np.ndarray, if_positive: np.ndarray, if_negative: np.ndarray
) -> tuple[float, float]:
    """Mean over documents of a quantity that is monotone within bins, and its error's bound.

    Positives and negatives, float [B], are the documents of each bin. The quantity for each, float
    [3, B], is at the middle and both ends of each bin.
    """
    total = positives.sum() + negatives.sum()
    value = positives @ if_positive[0] + negatives @ if_negative[0]
    furthest = [np.abs(ends[1:] - ends[0]).max(axis=0) for ends in (if_positive, if_negative)]
    return value / total, (positives @ furthest[0] + negatives @ furthest[1]) / total


def _calibration_error(
    positives: np.ndarray, negatives: np.ndarray, probabilities: np.ndarray
) -> tuple[float, float]:
    """Expected calibration error of one label's nonempty bins, and its error's bound.

    Positives and negatives, float [B], are the documents of each bin, and the probabilities, float
    [3, B], those at its middle and both ends.

    The bins of equal mass start at histogram bins. Two things make the error. The probabilities are
    off by their distance from the middles. And another edge of a bin of equal mass would put some
    documents on its other side: their sum of (probability - truth) counts twice. They all lie in
    one histogram bin, and are no more than lie between its start and the edge's rank: at most as
    many of its negatives, or of its positives.
    """
    middle, low, high = probabilities
    documents = positives + negatives
    ends = np.cumsum(documents)
    total = ends[-1]
    ranks = np.arange(1, metrics.CALIBRATION_BINS) * int(total) // metrics.CALIBRATION_BINS
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
