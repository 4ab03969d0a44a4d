"""Thresholds, which turn probabilities into decisions: the best of all cuts (NumPy only).

They are fitted for F1, for the sum of macro- and micro-F1, for precision (the largest recall at
that precision or more) or for recall (the largest precision at that recall or more). Of equally
good cuts the strictest is taken.

Thresholds for each label's own F1 give the best macro-F1 and a poor micro-F1. The best F1 of a
label that the model hardly knows is that of predicting it for very many documents, and those false
positives count in micro-F1: on docstrings, micro-F1 fell from 0.70 at a threshold of 0.5 to 0.61.
The sum of both F1 gives up almost nothing of the one for the other: there it reached 0.71, at a
macro-F1 of 0.390 instead of 0.394.

The sum of both F1 is not counted on the labels alone. A rare label has a handful of positives among
the fitted documents, and its best cut there is mostly chance. A document counts (100 p + n y)
/ (100 + n) in place of y, where p is its calibrated probability and n the label's positives: the
probabilities stand in for what is not known yet. On six systems, two corpora and 400 to 2,000
fitted documents, the macro-F1 of other documents rose from 0.532 to 0.548 in the mean, and
micro-F1 from 0.702 to 0.703, beside labels alone with 10 positives or more for a threshold of one's
own. Weights of 5 and 20 gave less, and any of 50 to 200 the same within 0.001.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from trainer.evaluation.calibration import sigmoid
from trainer.evaluation.cuts import (
    CENTRES,
    NUM_BINS,
    Cuts,
    Histograms,
    bin_indices,
    bound_cuts,
    cuts_of_bins,
    label_blocks,
    rank_labels,
)
from trainer.run_config import EvaluateConfig

_MAX_ROUNDS = 50
# Of the calibrated probabilities in overall_f1, in positives of a label, see above.
_PRIOR_WEIGHT = 100.0
# Of the cuts that a blend of both counts is weighed at, each predicts 1 % more than the one before.
_SPACING = 1.01


@dataclass(frozen=True)
class MicroF1Tradeoff:
    """What a label's true positives and predictions are worth in micro-F1, whose value is `micro`.

    `rate` is labels over the denominator of micro-F1. It makes micro-F1 worth as much as one
    label's F1.
    """

    micro: float
    rate: float

    def values(self, cuts: Cuts) -> np.ndarray:
        """A label's F1 at each cut, plus its share of micro-F1 in the same unit; float64 [...]."""
        predicted, positives = np.maximum(cuts.predicted, 1), np.maximum(cuts.positives, 1)
        f1 = 2 * cuts.true_positives / (predicted + positives)
        return f1 + self.rate * (2 * cuts.true_positives - self.micro * predicted)


# Counts each label's own F1 only.
NO_TRADEOFF = MicroF1Tradeoff(0.0, 0.0)


@dataclass(frozen=True)
class ThresholdRule:
    """What thresholds are best for, and which labels have one of their own.

    `kind` is f1 (each label's own), overall_f1 (the sum of macro- and micro-F1), precision or
    recall; `level` the minimum precision or recall. Labels with fewer than `min_support` positives
    (1 or more), or all where `is_global`, take the global cut, the best one of all labels' scores
    together. Of overall_f1 a label's own counts are blended with its probabilities.
    """

    kind: str = "f1"
    level: float = 0.0
    min_support: int = 10
    is_global: bool = False

    @classmethod
    def of(cls, config: EvaluateConfig) -> "ThresholdRule":
        """The rule that the flags of `multihot evaluate` name."""
        kind, level = config.threshold_target
        return cls(kind, level, config.own_min_support, config.thresholds == "global")

    @property
    def is_blended(self) -> bool:
        """Whether true positives are counted on probabilities, too."""
        return self.kind == "overall_f1"

    def values(self, cuts: Cuts, tradeoff: MicroF1Tradeoff = NO_TRADEOFF) -> np.ndarray:
        """What each cut is worth, float64 [...]: F1, or what a level that it reaches leaves free.

        -inf for a cut without true positives or below the level. `positives` of the cuts is of each
        cut's label.
        """
        precision = cuts.true_positives / np.maximum(cuts.predicted, 1)
        recall = cuts.true_positives / np.maximum(cuts.positives, 1)
        if self.kind == "precision":
            values, is_met = recall, precision >= self.level
        elif self.kind == "recall":
            values, is_met = precision, recall >= self.level
        else:
            values, is_met = tradeoff.values(cuts), True
        return np.where(is_met & (cuts.true_positives > 0), values, -np.inf)


