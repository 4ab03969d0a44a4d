"""Logistic regressions on documents' vectors and on their terms, fitted apart and then mixed.

One regression over both kinds of features was measured to rank worse than the mean of two. The
strengths of regularisation and the share of each in the mixture are those with the best mean
average precision on documents that are held out; the last fit is on all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy.sparse import csr_matrix

from trainer.evaluation.metrics import mean_of_defined, rank_every_label
from trainer.linear.logistic import Features, LinearModel, fit_logistic

# Values of scikit-learn's C to choose from, ascending.
VECTOR_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)
TERM_STRENGTHS = (1.0, 3.0, 10.0, 30.0)
# Shares of the terms' logits. Neither part starts at nothing: it would get no gradient, or give
# none to the encoder.
_SHARES = tuple(np.linspace(0.1, 0.9, 9).round(1).tolist())
# Every fifth document is held out while a choice is made, among at most so many labels.
_HELD_OUT = 5
_MAX_LABELS = 256
# A dimension of less deviation says nothing.
_MIN_DEVIATION = 1e-6


@dataclass(frozen=True)
class JointFit:
    """Two linear models whose logits add up to those of the mixture; None for a kind not fitted.

    `chosen` says the strengths and the share, and `held_out` the mean average precision of each
    part and of the mixture on the held-out documents.
    """

    vectors: LinearModel | None
    terms: LinearModel | None
    chosen: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Standardised:
    """Vectors as features with a mean of 0 and a deviation of 1, turned to their main axes.

    The turn changes no solution. It makes the Hessian nearly diagonal, which conjugate gradients
    need few steps for.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> "Standardised":
        """The standardisation of vectors, float32 [N, H]."""
        mean, deviation = (
            vectors.mean(axis=0, dtype=np.float64),
            vectors.std(axis=0, dtype=np.float64),
        )
        scale = np.where(deviation > _MIN_DEVIATION, 1 / np.maximum(deviation, _MIN_DEVIATION), 0)
        scaled = ((vectors - mean) * scale).astype(np.float32)
        _, axes = np.linalg.eigh((scaled.T @ scaled).astype(np.float64))
        return cls(mean, scale, axes)

    def features(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [N, H]."""
        scaled = ((vectors - self.mean) * self.scale).astype(np.float32)
        return scaled @ self.axes.astype(np.float32)

    def fold(self, model: LinearModel) -> LinearModel:
        """The model of the vectors themselves that gives the logits of `model` on features."""
        weights = self.scale[:, None] * (self.axes @ model.weights.astype(np.float64))
        bias = model.bias - self.mean @ weights
        return LinearModel(weights.astype(np.float32), bias.astype(np.float32))


def fit_jointly(
    vectors: np.ndarray | None,
    terms: Features | None,
    labels: np.ndarray,
    progress: Callable[[str], object] = lambda line: None,
) -> JointFit:
    """Fits vectors, float32 [N, H], and features of terms to labels, bool [N, L].

    `progress` hears in words what is done next. All is deterministic.
    """
    standard = None if vectors is None else Standardised.of(vectors)
    kinds: dict[str, tuple[Features, Sequence[float]]] = {}
    if standard is not None:
        kinds["vectors"] = (standard.features(vectors), VECTOR_STRENGTHS)
    if terms is not None:
        kinds["terms"] = (terms, TERM_STRENGTHS)
    progress("choosing the strength of regularisation")
    chosen, held_out = _choose(kinds, labels)
    fits = {}
    for name, (features, _) in kinds.items():
        progress(f"fitting {labels.shape[1]} labels to {name}")
        share = chosen.get(f"share_of_{name}", 1.0)
        model = fit_logistic(features, labels, chosen[f"inverse_strength_of_{name}"])
        model = LinearModel(model.weights * np.float32(share), model.bias * np.float32(share))
        fits[name] = standard.fold(model) if name == "vectors" else model
    return JointFit(fits.get("vectors"), fits.get("terms"), chosen, held_out)


def _choose(
    kinds: dict[str, tuple[Features, Sequence[float]]], labels: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """The strengths and shares that are best on held-out documents, and their precisions there."""
    held = np.arange(len(labels)) % _HELD_OUT == 0
    fit_labels, held_labels = labels[~held], labels[held]
    # Of the labels that can be judged, some of every frequency.
    judged = np.flatnonzero((fit_labels.any(axis=0)) & (held_labels.any(axis=0)))
    judged = judged[np.argsort(-fit_labels[:, judged].sum(axis=0), kind="stable")]
    picks = np.linspace(0, len(judged) - 1, min(len(judged), _MAX_LABELS)).astype(int)
    judged = np.sort(judged[picks])
    fit_labels, held_labels = fit_labels[:, judged], held_labels[:, judged]

    def precision(logits: np.ndarray) -> float:
        value = mean_of_defined(rank_every_label(logits, held_labels)[0])
        return value if np.isfinite(value) else 0.0

    chosen, held_out, best_logits = {}, {}, {}
    for name, (features, grid) in kinds.items():
        model, best = None, (-1.0, grid[0])
        for strength in grid:
            model = fit_logistic(features[~held], fit_labels, strength, model)
            logits = model.logits(features[held])
            value = precision(logits)
            if value <= best[0]:
                break  # The precision has one maximum over the strengths.
            best, best_logits[name] = (value, strength), logits
        held_out[name], chosen[f"inverse_strength_of_{name}"] = best
    if len(kinds) == 2:

        def mixed(share: float) -> float:
            return precision(share * best_logits["terms"] + (1 - share) * best_logits["vectors"])

        share = max(_SHARES, key=mixed)
        chosen |= {"share_of_terms": share, "share_of_vectors": 1 - share}
        held_out["both"] = mixed(share)
    return chosen, held_out
