"""Calibration recovers known probabilities, also from what training with weights distorts."""

import numpy as np
import pytest
from scipy import optimize

from trainer.evaluation.calibration import (
    MIN_SCALE,
    RATE_STRENGTH,
    SHRINKAGE_STRENGTH,
    _fit_lines,
    _Sample,
    fit_calibration,
    sigmoid,
)
from trainer.evaluation.metrics import calibration_errors
from trainer.training.losses import positive_weights


def cross_entropy(probabilities, labels):
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-np.where(labels, np.log(p), np.log1p(-p)).mean())


@pytest.fixture(scope="module")
def weighted_world():
    """Documents with known label probabilities, and the logits of a model that learned them well
    under balanced weights but is overconfident and a little off, differently for each label."""
    random = np.random.default_rng(5)
    num_labels, documents = 40, 24_000
    base = np.linspace(-4.2, 0.0, num_labels)
    log_odds = base + random.normal(0, 1.5, (documents, num_labels))
    truth = random.random((documents, num_labels)) < sigmoid(log_odds)
    counts = truth[:8000].sum(axis=0)
    weights = positive_weights("balanced", counts, 8000, 100.0, [str(k) for k in range(num_labels)])
    scale = random.uniform(1.1, 1.5, num_labels)
    offset = random.normal(0, 0.3, num_labels)
    logits = scale * (log_odds + offset) + np.log(weights)
    return logits.astype(np.float32), truth, log_odds, weights


def test_recovers_known_probabilities_under_balanced_weights(weighted_world):
    logits, truth, log_odds, weights = weighted_world
    fit, test = slice(8000, 16_000), slice(16_000, None)
    before = calibration_errors(sigmoid(logits[test]), truth[test])[0]
    calibration = fit_calibration(logits[fit], truth[fit], weights, "labels")
    probabilities = calibration.probabilities(logits[test])
    after, _, counted = calibration_errors(probabilities, truth[test])
    assert counted >= 35
    assert before > 0.10
    assert after <= 0.02
    best = cross_entropy(sigmoid(log_odds[test]), truth[test])
    assert cross_entropy(probabilities, truth[test]) <= best + 0.002
    # Predicting prevalence is calibrated, too, but tells nothing: its loss gives it away.
    prevalence = np.broadcast_to(truth[fit].mean(axis=0), truth[test].shape)
    assert calibration_errors(prevalence, truth[test])[0] <= 0.02
    assert cross_entropy(prevalence, truth[test]) > best + 0.05
    # One line for all labels, and the weights' correction alone, each leave more to correct.
    errors = [
        calibration_errors(
            fit_calibration(logits[fit], truth[fit], weights, mode).probabilities(logits[test]),
            truth[test],
        )[0]
        for mode in ("global", "none")
    ]
    assert after < errors[0] < errors[1] < before


def test_none_takes_back_exactly_the_weights():
    logits = np.array([[1.5, -2.0], [0.0, 3.0]])
    calibration = fit_calibration(logits, logits > 0, np.array([1.0, 8.0]), "none")
    np.testing.assert_array_equal(calibration.scale, [1, 1])
    np.testing.assert_allclose(calibration.shift, [0, -np.log(8)])
    # Weight 8 turns the odds 1 : 4 into 2 : 1; the correction gives 1 : 4 back.
    p = calibration.probabilities(np.log([[1.0, 2.0]]))
    np.testing.assert_allclose(p, [[0.5, 0.2]])


def lines_of_rates(x, truth, scale, shift):
    """Scale and shift [L, 2] that the labels' log-odds predict, by scipy on the documented sums."""
    counts = truth.sum(axis=0)
    rates = np.log((counts + 0.5) / (len(x) - counts + 0.5))
    rates = (rates - rates.mean()) / rates.std()
    p = sigmoid(scale * x + shift)
    centre = np.average(x, weights=p * (1 - p))
    variance = np.average((x - centre) ** 2, weights=p * (1 - p)) + 1e-3

    def lines(change):
        slope, height = change[0] + change[1] * rates, change[2] + change[3] * rates
        return scale + slope, shift + height - slope * centre

    def objective(change):
        slopes, heights = lines(change)
        z = slopes * x + heights
        pull = (change**2 * [variance, variance, 1, 1]).sum()
        return np.logaddexp(0, np.where(truth, -z, z)).sum() + RATE_STRENGTH / 2 * pull

    best = optimize.minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-7})
    slopes, heights = lines(best.x)
    bounded = np.maximum(slopes, MIN_SCALE)
    return np.stack([bounded, heights + (slopes - bounded) * centre], axis=1)


