"""Every way to cut a list of scores in two, and the areas under its curves (NumPy only)."""

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
