"""Every way to cut labels' scores in two, exact or binned, and the areas under their curves.

NumPy only. Where documents x labels fit into memory, each label's scores are ranked. Where they do
not, each label keeps counts of its documents and of its positives over bins of log-odds, 1/256 wide
from -32 to 32 with open ends. That takes 128 KiB a label for any number of documents. The bins are
of log-odds, not of probabilities: scale and shift map a bin to a bin, and the probabilities of a
rare label all lie near 0. Every bound follows from the counts: it is what the worst and the best
scores within the bins would give.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# Cells of documents x labels that are ranked at once; ranking takes about 64 bytes a cell.
BLOCK_CELLS = 1 << 22


@dataclass(frozen=True)
class Cuts:
    """Every way to cut a list of scores in two, from the strictest down; of one list or of many.

    Cut c predicts every document that scores at least `scores[c]`: `predicted[c]` documents, of
    which `true_positives[c]` are positive, of the list's `positives`. Scores are float [..., C],
    falling, the counts int64 [..., C], and `positives` int64 [...]. Lists of different lengths are
    held side by side, so some entries repeat the cut before them (at the start the one that
    predicts nothing).
    """

    scores: np.ndarray
    predicted: np.ndarray
    true_positives: np.ndarray
    positives: Any


def rank_labels(scores: np.ndarray, positive: np.ndarray) -> Cuts:
    """The cuts [..., N] of every label, of scores float [..., N] and classes bool [..., N].

    Of equal scores only the last is a cut; the others repeat the one before.
    """
    order = np.argsort(-scores, axis=-1)
    ranked = np.take_along_axis(scores, order, axis=-1)
    positive = np.take_along_axis(positive, order, axis=-1)
    is_cut = np.ones(ranked.shape, bool)
    is_cut[..., :-1] = ranked[..., 1:] != ranked[..., :-1]
    predicted = np.where(is_cut, np.arange(1, ranked.shape[-1] + 1), 0)
    true_positives = np.where(is_cut, np.cumsum(positive, axis=-1, dtype=np.int64), 0)
    return Cuts(
        ranked,
        np.maximum.accumulate(predicted, axis=-1),
        np.maximum.accumulate(true_positives, axis=-1),
        np.count_nonzero(positive, axis=-1),
    )


def rank_cuts(scores: np.ndarray, positive: np.ndarray) -> Cuts:
    """The cuts of one list, float [N], whose true classes are bool [N]; none is repeated."""
    cuts = rank_labels(scores, positive)
    is_cut = np.diff(cuts.predicted, prepend=0) > 0
    return Cuts(
        cuts.scores[is_cut], cuts.predicted[is_cut], cuts.true_positives[is_cut], cuts.positives
    )


def label_blocks(num_documents: int, num_labels: int) -> Iterator[slice]:
    """Slices of labels, of about `BLOCK_CELLS` cells each."""
    width = max(1, BLOCK_CELLS // max(num_documents, 1))
    for start in range(0, num_labels, width):
        yield slice(start, min(start + width, num_labels))


def average_precision(cuts: Cuts) -> Any:
    """Average precision of every list, float64 [...]; NaN without positives."""
    gained = np.diff(cuts.true_positives, prepend=0, axis=-1)
    precision = cuts.true_positives / np.maximum(cuts.predicted, 1)
    return share((gained * precision).sum(axis=-1), cuts.positives)


def roc_auc(cuts: Cuts) -> Any:
    """Area under the ROC curve by trapezoids between cuts, float64 [...]; NaN for one class."""
    total = cuts.predicted.max(axis=-1, initial=0)
    gained = np.diff(cuts.true_positives, prepend=0, axis=-1)
    widths = np.diff(cuts.predicted - cuts.true_positives, prepend=0, axis=-1)
    area = (widths * (cuts.true_positives - gained / 2)).sum(axis=-1)
    return share(area, np.multiply(cuts.positives, total - cuts.positives, dtype=np.float64))


def share(part: Any, whole: Any) -> Any:
    """part / whole; NaN where the whole is 0."""
    return np.where(np.greater(whole, 0), part / np.maximum(whole, 1), np.nan)[()]


BIN_WIDTH = 1 / 256
LIMIT = 32.0
NUM_BINS = int(2 * LIMIT / BIN_WIDTH)
# Lower edges of the bins, float64 [B]; the lowest bin is open below, the highest above.
LOWER_EDGES = np.concatenate([[-np.inf], -LIMIT + BIN_WIDTH * np.arange(1, NUM_BINS)])
UPPER_EDGES = np.append(LOWER_EDGES[1:], np.inf)
CENTRES = -LIMIT + BIN_WIDTH * (np.arange(NUM_BINS) + 0.5)


@dataclass(frozen=True)
class Histograms:
    """Counts of many labels' documents, and of their positives, by score: uint32 or wider [L, B].

    `lowest` and `highest`, float64 [L], are the outermost scores, which close the open bins.
    """

    documents: np.ndarray
    positives: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray

    @classmethod
    def empty(cls, num_labels: int, dtype: type = np.uint32) -> "Histograms":
        """Histograms of no documents yet; `dtype` is that of the counts."""
        shape = (num_labels, NUM_BINS)
        return cls(
            np.zeros(shape, dtype),
            np.zeros(shape, dtype),
            np.full(num_labels, np.inf),
            np.full(num_labels, -np.inf),
        )

    def add(self, log_odds: np.ndarray, labels: np.ndarray) -> None:
        """Counts a block of documents: finite log-odds float [D, L] and labels bool [D, L]."""
        for block in label_blocks(*log_odds.shape):
            # Contiguous for each label, and small enough for a cache.
            bins = bin_indices(np.ascontiguousarray(log_odds[:, block].T))
            for counts, row in zip(self.documents[block], bins, strict=True):
                counts += np.bincount(row, minlength=NUM_BINS).astype(counts.dtype)
            columns, documents = np.nonzero(labels[:, block].T)
            np.add.at(self.positives[block], (columns, bins[columns, documents]), 1)
        if len(log_odds):
            np.minimum(self.lowest, log_odds.min(axis=0), out=self.lowest)
            np.maximum(self.highest, log_odds.max(axis=0), out=self.highest)

    def pooled(self) -> "Histograms":
        """All labels as one, int64 [1, B]."""
        return Histograms(
            self.documents.sum(axis=0, dtype=np.int64)[None],
            self.positives.sum(axis=0, dtype=np.int64)[None],
            self.lowest.min(keepdims=True),
            self.highest.max(keepdims=True),
        )

    def of_labels(self, block: slice | np.ndarray) -> "Histograms":
        """The histograms of some of the labels."""
        return Histograms(
            self.documents[block], self.positives[block], self.lowest[block], self.highest[block]
        )

    @property
    def support(self) -> np.ndarray:
        """Positives of each label, int64 [L]."""
        return self.positives.sum(axis=1, dtype=np.int64)

    def cuts(self) -> Cuts:
        """The cuts at the bins' lower edges, in log-odds, from the highest down, [L, B]."""
        return cuts_of_bins(self.documents, self.positives)


