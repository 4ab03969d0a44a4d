"""The solver against scikit-learn's LogisticRegression in float64, of dense and sparse features."""

import os

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from trainer.linear import logistic
from trainer.linear.logistic import LinearModel, fit_logistic

DOCUMENTS = 600
STRENGTHS = {"dense": (0.003, 0.1), "sparse": (1.0, 10.0)}


def draw_labels(features, num_labels, seed=1):
    """Labels that the features tell of, of 2 to 50 % of the documents."""
    random = np.random.default_rng(seed)
    logits = features @ random.normal(0, 1, (features.shape[1], num_labels))
    logits = logits / logits.std(axis=0) + random.normal(0, 1, logits.shape)
    rates = np.geomspace(0.5, 0.02, num_labels)
    return logits > [np.quantile(logits[:, k], 1 - rate) for k, rate in enumerate(rates)]


def draw_features(kind, seed=0):
    """float32 [N, 40]: standardised vectors, or CSR with rows of norm 1."""
    random = np.random.default_rng(seed)
    dense = random.normal(0, 1, (DOCUMENTS, 40)) @ random.normal(0, 1, (40, 40))
    if kind == "dense":
        return ((dense - dense.mean(axis=0)) / dense.std(axis=0)).astype(np.float32)
    kept = np.maximum(dense - np.quantile(dense, 0.85), 0)
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return csr_matrix((kept / np.maximum(norms, 1e-9)).astype(np.float32))


def fit_reference(features, labels, strength):
    """scikit-learn's solution of one label after the other, float64."""
    exact = features.astype(np.float64)
    exact = exact.toarray() if isinstance(exact, csr_matrix) else exact
    fits = [
        LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(
            exact, column
        )
        for column in labels.T
    ]
    weights = np.stack([fit.coef_[0] for fit in fits], axis=1)
    return weights, np.array([fit.intercept_[0] for fit in fits])


def relative_gradients(features, labels, model, strength):
    """Each label's gradient norm at the model over that at no weights and the log-odds, float64."""
    exact = features.astype(np.float64)
    weights, bias = model.weights.astype(np.float64), model.bias.astype(np.float64)
    rest = 1 / (1 + np.exp(-(exact @ weights + bias))) - labels
    here = np.sqrt(((exact.T @ rest + weights / strength) ** 2).sum(axis=0) + rest.sum(axis=0) ** 2)
    return here / np.linalg.norm(exact.T @ (labels.mean(axis=0) - labels), axis=0)


@pytest.fixture(scope="module", params=["dense", "sparse"])
def problem(request):
    features = draw_features(request.param)
    return features, draw_labels(features, 12), STRENGTHS[request.param]


def test_solutions_are_scikit_learns(problem):
    features, labels, strengths = problem
    for strength in strengths:
        found = fit_logistic(features, labels, strength)
        assert found.weights.dtype == found.bias.dtype == np.float32
        weights, bias = fit_reference(features, labels, strength)
        expected = features @ weights + bias
        assert np.ptp(expected, axis=0).min() > 0.5
        np.testing.assert_allclose(found.logits(features), expected, atol=0.01)
        gap = np.linalg.norm(found.weights - weights, axis=0) / np.linalg.norm(weights, axis=0)
        assert gap.max() < 0.01


def test_the_gradient_at_the_solution_is_below_the_tolerance(problem):
    features, labels, strengths = problem
    for strength in strengths:
        found = fit_logistic(features, labels, strength)
        # float32 adds about 1e-5.
        limit = logistic.TOLERANCE + 2e-5
        assert relative_gradients(features, labels, found, strength).max() < limit


def test_rare_constant_and_missing_labels(problem):
    """One positive, one negative, none, and all: the last two have no scikit-learn solution."""
    features, _, (_, strength) = problem
    labels = np.zeros((DOCUMENTS, 4), bool)
    labels[7, 0] = labels[:, 1] = labels[:, 3] = True
    labels[11, 1] = False
    found = fit_logistic(features, labels, strength)
    weights, bias = fit_reference(features, labels[:, :2], strength)
    np.testing.assert_allclose(found.logits(features)[:, :2], features @ weights + bias, atol=0.03)
    assert not found.weights[:, 2:].any()
    odds = np.log(0.5 / (DOCUMENTS + 0.5))
    np.testing.assert_allclose(found.bias[2:], [odds, -odds], rtol=1e-6)


def test_a_start_from_another_strength_ends_at_the_same_solution(problem):
    features, labels, (weak, strong) = problem
    start = fit_logistic(features, labels, weak)
    before = start.weights.copy()
    warm, cold = (
        fit_logistic(features, labels, strong, start),
        fit_logistic(features, labels, strong),
    )
    np.testing.assert_allclose(warm.logits(features), cold.logits(features), atol=0.01)
    assert np.abs(start.logits(features) - cold.logits(features)).max() > 0.5
    np.testing.assert_array_equal(start.weights, before)
    # At the solution no step is taken.
    again = fit_logistic(features, labels, strong, cold)
    np.testing.assert_array_equal(again.weights, cold.weights)
    np.testing.assert_array_equal(again.bias, cold.bias)


def test_many_labels_are_solved_in_blocks_with_the_same_bits_on_any_number_of_threads(monkeypatch):
    features = draw_features("sparse")
    labels = draw_labels(features, 300)
    assert 300 > 9 * logistic._BLOCK_LABELS
    found = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=threads: set(range(count)))
        found.append(fit_logistic(features, labels, 3.0))
    for other in found[1:]:
        np.testing.assert_array_equal(other.weights, found[0].weights)
        np.testing.assert_array_equal(other.bias, found[0].bias)
    picks = [0, 31, 32, 150, 299]
    weights, bias = fit_reference(features, labels[:, picks], 3.0)
    np.testing.assert_allclose(
        found[0].logits(features)[:, picks], features @ weights + bias, atol=0.01
    )


def test_separable_labels_end_at_finite_weights():
    """A label that one feature decides, and hardly any penalty: steps have to be halved."""
    features = np.repeat([[1.0, 0.0], [0.0, 1.0]], 50, axis=0).astype(np.float32)
    labels = features[:, :1] > 0
    found = fit_logistic(features, labels, 1e4)
    assert relative_gradients(features, labels, found, 1e4).max() < logistic.TOLERANCE
    logits = found.logits(features)
    assert ((logits > 0) == labels).all() and 6 < np.abs(logits).min() < 12


def test_logits_are_float32_of_both_kinds():
    model = LinearModel(np.eye(2, dtype=np.float32), np.array([1, -1], np.float32))
    rows = np.array([[2, 0], [0, 3]], np.float32)
    for features in (rows, csr_matrix(rows)):
        logits = model.logits(features)
        assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
        np.testing.assert_array_equal(logits, [[3, -1], [1, 2]])
