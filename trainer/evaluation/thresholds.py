"""From probabilities to decisions: the best cut of each label, of all cuts there are (NumPy only).

A cut is chosen for F1, for macro- and micro-F1 together (see `overall_thresholds.py`), for
precision (the largest recall at that precision or more) or for recall (the largest precision at
that recall or more); of equally good ones, the strictest.

Thresholds for macro- and micro-F1 at once (NumPy only).

Each label cut where its own F1 is best makes the best macro-F1, and a poor micro-F1: the best F1 of
a label that the model hardly knows is that of predicting it for very many documents, and those
false positives count in micro-F1 (on docstrings, micro-F1 fell from 0.70 at a threshold of 0.5 to
0.61). The sum of both F1 gives up almost nothing of the one for the other (0.71 there, at a
macro-F1 of 0.390 instead of 0.394).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.calibration import sigmoid
from trainer.evaluation.histograms import (
    CENTRES,
    NUM_BINS,
    Histograms,
    bin_indices,
    cuts_of_bins,
    most_favourable,
)
from trainer.evaluation.ranking import Cuts, label_blocks, rank_cuts, rank_labels

_MOST_ROUNDS = 50


@dataclass(frozen=True)
class Candidates:
    """Cuts of some labels: of all that find as many positives, the one that predicts least.

    Attributes:
      labels: int64 [M], rising; each label has one candidate or more.
      true_positives, predicted: int64 [M], rising within a label.
      thresholds: float64 [M].
    """

    labels: np.ndarray
    true_positives: np.ndarray
    predicted: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def of_cuts(cls, cuts: Cuts, labels: np.ndarray, thresholds: np.ndarray) -> "Candidates":
        """The candidates among the cuts [B, C] of the labels int64 [B], at thresholds [B, C]."""
        rises = np.diff(cuts.true_positives, axis=-1, prepend=0) > 0
        return cls(
            labels[np.nonzero(rises)[0]],
            cuts.true_positives[rises],
            cuts.predicted[rises],
            thresholds[rises],
        )

    @classmethod
    def joined(cls, parts: list["Candidates"]) -> "Candidates":
        """The candidates of all parts, whose labels rise from part to part."""
        columns = ("labels", "true_positives", "predicted", "thresholds")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


@dataclass(frozen=True)
class MicroF1Tradeoff:
    """What a label's positives found and documents predicted are worth in micro-F1.

    Attributes:
      micro: micro-F1.
      rate: labels over the denominator of micro-F1, which makes it worth as much as one label's F1.
    """

    micro: float
    rate: float

    def values(
        self, true_positives: np.ndarray, predicted: np.ndarray, positives: np.ndarray
    ) -> np.ndarray:
        """A label's F1, and its share of micro-F1 in the same unit; float64 [...]."""
        f1 = 2 * true_positives / (predicted + positives)
        return f1 + self.rate * (2 * true_positives - self.micro * predicted)


# Counts each label's own F1 only.
NO_EXCHANGE = MicroF1Tradeoff(0.0, 0.0)


def choose_overall(
    candidates: Candidates, support: np.ndarray, true_positives: int, predicted: int
) -> tuple[np.ndarray, MicroF1Tradeoff]:
    """The candidates that make macro-F1 plus micro-F1 largest, one a label.

    Micro-F1 is a ratio A / B of sums over labels. Near a choice with the value m = A / B, the sum
    of both changes as the sum over labels of F1 / L + (2 true positives - m predicted) / B, which
    each label maximises over all its cuts by itself; the choice is repeated from there for as long
    as the sum rises (Dinkelbach 1967, "On Nonlinear Fractional Programming").

    Args:
      candidates: of the labels that have cuts of their own.
      support: int64 [L], positives of every label.
      true_positives, predicted: of the other labels together, whose cuts stand.

    Returns:
      int64, an index into the candidates for each of their labels, in order; and at what rate
      micro-F1 was traded in the end.
    """
    own, starts = np.unique(candidates.labels, return_index=True)
    counts = np.diff(np.append(starts, len(candidates.labels)))
    found, said = candidates.true_positives, candidates.predicted
    positives = support[candidates.labels]

    def best_by_label(values: np.ndarray) -> np.ndarray:
        is_best = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), counts))
        # Of equal ones the first, which is the strictest.
        return is_best[np.unique(candidates.labels[is_best], return_index=True)[1]]

    exchange = NO_EXCHANGE
    f1 = exchange.values(found, said, positives)
    chosen, best, value = best_by_label(f1), np.zeros(len(own), np.int64), -np.inf
    for _ in range(_MOST_ROUNDS):
        total = said[chosen].sum() + predicted + support.sum()
        micro = 2 * (found[chosen].sum() + true_positives) / total
        reached = f1[chosen].sum() / len(support) + micro
        if reached <= value:
            break
        best, value = chosen, reached
        exchange = MicroF1Tradeoff(float(micro), len(support) / float(total))
        chosen = best_by_label(exchange.values(found, said, positives))
    return best, exchange


