"""Calibration: a scale and a shift for each label's logits (NumPy only)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.cuts import CENTRES, NUM_BINS, Histograms

# The pull of a label's fit toward the line that its frequency predicts, in units of the label's own
# Fisher information sum p (1 - p), which for a rare label is about its number of positives. A label
# of information I goes I / (I + strength) of the way from that line to its own.
SHRINKAGE_STRENGTH = 20.0

# The same of the lines of frequencies toward the common line, for splits that tell nothing of them.
RATE_STRENGTH = 0.1

# A positive scale keeps the ranking of documents, even of a label that was learned backwards.
MIN_SCALE = 0.01

# Variance, in squared logits, that defines the scale of a label whose logits are all the same.
MIN_LOGIT_VARIANCE = 1e-3

MAX_NEWTON_STEPS = 50
NEWTON_TOLERANCE = 1e-12
MAX_HALVINGS = 30

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
    by penalised Newton steps. First one line for all labels, pulled toward the identity; then lines
    whose scale and shift are linear in the label's log-odds, pulled toward that one by
    `RATE_STRENGTH`; then one line a label, pulled toward its line of the second fit. The first and
    the last pull have `SHRINKAGE_STRENGTH`.

    The second fit is for rare labels. A penalty in training, or few steps, keep their logits too
    near the common value, more so the rarer they are, and they have too few positives to show it.
    On ten systems of 500 to 8,000 documents, fitted on 400 to 2,000 others, log-loss fell by 1.2 %,
    and macro-F1 by overall_f1 rose from 0.551 to 0.560 in the mean.

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
    rates = log_odds(labels.sum(axis=0), len(labels))
    return _fit(everything, of_labels, len(logits), rates, log_weights, mode)


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
    rates = log_odds(histograms.support, histograms.documents[0].sum())
    return _fit(everything, of_labels, NUM_BINS // BINS_PER_GROUP, rates, log_weights, mode)


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
    rates: np.ndarray,
    log_weights: np.ndarray,
    mode: str,
) -> Calibration:
    """The lines of a mode; `rates`, float64 [L], are the labels' log-odds."""
    assert mode in ("labels", "global", "none"), mode
    num_labels = len(log_weights)
    scale, shift = np.ones(num_labels), np.zeros(num_labels)
    if mode != "none" and num_rows:
        pooled = _fit_lines(everything, np.ones(1), np.zeros(1))
        scale[:], shift[:] = pooled[0][0], pooled[1][0]
        if mode == "labels":
            size = max(1, BLOCK_ELEMENTS // num_rows)
            blocks = [slice(start, start + size) for start in range(0, num_labels, size)]
            samples = [(block, of_labels(block)) for block in blocks]
            scale, shift = _fit_lines_of_rates(samples, rates, scale, shift)
            for block, sample in samples:
                scale[block], shift[block] = _fit_lines(sample, scale[block], shift[block])
    return Calibration(scale, shift - scale * log_weights)


# Labels with what their lines are fitted to.
_Samples = Sequence[tuple[slice, _Sample]]


def _fit_lines_of_rates(
    samples: _Samples, rates: np.ndarray, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The line of each label as its rate predicts it, from one `scale` and `shift` [L] for all.

    Logistic regression of all labels' positives on x, the standardised rate and their product, with
    `scale` x + `shift` as offset and a pull of `RATE_STRENGTH` toward it, by Newton steps.
    """
    model = _LinesOfRates.of(samples, rates, scale, shift)
    change = np.zeros((2, 2))
    value, gradient, hessian = model.measure(change)
    for _ in range(MAX_NEWTON_STEPS):
        step = -np.linalg.solve(hessian, gradient.ravel()).reshape(2, 2)
        if -(step * gradient).sum() <= NEWTON_TOLERANCE * (1 + value):
            break
        for _ in range(MAX_HALVINGS):
            found = model.measure(change + step)
            if found[0] <= value:
                break
            step = step / 2
        else:
            break
        change, (value, gradient, hessian) = change + step, found
    slopes, heights = model.lines(change)
    bounded = np.maximum(slopes, MIN_SCALE)
    # A line that is turned keeps its height at the centre.
    return bounded, heights + (slopes - bounded) * model.centre


@dataclass(frozen=True)
class _LinesOfRates:
    """One line for all labels, `scale` x + `shift` [L], and what rates change in it.

    A change is [2, 2]: in the slope, and in the height at the centre of information; in the units
    of `features`, [2, L], which are 1 and the standardised rate. `penalty` is of a change.
    """

    samples: _Samples
    features: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    centre: float
    penalty: np.ndarray

    @classmethod
    def of(
        cls, samples: _Samples, rates: np.ndarray, scale: np.ndarray, shift: np.ndarray
    ) -> "_LinesOfRates":
        features = np.stack([np.ones_like(rates), (rates - rates.mean()) / (rates.std() or 1.0)])
        sums = np.zeros(3)
        for block, sample in samples:
            weight = sample.documents * _variance(scale[block] * sample.x + shift[block])
            sums += [(weight * sample.x**power).sum() for power in range(3)]
        mean, mean_square = sums[1:] / max(sums[0], 1e-300)
        variance = max(mean_square - mean**2, 0.0) + MIN_LOGIT_VARIANCE
        penalty = RATE_STRENGTH * np.array([[variance] * 2, [1.0] * 2])
        return cls(samples, features, scale, shift, float(mean), penalty)

    def lines(self, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The labels' scales and shifts, float64 [L]."""
        slope, height = change @ self.features
        return self.scale + slope, self.shift + height - slope * self.centre

    def measure(self, change: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Cross-entropy and penalty at a change, with gradient [2, 2] and Hessian [4, 4]."""
        scale, shift = self.lines(change)
        value = 0.5 * float((self.penalty * change**2).sum())
        gradients, curvatures = np.zeros((2, len(scale))), np.zeros((2, 2, len(scale)))
        for block, sample in self.samples:
            logits, x = scale[block] * sample.x + shift[block], sample.x - self.centre
            value += float(_cross_entropy(logits, sample).sum())
            residual = sample.documents * sigmoid(logits) - sample.positives
            gradients[:, block] = (residual * x).sum(axis=0), residual.sum(axis=0)
            curvature = sample.documents * _variance(logits)
            both = (curvature * x).sum(axis=0)
            square = (curvature * x**2).sum(axis=0)
            curvatures[:, :, block] = [[square, both], [both, curvature.sum(axis=0)]]
        gradient = gradients @ self.features.T + self.penalty * change
        hessian = np.einsum("abl,il,jl->aibj", curvatures, self.features, self.features)
        return value, gradient, hessian.reshape(4, 4) + np.diag(self.penalty.ravel())


def _fit_lines(
    sample: _Sample, prior_scale: np.ndarray, prior_shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Penalised logistic regression of positives on x: each column's scale and shift, float64 [B].

    Minimises cross-entropy + strength / 2 x (d_b^2 + s^2 d_a^2), where d_b and d_a are the
    differences from the column's prior line, in height at the column's centre of information and in
    slope, and s^2 is the variance of x about that centre: the same pull in every direction, in the
    column's own information. The prior lines are float64 [B].
    """
    x = sample.x
    information = sample.documents * _variance(prior_scale * x + prior_shift)
    total = np.maximum(information.sum(axis=0), 1e-300)
    centre = (information * x).sum(axis=0) / total
    x = x - centre
    variance = (information * x**2).sum(axis=0) / total
    penalty = SHRINKAGE_STRENGTH * np.stack([variance + MIN_LOGIT_VARIANCE, np.ones_like(variance)])
    prior = np.stack([prior_scale, prior_scale * centre + prior_shift])

    centred = _Sample(x, sample.positives, sample.documents)
    line = _minimise(centred, prior, penalty, fix_scale=np.zeros(len(centre), bool))
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
        for _ in range(MAX_HALVINGS):
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
