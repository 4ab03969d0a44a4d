"""Thresholds are the exact optima for every rule, and macro- and micro-F1 are weighed up."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from sklearn import metrics as peer
from sklearn.metrics import f1_score

from trainer.evaluation.cuts import Histograms, rank_cuts, rank_labels
from trainer.evaluation.thresholds import (
    Candidates,
    ThresholdRule,
    choose_overall,
    fit_binned_thresholds,
    fit_thresholds,
    round_thresholds,
)


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
    monkeypatch.setattr("trainer.evaluation.cuts.BLOCK_CELLS", 100)
    np.testing.assert_array_equal(fit_thresholds(scores, truth), whole)


def test_cuts_count_ties_as_one():
    cuts = rank_cuts(np.array([0.5, 0.9, 0.5, 0.1]), np.array([True, True, False, False]))
    assert cuts.scores.tolist() == [0.9, 0.5, 0.1]
    assert cuts.predicted.tolist() == [1, 3, 4]
    assert cuts.true_positives.tolist() == [1, 2, 2]
    assert cuts.positives == 2


def value_of(candidates, choice, support, true_positives, predicted):
    """(macro-F1 x labels of candidates / all labels) + micro-F1, by definition."""
    found, said = candidates.true_positives[choice], candidates.predicted[choice]
    f1 = 2 * found / (said + support[candidates.labels[choice]])
    micro = 2 * (found.sum() + true_positives) / (said.sum() + predicted + support.sum())
    return f1.sum() / len(support) + micro


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_as_good_as_the_best_of_all_choices(seed):
    random = np.random.default_rng(seed)
    labels = random.random((40, 4)) < [0.15, 0.1, 0.2, 0.05]
    labels[0] = True
    # Labels of different difficulty, with ties.
    scores = np.round(labels * [3.0, 0.3, 1.0, 0.5] + random.normal(0, 1, labels.shape), 1)
    own = np.array([0, 1, 3])
    support = labels.sum(axis=0)
    cuts = rank_labels(scores[:, own].T, labels[:, own].T)
    candidates = Candidates.of_cuts(cuts, own)
    others = (int(support[2]) - 1, int(support[2]) + 5)
    chosen, _ = choose_overall(candidates, support, *others)
    places = [np.flatnonzero(candidates.labels == label) for label in own]
    assert [len(place) for place in places] <= support[own].tolist()
    every = [
        value_of(candidates, np.array(choice), support, *others)
        for choice in itertools.product(*places)
    ]
    assert candidates.labels[chosen].tolist() == own.tolist()
    assert value_of(candidates, chosen, support, *others) >= max(every) - 2e-3


def test_a_candidate_says_what_its_cut_predicts():
    scores = np.array([[0.9, 0.8, 0.8, 0.3, 0.1]])
    labels = np.array([[False, True, False, True, False]])
    cuts = rank_labels(scores, labels)
    candidates = Candidates.of_cuts(cuts, np.array([5]))
    assert candidates.labels.tolist() == [5, 5]
    assert candidates.true_positives.tolist() == [1, 2]
    assert candidates.predicted.tolist() == [3, 4]  # Ties are cut together.


def test_micro_f1_gains_more_than_macro_f1_loses():
    """One label that is known well and ten that hardly are: each one's best F1 floods micro-F1."""
    random = np.random.default_rng(1)
    rates = np.r_[0.4, np.full(10, 0.05)]
    labels = random.random((4000, 11)) < rates
    scores = labels * np.r_[4.0, np.full(10, 0.4)] + random.normal(0, 1, labels.shape)
    cuts = rank_labels(scores.T, labels.T)
    candidates = Candidates.of_cuts(cuts, np.arange(11))
    support = labels.sum(axis=0)
    f1 = 2 * candidates.true_positives / (candidates.predicted + support[candidates.labels])
    alone = np.array([np.flatnonzero(candidates.labels == i)[0] for i in range(11)])
    alone += [int(np.argmax(f1[candidates.labels == i])) for i in range(11)]
    both, _ = choose_overall(candidates, support, 0, 0)

    def measured(choice):
        predicted = scores >= candidates.scores[choice]
        return [f1_score(labels, predicted, average=kind) for kind in ("macro", "micro")]

    (macro_alone, micro_alone), (macro_both, micro_both) = measured(alone), measured(both)
    assert micro_both > micro_alone + 0.2
    assert macro_alone - 0.1 < macro_both < macro_alone


def blended_value(scores, labels, thresholds):
    """Macro- plus micro-F1 where a document counts (100 p + n y) / (100 + n), by definition."""
    counts = labels.sum(axis=0)
    truth = (100 * scores + counts * labels) / (100 + counts)
    predicted = scores >= thresholds
    right, sizes = (truth * predicted).sum(axis=0), predicted.sum(axis=0) + truth.sum(axis=0)
    return (2 * right / sizes).mean() + 2 * right.sum() / sizes.sum()