def cuts_of_bins(documents: np.ndarray, positives: np.ndarray) -> Cuts:
    """The cuts at the bins' lower edges, from the highest down, of counts int [..., B]."""
    return Cuts(
        np.broadcast_to(LOWER_EDGES[::-1], documents.shape),
        np.cumsum(documents[..., ::-1], axis=-1, dtype=np.int64),
        np.cumsum(positives[..., ::-1], axis=-1, dtype=np.int64),
        positives.sum(axis=-1, dtype=np.int64),
    )


def bin_indices(log_odds: np.ndarray) -> np.ndarray:
    """The bin of every score, int64, open ends included."""
    places = (log_odds + LIMIT) * (1 / BIN_WIDTH)
    # astype cuts off toward zero, which rounds down because nothing is negative.
    return np.clip(places, 0, NUM_BINS - 1, out=places).astype(np.int64)


def bound_average_precision(cuts: Cuts, value: np.ndarray) -> np.ndarray:
    """How far the average precision of the scores can be from that of the cuts, float64 [...].

    A positive counts the precision of the cut that first predicts it. Let T of K predicted
    documents above a bin be true, and the bin have p positives and n negatives. No cut within it is
    more precise than (T + p) / (K + p). The j-th positive is at worst at (T + j) / (K + n + j),
    which is concave in j: the sum over j is at least p times the mean of the first and the last.
    """
    gained = np.diff(cuts.true_positives, prepend=0, axis=-1)
    negatives = np.diff(cuts.predicted, prepend=0, axis=-1) - gained
    true, predicted = cuts.true_positives, cuts.predicted
    best = true / np.maximum(predicted - negatives, 1)
    first = (true - gained + 1) / np.maximum(predicted - gained + 1, 1)
    worst = (first + true / np.maximum(predicted, 1)) / 2
    high = share((gained * best).sum(axis=-1), cuts.positives)
    low = share((gained * worst).sum(axis=-1), cuts.positives)
    return np.maximum(high - value, value - low)


def bound_roc_auc(cuts: Cuts) -> np.ndarray:
    """How far the ROC-AUC of the scores can be from that of the cuts, float64 [...].

    Pairs of a positive and a negative in one bin count one half; they might count nothing or one.
    """
    gained = np.diff(cuts.true_positives, prepend=0, axis=-1)
    negatives = np.diff(cuts.predicted, prepend=0, axis=-1) - gained
    total = cuts.predicted[..., -1]
    pairs = np.multiply(cuts.positives, total - cuts.positives, dtype=np.float64)
    return share((gained * negatives / 2).sum(axis=-1), pairs)


def bound_cuts(cuts: Cuts) -> Cuts:
    """Cuts no worse than any within the bins: each takes a bin's positives, not its negatives."""
    gained = np.diff(cuts.true_positives, prepend=0, axis=-1)
    negatives = np.diff(cuts.predicted, prepend=0, axis=-1) - gained
    return Cuts(cuts.scores, cuts.predicted - negatives, cuts.true_positives, cuts.positives)
