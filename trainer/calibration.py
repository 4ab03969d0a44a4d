"""From logits to probabilities that mean what they say, and to decisions (NumPy only)."""

from dataclasses import dataclass

import numpy as np

from trainer.metrics import Cuts, rank_cuts

# The pull of a label's fit toward the global one, in units of its own Fisher information
# sum p (1 - p), which for a rare label is about its number of positives: a label of information I
# goes I / (I + strength) of the way from the global fit to its own.
SHRINKAGE_STRENGTH = 20.0

# A positive scale keeps the ranking of documents, even of a label that was learned backwards.
MIN_SCALE = 0.01

# Keeps the scale of a label defined whose logits are all the same (variance, in squared logits).
MIN_LOGIT_VARIANCE = 1e-3

MAX_NEWTON_STEPS = 50
NEWTON_TOLERANCE = 1e-12

# Elements of the [documents, labels] temporaries of a fit; labels are fitted in blocks.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Calibration:
    """Calibrated logit = scale x raw logit + shift; both float64 [L], scale > 0."""

    scale: np.ndarray
    shift: np.ndarray

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, float64 [N, L], of raw logits [N, L]."""
        return sigmoid(self.scale * np.asarray(logits, np.float64) + self.shift)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow and precise for small probabilities."""
    logits = np.asarray(logits, np.float64)
    tail = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, tail) / (1 + tail)


