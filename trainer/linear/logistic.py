"""L2-regularised logistic regression of many labels at once, over dense or sparse features.

For every label it minimises sum_n log(1 + exp(-y_n z_n)) + |w|^2 / (2 C) with z = x.w + b, which is
scikit-learn's `LogisticRegression(C=C)`; b is free. The labels share each product with the
features, so that 128 labels cost little more than a few. Newton's method (Lin, Weng, Keerthi 2008,
"Trust Region Newton Method for Large-Scale Logistic Regression", without the region: steps are
halved instead) solves each step by conjugate gradients, preconditioned with the Hessian's diagonal.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.sparse import csr_matrix

from trainer.evaluation.calibration import log_odds, sigmoid
from trainer.runtime.workers import count_cores

Features: TypeAlias = np.ndarray | csr_matrix
# Labels that a thread solves together: their N x labels arrays stay within the processor's cache
# for some thousand documents, and within 200 MB for 50,000.
_BLOCK_LABELS = 32
_MAX_NEWTON_STEPS = 30
_MAX_CG_STEPS = 50
_MAX_HALVINGS = 12
# Of the gradient's norm, beside that of the start: float32 gets no further than about 1e-5.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class LinearModel:
    """Logits x.weights + bias: `weights` float32 [F, L], `bias` float32 [L]."""

    weights: np.ndarray
    bias: np.ndarray

    def logits(self, features: Features) -> np.ndarray:
        """Features [N, F] to logits, float32 [N, L]."""
        return np.asarray(features @ self.weights + self.bias, np.float32)


@dataclass(frozen=True)
class _Problem:
    """N documents' features and their transposes, float32, as the products need them."""

    features: Features
    transposed: Features
    squares: Features

    @classmethod
    def of(cls, features: Features) -> "_Problem":
        if isinstance(features, csr_matrix):
            transposed = features.T.tocsr()
            return cls(features, transposed, transposed.power(2))
        transposed = np.ascontiguousarray(features.T)
        return cls(features, transposed, transposed**2)


