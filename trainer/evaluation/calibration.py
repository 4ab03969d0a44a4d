"""Calibration: a scale and a shift for each label's logits (NumPy only)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.cuts import CENTRES, NUM_BINS, Histograms

# The pull of a label's fit toward the global one, in units of the label's own Fisher information
# sum p (1 - p), which for a rare label is about its number of positives. A label of information I
# goes I / (I + strength) of the way from the global fit to its own.
SHRINKAGE_STRENGTH = 20.0

# A positive scale keeps the ranking of documents, even of a label that was learned backwards.
MIN_SCALE = 0.01

# Variance, in squared logits, that defines the scale of a label whose logits are all the same.
MIN_LOGIT_VARIANCE = 1e-3

MAX_NEWTON_STEPS = 50
NEWTON_TOLERANCE = 1e-12

# Elements of the [documents, labels] temporaries of a fit, which takes a block of labels at a time.
BLOCK_ELEMENTS = 1 << 20

# Histogram bins that a fit takes as one.
BINS_PER_GROUP = 8


@dataclass(frozen=True)
class Calibration:
    """Calibrated logit = scale x raw logit + shift; both float64 [L], scale > 0."""

    scale: np.ndarray
    shift: np.ndarray

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, float64 [N, L], of raw logits [N, L]."""
        return sigmoid(self.scale * np.asarray(logits, np.float64) + self.shift)


# Half a document on each side keeps the log-odds of labels that all or none have finite.
_LOG_ODDS_SMOOTHING = 0.5