def fit_calibration(
    logits: np.ndarray, labels: np.ndarray, pos_weights: np.ndarray, mode: str
) -> Calibration:
    """Fits a positive scale and a shift on top of the exact correction for positive weights.

    Weight w moves the minimiser of weighted cross-entropy by log w, so x = logit - log w is the
    log-odds that training without weights would aim at. On x, Platt scaling (Platt 1999) by
    penalised Newton: first one line for all labels, pulled toward the identity, then one a label,
    pulled toward the global line by `SHRINKAGE_STRENGTH`.

    Args:
      logits: float [N, L], raw, of a split that training did not see.
      labels: bool [N, L].
      pos_weights: float [L], that the loss used.
      mode: `labels`, `global` (one line for all), or `none` (the exact correction only).

    Returns:
      The calibration, the correction included.
    """
    assert mode in ("labels", "global", "none"), mode
    log_weights = np.log(np.asarray(pos_weights, np.float64))
    num_labels = len(log_weights)
    scale, shift = np.ones(num_labels), np.zeros(num_labels)
    if mode != "none" and len(logits):
        corrected = np.asarray(logits, np.float64) - log_weights
        labels = np.asarray(labels, bool)
        pooled = _fit_lines(corrected.reshape(-1, 1), labels.reshape(-1, 1), 1.0, 0.0)
        global_scale, global_shift = float(pooled[0][0]), float(pooled[1][0])
        scale[:], shift[:] = global_scale, global_shift
        if mode == "labels":
            block = max(1, BLOCK_ELEMENTS // len(logits))
            for start in range(0, num_labels, block):
                part = slice(start, start + block)
                scale[part], shift[part] = _fit_lines(
                    corrected[:, part], labels[:, part], global_scale, global_shift
                )
    return Calibration(scale, shift - scale * log_weights)


def _fit_lines(
    x: np.ndarray, labels: np.ndarray, prior_scale: float, prior_shift: float
) -> tuple[np.ndarray, np.ndarray]:
    """Penalised logistic regression of labels [N, B] on x [N, B], one line a column.

    Minimises cross-entropy + strength / 2 x (d_b^2 + s^2 d_a^2), where d_b and d_a are the
    differences from the prior line in height at the column's centre of information and in slope,
    and s^2 is the variance of x about that centre: the same pull in every direction, measured by
    the column's own information.

    Returns:
      scale and shift, float64 [B] each.
    """
    information = _variance(prior_scale * x + prior_shift)
    total = np.maximum(information.sum(axis=0), 1e-300)
    centre = (information * x).sum(axis=0) / total
    x = x - centre
    variance = (information * x**2).sum(axis=0) / total
    penalty = SHRINKAGE_STRENGTH * np.stack([variance + MIN_LOGIT_VARIANCE, np.ones_like(variance)])
    prior = np.stack([np.full(x.shape[1], prior_scale), prior_scale * centre + prior_shift])

    line = _minimise(x, labels, prior, penalty, fix_scale=np.zeros(x.shape[1], bool))
    # The objective is convex: where the free minimum is out of bounds, the best lies on the bound.
    backwards = line[0] < MIN_SCALE
    if backwards.any():
        bounded = np.where(backwards, [np.full_like(centre, MIN_SCALE), prior[1]], line)
        line = _minimise(x, labels, prior, penalty, fix_scale=backwards, start=bounded)
    return line[0], line[1] - line[0] * centre


def _variance(logits: np.ndarray) -> np.ndarray:
    """p (1 - p) of p = sigmoid(logits)."""
    tail = np.exp(-np.abs(logits))
    return tail / (1 + tail) ** 2


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    wrong_way = np.where(labels, -logits, logits)
    return np.maximum(wrong_way, 0) + np.log1p(np.exp(-np.abs(logits)))


def _minimise(
    x: np.ndarray,
    labels: np.ndarray,
    prior: np.ndarray,
    penalty: np.ndarray,
    fix_scale: np.ndarray,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Newton's method with step halving on every column's (scale, height), float64 [2, B]."""

    def objective(line: np.ndarray) -> np.ndarray:
        data = _cross_entropy(line[0] * x + line[1], labels).sum(axis=0)
        return data + 0.5 * (penalty * (line - prior) ** 2).sum(axis=0)

    line = (prior if start is None else start).copy()
    value = objective(line)
    for _ in range(MAX_NEWTON_STEPS):
        step, decrement = _newton_step(x, labels, line, prior, penalty, fix_scale)
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
    x: np.ndarray,
    labels: np.ndarray,
    line: np.ndarray,
    prior: np.ndarray,
    penalty: np.ndarray,
    fix_scale: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The step -H^-1 g of every column, [2, B], and its decrement g H^-1 g, [B]."""
    logits = line[0] * x + line[1]
    residual = sigmoid(logits) - labels
    curvature = _variance(logits)
    gradient = np.stack([(residual * x).sum(axis=0), residual.sum(axis=0)])
    gradient += penalty * (line - prior)
    gradient[0, fix_scale] = 0
    h_scale = (curvature * x**2).sum(axis=0) + penalty[0]
    h_both = np.where(fix_scale, 0, (curvature * x).sum(axis=0))
    h_height = curvature.sum(axis=0) + penalty[1]
    determinant = h_scale * h_height - h_both**2
    step = np.stack(
        [
            (h_both * gradient[1] - h_height * gradient[0]) / determinant,
            (h_both * gradient[0] - h_scale * gradient[1]) / determinant,
        ]
    )
    return step, -(step * gradient).sum(axis=0)


def fit_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, min_support: int = 10
) -> np.ndarray:
    """The thresholds that maximise F1, over all cuts.

    Args:
      probabilities: float [N, L], calibrated, of a split that training did not see.
      labels: bool [N, L].
      min_support: a label with fewer positives here takes the one cut that maximises micro-F1
        over all labels.

    Returns:
      float64 [L], to compare with `>=`: midpoints between neighbouring scores. NaN (never
      predicted) for labels that need a global cut where the split has no positives at all.
    """
    labels = np.asarray(labels, bool)
    support = labels.sum(axis=0)
    rare = support < min_support
    thresholds = np.full(labels.shape[1], np.nan)
    for index in np.flatnonzero(~rare):
        thresholds[index] = _best_f1_cut(rank_cuts(probabilities[:, index], labels[:, index]))
    if rare.any() and support.any():
        thresholds[rare] = _best_f1_cut(rank_cuts(probabilities.ravel(), labels.ravel()))
    return thresholds


def _best_f1_cut(cuts: Cuts) -> float:
    """The midpoint below the cut of highest F1; of equal ones, the strictest."""
    best = int(np.argmax(cuts.true_positives / (cuts.predicted + cuts.positives)))
    above = float(cuts.scores[best])
    below = float(cuts.scores[best + 1]) if best + 1 < len(cuts.scores) else 0.0
    middle = below + (above - below) / 2
    # Between neighbouring floats there is no middle.
    return middle if below < middle else above
