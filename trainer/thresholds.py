"""From probabilities to decisions: the best cut of each label, of all cuts there are (NumPy only).

A cut is chosen for F1, for precision (the largest recall at that precision or more) or for recall
(the largest precision at that recall or more); of equally good ones, the strictest.
"""

from dataclasses import dataclass

import numpy as np

from trainer.calibration import sigmoid
from trainer.histograms import (
    CENTRES,
    NUM_BINS,
    Histograms,
    bin_indices,
    cuts_of_bins,
    most_favourable,
)
from trainer.ranking import Cuts, label_blocks, rank_cuts, rank_labels


@dataclass(frozen=True)
class Target:
    """What a threshold is for: `kind` f1, precision or recall, the latter two at least `level`."""

    kind: str = "f1"
    level: float = 0.0


@dataclass(frozen=True)
class BinnedThresholds:
    """Thresholds that were fitted to histograms.

    Attributes:
      probabilities: float64 [L], as `fit_thresholds` gives them.
      shortfall: float64 [L], how far what the label's own cut reaches on the fitted documents (F1,
        or the recall or precision that its target leaves free) can be from the best of all cuts;
        NaN for labels that take the global cut.
    """

    probabilities: np.ndarray
    shortfall: np.ndarray


def fit_thresholds(
    probabilities: np.ndarray,
    labels: np.ndarray,
    min_support: int = 10,
    target: Target = Target(),
    is_global: bool = False,
) -> np.ndarray:
    """The thresholds that are best for a target, over all cuts.

    Args:
      probabilities: float [N, L], calibrated, of a split that training did not see.
      labels: bool [N, L].
      min_support: a label with fewer positives here takes the one cut of all labels' scores
        together that is best for the target.
      target: what for.
      is_global: whether all labels take that one cut.

    Returns:
      float64 [L], to compare with `>=`: midpoints between neighbouring scores. NaN (never
      predicted) where no cut reaches the target.
    """
    labels = np.asarray(labels, bool)
    has_own = (labels.sum(axis=0) >= min_support) & (not is_global)
    thresholds = np.full(labels.shape[1], np.nan)
    own = np.flatnonzero(has_own)
    for block in label_blocks(len(labels), len(own)):
        columns = own[block]
        cuts = rank_labels(probabilities[:, columns].T, labels[:, columns].T)
        thresholds[columns] = _midpoints(cuts, target)
    if not has_own.all():
        thresholds[~has_own] = _midpoints(rank_cuts(probabilities.ravel(), labels.ravel()), target)
    return thresholds


def fit_binned_thresholds(
    histograms: Histograms,
    scale: np.ndarray,
    shift: np.ndarray,
    min_support: int = 10,
    target: Target = Target(),
    is_global: bool = False,
) -> BinnedThresholds:
    """`fit_thresholds`, over the cuts at the lower edges of histogram bins.

    A label's own counts at these cuts are exact, so that a target is met. The global cut is found
    on calibrated log-odds, where each label's bins are put at their middles: it is as if every
    score were moved by at most half a bin there and half a bin times the scale before.

    Args:
      histograms: of L labels.
      scale, shift: float [L], from the histograms' log-odds to the calibrated ones.
      min_support, target, is_global: as for `fit_thresholds`.
    """
    has_own = (histograms.support >= min_support) & (not is_global)
    thresholds, shortfall = np.full((2, len(scale)), np.nan)
    pooled = np.zeros((2, NUM_BINS), np.int64)
    for block in label_blocks(NUM_BINS, len(scale)):
        part = histograms.of_labels(block)
        cuts = part.cuts()
        best, reached = _best_cuts(cuts, target)
        edges = np.take_along_axis(cuts.scores, best[:, None], axis=1)[:, 0]
        chosen = sigmoid(scale[block] * edges + shift[block])
        thresholds[block] = np.where(has_own[block] & reached, chosen, np.nan)
        shortfall[block] = np.where(has_own[block], _shortfall(cuts, best, reached, target), np.nan)
        _add_pooled(part, scale[block], shift[block], pooled)
    if not has_own.all():
        cuts = cuts_of_bins(pooled[0], pooled[1])
        best, reached = _best_cuts(cuts, target)
        thresholds[~has_own] = sigmoid(cuts.scores[best]) if reached else np.nan
    return BinnedThresholds(thresholds, shortfall)


def _add_pooled(
    histograms: Histograms, scale: np.ndarray, shift: np.ndarray, pooled: np.ndarray
) -> None:
    """Adds labels' documents and positives to those by calibrated log-odds, int64 [2, B]."""
    for index in range(len(scale)):
        bins = bin_indices(scale[index] * CENTRES + shift[index])
        np.add.at(pooled[0], bins, histograms.documents[index])
        np.add.at(pooled[1], bins, histograms.positives[index])


def _best_cuts(cuts: Cuts, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """The index of the best cut of every list, and whether it reaches the target."""
    values = _values(cuts, target)
    best = np.argmax(values, axis=-1)
    return best, np.take_along_axis(values, best[..., None], axis=-1)[..., 0] > 0


def _values(cuts: Cuts, target: Target) -> np.ndarray:
    """What each cut is worth, float64 [..., C]: F1, or what a target that it meets leaves free.

    0 for what predicts no positive or misses the target.
    """
    true, predicted = cuts.true_positives, np.maximum(cuts.predicted, 1)
    positives = np.maximum(np.asarray(cuts.positives)[..., None], 1)
    if target.kind == "f1":
        return 2 * true / (predicted + positives)
    precision, recall = true / predicted, true / positives
    if target.kind == "precision":
        return np.where(precision >= target.level, recall, 0)
    return np.where(recall >= target.level, precision, 0)


def _shortfall(cuts: Cuts, best: np.ndarray, reached: np.ndarray, target: Target) -> np.ndarray:
    """How much better than the chosen cut at a bin's edge one within a bin can be."""
    found = np.take_along_axis(_values(cuts, target), best[..., None], axis=-1)[..., 0]
    bound = _values(most_favourable(cuts), target).max(axis=-1)
    return np.maximum(bound - np.where(reached, found, 0), 0)


def _midpoints(cuts: Cuts, target: Target) -> np.ndarray:
    """The midpoint below the best cut of every list, float64 [...]; NaN out of reach."""
    best, reached = _best_cuts(cuts, target)
    padded = np.concatenate([cuts.scores, np.zeros_like(cuts.scores[..., :1])], axis=-1)
    above, below = (
        np.take_along_axis(padded, best[..., None] + step, axis=-1)[..., 0].astype(np.float64)
        for step in (0, 1)
    )
    middle = below + (above - below) / 2
    # Between neighbouring floats there is no middle.
    return np.where(reached, np.where(below < middle, middle, above), np.nan)