@pytest.mark.parametrize("seed", range(10))
def test_overall_f1_blends_labels_with_probabilities(seed):
    """No cut of any label has a better sum, ties and a cut that predicts nothing among them."""
    random = np.random.default_rng(seed)
    scores = np.round(random.beta(0.3, 1.5, (60, 3)), 2)
    scores[:, 2] = 0.01
    labels = random.random((60, 3)) < scores
    labels[0] = True
    thresholds = fit_thresholds(scores, labels, ThresholdRule("overall_f1", min_support=1))
    assert np.isnan(thresholds[2])
    thresholds[2] = np.inf
    every = itertools.product(*([*np.unique(column), np.inf] for column in scores.T))
    best = max(blended_value(scores, labels, np.array(choice)) for choice in every)
    # The sum is raised step by step, to a value that no step from there raises.
    assert blended_value(scores, labels, thresholds) >= best - 2e-3


def test_probabilities_help_rare_labels_on_other_documents():
    """60 labels with 3 to 12 positives among those that thresholds are fitted to."""
    random = np.random.default_rng(8)
    logits = random.normal(0, 2.0, (21_000, 60)) - np.linspace(6, 7.5, 60)
    probabilities = 1 / (1 + np.exp(-logits))
    labels = random.random(logits.shape) < probabilities
    fitted, others = slice(1000), slice(1000, None)

    def macro_f1(thresholds):
        predicted = probabilities[others] >= thresholds
        return f1_score(labels[others], predicted, average="macro", zero_division=0)

    blended, own, own_or_global = (
        macro_f1(fit_thresholds(probabilities[fitted], labels[fitted], rule))
        for rule in (
            ThresholdRule("overall_f1", min_support=1),
            ThresholdRule("f1", min_support=1),
            ThresholdRule("f1", min_support=10),
        )
    )
    assert blended > own + 0.02
    assert blended > own_or_global + 0.005


def test_labels_with_many_positives_hardly_need_their_probabilities():
    """Even where these are wrong: three times too small."""
    random = np.random.default_rng(9)
    scores = random.beta(1, 3, (20_000, 1))
    labels = random.random(scores.shape) < scores
    found, alone = (
        fit_thresholds(scores / 3, labels, ThresholdRule(kind, min_support=1))
        for kind in ("overall_f1", "f1")
    )
    values = [f1_score(labels, scores / 3 >= thresholds) for thresholds in (found, alone)]
    assert values[0] == pytest.approx(values[1], abs=2e-3)


def test_thresholds_from_histograms_reach_what_exact_ones_do():
    """And labels without enough positives take the one cut of all, here and there."""
    random = np.random.default_rng(4)
    rates = np.array([0.4, 0.1, 0.05, 0.02, 0.001])
    labels = random.random((6000, 5)) < rates
    log_odds = labels * [4.0, 2.0, 0.5, 1.0, 1.0] + random.normal(0, 1, labels.shape)
    log_odds += np.log(rates / (1 - rates))
    scale, shift = np.array([1.0, 0.8, 1.2, 1.0, 0.9]), np.array([0.0, 0.3, -0.2, 0.1, 0.0])
    probabilities = 1 / (1 + np.exp(-(scale * log_odds + shift)))
    rule = ThresholdRule("overall_f1", min_support=20)
    exact = fit_thresholds(probabilities, labels, rule)
    histograms = Histograms.empty(5)
    histograms.add(log_odds, labels)
    binned = fit_binned_thresholds(histograms, scale, shift, rule)

    def reached(thresholds):
        predicted = probabilities >= thresholds
        return sum(
            f1_score(labels, predicted, average=kind, zero_division=0)
            for kind in ("macro", "micro")
        )

    alone = fit_thresholds(probabilities, labels, ThresholdRule("f1", min_support=20))
    assert labels.sum(axis=0)[4] < 20
    assert reached(exact) > reached(alone) + 0.02
    assert reached(binned.probabilities) == pytest.approx(reached(exact), abs=5e-3)
    assert np.isnan(binned.shortfall[4]) and np.all(binned.shortfall[:4] < 0.05)


@settings(deadline=None, max_examples=300)
@given(st.floats(0, 1), st.floats(0, 1, width=32), st.integers(-2, 2))
@example(0.5, 0.5, 0)
@example(0.0, 0.0, 0)
@example(1.0, 1.0, 0)
@example(float(np.float32(0.1)), 0.5, 0)  # Its digits, 0.1, are less than itself.
@example(2.0**-149, 2.0**-149, 0)
@example(1e-45, 0.0, 0)
@example(1.0000001, 1.0, 0)
def test_rounded_thresholds_decide_the_same_for_every_way_to_write_a_score(cut, score, steps):
    (rounded,) = round_thresholds([cut])
    beside = np.float32(cut)
    for _ in range(abs(steps)):
        beside = np.nextafter(beside, np.float32(2 if steps > 0 else -1))
    for value in (np.float32(score), beside):
        reached = float(value) >= cut
        assert (float(value) >= rounded) == reached
        assert (float(str(value)) >= rounded) == reached
        assert bool(value >= np.float32(rounded)) == reached
    assert round_thresholds([rounded, None]) == [rounded, None]
    assert rounded == pytest.approx(cut, rel=2e-7, abs=1e-44)


def test_round_numbers_stay_as_they_are():
    numbers = [0.0, 0.1, 0.2, 0.25, 0.5, 1.0]
    assert round_thresholds(numbers) == numbers
