"""Thresholds are the exact optima, for every target."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from sklearn import metrics as peer

from trainer.evaluation.ranking import rank_cuts
from trainer.evaluation.thresholds import ThresholdRule, fit_thresholds


def best_f1_by_search(scores, positive):
    """The highest F1 over every cut there is, by scikit-learn."""
    return max(peer.f1_score(positive, scores >= cut, zero_division=0) for cut in np.unique(scores))


@settings(deadline=None, max_examples=150)
@given(
    st_numpy.arrays(np.float64, (25, 2), elements=st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.9, 1.0])),
    st_numpy.arrays(bool, (25, 2)),
)
def test_thresholds_reach_the_best_f1_there_is(scores, truth):
    thresholds = fit_thresholds(scores, truth, ThresholdRule(min_support=3))
    pooled = best_f1_by_search(scores.ravel(), truth.ravel()) if truth.any() else None
    for k in range(2):
        predicted = scores[:, k] >= thresholds[k]
        if truth[:, k].sum() >= 3:
            f1 = peer.f1_score(truth[:, k], predicted, zero_division=0)
            assert f1 == pytest.approx(best_f1_by_search(scores[:, k], truth[:, k]))
            # A midpoint: as far from the lowest score above it as from the highest below.
            above = scores[:, k][predicted].min()
            below = scores[:, k][~predicted].max(initial=0.0)
            assert thresholds[k] == pytest.approx((above + below) / 2)
        elif pooled is None:
            assert np.isnan(thresholds[k])
        else:
            everywhere = scores.ravel() >= thresholds[k]
            assert peer.f1_score(truth.ravel(), everywhere) == pytest.approx(pooled)


@settings(deadline=None, max_examples=50)
@given(st.floats(2.0**-100, 1.0, width=32), st.integers(1, 3))
def test_neighbouring_floats_are_told_apart(value, steps):
    """A threshold between scores without room between them still parts them."""
    below = np.float32(value)
    above = below
    for _ in range(steps):
        above = np.nextafter(above, np.float32(2), dtype=np.float32)
    for dtype in (np.float32, np.float64):
        scores = np.array([[below], [above]], dtype)
        if dtype is np.float64:
            scores[1] = np.nextafter(scores[0], 2)
        threshold = fit_thresholds(
            scores, np.array([[False], [True]]), ThresholdRule(min_support=1)
        )
        assert (scores >= threshold).ravel().tolist() == [False, True]


def reached(scores, positive, threshold):
    """Precision and recall of a threshold, 0 for 0/0."""
    predicted = scores >= threshold
    right = np.sum(predicted & positive)
    return right / max(predicted.sum(), 1), right / max(positive.sum(), 1)


@settings(deadline=None, max_examples=150)
@given(
    st_numpy.arrays(np.float64, (20, 2), elements=st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.9, 1.0])),
    st_numpy.arrays(bool, (20, 2)),
    st.sampled_from([0.3, 0.5, 0.7, 1.0]),
    st.booleans(),
)
def test_targets_take_all_that_they_leave_free(scores, truth, level, is_global):
    """Of all cuts with the precision, the largest recall, and the other way round; else none."""
    if is_global:
        lists = [(scores.ravel(), truth.ravel())] * 2
    else:
        lists = [(scores[:, k], truth[:, k]) for k in range(2)]
    for kind, own, free in (("precision", 0, 1), ("recall", 1, 0)):
        thresholds = fit_thresholds(scores, truth, ThresholdRule(kind, level, 1, is_global))
        for k, (mine, positive) in enumerate(lists):
            if not positive.any():
                continue
            all_cuts = [reached(mine, positive, cut) for cut in np.unique(mine)]
            meeting = [values[free] for values in all_cuts if values[own] >= level]
            if not meeting:
                assert np.isnan(thresholds[k])
                continue
            found = reached(mine, positive, thresholds[k])
            assert found[own] >= level
            assert found[free] == max(meeting)


def test_rare_labels_take_the_global_cut_for_the_same_target():
    """Two positives among 100 are too few for a cut of their own."""
    random = np.random.default_rng(0)
    truth = np.stack([np.arange(100) < 40, np.arange(100) < 2], axis=1)
    scores = random.random((100, 2)) * 0.5 + 0.4 * truth
    rule = ThresholdRule("precision", 0.8, 10)
    thresholds = fit_thresholds(scores, truth, rule)
    everywhere = fit_thresholds(scores, truth, replace(rule, is_global=True))
    assert everywhere[0] == everywhere[1] == thresholds[1] != thresholds[0]
    right, count = np.sum(truth & (scores >= everywhere)), np.sum(scores >= everywhere)
    assert right / count >= 0.8


def test_out_of_reach_is_never_predicted():
    """The highest score is a negative's, so that no cut is precise; recall is always in reach."""
    scores, truth = np.array([[0.9], [0.8], [0.7]]), np.array([[False], [True], [True]])
    assert np.isnan(fit_thresholds(scores, truth, ThresholdRule("precision", 0.9, 1)))[0]
    assert fit_thresholds(scores, truth, ThresholdRule("precision", 0.6, 1))[0] == pytest.approx(
        0.35
    )
    assert fit_thresholds(scores, truth, ThresholdRule("recall", 0.5, 1))[0] == pytest.approx(0.35)
    assert fit_thresholds(scores, truth, ThresholdRule("recall", 1.0, 1))[0] == pytest.approx(0.35)
    assert np.isnan(fit_thresholds(scores, ~truth & False, ThresholdRule(min_support=1))).all()


def test_blocks_of_labels_do_not_change_thresholds(monkeypatch):
    random = np.random.default_rng(4)
    scores, truth = random.random((50, 9)), random.random((50, 9)) < 0.4
    whole = fit_thresholds(scores, truth)
    monkeypatch.setattr("trainer.evaluation.ranking.BLOCK_CELLS", 100)
    np.testing.assert_array_equal(fit_thresholds(scores, truth), whole)


def test_cuts_count_ties_as_one():
    cuts = rank_cuts(np.array([0.5, 0.9, 0.5, 0.1]), np.array([True, True, False, False]))
    assert cuts.scores.tolist() == [0.9, 0.5, 0.1]
    assert cuts.predicted.tolist() == [1, 3, 4]
    assert cuts.true_positives.tolist() == [1, 2, 2]
    assert cuts.positives == 2