def log_odds(label_counts: Sequence[int] | np.ndarray, num_documents: int) -> np.ndarray:
    """log(positives / negatives) of each label, half a document added to both; float64 [L]."""
    positives = np.asarray(label_counts, np.float64)
    negatives = num_documents - positives
    return np.log((positives + _LOG_ODDS_SMOOTHING) / (negatives + _LOG_ODDS_SMOOTHING))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow and precise for small probabilities."""
    logits = np.asarray(logits, np.float64)
    tail = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, tail) / (1 + tail)


def exact_correction(pos_weights: Sequence[float], is_exact: bool) -> Calibration:
    """Takes positive weights back: log w off each logit, or nothing where that is not exact."""
    log_weights = np.log(np.asarray(pos_weights, np.float64)) * is_exact
    return Calibration(np.ones_like(log_weights), -log_weights)


def fit_calibration(
    logits: np.ndarray, labels: np.ndarray, pos_weights: np.ndarray, mode: str
) -> Calibration:
    """Fits a positive scale and a shift on top of the exact correction for positive weights.

    Weight w moves the minimiser of weighted cross-entropy by log w, so x = logit - log w is the
    log-odds that training without weights would aim at. Platt scaling (Platt 1999) is fitted to x
    by penalised Newton steps: first one line for all labels, pulled toward the identity, then one
    line a label, pulled toward the global line by `SHRINKAGE_STRENGTH`.

    The raw logits, float [N, L], and the labels, bool [N, L], are of a split that training did not
    see. `pos_weights`, float [L], are the loss's; ones for a loss that does not take them exactly.
    `mode` is `labels`, `global` (one line for all), or `none` (the exact correction only).
    """
    log_weights = np.log(np.asarray(pos_weights, np.float64))
    corrected = np.asarray(logits, np.float64) - log_weights
    labels = np.asarray(labels, bool)

    def of_labels(block: slice) -> _Sample:
        return _Sample(corrected[:, block], labels[:, block], 1.0)

    everything = _Sample(corrected.reshape(-1, 1), labels.reshape(-1, 1), 1.0)
    return _fit(everything, of_labels, len(logits), log_weights, mode)


def fit_binned_calibration(
    histograms: Histograms, log_weights: np.ndarray, mode: str
) -> Calibration:
    """`fit_calibration` by histograms of corrected logits x = logit - log w (log w: float64 [L]).

    The fit puts each x at its label's mean in a group of bins. That moves x by at most 1/32 between
    -32 and 32; since the means stay, the line is off by the order of the square of that.
    """

    def sample_of(counts: Histograms) -> _Sample:
        grouped = [
            np.add.reduceat(values, np.arange(0, NUM_BINS, BINS_PER_GROUP), axis=1).T
            for values in (counts.documents * CENTRES, counts.documents, counts.positives)
        ]
        sums, documents, positives = (values.astype(np.float64) for values in grouped)
        return _Sample(sums / np.maximum(documents, 1), positives, documents)

    def of_labels(block: slice) -> _Sample:
        return sample_of(histograms.of_labels(block))

    everything = sample_of(histograms.pooled())
    return _fit(everything, of_labels, NUM_BINS // BINS_PER_GROUP, log_weights, mode)


@dataclass(frozen=True)
class _Sample:
    """What lines are fitted to: x with its positives and documents (1.0: one each), [N, B]."""

    x: np.ndarray
    positives: np.ndarray
    documents: np.ndarray | float


def _fit(
    everything: _Sample,
    of_labels: Callable[[slice], _Sample],
    num_rows: int,
    log_weights: np.ndarray,
    mode: str,
) -> Calibration:
    assert mode in ("labels", "global", "none"), mode
    num_labels = len(log_weights)
    scale, shift = np.ones(num_labels), np.zeros(num_labels)
    if mode != "none" and num_rows:
        pooled = _fit_lines(everything, 1.0, 0.0)
        global_scale, global_shift = float(pooled[0][0]), float(pooled[1][0])
        scale[:], shift[:] = global_scale, global_shift
        if mode == "labels":
            block = max(1, BLOCK_ELEMENTS // num_rows)
            for start in range(0, num_labels, block):
                part = slice(start, start + block)
                scale[part], shift[part] = _fit_lines(of_labels(part), global_scale, global_shift)
    return Calibration(scale, shift - scale * log_weights)


def _fit_lines(
    sample: _Sample, prior_scale: float, prior_shift: float
) -> tuple[np.ndarray, np.ndarray]:
    """Penalised logistic regression of positives on x: each column's scale and shift, float64 [B].

    Minimises cross-entropy + strength / 2 x (d_b^2 + s^2 d_a^2), where d_b and d_a are the
    differences from the prior line in height at the column's centre of information and in slope,
    and s^2 is the variance of x about that centre: the same pull in every direction, measured by
    the column's own information.
    """
    x, columns = sample.x, sample.positives.shape[1]
    information = sample.documents * _variance(prior_scale * x + prior_shift)
    total = np.maximum(information.sum(axis=0), 1e-300)
    centre = (information * x).sum(axis=0) / total
    x = x - centre
    variance = (information * x**2).sum(axis=0) / total
    penalty = SHRINKAGE_STRENGTH * np.stack([variance + MIN_LOGIT_VARIANCE, np.ones_like(variance)])
    prior = np.stack([np.full(columns, prior_scale), prior_scale * centre + prior_shift])

    centred = _Sample(x, sample.positives, sample.documents)
    line = _minimise(centred, prior, penalty, fix_scale=np.zeros(columns, bool))
    # The objective is convex: where the free minimum is out of bounds, the best lies on the bound.
    backwards = line[0] < MIN_SCALE
    if backwards.any():
        bounded = np.where(backwards, [np.full_like(centre, MIN_SCALE), prior[1]], line)
        line = _minimise(centred, prior, penalty, fix_scale=backwards, start=bounded)
    return line[0], line[1] - line[0] * centre


def _variance(logits: np.ndarray) -> np.ndarray:
    """p (1 - p) of p = sigmoid(logits)."""
    tail = np.exp(-np.abs(logits))
    return tail / (1 + tail) ** 2


def _cross_entropy(logits: np.ndarray, sample: _Sample) -> np.ndarray:
    """Cross-entropy of all documents at each x: softplus(z) a negative, softplus(-z) a positive."""
    shared = np.log1p(np.exp(-np.abs(logits)))
    negatives = sample.documents - sample.positives
    wrong_way = negatives * np.maximum(logits, 0) + sample.positives * np.maximum(-logits, 0)
    return wrong_way + sample.documents * shared


def _minimise(
    sample: _Sample,
    prior: np.ndarray,
    penalty: np.ndarray,
    fix_scale: np.ndarray,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Newton's method with step halving on every column's (scale, height), float64 [2, B]."""

    def objective(line: np.ndarray) -> np.ndarray:
        data = _cross_entropy(line[0] * sample.x + line[1], sample).sum(axis=0)
        return data + 0.5 * (penalty * (line - prior) ** 2).sum(axis=0)

    line = (prior if start is None else start).copy()
    value = objective(line)
    for _ in range(MAX_NEWTON_STEPS):
        step, decrement = _newton_step(sample, line, prior, penalty, fix_scale)
        if np.all(decrement <= NEWTON_TOLERANCE * (1 + value)):
            break
        for _ in range(30):
            candidate = line + step
            candidate_value = objective(candidate)
            worse = candidate_value > value
            if not worse.any():
                break
            step = np.where(worse, step / 2, step)
        line = np.where(worse, line, candidate)
        value = np.where(worse, value, candidate_value)
    return line


def _newton_step(
    sample: _Sample, line: np.ndarray, prior: np.ndarray, penalty: np.ndarray, fix_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The step -H^-1 g of every column, [2, B], and its decrement g H^-1 g, [B]."""
    x = sample.x
    logits = line[0] * x + line[1]
    residual = sample.documents * sigmoid(logits) - sample.positives
    curvature = sample.documents * _variance(logits)
    gradient = np.stack([(residual * x).sum(axis=0), residual.sum(axis=0)])
    gradient += penalty * (line - prior)
    gradient[0, fix_scale] = 0
    h_scale = (curvature * x**2).sum(axis=0) + penalty[0]
    h_both = np.where(fix_scale, 0, (curvature * x).sum(axis=0))
    h_height = curvature.sum(axis=0) + penalty[1]
    determinant = h_scale * h_height - h_both**2
    along_scale = h_both * gradient[1] - h_height * gradient[0]
    along_height = h_both * gradient[0] - h_scale * gradient[1]
    step = np.stack([along_scale, along_height]) / determinant
    return step, -(step * gradient).sum(axis=0)
