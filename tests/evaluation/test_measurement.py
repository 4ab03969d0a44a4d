"""Streamed metrics against exact ones: what is counted is equal, what is binned within bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation import measurement
from trainer.evaluation.calibration import (
    Calibration,
    fit_binned_calibration,
    fit_calibration,
    sigmoid,
)
from trainer.evaluation.cuts import (
    BIN_WIDTH,
    NUM_BINS,
    Histograms,
    average_precision,
    bin_indices,
    bound_average_precision,
    bound_roc_auc,
    rank_labels,
    roc_auc,
)
from trainer.evaluation.measurement import (
    ExactMeasurement,
    Predictions,
    StreamedMeasurement,
    fits_exactly,
)
from trainer.evaluation.thresholds import ThresholdRule, fit_binned_thresholds, fit_thresholds


def predictions_of(logits, labels):
    names = [f"d{number}" for number in range(len(logits))]
    slices = np.full((len(logits), 0), "", object)
    return Predictions(names, np.arange(len(logits)), logits, labels, slices)


@pytest.fixture(scope="module")
def world():
    """Logits of 6,000 documents and 12 labels, one of them absent, after weights of up to 30."""
    random = np.random.default_rng(3)
    base = np.linspace(-5, 0.5, 12)
    log_odds = base + random.normal(0, 1.7, (6000, 12))
    labels = random.random(log_odds.shape) < sigmoid(log_odds)
    labels[:, 3] = False
    weights = np.linspace(30, 1, 12)
    logits = (0.8 * log_odds + np.log(weights) + random.normal(0, 0.3, log_odds.shape)).astype(
        np.float32
    )
    logits[0] = [40, -40] * 6
    return logits, labels, np.log(weights)


@pytest.fixture(scope="module")
def measured(world):
    """The same documents, calibration and thresholds, measured in both ways."""
    logits, labels, log_weights = world
    calibration = fit_calibration(logits, labels, np.exp(log_weights), "labels")
    thresholds = fit_thresholds(calibration.probabilities(logits), labels)
    exact = ExactMeasurement(calibration, thresholds)
    streamed = StreamedMeasurement(len(logits), log_weights, calibration, thresholds)
    documents = predictions_of(logits, labels)
    order = np.random.default_rng(0).permutation(len(logits))
    for part in np.array_split(order, 7):
        exact.add(documents.chosen(part))
        streamed.add(documents.chosen(part))
    return exact.result(), streamed.result()


def test_streamed_metrics_are_within_their_bounds(measured):
    exact, streamed = (result.metrics for result in measured)
    bounds = streamed["error_bounds"]
    binned = [name for name in exact if "average_precision" in name or "roc_auc" in name]
    binned += [name for name in exact if name.startswith(("brier", "log_loss", "expected"))]
    binned.remove("label_ranking_average_precision")
    assert sorted(bounds) == sorted(binned) and len(bounds) == 12
    for name, bound in bounds.items():
        assert abs(streamed[name] - exact[name]) <= bound + 1e-9, name
        # Useful, too: a hundredth of a scale from 0 to 1.
        assert 0 < bound < 0.01, name
    for name in ("average_precision", "roc_auc"):
        off = np.abs(streamed["per_label"][name] - exact["per_label"][name])
        bound = streamed["per_label"][f"{name}_bound"]
        np.testing.assert_array_equal(np.isnan(off), np.isnan(bound))
        assert np.all(np.nan_to_num(off - bound, nan=-1) <= 1e-9)


def test_everything_else_is_exact(measured):
    exact, streamed = (result.metrics for result in measured)
    for name in set(exact) - set(streamed["error_bounds"]) - {"per_label"}:
        assert streamed[name] == pytest.approx(exact[name], abs=1e-12), name
    for name in ("support", "predicted", "precision", "recall", "f1"):
        np.testing.assert_array_equal(streamed["per_label"][name], exact["per_label"][name])


def test_a_sample_stands_for_a_split_that_does_not_fit(world, monkeypatch):
    logits, labels, log_weights = world
    monkeypatch.setattr("trainer.evaluation.measurement.SAMPLE_CELLS", 600 * 12)
    calibration = Calibration(np.ones(12), -log_weights)
    documents = predictions_of(logits, labels)
    samples = []
    for pieces in (3, 11):
        streamed = StreamedMeasurement(len(logits), log_weights, calibration, np.full(12, 0.5))
        for part in np.array_split(np.arange(len(logits)), pieces):
            streamed.add(documents.chosen(part))
        samples.append(streamed.result().calibrated(calibration))
    first, second = samples
    assert len(first.ids) == 600 < first.num_documents == 6000
    # The same whatever the blocks, in the split's order, and from all over it.
    assert first.ids == second.ids == [f"d{index}" for index in first.indices]
    assert np.all(np.diff(first.indices) > 0)
    assert 200 < np.sum(first.indices < 3000) < 400
    np.testing.assert_array_equal(first.labels, labels[first.indices])
    expected = sigmoid(logits[first.indices] - log_weights)
    np.testing.assert_allclose(first.probabilities, expected, rtol=1e-6)
    np.testing.assert_allclose(first.raw_probabilities, sigmoid(logits[first.indices]), rtol=1e-6)


@st.composite
def lists_of_scores(draw):
    """Few documents and few places, so that bins hold several distinct scores and ties."""
    documents = draw(st.integers(2, 25))
    step = draw(st.sampled_from([BIN_WIDTH / 3, BIN_WIDTH, 0.3]))
    places = draw(st.lists(st.integers(-6, 6), min_size=documents, max_size=documents))
    positive = draw(st.lists(st.booleans(), min_size=documents, max_size=documents))
    offset = draw(st.sampled_from([0.0, -5.0, 35.0]))
    return np.array(places)[:, None] * step + offset, np.array(positive)[:, None]


@settings(deadline=None, max_examples=150)
@given(lists_of_scores(), st.floats(0.1, 3.0), st.floats(-2.0, 2.0))
def test_bounds_hold_where_a_bin_holds_many_scores(case, scale, shift):
    log_odds, labels = case
    histograms = Histograms.empty(1)
    histograms.add(log_odds, labels)
    cuts = histograms.cuts()
    exact = rank_labels(log_odds.T, labels.T)
    for metric, bound in (
        (average_precision, lambda cuts: bound_average_precision(cuts, average_precision(cuts))),
        (roc_auc, bound_roc_auc),
    ):
        off = np.abs(metric(cuts) - metric(exact))
        assert np.isnan(off[0]) or off[0] <= bound(cuts)[0] + 1e-9, metric
    ours, _, bounds = measurement.binned_probability_metrics(
        histograms, np.array([scale]), np.array([shift])
    )
    theirs = ExactMeasurement(Calibration(np.array([scale]), np.array([shift])), np.full(1, 0.5))
    theirs.add(predictions_of(log_odds, labels))
    metrics = theirs.result().metrics
    for name, bound in bounds.items():
        value = metrics["per_label"][name][0]
        if np.isfinite(bound):
            assert abs(ours[name] - value) <= bound + 1e-9, name


@settings(deadline=None, max_examples=100)
@given(
    lists_of_scores(),
    st.sampled_from(
        [
            ThresholdRule("f1", 0.0, 1),
            ThresholdRule("precision", 0.7, 1),
            ThresholdRule("recall", 0.6, 1),
        ]
    ),
)
def test_shortfall_of_binned_thresholds_is_bounded(case, rule):
    """What a binned threshold reaches, plus its shortfall, is at least the best of all cuts."""
    log_odds, labels = case
    histograms = Histograms.empty(1)
    histograms.add(log_odds, labels)
    one, zero = np.ones(1), np.zeros(1)
    binned = fit_binned_thresholds(histograms, one, zero, rule)
    exact = fit_thresholds(sigmoid(log_odds), labels, rule)
    if not labels.any():
        assert np.isnan(binned.probabilities[0]) and np.isnan(exact[0])
        return

    def reached(threshold):
        predicted = sigmoid(log_odds) >= threshold
        right, count = np.sum(predicted & labels), max(np.sum(predicted), 1)
        precision, recall = right / count, right / labels.sum()
        if rule.kind == "f1":
            return 2 * right / (predicted.sum() + labels.sum())
        meets = {"precision": precision, "recall": recall}[rule.kind] >= rule.level
        return (recall if rule.kind == "precision" else precision) if meets else 0.0

    ours, best = reached(binned.probabilities[0]), reached(exact[0])
    assert ours <= best + 1e-12
    assert ours + binned.shortfall[0] >= best - 1e-12
    if not np.isnan(binned.probabilities[0]):
        assert ours > 0


def test_binned_fit_is_the_exact_one_but_for_half_a_bin(world):
    logits, labels, log_weights = world
    logits, labels = logits[1:], labels[1:]  # Document 0 lies beyond the last bin.
    histograms = Histograms.empty(12)
    histograms.add(logits - log_weights, labels)
    for mode in ("labels", "global", "none"):
        exact = fit_calibration(logits, labels, np.exp(log_weights), mode)
        binned = fit_binned_calibration(histograms, log_weights, mode)
        off = np.abs(binned.probabilities(logits) - exact.probabilities(logits))
        # Half a bin is 0.002 log-odds, at most 0.0005 of a probability.
        assert off.max() < 0.0005, mode


def test_global_binned_threshold_is_nearly_the_exact_one(world):
    logits, labels, log_weights = world
    calibration = fit_calibration(logits, labels, np.exp(log_weights), "labels")
    histograms = Histograms.empty(12)
    histograms.add(logits - log_weights, labels)
    shift = calibration.shift + calibration.scale * log_weights
    probabilities = calibration.probabilities(logits)
    binned = fit_binned_thresholds(
        histograms, calibration.scale, shift, ThresholdRule(is_global=True)
    )
    assert len(set(binned.probabilities)) == 1 and np.isnan(binned.shortfall).all()

    def micro_f1(threshold):
        predicted = probabilities >= threshold
        return 2 * np.sum(predicted & labels) / (predicted.sum() + labels.sum())

    exact = fit_thresholds(probabilities, labels, ThresholdRule(is_global=True))
    assert micro_f1(exact[0]) - 0.001 <= micro_f1(binned.probabilities[0]) <= micro_f1(exact[0])
    # A rare label takes that cut, the others their own.
    some = fit_binned_thresholds(
        histograms, calibration.scale, shift, ThresholdRule(min_support=200)
    )
    rare = labels.sum(axis=0) < 200
    assert 2 <= rare.sum() <= 8
    np.testing.assert_array_equal(some.probabilities[rare], binned.probabilities[rare])
    assert np.all(some.probabilities[~rare] != binned.probabilities[0])


def test_bins_by_hand():
    scores = np.array([-100.0, -32.0, -0.001, 0.0, BIN_WIDTH, 31.999, 32.0, 1000.0])
    half = NUM_BINS // 2
    expected = [0, 0, half - 1, half, half + 1, NUM_BINS - 1, NUM_BINS - 1, NUM_BINS - 1]
    assert bin_indices(scores).tolist() == expected


def test_what_fits_is_what_the_memory_holds():
    assert fits_exactly(10_000, 35, 4.0)
    assert not fits_exactly(1_000_000, 4000, 4.0)
    assert not fits_exactly(1, 1, 0.0)