@dataclass(frozen=True)
class ThresholdTarget:
    """What thresholds are for.

    Attributes:
      kind: f1 (each label's own), overall_f1 (the sum of macro- and micro-F1), precision or recall.
      level: the least precision or recall.
    """

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
    target: ThresholdTarget = ThresholdTarget(),
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
    support = labels.sum(axis=0)
    has_own = (support >= min_support) & (not is_global)
    thresholds = np.full(labels.shape[1], np.nan)
    if not has_own.all():
        thresholds[~has_own] = _at_best(rank_cuts(probabilities.ravel(), labels.ravel()), target)
    own = np.flatnonzero(has_own)
    lists = _rank_in_blocks(probabilities, labels, own)
    if target.kind == "overall_f1" and len(own):
        parts = [Candidates.of_cuts(cuts, columns, _midpoints(cuts)) for columns, cuts in lists]
        others = probabilities[:, ~has_own] >= thresholds[~has_own]
        found = int(np.count_nonzero(others & labels[:, ~has_own]))
        candidates = Candidates.joined(parts)
        chosen, _ = choose_overall(candidates, support, found, int(np.count_nonzero(others)))
        thresholds[own] = candidates.thresholds[chosen]
    else:
        for columns, cuts in lists:
            thresholds[columns] = _at_best(cuts, target)
    return thresholds


def _rank_in_blocks(
    probabilities: np.ndarray, labels: np.ndarray, own: np.ndarray
) -> Iterator[tuple[np.ndarray, Cuts]]:
    """Some labels at a time, int64 [B], and their cuts [B, C]."""
    for block in label_blocks(len(labels), len(own)):
        columns = own[block]
        yield columns, rank_labels(probabilities[:, columns].T, labels[:, columns].T)