@dataclass(frozen=True)
class Candidates(Cuts):
    """The cuts [M] of some labels that are weighed.

    `labels`, int64 [M], rise, and the cuts of one label go from the strictest down; `positives`,
    [M], are those of each cut's label.
    """

    labels: np.ndarray

    @classmethod
    def of_cuts(cls, cuts: Cuts, labels: np.ndarray) -> "Candidates":
        """Those of the cuts [B, C] of the labels int64 [B] that can be best: the strictest for each
        number of positives."""
        return cls._chosen(cuts, labels, np.diff(cuts.true_positives, axis=-1, prepend=0) > 0)

    @classmethod
    def of_blend(cls, cuts: Cuts, labels: np.ndarray) -> "Candidates":
        """Of blended cuts any can be best: these are 1 % apart, after one that predicts nothing."""
        pad = ((0, 0), (1, 0))
        scores = np.pad(cuts.scores, pad, constant_values=np.inf)
        predicted, found = (np.pad(part, pad) for part in (cuts.predicted, cuts.true_positives))
        steps = np.log(np.maximum(predicted, 0.5)) // np.log(_SPACING)
        is_kept = np.diff(steps, axis=-1, prepend=-np.inf) > 0
        return cls._chosen(Cuts(scores, predicted, found, cuts.positives), labels, is_kept)

    @classmethod
    def _chosen(cls, cuts: Cuts, labels: np.ndarray, is_kept: np.ndarray) -> "Candidates":
        lists = np.nonzero(is_kept)[0]
        return cls(
            cuts.scores[is_kept],
            cuts.predicted[is_kept],
            cuts.true_positives[is_kept],
            cuts.positives[lists],
            labels[lists],
        )

    @classmethod
    def joined(cls, parts: list["Candidates"]) -> "Candidates":
        """The candidates of all parts, whose labels rise from part to part."""
        parts = parts or [cls(np.zeros(0), *np.zeros((4, 0), np.int64))]
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        return cls(*map(np.concatenate, columns))

    def of_places(self, places: np.ndarray | slice) -> "Candidates":
        """Some of the candidates, by their places here."""
        return Candidates(*(getattr(self, field.name)[places] for field in fields(self)))

    def best(self, values: np.ndarray) -> np.ndarray:
        """The place of each label's candidate with the highest value, int64, in label order."""
        starts = np.flatnonzero(np.diff(self.labels, prepend=-1))
        counts = np.diff(starts, append=len(values))
        is_best = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), counts))
        # Of equal ones the first, which is the strictest.
        return is_best[np.unique(self.labels[is_best], return_index=True)[1]]


def fit_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, rule: ThresholdRule = ThresholdRule()
) -> np.ndarray:
    """The thresholds that are best for a rule, over all cuts.

    Probabilities, float [N, L], are calibrated, of a split that training did not see; labels are
    bool [N, L]. Returns float64 [L], to compare with `>=`: midpoints between neighbouring scores.
    NaN (never predicted) where no cut reaches the rule's level.
    """
    return _fit(_RankedScores(probabilities, np.asarray(labels, bool)), rule)[0]


@dataclass(frozen=True)
class BinnedThresholds:
    """Thresholds that were fitted to histograms: `probabilities`, as of `fit_thresholds`.

    `shortfall`, float64 [L], is how far what the label's own cut reaches on the fitted documents
    (F1, or the recall or precision that the rule leaves free) can be from the best of all cuts; NaN
    for labels that take the global cut.
    """

    probabilities: np.ndarray
    shortfall: np.ndarray


