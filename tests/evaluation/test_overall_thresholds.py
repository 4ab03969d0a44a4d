"""Thresholds for macro- and micro-F1 at once against all choices there are."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainer.evaluation.histograms import Histograms
from trainer.evaluation.ranking import rank_labels
from trainer.evaluation.thresholds import (
    Candidates,
    ThresholdRule,
    choose_overall,
    fit_binned_thresholds,
    fit_thresholds,
)


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
