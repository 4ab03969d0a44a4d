"""Logistic regressions whose strength, and whose mixture, held-out documents choose."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.metrics import mean_of_defined, rank_every_label
from trainer.linear.logistic import Features, LinearModel, fit_logistic

# Values of scikit-learn's C to choose from, ascending: for standardised vectors, and for TF-IDF.
VECTOR_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)
TERM_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
# Every fifth document is held out while a strength is chosen, among at most so many labels.
_HELD_OUT = 5
_MAX_LABELS = 256
# Of the fits that only choose; ten times that of the last one changed no choice.
_ROUGH = 1e-2
# A dimension of less deviation says nothing: absolutely, and as a share of the median one. MiniLM
# has three that are constant. In a fine-tuned one they deviate by a thousandth of the others. With
# weights of thousands on them, an encoder that went on from there had gradients a hundred times as
# large, and diverged.
_MIN_DEVIATION, _MIN_SHARE = 1e-6, 0.02
# Of those that a mixture is judged by, which takes some seconds at most.
_SHARE_DOCUMENTS = 8192
_SHARES = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class SelectedFit:
    """A fit to all documents, the C that was chosen, and its precision on held-out documents."""

    model: LinearModel
    inverse_strength: float
    held_out_precision: float


def fit_selected(features: Features, labels: np.ndarray, strengths: Sequence[float]) -> SelectedFit:
    """Fits features [N, F] to labels, bool [N, L], at the best of `strengths`.

    That is the one with the largest mean average precision on a fifth of the documents, which have
    to be in random order.
    """
    held = np.arange(len(labels)) % _HELD_OUT == 0
    judged = _choose_labels(labels, held)
    fit_labels, held_labels = (labels[np.ix_(rows, judged)] for rows in (~held, held))
    model, best, chosen = None, -1.0, strengths[0]
    for strength in strengths:
        model = fit_logistic(features[~held], fit_labels, strength, model, _ROUGH)
        precision = mean_precision(model.logits(features[held]), held_labels)
        if precision <= best:
            break  # Over the strengths it rises, then falls.
        best, chosen = precision, strength
    return SelectedFit(fit_logistic(features, labels, chosen), chosen, best)


def _choose_labels(labels: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Labels that can be judged, at most `_MAX_LABELS` of all frequencies, int64 ascending."""
    held_counts = labels[held].sum(axis=0)
    fit_counts = labels.sum(axis=0) - held_counts
    return _spread(np.where(held_counts > 0, fit_counts, 0))


def _spread(counts: np.ndarray) -> np.ndarray:
    """At most `_MAX_LABELS` of the labels with positives, of all counts [L]; int64 ascending."""
    judged = np.flatnonzero(counts)
    by_frequency = judged[np.argsort(-counts[judged], kind="stable")]
    picks = np.linspace(0, len(judged) - 1, min(len(judged), _MAX_LABELS)).astype(int)
    return np.sort(by_frequency[picks])


def mean_precision(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean average precision of logits [N, L]; 0 where no label of them has positives."""
    value = mean_of_defined(rank_every_label(logits, labels)[0])
    return value if np.isfinite(value) else 0.0


def fit_vectors(vectors: np.ndarray, labels: np.ndarray) -> SelectedFit:
    """`fit_selected` of vectors, float32 [N, H], standardised; the model is of the vectors as is.

    The standardised vectors are turned to their main axes. That changes no solution, and makes the
    Hessian nearly diagonal, so that conjugate gradients take few steps.
    """
    mean, deviation = (
        statistic(vectors, axis=0, dtype=np.float64) for statistic in (np.mean, np.std)
    )
    floor = max(_MIN_DEVIATION, _MIN_SHARE * float(np.median(deviation)))
    scale = np.where(deviation > floor, 1 / np.maximum(deviation, floor), 0)
    scaled = ((vectors - mean) * scale).astype(np.float32)
    axes = np.linalg.eigh((scaled.T @ scaled).astype(np.float64))[1]
    found = fit_selected(scaled @ axes.astype(np.float32), labels, VECTOR_STRENGTHS)
    weights = scale[:, None] * (axes @ found.model.weights.astype(np.float64))
    bias = found.model.bias - mean @ weights
    model = LinearModel(weights.astype(np.float32), bias.astype(np.float32))
    return SelectedFit(model, found.inverse_strength, found.held_out_precision)


def choose_share(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> float:
    """The share of `second` in a mixture of two models' logits [N, L] with the best precision.

    That is the largest sum of mean and micro average precision. On a few hundred documents the mean
    alone is mostly chance, which rare labels decide: of five small corpora it gave three a share of
    a quarter to a half, where a share of 1 had more of both on other documents.

    Shares go from 0 to 1 in steps of 0.05; of equal ones the smallest. Of many documents and labels
    some are enough to judge.
    """
    rows = slice(_SHARE_DOCUMENTS)
    judged = _spread(labels[rows].sum(axis=0))
    first, second, labels = (item[rows][:, judged] for item in (first, second, labels))
    sums = []
    for share in _SHARES:
        logits = (1 - share) * first + share * second
        micro = mean_precision(logits.reshape(-1, 1), labels.reshape(-1, 1))
        sums.append(mean_precision(logits, labels) + micro)
    return _SHARES[int(np.argmax(sums))]
