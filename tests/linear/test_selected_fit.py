"""What held-out documents choose, and fits of vectors against scikit-learn's pipeline."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainer.linear import selected_fit
from trainer.linear.logistic import fit_logistic
from trainer.linear.selected_fit import choose_share, fit_selected, fit_vectors, mean_precision


def draw(documents=500, dimensions=30, num_labels=6, noise=2.0, seed=0):
    """Vectors of widely different scales, correlated, and labels that they tell something of."""
    random = np.random.default_rng(seed)
    vectors = random.normal(0, 1, (documents, dimensions)) @ random.normal(
        0, 1, (dimensions, dimensions)
    )
    logits = vectors @ random.normal(0, 1, (dimensions, num_labels))
    logits = logits / logits.std(axis=0) + noise * random.normal(0, 1, logits.shape)
    rates = np.geomspace(0.4, 0.05, num_labels)
    labels = logits > [np.quantile(logits[:, k], 1 - rate) for k, rate in enumerate(rates)]
    scales = np.geomspace(0.3, 100, dimensions)
    return (vectors * scales + 3 * scales).astype(np.float32), labels


def standardised(vectors):
    return ((vectors - vectors.mean(axis=0)) / vectors.std(axis=0)).astype(np.float32)


def precisions_of(features, labels, strengths):
    """scikit-learn's mean average precision on every fifth document, of each strength."""
    held = np.arange(len(labels)) % 5 == 0
    found = []
    for strength in strengths:
        logits = np.stack(
            [
                LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
                .fit(features[~held], column[~held])
                .decision_function(features[held])
                for column in labels.T
            ],
            axis=1,
        )
        found.append(average_precision_score(labels[held], logits, average="macro"))
    return found


@pytest.mark.parametrize("seed", [3, 4])
def test_the_strength_is_the_one_with_the_best_precision_on_held_out_documents(seed):
    vectors, labels = draw(documents=300, noise=3.0, seed=seed)
    features, strengths = standardised(vectors), (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    expected = precisions_of(features, labels, strengths)
    rises = np.diff(expected) > 0
    assert not np.any(rises[1:] & ~rises[:-1]), "precision has to rise, then fall"
    best = int(np.argmax(expected))
    assert 0 < best < len(strengths) - 1
    found = fit_selected(features, labels, strengths)
    assert found.inverse_strength == strengths[best]
    assert found.held_out_precision == pytest.approx(expected[best], abs=5e-3)
    whole = fit_logistic(features, labels, strengths[best])
    np.testing.assert_array_equal(found.model.weights, whole.weights)


def test_labels_that_cannot_be_judged_choose_nothing_and_are_fitted_all_the_same():
    """A label held out alone, one never held out, and one without positives."""
    vectors, labels = draw(num_labels=4)
    held = np.arange(len(labels)) % 5 == 0
    labels[:, 1] &= held
    labels[:, 2] &= ~held
    labels[:, 3] = False
    features = standardised(vectors)
    found = fit_selected(features, labels, (0.001, 0.01, 0.1))
    alone = fit_selected(features, labels[:, :1], (0.001, 0.01, 0.1))
    assert found.inverse_strength == alone.inverse_strength
    assert found.held_out_precision == pytest.approx(alone.held_out_precision, abs=1e-3)
    assert np.abs(found.model.weights[:, :3]).max(axis=0).min() > 1e-3
    assert not found.model.weights[:, 3].any()


@pytest.mark.parametrize("documents", [1, 2, 7])
def test_hardly_any_documents_give_finite_weights_and_the_first_strength(documents):
    labels = np.zeros((documents, 2), bool)
    found = fit_selected(np.eye(documents, 4, dtype=np.float32), labels, (0.5, 1.0))
    assert found.inverse_strength == 0.5 and found.held_out_precision == 0
    np.testing.assert_allclose(found.model.bias, np.log(0.5 / (documents + 0.5)), rtol=1e-6)
    assert not found.model.weights.any()


def test_many_labels_are_judged_by_some_of_all_frequencies(monkeypatch):
    monkeypatch.setattr(selected_fit, "_MAX_LABELS", 3)
    labels = np.zeros((100, 7), bool)
    for label, count in enumerate((90, 70, 50, 0, 20, 10, 5)):
        labels[:count, label] = True
    picks = selected_fit._choose_labels(labels, np.arange(100) % 5 == 0)
    assert picks.tolist() == [0, 2, 6]  # Of the six with positives the first, a middle, the last.


def test_fitted_vectors_are_a_scaler_and_a_regression():
    """A dimension without deviation, of any size, or with next to none, has no weight."""
    vectors, labels = draw()
    vectors[:, 4] = 123.25
    vectors[:, 7] *= 0.01 * np.median(vectors.std(axis=0)) / vectors[:, 7].std()
    found = fit_vectors(vectors, labels)
    assert found.inverse_strength in selected_fit.VECTOR_STRENGTHS
    assert not found.model.weights[[4, 7]].any()
    assert np.delete(found.model.weights, [4, 7], axis=0).all()
    vectors[:, 7] = 0
    logits = found.model.logits(vectors)
    for label, column in enumerate(labels.T):
        pipeline = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=found.inverse_strength, tol=1e-10, max_iter=10_000),
        )
        exact = vectors.astype(np.float64)
        expected = pipeline.fit(exact, column).decision_function(exact)
        assert np.ptp(expected) > 0.3
        np.testing.assert_allclose(logits[:, label], expected, atol=0.01)


def test_fewer_vectors_than_dimensions_are_fitted():
    vectors, labels = draw(documents=20, num_labels=2)
    labels[:5, :] = labels[5:10, :] = False
    labels[:3, 0] = labels[6:9, 1] = True
    found = fit_vectors(vectors, labels)
    pipeline = make_pipeline(
        StandardScaler(), LogisticRegression(C=found.inverse_strength, tol=1e-10, max_iter=10_000)
    )
    exact = vectors.astype(np.float64)
    expected = pipeline.fit(exact, labels[:, 0]).decision_function(exact)
    np.testing.assert_allclose(found.model.logits(vectors)[:, 0], expected, atol=0.01)


def test_the_share_is_the_best_of_a_grid():
    random = np.random.default_rng(2)
    labels = random.random((400, 5)) < 0.2
    first = labels + random.normal(0, 1.0, labels.shape)
    second = labels + random.normal(0, 1.5, labels.shape)
    shares = np.arange(21) / 20
    means, micros = (
        np.array([
            average_precision_score(labels, (1 - s) * first + s * second, average=average)
            for s in shares
        ])
        for average in ("macro", "micro")
    )  # fmt: skip
    found = choose_share(first, second, labels)
    assert found == pytest.approx(shares[int(np.argmax(means + micros))]) and 0 < found < 0.5
    assert mean_precision(first, labels) == pytest.approx(means[0], abs=1e-9)
    # Of equally good ones the smallest; of worthless ones 0 and 1.
    assert choose_share(first, first, labels) == 0
    assert choose_share(first, np.zeros_like(first), labels) == 0
    assert choose_share(np.zeros_like(first), first, labels) == 0.05
    assert choose_share(first, second, np.zeros_like(labels)) == 0