def test_fit_is_the_minimum_of_its_objective():
    """Against scipy on the documented objective, for a common, a rare and a backward label."""
    random = np.random.default_rng(8)
    x = random.normal(-1.0, 2.0, (600, 3))
    slopes = np.array([0.7, 2.0, -1.0])
    truth = random.random((600, 3)) < sigmoid(slopes * x - np.array([0.0, 7.0, 1.0]))
    calibration = fit_calibration(x, truth, np.ones(3), "labels")
    pooled = fit_calibration(x, truth, np.ones(3), "global")
    predicted = lines_of_rates(x, truth, pooled.scale[0], pooled.shift[0])
    for k, (a0, b0) in enumerate(predicted):
        p = sigmoid(a0 * x[:, k] + b0)
        centre = np.average(x[:, k], weights=p * (1 - p))
        spread = np.average((x[:, k] - centre) ** 2, weights=p * (1 - p)) + 1e-3

        def objective(line, k=k, a0=a0, b0=b0, centre=centre, spread=spread):
            z = line[0] * x[:, k] + line[1]
            data = np.logaddexp(0, np.where(truth[:, k], -z, z)).sum()
            height = (line[0] - a0) * centre + line[1] - b0
            return data + SHRINKAGE_STRENGTH / 2 * (height**2 + spread * (line[0] - a0) ** 2)

        best = optimize.minimize(
            objective, [a0, b0], bounds=[(MIN_SCALE, None), (None, None)], method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        ours = np.array([calibration.scale[k], calibration.shift[k]])
        np.testing.assert_allclose(ours, best.x, atol=2e-4)
        assert objective(ours) <= best.fun + 1e-7
    assert calibration.scale[2] == pytest.approx(MIN_SCALE)


def test_shrinkage_moves_labels_by_their_information():
    """Labels whose predicted odds are twice too low or too high: of about 20 positives each they
    go about half the way back, of 440 nearly all of it."""
    random = np.random.default_rng(9)
    base = np.repeat([-8.1, -5.0], [20, 10])
    off = np.resize([np.log(2), -np.log(2)], len(base))
    log_odds = base + random.normal(0, 1, (40_000, len(base)))
    truth = random.random(log_odds.shape) < sigmoid(log_odds)
    scale, shift = _fit_lines(_Sample(log_odds - off, truth, 1.0), np.ones(30), np.zeros(30))
    # Where the positives of a rare label are: one variance above its mean.
    centre = base - off + 1
    moved = scale * centre + shift - centre
    # The roots d of predicted x exp(d) - observed + 20 d = 0.
    for mean, sign, expected in (
        (-8.1, 1, 0.32),
        (-8.1, -1, -0.37),
        (-5, 1, 0.66),
        (-5, -1, -0.67),
    ):
        group = (base == mean) & (np.sign(off) == sign)
        assert moved[group].mean() == pytest.approx(expected, abs=0.1), (mean, sign)


def test_rare_labels_learn_from_their_frequency():
    """Logits that keep less of the log-odds' spread the rarer the label, 400 documents to fit: the
    rarest have two positives or so, and still most of the error of one line for all goes."""
    random = np.random.default_rng(11)
    base = np.linspace(-7.0, -1.0, 60)
    log_odds = base + random.normal(0, 3.0, (20_400, 60))
    truth = random.random(log_odds.shape) < sigmoid(log_odds)
    kept = np.linspace(0.3, 1.0, 60)
    logits = base + kept * (log_odds - base)
    fit, test = slice(0, 400), slice(400, None)
    best = cross_entropy(sigmoid(log_odds[test, :20]), truth[test, :20])

    def excess(mode):
        calibration = fit_calibration(logits[fit], truth[fit], np.ones(60), mode)
        probabilities = calibration.probabilities(logits[test])[:, :20]
        return cross_entropy(probabilities, truth[test, :20]) / best - 1

    assert 0.4 < excess("global")
    assert excess("labels") < 0.10


@pytest.mark.parametrize(
    "logits, truth",
    [
        (np.zeros((50, 2)), np.zeros((50, 2), bool)),
        (np.full((50, 2), 30.0), np.ones((50, 2), bool)),
        (np.full((50, 2), -300.0), np.ones((50, 2), bool)),
        (np.linspace(-5, 5, 100).reshape(50, 2), np.linspace(-5, 5, 100).reshape(50, 2) > 0),
        (np.zeros((0, 2)), np.zeros((0, 2), bool)),
    ],
)
def test_degenerate_splits_give_finite_positive_scales(logits, truth):
    with np.errstate(all="raise", under="ignore"):
        calibration = fit_calibration(logits, truth, np.array([1.0, 50.0]), "labels")
    assert np.all(calibration.scale > 0) and np.all(np.isfinite(calibration.scale))
    assert np.all(np.isfinite(calibration.shift))


def test_blocks_do_not_change_the_fit(weighted_world, monkeypatch):
    logits, truth, _, weights = weighted_world
    whole = fit_calibration(logits[:1000], truth[:1000], weights, "labels")
    monkeypatch.setattr("trainer.evaluation.calibration.BLOCK_ELEMENTS", 3000)
    blocks = fit_calibration(logits[:1000], truth[:1000], weights, "labels")
    np.testing.assert_allclose(blocks.scale, whole.scale, rtol=1e-5)
    np.testing.assert_allclose(blocks.shift, whole.shift, rtol=1e-5, atol=1e-5)
