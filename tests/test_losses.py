"""The loss, its weights and the head's first bias against PyTorch and float64 formulas."""

import json
import logging

import numpy as np
import pytest
import tensorflow as tf
import torch

from trainer.errors import UserError
from trainer.losses import initial_bias, positive_weights, weighted_bce

LABELS = ("common", "rare", "never", "always")
COUNTS = (2000, 10, 0, 8000)
DOCUMENTS = 8000


def reference_loss(logits, labels, mask, weights):
    """-w y log s(z) - (1 - y) log(1 - s(z)) in float64, mean over labels, sum over documents."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    per_label = weights * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    return float((per_label.mean(axis=1) * mask).sum())


@pytest.fixture
def batch():
    random = np.random.default_rng(3)
    logits = random.normal(0, 4, (9, 6)).astype(np.float32)
    # Extreme logits of both signs, right and wrong, and the kinks of stable formulas at 0.
    logits[0] = [80, -80, 500, -500, 1e4, -1e4]
    logits[1] = 0
    labels = (random.random((9, 6)) < 0.4).astype(np.float32)
    weights = np.array([1, 0.3, 5, 100, 2, 17], np.float32)
    return logits, labels, weights


def test_loss_equals_torch_and_the_formula(batch):
    logits, labels, weights = batch
    total, count = weighted_bce(logits, labels, tf.ones(9), weights)
    peer = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))
    expected = peer(torch.tensor(logits), torch.tensor(labels)).item() * 9
    assert float(count) == 9
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(total) == pytest.approx(reference_loss(logits, labels, np.ones(9), weights), 1e-6)


def test_gradient_equals_torch_and_the_formula(batch):
    logits, labels, weights = batch
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        total, _ = weighted_bce(variable, labels, tf.ones(9), weights)
    tensor = torch.tensor(logits, requires_grad=True)
    peer = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights), reduction="sum")
    (peer(tensor, torch.tensor(labels)) / 6).backward()
    gradient = tape.gradient(total, variable).numpy()
    np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-5, atol=1e-7)
    # Against the formula to 1e-5 even where the gradient is tiny, which PyTorch's is not.
    z = logits.astype(np.float64)
    down, up = np.exp(-np.logaddexp(0, -z)), np.exp(-np.logaddexp(0, z))
    exact = ((1 - labels) * down - weights * labels * up) / 6
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-35)


def test_empty_slots_count_nothing_even_if_their_logits_are_nan(batch):
    logits, labels, weights = batch
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0], np.float32)
    logits[mask == 0] = np.nan
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        total, count = weighted_bce(variable, labels, mask, weights)
    gradient = tape.gradient(total, variable).numpy()
    expected = reference_loss(np.nan_to_num(logits), labels, mask, weights)
    assert float(count) == 6
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert np.all(gradient[mask == 0] == 0) and np.all(np.isfinite(gradient))


def test_empty_micro_batch_is_zero_of_weight_zero():
    total, count = weighted_bce(tf.fill([4, 3], np.nan), tf.zeros([4, 3]), tf.zeros(4), tf.ones(3))
    assert (float(total), float(count)) == (0.0, 0.0)


def test_sums_over_micro_batches_give_the_loss_of_the_whole(batch):
    logits, labels, weights = batch
    parts = [
        weighted_bce(logits[a:b], labels[a:b], tf.ones(b - a), weights) for a, b in ((0, 2), (2, 9))
    ]
    whole, _ = weighted_bce(logits, labels, tf.ones(9), weights)
    assert sum(float(total) for total, _ in parts) == pytest.approx(float(whole), rel=1e-6)


def test_low_precision_logits_are_computed_in_float32():
    logits = tf.constant([[12.0, -12.0]], tf.bfloat16)
    total, _ = weighted_bce(logits, tf.constant([[1.0, 0.0]]), tf.ones(1), tf.ones(2))
    assert total.dtype == tf.float32
    assert float(total) == pytest.approx(np.log1p(np.exp(-12.0)), rel=1e-5)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("none", [1, 1, 1, 1]),
        ("balanced", [3, 100, 1, 1]),  # 6000 / 2000; 7990 / 10 capped at 100
        ("sqrt", [np.sqrt(3), np.sqrt(799), 1, 1]),
        (
            "effective",  # beta = 0.999
            [(1 - 0.999**6000) / (1 - 0.999**2000), (1 - 0.999**7990) / (1 - 0.999**10), 1, 1],
        ),
    ],
)
def test_positive_weights_by_kind(kind, expected):
    weights = positive_weights(kind, COUNTS, DOCUMENTS, 100, LABELS)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, np.minimum(expected, 100), rtol=1e-5)


def test_cap_holds_for_weights_below_one_too():
    weights = positive_weights("balanced", (7990,), DOCUMENTS, 100, ("nearly",))
    np.testing.assert_allclose(weights, [0.01])


def test_one_sided_labels_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        positive_weights("none", COUNTS, DOCUMENTS, 100, LABELS)
    assert "1 labels have no positives" in caplog.text and "never" in caplog.text
    assert "1 labels have no negatives" in caplog.text and "always" in caplog.text


def test_weights_from_a_file(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"rare": 250, "common": 0.5}))
    weights = positive_weights(str(path), COUNTS, DOCUMENTS, 100, LABELS)
    np.testing.assert_allclose(weights, [0.5, 100, 1, 1])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"commmon": 2}', "'commmon'"),
        ('{"rare": 0}', "expected a positive number"),
        ('{"rare": "3"}', "expected a positive number"),
        ('{"rare": true}', "expected a positive number"),
        ('{"rare": NaN}', "expected a positive number"),
    ],
)
def test_bad_weight_files_are_one_clear_line(tmp_path, content, message):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="--pos_weight=") as error:
        positive_weights(str(path), COUNTS, DOCUMENTS, 100, LABELS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_initial_bias_minimises_the_weighted_loss_of_a_constant():
    counts, weights = np.array([2000, 400]), np.array([3.0, 10.0], np.float32)
    bias = initial_bias(counts, DOCUMENTS, weights).astype(np.float64)
    prevalence = counts / DOCUMENTS
    # d loss / d z = (1 - p) s(z) - w p (1 - s(z)), zero at the best constant.
    sigmoid = 1 / (1 + np.exp(-bias))
    slope = (1 - prevalence) * sigmoid - weights * prevalence * (1 - sigmoid)
    # Half a document of smoothing in 400 is what is left.
    np.testing.assert_allclose(slope, 0, atol=6e-4)


def test_initial_bias_is_finite_for_one_sided_labels():
    bias = initial_bias((0, DOCUMENTS), DOCUMENTS, np.ones(2))
    np.testing.assert_allclose(bias, [np.log(0.5 / 8000.5), np.log(8000.5 / 0.5)], rtol=1e-6)