def fit_binned_thresholds(
    histograms: Histograms,
    scale: np.ndarray,
    shift: np.ndarray,
    min_support: int = 10,
    target: ThresholdTarget = ThresholdTarget(),
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
    support = histograms.support
    has_own = (support >= min_support) & (not is_global)
    thresholds, shortfall = np.full((2, len(scale)), np.nan)
    blocks = list(label_blocks(NUM_BINS, len(scale)))
    pooled = np.zeros((2, NUM_BINS), np.int64)
    for block in blocks:
        _add_pooled(histograms.of_labels(block), scale[block], shift[block], pooled)
    others = (0, 0)
    if not has_own.all():
        cuts = cuts_of_bins(pooled[0], pooled[1])
        best, reached = _best_cuts(cuts, target)
        thresholds[~has_own] = sigmoid(cuts.scores[best]) if reached else np.nan
        others = _counts_above(histograms, scale, shift, ~has_own, cuts.scores[best])
    exchange = NO_EXCHANGE
    if target.kind == "overall_f1" and has_own.any():
        parts = []
        for block in blocks:
            labels = np.arange(len(scale))[block][has_own[block]]
            cuts = histograms.of_labels(labels).cuts()
            parts.append(Candidates.of_cuts(cuts, labels, cuts.scores))
        _, exchange = choose_overall(Candidates.joined(parts), support, *others)
    for block in blocks:
        cuts = histograms.of_labels(block).cuts()
        best, reached = _best_cuts(cuts, target, exchange)
        edges = np.take_along_axis(cuts.scores, best[:, None], axis=1)[:, 0]
        chosen = sigmoid(scale[block] * edges + shift[block])
        thresholds[block] = np.where(
            has_own[block], np.where(reached, chosen, np.nan), thresholds[block]
        )
        found = _shortfall(cuts, best, reached, target, exchange)
        shortfall[block] = np.where(has_own[block], found, np.nan)
    return BinnedThresholds(thresholds, shortfall)


def _add_pooled(
    histograms: Histograms, scale: np.ndarray, shift: np.ndarray, pooled: np.ndarray
) -> None:
    """Adds labels' documents and positives to those by calibrated log-odds, int64 [2, B]."""
    for index in range(len(scale)):
        bins = bin_indices(scale[index] * CENTRES + shift[index])
        np.add.at(pooled[0], bins, histograms.documents[index])
        np.add.at(pooled[1], bins, histograms.positives[index])


def _counts_above(
    histograms: Histograms, scale: np.ndarray, shift: np.ndarray, chosen: np.ndarray, cut: float
) -> tuple[int, int]:
    """Positives and documents of the `chosen` (bool [L]) labels at calibrated log-odds >= cut."""
    positives = documents = 0
    for index in np.flatnonzero(chosen):
        above = scale[index] * CENTRES + shift[index] >= cut
        positives += int(histograms.positives[index][above].sum(dtype=np.int64))
        documents += int(histograms.documents[index][above].sum(dtype=np.int64))
    return positives, documents


def _best_cuts(
    cuts: Cuts, target: ThresholdTarget, exchange: MicroF1Tradeoff = NO_EXCHANGE
) -> tuple[np.ndarray, np.ndarray]:
    """The index of the best cut of every list, and whether it reaches the target."""
    values = _values(cuts, target, exchange)
    best = np.argmax(values, axis=-1)
    return best, np.take_along_axis(values, best[..., None], axis=-1)[..., 0] > -np.inf


def _values(
    cuts: Cuts, target: ThresholdTarget, exchange: MicroF1Tradeoff = NO_EXCHANGE
) -> np.ndarray:
    """What each cut is worth, float64 [..., C]: F1, or what a target that it meets leaves free.

    Minus infinity for what predicts no positive or misses the target. F1 is without the share of
    micro-F1 where the exchange has no rate.
    """
    true, predicted = cuts.true_positives, np.maximum(cuts.predicted, 1)
    positives = np.maximum(np.asarray(cuts.positives)[..., None], 1)
    precision, recall = true / predicted, true / positives
    if target.kind == "precision":
        values, met = recall, precision >= target.level
    elif target.kind == "recall":
        values, met = precision, recall >= target.level
    else:
        values, met = exchange.values(true, predicted, positives), True
    return np.where(met & (true > 0), values, -np.inf)


def _shortfall(
    cuts: Cuts,
    best: np.ndarray,
    reached: np.ndarray,
    target: ThresholdTarget,
    exchange: MicroF1Tradeoff,
) -> np.ndarray:
    """How much better than the chosen cut at a bin's edge one within a bin can be."""
    found = np.take_along_axis(_values(cuts, target, exchange), best[..., None], axis=-1)[..., 0]
    bound = _values(most_favourable(cuts), target, exchange).max(axis=-1)
    gap = bound - np.where(reached, found, 0)
    return np.where(bound > -np.inf, np.maximum(gap, 0), 0)


def _at_best(cuts: Cuts, target: ThresholdTarget) -> np.ndarray:
    """The threshold of the best cut of every list, float64 [...]; NaN out of reach."""
    best, reached = _best_cuts(cuts, target)
    middles = np.take_along_axis(_midpoints(cuts), best[..., None], axis=-1)[..., 0]
    return np.where(reached, middles, np.nan)


def _midpoints(cuts: Cuts) -> np.ndarray:
    """The midpoint below every cut, float64 [..., C]."""
    above = cuts.scores.astype(np.float64)
    below = np.concatenate([above[..., 1:], np.zeros_like(above[..., :1])], axis=-1)
    middle = below + (above - below) / 2
    # Between neighbouring floats there is no middle.
    return np.where(below < middle, middle, above)