def fit_logistic(
    features: Features,
    labels: np.ndarray,
    inverse_strength: float,
    start: LinearModel | None = None,
    tolerance: float = TOLERANCE,
) -> LinearModel:
    """Fits features, float32 [N, F] or a CSR matrix, to labels, bool [N, L].

    `inverse_strength` is scikit-learn's C. `start` is a solution for another C, from which this one
    is near. `tolerance` is the share of the gradient's norm at no weights that may be left. A label
    of one class gets its log-odds, half a document added to both sides, as its bias, and no
    weights. The result is the same for any number of threads.
    """
    num_features = features.shape[1]
    # Hashed terms leave most columns of a sparse matrix empty.
    used: Any = slice(None)
    if isinstance(features, csr_matrix):
        used = np.flatnonzero(np.bincount(features.indices, minlength=num_features))
        features = features[:, used]
    problem = _Problem.of(features)
    weights = np.zeros((features.shape[1], labels.shape[1]), np.float32)
    counts = labels.sum(axis=0)
    bias = log_odds(counts, len(labels)).astype(np.float32)
    if start is not None:
        weights[:], bias[:] = start.weights[used], start.bias
    both = np.flatnonzero((counts > 0) & (counts < len(labels)))
    blocks = np.array_split(both, max(1, -(-len(both) // _BLOCK_LABELS)))

    def solve(block: np.ndarray) -> None:
        if len(block):
            targets = labels[:, block].astype(np.float32)
            solved = _solve(
                problem, targets, weights[:, block], bias[block], inverse_strength, tolerance
            )
            weights[:, block], bias[block] = solved

    # NumPy's own products take all cores; SciPy's take one, and leave Python's lock to the others.
    threads = 1 if isinstance(features, np.ndarray) else count_cores()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(solve, blocks))
    all_weights = np.zeros((num_features, labels.shape[1]), np.float32)
    all_weights[used] = weights
    return LinearModel(all_weights, bias)


def _solve(
    problem: _Problem,
    targets: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
    c: float,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The solution of a block of labels, targets float32 [N, K], from weights [F, K] and bias [K].

    All labels take each step together; those that are solved drop out.
    """
    weights, bias = weights.copy(), bias.copy()
    active: np.ndarray = np.arange(len(bias))
    w, b, y = weights, bias, targets
    z: np.ndarray = problem.features @ w + b
    loss: np.ndarray = _losses(z, y, w, c)
    # Of no weights and the log-odds as bias, so that a good start is not asked for more digits.
    base: np.ndarray = np.linalg.norm(problem.transposed @ (y.mean(axis=0) - y), axis=0)
    for _ in range(_MAX_NEWTON_STEPS):
        p: np.ndarray = sigmoid(z).astype(np.float32)
        gradient, bias_gradient = problem.transposed @ (p - y) + w / c, (p - y).sum(axis=0)
        norm: np.ndarray = np.sqrt((gradient**2).sum(axis=0) + bias_gradient**2)
        left = norm > tolerance * np.maximum(base, 1e-3)
        if not left.all():
            weights[:, active], bias[active] = w, b
            active, w, b, y, z, p, loss, base, norm = (
                item[..., left] for item in (active, w, b, y, z, p, loss, base, norm)
            )
            gradient, bias_gradient = gradient[:, left], bias_gradient[left]
        if not len(active):
            break
        curvature = p * (1 - p)
        forcing = np.minimum(0.3, np.sqrt(norm / np.maximum(base, 1e-3)))
        step, bias_step = _newton_step(problem, gradient, bias_gradient, curvature, c, forcing)
        w, b, z, loss = _search(problem, (w, b, z, loss), (step, bias_step), y, c)
    weights[:, active], bias[active] = w, b
    return weights, bias


def _losses(z: np.ndarray, y: np.ndarray, w: np.ndarray, c: float) -> np.ndarray:
    """The objective of each label, float64 [K]."""
    terms = np.logaddexp(0, z) - y * z
    return terms.sum(axis=0, dtype=np.float64) + (w**2).sum(axis=0, dtype=np.float64) / (2 * c)


def _newton_step(
    problem: _Problem,
    gradient: np.ndarray,
    bias_gradient: np.ndarray,
    curvature: np.ndarray,
    c: float,
    forcing: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """-H^-1 g for each label, by conjugate gradients until |H s + g| <= forcing |g|."""
    diagonal = problem.squares @ curvature + 1 / c
    bias_diagonal = curvature.sum(axis=0) + 1e-6
    s, bias_s = np.zeros_like(gradient), np.zeros_like(bias_gradient)
    r, bias_r = -gradient, -bias_gradient
    d, bias_d = r / diagonal, bias_r / bias_diagonal
    rho = _dot(r, d) + bias_r * bias_d
    target = forcing**2 * (_dot(r, r) + bias_r**2)
    running = np.ones(len(rho), bool)
    for _ in range(_MAX_CG_STEPS):
        weighted = curvature * (problem.features @ d + bias_d)
        h, bias_h = problem.transposed @ weighted, weighted.sum(axis=0)
        h += d * np.float32(1 / c)
        bend = _dot(d, h) + bias_d * bias_h
        alpha = np.where(running & (bend > 0), rho / np.where(bend > 0, bend, 1), 0)
        s += alpha * d
        bias_s += alpha * bias_d
        h *= alpha
        r -= h
        bias_r -= alpha * bias_h
        running &= _dot(r, r) + bias_r**2 > target
        if not running.any():
            break
        e, bias_e = np.divide(r, diagonal, out=h), bias_r / bias_diagonal
        following = _dot(r, e) + bias_r * bias_e
        beta = following / np.maximum(rho, 1e-30)
        d *= beta
        d += e
        bias_d = bias_e + beta * bias_d
        rho = following
    return s, bias_s


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The products of the columns of two arrays [F, K], [K]."""
    return np.einsum("fk,fk->k", first, second)


def _search(
    problem: _Problem,
    at: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    step: tuple[np.ndarray, np.ndarray],
    y: np.ndarray,
    c: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each label's full step, or half of it, and so on, until its objective does not rise."""
    w, b, z, loss = at
    slope = problem.features @ step[0] + step[1]
    size = np.ones(len(b), np.float32)
    for _ in range(_MAX_HALVINGS):
        after = _losses(z + size * slope, y, w + size * step[0], c)
        worse = after > loss * (1 + 1e-7)
        if not worse.any():
            break
        size = np.where(worse, size / 2, size)
    return w + size * step[0], b + size * step[1], z + size * slope, after
