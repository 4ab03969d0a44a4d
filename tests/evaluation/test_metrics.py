"""Metrics against scikit-learn under our conventions, on random cases full of ties."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from sklearn import metrics as peer

from trainer.evaluation.cuts import average_precision, rank_cuts, roc_auc
from trainer.evaluation.metrics import calibration_error, compute_metrics, warn_if_constant


@st.composite
def splits(draw):
    """Probabilities on a coarse grid (many ties), labels with empty and full columns, thresholds
    on the grid too, some NaN."""
    documents, labels = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    levels = draw(st.sampled_from([1, 2, 7, 1000]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    grid = draw(st_numpy.arrays(np.int64, (documents, labels), elements=st.integers(0, levels)))
    truth = draw(st_numpy.arrays(bool, (documents, labels)))
    for column in range(labels):
        kind = draw(st.sampled_from(["mixed", "mixed", "mixed", "empty", "full"]))
        if kind != "mixed":
            truth[:, column] = kind == "full"
    cuts = draw(st_numpy.arrays(np.int64, labels, elements=st.integers(-1, levels)))
    probabilities = (grid / levels).astype(dtype)
    thresholds = np.where(cuts < 0, np.nan, (cuts / levels).astype(dtype))
    return probabilities, truth, thresholds


def mean_or_nan(values):
    return np.mean(values) if len(values) else math.nan


def same(value, expected):
    return value == pytest.approx(expected, abs=1e-6, nan_ok=True)


@settings(deadline=None, max_examples=200)
@given(splits())
def test_equal_to_scikit_learn(split):
    probabilities, truth, thresholds = split
    result = compute_metrics(probabilities, truth, thresholds)
    predicted = probabilities >= thresholds
    for average in ("micro", "macro"):
        expected = peer.precision_recall_fscore_support(
            truth.reshape(len(truth), -1).astype(int) if truth.shape[1] > 1 else _pair(truth),
            predicted.astype(int) if truth.shape[1] > 1 else _pair(predicted),
            labels=None if truth.shape[1] > 1 else [0],
            average=average,
            zero_division=0,
        )
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert same(result[f"{average}_{name}"], value), (average, name)

    with_positives = [k for k in range(truth.shape[1]) if truth[:, k].any()]
    two_classes = [k for k in with_positives if not truth[:, k].all()]
    precisions = [peer.average_precision_score(truth[:, k], probabilities[:, k])
                  for k in with_positives]  # fmt: skip
    areas = [peer.roc_auc_score(truth[:, k], probabilities[:, k]) for k in two_classes]
    assert same(result["mean_average_precision"], mean_or_nan(precisions))
    assert same(result["macro_roc_auc"], mean_or_nan(areas))
    assert result["labels_without_positives"] == truth.shape[1] - len(with_positives)
    assert result["labels_of_one_class"] == truth.shape[1] - len(two_classes)
    np.testing.assert_allclose(
        result["per_label"]["average_precision"][with_positives], precisions, atol=1e-6
    )
    if truth.any():
        micro = peer.average_precision_score(truth, probabilities, average="micro")
        assert same(result["micro_average_precision"], micro)
    else:
        assert math.isnan(result["micro_average_precision"])


def _pair(column):
    """One label as two, so that scikit-learn sees multi-label data; only label 0 counts."""
    return np.hstack([column, np.zeros_like(column)]).astype(int)


@settings(deadline=None, max_examples=80)
@given(splits())
def test_weighted_means_and_probabilities_equal_scikit_learn(split):
    probabilities, truth, thresholds = split
    probabilities = probabilities.astype(np.float64)
    result = compute_metrics(probabilities, truth, thresholds)
    columns = range(truth.shape[1])
    expected = peer.precision_recall_fscore_support(
        np.hstack([truth, np.zeros_like(truth)]).astype(int),
        np.hstack([probabilities >= thresholds, np.zeros_like(truth)]).astype(int),
        average="weighted",
        zero_division=0,
    )
    for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert same(result[f"weighted_{name}"], value), name

    two_classes = [k for k in columns if 0 < truth[:, k].sum() < len(truth)]
    areas = [peer.roc_auc_score(truth[:, k], probabilities[:, k]) for k in two_classes]
    weights = truth.sum(axis=0)
    expected = np.average(areas, weights=weights[two_classes]) if two_classes else math.nan
    assert same(result["weighted_roc_auc"], expected)
    if truth.any():
        present = truth.any(axis=0)
        precision = [peer.average_precision_score(truth[:, k], probabilities[:, k])
                     for k in np.flatnonzero(present)]  # fmt: skip
        expected = np.average(precision, weights=weights[present])
        assert same(result["weighted_average_precision"], expected)
    if 0 < truth.sum() < truth.size:
        expected = peer.roc_auc_score(truth.ravel(), probabilities.ravel())
        assert same(result["micro_roc_auc"], expected)

    scores = [np.mean((probabilities[:, k] - truth[:, k]) ** 2) for k in columns]
    losses = [peer.log_loss(truth[:, k], probabilities[:, k], labels=[0, 1]) for k in columns]
    briers = [peer.brier_score_loss(truth[:, k], probabilities[:, k], pos_label=True)
              for k in two_classes]  # fmt: skip
    np.testing.assert_allclose(result["per_label"]["brier_score"], scores, atol=1e-9)
    np.testing.assert_allclose(result["per_label"]["brier_score"][two_classes], briers, atol=1e-9)
    np.testing.assert_allclose(result["per_label"]["log_loss"], losses, atol=1e-6)
    assert same(result["brier_score"], np.mean(scores))
    assert same(result["log_loss"], np.mean(losses))


@settings(deadline=None, max_examples=80)
@given(splits())
def test_metrics_of_documents_equal_scikit_learn(split):
    probabilities, truth, thresholds = split
    result = compute_metrics(probabilities, truth, thresholds)
    predicted = (probabilities >= thresholds).astype(int)
    expected = np.mean((predicted == truth).all(axis=1))
    assert same(result["subset_accuracy"], expected)
    assert same(result["hamming_loss"], peer.hamming_loss(truth.ravel(), predicted.ravel()))
    for k in (1, 3, 5):
        assert same(result[f"precision_at_{k}"], precision_at(k, probabilities, truth)), k
    if truth.shape[1] == 1:
        return
    assert same(result["subset_accuracy"], peer.accuracy_score(truth.astype(int), predicted))
    expected = peer.precision_recall_fscore_support(
        truth.astype(int), predicted, average="samples", zero_division=0
    )
    for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert same(result[f"samples_{name}"], value), name
    for k in (1, 3, 5):
        assert same(result[f"ndcg_at_{k}"], peer.ndcg_score(truth, probabilities, k=k)), k
    expected = peer.label_ranking_average_precision_score(truth, probabilities)
    assert same(result["label_ranking_average_precision"], expected)


def precision_at(k, probabilities, truth):
    """Each label's chance to be among its document's k highest, ties in all orders, in float64."""
    values = []
    for scores, labels in zip(probabilities, truth, strict=True):
        chances = [
            np.clip((k - np.sum(scores > score)) / np.sum(scores == score), 0, 1)
            for score in scores
        ]
        values.append(np.sum(np.array(chances) * labels) / k)
    return np.mean(values)


@settings(deadline=None, max_examples=100)
@given(splits())
def test_calibration_error_equals_its_formula(split):
    """Bins of equal mass begin at ranks k N / 10, or where the score there first occurs."""
    probabilities, truth, thresholds = split
    result = compute_metrics(probabilities, truth, thresholds)["per_label"]
    for k in range(truth.shape[1]):
        scores = [float(score) for score in probabilities[:, k]]
        ranked = sorted(scores)
        starts = sorted({ranked.index(ranked[i * len(ranked) // 10]) for i in range(10)})
        bounds = [ranked[start] for start in starts] + [math.inf]
        total = 0.0
        for low, high in zip(bounds, bounds[1:], strict=False):
            inside = [i for i, score in enumerate(scores) if low <= score < high]
            total += abs(sum(scores[i] - truth[i, k] for i in inside))
        assert same(result["expected_calibration_error"][k], total / len(scores))


@settings(deadline=None, max_examples=100)
@given(splits())
def test_per_label_equal_to_scikit_learn(split):
    probabilities, truth, thresholds = split
    table = compute_metrics(probabilities, truth, thresholds)["per_label"]
    for k in range(truth.shape[1]):
        values = peer.precision_recall_fscore_support(
            truth[:, k], probabilities[:, k] >= thresholds[k], average="binary", zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values[:3], strict=True):
            assert same(table[name][k], value), name
        assert table["support"][k] == truth[:, k].sum()


def test_large_case_equals_scikit_learn():
    random = np.random.default_rng(0)
    truth = random.random((5000, 3)) < [0.5, 0.05, 0.002]
    scores = np.round(random.random((5000, 3)) + truth * 0.3, 2).astype(np.float32)
    for k in range(3):
        cuts = rank_cuts(scores[:, k], truth[:, k])
        expected = peer.average_precision_score(truth[:, k], scores[:, k])
        assert average_precision(cuts) == pytest.approx(expected, abs=1e-9)
        expected = peer.roc_auc_score(truth[:, k], scores[:, k])
        assert roc_auc(cuts) == pytest.approx(expected, abs=1e-9)


def test_order_of_documents_does_not_matter():
    random = np.random.default_rng(1)
    probabilities = random.integers(0, 5, (200, 3)) / 5
    truth = random.random((200, 3)) < 0.3
    thresholds = np.array([0.2, 0.6, np.nan])
    order = random.permutation(200)
    first = compute_metrics(probabilities, truth, thresholds)
    second = compute_metrics(probabilities[order], truth[order], thresholds)
    first_table, second_table = first.pop("per_label"), second.pop("per_label")
    assert first == pytest.approx(second, abs=1e-12)
    for name, values in first_table.items():
        np.testing.assert_allclose(second_table[name], values, atol=1e-12, err_msg=name)


def test_calibration_error_by_hand():
    # Ten bins of two: nine are right on average, the last says 0.9 where 0 of 2 are positive.
    probabilities = np.repeat(np.linspace(0, 0.9, 10), 2)
    positive = np.zeros(20, bool)
    assert calibration_error(probabilities, positive) == pytest.approx(0.45)
    # Equal scores share a bin: 0.5 for all, half positive, is no error in whatever order.
    assert calibration_error(np.full(20, 0.5), np.arange(20) < 10) == 0
    # Ties across a would-be edge: 15 at 0.2 (3 positive), 5 at 0.8 (1 positive).
    probabilities = np.array([0.2] * 15 + [0.8] * 5)
    positive = np.array([1] * 3 + [0] * 12 + [1] + [0] * 4, bool)
    assert calibration_error(probabilities, positive) == pytest.approx(5 * 0.6 / 20)


def test_macro_calibration_error_takes_labels_of_1_to_50_percent():
    truth = np.zeros((1000, 4), bool)
    for k, count in enumerate((9, 10, 500, 501)):
        truth[:count, k] = True
    probabilities = np.tile([0.9, 0.11, 0.5, 0.9], (1000, 1))
    result = compute_metrics(probabilities, truth, np.full(4, 0.5))
    assert result["labels_in_calibration_error"] == 2
    assert result["expected_calibration_error"] == pytest.approx((0.1 + 0.0) / 2)


def test_never_predicted_label_counts_zero_in_macro_f1():
    truth = np.array([[1, 1], [0, 1]], bool)
    result = compute_metrics(np.ones((2, 2)), truth, np.array([np.nan, 0.5]))
    assert result["macro_f1"] == 0.5
    assert result["micro_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert math.isnan(result["per_label"]["threshold"][0])


def test_constant_predictions_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        assert warn_if_constant(np.array([0.04, 0.001, 0.0]), 50)
    assert "the same for every document" in caplog.text
    caplog.clear()
    # One informative label is enough, however rare; one document says nothing.
    assert not warn_if_constant(np.array([0.04, 0.001, 0.06]), 50)
    assert not warn_if_constant(np.zeros(3), 1)
    assert not caplog.text