def fit_binned_thresholds(
    histograms: Histograms,
    scale: np.ndarray,
    shift: np.ndarray,
    rule: ThresholdRule = ThresholdRule(),
) -> BinnedThresholds:
    """`fit_thresholds`, over the cuts at the lower edges of histogram bins.

    A label's own counts at these cuts are exact, so that a level is reached. The global cut is
    found on calibrated log-odds, to which scale and shift, float [L], take those of the histograms.
    Each label's bins are put at their centres there. It is as if every score were moved by at most
    half a bin there and half a bin times the scale before.
    """
    scores = _BinnedScores(histograms, scale, shift)
    thresholds, chosen, tradeoff = _fit(scores, rule)
    shortfall = np.full(len(scale), np.nan)
    blocks = label_blocks(NUM_BINS, len(chosen.labels))
    for block, (_, cuts) in zip(blocks, scores.blocks(chosen.labels, rule.is_blended), strict=True):
        some, bound = chosen.of_places(block), bound_cuts(cuts)
        best = rule.values(replace(bound, positives=some.positives[:, None]), tradeoff).max(axis=-1)
        reached = rule.values(some, tradeoff)
        shortfall[some.labels] = np.maximum(best - np.where(reached > -np.inf, reached, 0), 0)
    return BinnedThresholds(thresholds, shortfall)


def _fit(
    scores: "_RankedScores | _BinnedScores", rule: ThresholdRule
) -> tuple[np.ndarray, Candidates, MicroF1Tradeoff]:
    """The thresholds float64 [L], the cuts of the labels that have their own, and the tradeoff that
    those were chosen by."""
    support = scores.support
    has_own = (support >= rule.min_support) & (not rule.is_global)
    own, others = np.flatnonzero(has_own), np.flatnonzero(~has_own)
    thresholds = np.full(len(support), np.nan)
    if len(others) and support.any():
        pooled = Candidates.of_cuts(scores.pooled(), np.zeros(1, np.int64))
        thresholds[others] = _thresholds(rule, pooled.of_places(pooled.best(rule.values(pooled))))
    weigh = Candidates.of_blend if rule.is_blended else Candidates.of_cuts
    parts = [weigh(cuts, labels) for labels, cuts in scores.blocks(own, rule.is_blended)]
    candidates = Candidates.joined(parts)
    if rule.is_blended and len(own):
        counts = scores.count_above(others, thresholds[others])
        positives = support.astype(np.float64)
        positives[candidates.labels] = candidates.positives
        places, tradeoff = choose_overall(candidates, positives, *counts)
    else:
        places, tradeoff = candidates.best(rule.values(candidates)), NO_TRADEOFF
    chosen = candidates.of_places(places)
    thresholds[own] = _thresholds(rule, chosen)
    return thresholds, chosen, tradeoff


def _thresholds(rule: ThresholdRule, cuts: Cuts) -> np.ndarray:
    """Of the best cuts [B] of their lists; NaN where these do not reach the rule's level."""
    return np.where(rule.values(cuts) > -np.inf, cuts.scores, np.nan)


def choose_overall(
    candidates: Candidates, support: np.ndarray, true_positives: int, predicted: int
) -> tuple[np.ndarray, MicroF1Tradeoff]:
    """The candidates that make macro-F1 plus micro-F1 largest, one a label.

    Micro-F1 is a ratio A / B of sums over labels. Near a choice with the value m = A / B, the sum
    of both changes as the sum over labels of F1 / L + (2 true positives - m predicted) / B. Each
    label maximises its term over its own cuts. The choice is repeated from there for as long as the
    sum rises (Dinkelbach 1967, "On Nonlinear Fractional Programming").

    `support`, [L], are the positives of every label; `true_positives` and `predicted` are of
    those without candidates together, whose cuts are fixed. Returns the place of each label's
    candidate, int64, in label order, and the tradeoff there.
    """
    tradeoff = NO_TRADEOFF
    f1 = tradeoff.values(candidates)
    chosen = best = candidates.best(f1)
    value = -np.inf
    for _ in range(_MAX_ROUNDS):
        total = candidates.predicted[chosen].sum() + predicted + support.sum()
        micro = 2 * (candidates.true_positives[chosen].sum() + true_positives) / total
        reached = f1[chosen].sum() / len(support) + micro
        if reached <= value:
            break
        best, value = chosen, reached
        tradeoff = MicroF1Tradeoff(float(micro), len(support) / float(total))
        chosen = candidates.best(tradeoff.values(candidates))
    return best, tradeoff


