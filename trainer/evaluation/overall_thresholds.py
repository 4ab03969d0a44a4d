"""Thresholds for macro- and micro-F1 at once (NumPy only).

Each label cut where its own F1 is best makes the best macro-F1, and a poor micro-F1: the best F1 of
a label that the model hardly knows is that of predicting it for very many documents, and those
false positives count in micro-F1 (on docstrings, micro-F1 fell from 0.70 at a threshold of 0.5 to
0.61). The sum of both F1 gives up almost nothing of the one for the other (0.71 there, at a
macro-F1 of 0.390 instead of 0.394).
"""

from dataclasses import dataclass

import numpy as np

from trainer.evaluation.ranking import Cuts

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
class Exchange:
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
NO_EXCHANGE = Exchange(0.0, 0.0)


def choose_overall(
    candidates: Candidates, support: np.ndarray, true_positives: int, predicted: int
) -> tuple[np.ndarray, Exchange]:
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
        exchange = Exchange(float(micro), len(support) / float(total))
        chosen = best_by_label(exchange.values(found, said, positives))
    return best, exchange
