"""What the report draws: the same numbers as scikit-learn and brute force, bounded in size."""

import json

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from trainer.evaluation.curves import (
    HISTOGRAM_EDGES,
    MAX_CURVE_LABELS,
    MAX_CURVE_POINTS,
    MAX_MISTAKES,
    MAX_MISTAKES_PER_LABEL,
    collect,
    label_curves,
    precision_recall,
    reliability,
)
from trainer.evaluation.measurement import CalibratedPredictions
from trainer.evaluation.metrics import calibration_error


def draw(documents, labels, seed, num_documents=None):
    """Documents whose labels come as their probabilities say, rounded so that scores tie."""
    random = np.random.default_rng(seed)
    rates = 0.5 / (1 + np.arange(labels))
    log_odds = np.log(rates / (1 - rates)) + 2 * random.normal(size=(documents, labels))
    probabilities = np.round(1 / (1 + np.exp(-log_odds)), 3).astype(np.float32)
    truth = random.random((documents, labels)) < probabilities
    ids = [f"document {number}" for number in range(documents)]
    return CalibratedPredictions(
        ids, 2 * np.arange(documents), probabilities, np.sqrt(probabilities), truth,
        num_documents or documents,
    )  # fmt: skip


@pytest.fixture(scope="module")
def collected():
    reported, fitted = draw(900, 12, 0, num_documents=1800), draw(700, 12, 1)
    thresholds = np.array([0.3] * 11 + [np.nan])
    names = [f"label {k}" for k in range(12)]
    return reported, fitted, thresholds, collect(reported, fitted, thresholds, names)


def test_points_of_the_curve_are_scikit_learns_cuts(collected):
    reported, fitted, _, values = collected
    for place, label in enumerate(values["curve_labels"]):
        for documents, name in ((reported, ""), (fitted, "fitted_")):
            curve = values["curves"][place][f"{name}precision_recall"]
            precision, recall, cut = precision_recall_curve(
                documents.labels[:, label], documents.probabilities[:, label]
            )
            where = [int(np.argmin(np.abs(cut - score))) for score in curve["score"]]
            assert np.allclose(curve["precision"], precision[where], atol=1e-4)
            assert np.allclose(curve["recall"], recall[where], atol=1e-4)
            assert curve["recall"][-1] == 1
            assert 2 <= len(curve["recall"]) <= MAX_CURVE_POINTS


def test_a_rare_label_keeps_every_recall_at_its_best_precision():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    curve = precision_recall(scores, np.array([True, False, False, True, False, True]))
    assert curve["recall"] == [0.3333, 0.6667, 1.0]
    assert curve["precision"] == [1.0, 0.5, 0.5]
    assert curve["score"] == [0.9, 0.6, 0.4]
    assert precision_recall(scores, np.zeros(6, bool)) == {
        "recall": [],
        "precision": [],
        "score": [],
    }


def test_bins_add_up_to_the_calibration_error(collected):
    reported, _, _, values = collected
    for place, label in enumerate(values["curve_labels"]):
        for name, scores in (
            ("after", reported.probabilities), ("before", reported.raw_probabilities),
        ):  # fmt: skip
            bins = values["curves"][place]["reliability"][name]
            weights = np.array(bins["documents"]) / 900
            gaps = np.abs(np.subtract(bins["probability"], bins["share"]))
            expected = calibration_error(scores[:, label], reported.labels[:, label])
            assert sum(bins["documents"]) == 900
            assert weights @ gaps == pytest.approx(expected, abs=1e-4)
            assert (np.array(bins["low"]) <= bins["share"]).all()
            assert (np.array(bins["high"]) >= bins["share"]).all()


def test_wilsons_interval_of_a_bin():
    """5 of 50: Wilson's 95 % interval is 0.0435 to 0.2136."""
    positive = np.arange(50) < 5
    bins = reliability(np.full(50, 0.2), positive)
    assert bins == {
        "documents": [50], "probability": [0.2], "share": [0.1], "low": [0.04348], "high": [0.2136],
    }  # fmt: skip


def test_histograms_count_every_document_by_class():
    probabilities = np.array([1e-9, 0.5, 0.51, 0.999999, 0.2])
    positive = np.array([False, True, True, True, False])
    histogram = label_curves(probabilities, probabilities, positive)["histogram"]
    middle = len(HISTOGRAM_EDGES) // 2
    assert histogram["positive"][middle] == 2 and histogram["positive"][-1] == 1
    assert sum(histogram["positive"]) == 3
    assert histogram["negative"][0] == 1 and sum(histogram["negative"]) == 2


def test_cooccurrence_is_counted_pair_by_pair(collected):
    reported, _, thresholds, values = collected
    pairs = values["cooccurrence"]
    predicted = reported.probabilities >= thresholds
    for row, first in enumerate(pairs["labels"]):
        for column, second in enumerate(pairs["labels"]):
            both = reported.labels[:, first] & reported.labels[:, second]
            assert pairs["true"][row][column] == both.sum()
            both = predicted[:, first] & predicted[:, second]
            assert pairs["predicted"][row][column] == both.sum()


def test_mistakes_are_the_surest_and_not_twice_of_a_document(collected):
    reported, _, thresholds, values = collected
    predicted = reported.probabilities >= thresholds
    wrong = {
        "false_positives": predicted & ~reported.labels,
        "missed": ~predicted & reported.labels,
    }
    for kind, mistakes in values["mistakes"].items():
        documents = [mistake["document"] for mistake in mistakes]
        assert len(documents) == len(set(documents)) == MAX_MISTAKES
        sure = [m["probability"] if kind == "missed" else 1 - m["probability"] for m in mistakes]
        assert sure == sorted(sure)
        scores = np.where(wrong[kind], reported.probabilities, np.nan)
        best = np.nanmin(scores) if kind == "missed" else np.nanmax(scores)
        assert mistakes[0]["probability"] == best
        for mistake in mistakes:
            place = reported.ids.index(mistake["document"])
            assert wrong[kind][place, mistake["label"]]
            assert mistake["index"] == 2 * place
            assert mistake["true"] == np.flatnonzero(reported.labels[place]).tolist()
            assert sorted(mistake["predicted"]) == np.flatnonzero(predicted[place]).tolist()
        counts = np.bincount([mistake["label"] for mistake in mistakes])
        assert counts.max() <= MAX_MISTAKES_PER_LABEL
    assert all(m["threshold"] is None for m in values["mistakes"]["missed"] if m["label"] == 11)


def test_a_sample_says_so_and_curves_go_to_the_most_frequent(collected):
    reported, _, _, values = collected
    assert (values["documents"], values["num_documents"]) == (900, 1800)
    counts = reported.labels.sum(axis=0)[values["curve_labels"]]
    assert (np.diff(counts) <= 0).all()


def test_4000_labels_stay_bounded():
    few = draw(60, 4000, 2)
    names = [f"label {k}" for k in range(4000)]
    values = collect(few, few, np.full(4000, 0.5), names)
    assert len(values["curves"]) == len(values["curve_labels"]) == MAX_CURVE_LABELS
    assert len(values["cooccurrence"]["labels"]) == 30
    assert len(json.dumps(values)) < 1_500_000
