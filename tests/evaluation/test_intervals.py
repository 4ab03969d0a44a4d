"""Resampled metrics are those of the documents drawn; intervals are as wide as they should be."""

import numpy as np
import pytest

from trainer.evaluation.intervals import (
    _metrics_of,
    _rank,
    confidence_intervals,
    count_resamples,
    resample_metrics,
)
from trainer.evaluation.metrics import compute_metrics, is_counted

INTERVALS = (
    "micro_f1",
    "macro_f1",
    "mean_average_precision",
    "macro_roc_auc",
    "expected_calibration_error",
)


def draw(num_documents, seed):
    """Calibrated probabilities on a grid (ties), labels and thresholds of five labels."""
    random = np.random.default_rng(seed)
    base = np.array([-2.5, -1.5, -1.0, -0.5, 0.0])
    log_odds = base + random.normal(0, 1.5, (num_documents, 5))
    probabilities = np.round(1 / (1 + np.exp(-log_odds)), 2)
    return probabilities, random.random(log_odds.shape) < probabilities, np.full(5, 0.4)


def test_resampled_metrics_are_those_of_the_documents_drawn():
    probabilities, labels, thresholds = draw(80, 0)
    labels[:, 0] = np.arange(80) == 3  # Some resamples leave label 0 without positives.
    thresholds[1] = np.nan
    random = np.random.default_rng(1)
    drawn = random.integers(0, 80, (80, 12))
    counts = np.stack([np.bincount(column, minlength=80) for column in drawn.T], axis=1)
    predicted = probabilities >= thresholds
    found = _metrics_of(
        [_rank(p, y) for p, y in zip(probabilities.T, labels.T, strict=True)],
        np.stack([predicted & labels, predicted, labels]).astype(np.float32),
        is_counted(labels.mean(axis=0)),
        counts.astype(np.int32),
    )
    for index, documents in enumerate(drawn.T):
        expected = compute_metrics(probabilities[documents], labels[documents], thresholds)
        for name in ("micro_f1", "macro_f1", "mean_average_precision", "macro_roc_auc"):
            assert found[name][index] == pytest.approx(expected[name], abs=1e-6), name
    # With every document drawn once, all are what they are, the calibration error among them.
    once = resample_of_all(probabilities, labels, thresholds)
    expected = compute_metrics(probabilities, labels, thresholds)
    assert tuple(once) == INTERVALS
    for name in INTERVALS:
        assert once[name][0] == pytest.approx(expected[name], abs=1e-6), name


def resample_of_all(probabilities, labels, thresholds):
    predicted = probabilities >= thresholds
    return _metrics_of(
        [_rank(p, y) for p, y in zip(probabilities.T, labels.T, strict=True)],
        np.stack([predicted & labels, predicted, labels]).astype(np.float32),
        is_counted(labels.mean(axis=0)),
        np.ones((len(labels), 1), np.int32),
    )


def test_intervals_are_as_wide_as_the_spread_over_other_documents():
    """Half an interval is 1.96 standard deviations of the metric over new samples of documents."""
    values = {name: [] for name in INTERVALS}
    for seed in range(100, 180):
        metrics = compute_metrics(*draw(400, seed))
        for name in INTERVALS:
            values[name].append(metrics[name])
    case = draw(400, 7)
    resampled = resample_metrics(*case, num_resamples=400)
    intervals = confidence_intervals(compute_metrics(*case), resampled, 400, 400)
    for name, (low, high) in intervals.items():
        expected = 1.96 * np.std(values[name])
        assert (high - low) / 2 == pytest.approx(expected, rel=0.35), name


def test_a_sample_gives_the_intervals_of_all_documents():
    """100 of 400 documents: half as wide, around the value of all."""
    value, draws = {"micro_f1": 0.6}, {"micro_f1": np.linspace(0.3, 0.5, 1001)}
    ((low, high),) = confidence_intervals(value, draws, 100, 400).values()
    assert (low, high) == pytest.approx((0.6 - 0.095 / 2, 0.6 + 0.095 / 2))
    ((low, high),) = confidence_intervals(value, draws, 400, 400).values()
    assert (low, high) == pytest.approx((0.6 - 0.095, 0.6 + 0.095))


def test_undefined_metrics_have_no_interval():
    nothing = {"macro_roc_auc": np.full(10, np.nan)}
    (interval,) = confidence_intervals({"macro_roc_auc": np.nan}, nothing, 5, 5).values()
    assert np.isnan(interval).all()


def test_resamples_are_repeatable_and_fewer_for_more_documents(monkeypatch):
    case = draw(60, 3)
    first = resample_metrics(*case, num_resamples=50)
    second = resample_metrics(*case, num_resamples=50)
    for name, values in first.items():
        assert len(values) == 50
        np.testing.assert_array_equal(values, second[name])
    counts = [count_resamples(1000, *shape) for shape in ((1000, 35), (20_000, 100), (10**6, 50))]
    assert counts == [1000, 200, 100]
    assert count_resamples(0, 1000, 35) == 0