@dataclass(frozen=True)
class _RankedScores:
    """Probabilities float [N, L] of documents with labels bool [N, L], cut midway between two."""

    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def support(self) -> np.ndarray:
        return self.labels.sum(axis=0)

    def pooled(self) -> Cuts:
        return _midway(rank_labels(self.probabilities.reshape(1, -1), self.labels.reshape(1, -1)))

    def blocks(
        self, labels: np.ndarray, is_blended: bool = False
    ) -> Iterator[tuple[np.ndarray, Cuts]]:
        for block in label_blocks(len(self.labels), len(labels)):
            some = labels[block]
            cuts = rank_labels(self.probabilities[:, some].T, self.labels[:, some].T)
            if is_blended:
                sums = np.pad(np.cumsum(cuts.scores, axis=-1, dtype=np.float64), ((0, 0), (1, 0)))
                # At a cut within ties, the sum of those that it predicts.
                cuts = _blend(cuts, np.take_along_axis(sums, cuts.predicted, axis=-1))
            yield some, _midway(cuts)

    def count_above(self, labels: np.ndarray, thresholds: np.ndarray) -> tuple[int, int]:
        predicted = self.probabilities[:, labels] >= thresholds
        right = np.count_nonzero(predicted & self.labels[:, labels])
        return int(right), int(np.count_nonzero(predicted))


def _blend(cuts: Cuts, expected: np.ndarray) -> Cuts:
    """The cuts [B, C] with true positives, float64, counted on labels and probabilities.

    `expected`, float64 [B, C], are the sums of the probabilities of the documents predicted.
    """
    share = (_PRIOR_WEIGHT / (_PRIOR_WEIGHT + cuts.positives))[:, None]
    found = share * expected + (1 - share) * cuts.true_positives
    return replace(cuts, true_positives=found, positives=found[:, -1])


def _midway(cuts: Cuts) -> Cuts:
    """The cuts with the midpoint below each in place of its score."""
    above = cuts.scores.astype(np.float64)
    below = np.concatenate([above[..., 1:], np.zeros_like(above[..., :1])], axis=-1)
    middle = below + (above - below) / 2
    # Between neighbouring floats there is no middle.
    return replace(cuts, scores=np.where(below < middle, middle, above))


@dataclass(frozen=True)
class _BinnedScores:
    """Histograms of log-odds, calibrated by scale and shift, float [L], cut at the bins' edges."""

    histograms: Histograms
    scale: np.ndarray
    shift: np.ndarray

    @property
    def support(self) -> np.ndarray:
        return self.histograms.support

    def pooled(self) -> Cuts:
        documents, positives = np.zeros((2, 1, NUM_BINS), np.int64)
        for index in range(len(self.scale)):
            bins = bin_indices(self.scale[index] * CENTRES + self.shift[index])
            np.add.at(documents[0], bins, self.histograms.documents[index])
            np.add.at(positives[0], bins, self.histograms.positives[index])
        cuts = cuts_of_bins(documents, positives)
        return replace(cuts, scores=sigmoid(cuts.scores))

    def blocks(
        self, labels: np.ndarray, is_blended: bool = False
    ) -> Iterator[tuple[np.ndarray, Cuts]]:
        for block in label_blocks(NUM_BINS, len(labels)):
            some = labels[block]
            histograms, scale, shift = (
                self.histograms.of_labels(some), self.scale[some, None], self.shift[some, None],
            )  # fmt: skip
            cuts = histograms.cuts()
            if is_blended:
                masses = histograms.documents * sigmoid(scale * CENTRES + shift)
                cuts = _blend(cuts, np.cumsum(masses[:, ::-1], axis=-1))
            yield some, replace(cuts, scores=sigmoid(scale * cuts.scores + shift))

    def count_above(self, labels: np.ndarray, thresholds: np.ndarray) -> tuple[int, int]:
        right = predicted = 0
        for index, threshold in zip(labels, thresholds, strict=True):
            above = sigmoid(self.scale[index] * CENTRES + self.shift[index]) >= threshold
            right += int(self.histograms.positives[index][above].sum(dtype=np.int64))
            predicted += int(self.histograms.documents[index][above].sum(dtype=np.int64))
        return right, predicted


def round_thresholds(thresholds: Iterable[float | None]) -> list[float | None]:
    """Thresholds that decide the same for every float32 score, however the score is written.

    A score reaches them exactly if it reaches the given ones, be it read as float32, as float64, or
    from the shortest decimal that gives it back. None stays None.
    """
    return [None if cut is None else _round(cut) for cut in thresholds]


def _round(threshold: float) -> float:
    lowest = np.float32(threshold)
    if float(lowest) < threshold:
        lowest = np.nextafter(lowest, np.float32(np.inf))
    # The score below and its digits are smaller than both of these.
    return min(float(lowest), float(str(lowest)))
