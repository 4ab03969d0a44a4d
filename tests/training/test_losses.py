"""The loss, its weights and the head's first bias against PyTorch and float64 formulas."""

import json
import logging

import numpy as np
import pytest
import tensorflow as tf
import torch
from sklearn.utils.class_weight import compute_class_weight

from trainer.errors import UserError
from trainer.model_config import LOSSES, LossConfig
from trainer.training.losses import (
    has_exact_correction,
    initial_bias,
    label_weights,
    logit_offset,
    make_loss,
    positive_weights,
)

LABELS = ("common", "rare", "never", "always")
COUNTS = (2000, 10, 0, 8000)
DOCUMENTS = 8000


def weighted_bce(logits, labels, mask, weights):
    """The default loss, as (sum, number of documents)."""
    ones = np.ones(len(weights))
    return make_loss(LossConfig(), weights, ones, ones, DOCUMENTS)(logits, labels, mask)


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
    total, count = weighted_bce(tf.fill([4, 3], np.nan), tf.zeros([4, 3]), tf.zeros(4), np.ones(3))
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
    total, _ = weighted_bce(logits, tf.constant([[1.0, 0.0]]), tf.ones(1), np.ones(2))
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


def config_of(loss, **constants):
    return LossConfig(loss=loss, **constants)


# Each loss as its paper writes it, in float64, from probabilities: (positive, negative) terms.
def paper_focal(z, gamma=2.0):
    p = 1 / (1 + np.exp(-z))
    return -((1 - p) ** gamma) * np.log(p), -(p**gamma) * np.log(1 - p)


def paper_asymmetric(z, gamma_positive, gamma_negative, margin):
    p = 1 / (1 + np.exp(-z))
    shifted = np.maximum(p - margin, 0)
    return (
        -((1 - p) ** gamma_positive) * np.log(p),
        -(shifted**gamma_negative) * np.log(1 - shifted),
    )


def paper_distribution_balanced(z, labels, counts, documents):
    """Equations 4 to 6 and 10 of Wu et al. 2020 with gamma = 2 (Huang et al. 2021)."""
    frequency = (counts + 0.5) / (documents + 1)
    v = -0.05 * -np.log(1 / frequency - 1)
    q_positive = 1 / (1 + np.exp(-(z - v)))
    q_negative = 1 / (1 + np.exp(-5 * (z - v)))
    positive = -((1 - q_positive) ** 2) * np.log(q_positive)
    negative = q_negative**2 * np.logaddexp(0, 5 * (z - v)) / 5
    per_class = 1 / counts / len(counts)
    per_document = (labels / counts).sum(axis=1, keepdims=True) / len(counts)
    with np.errstate(divide="ignore"):
        ratio = per_class / per_document
    weight = 0.1 + 1 / (1 + np.exp(-10 * (ratio - 0.2)))
    return weight * np.where(labels > 0, positive, negative)


RATES = np.array([3000, 12, 800, 4000, 150, 40])


def per_label_loss(kind, z, labels, weights, documents=DOCUMENTS):
    """The papers' losses, with positive weights, as [documents, labels] in float64."""
    cross_entropy = np.logaddexp(0, -z), np.logaddexp(0, z)
    if kind == "distribution_balanced":
        pair = paper_distribution_balanced(z, labels, RATES, documents)
        return np.where(labels > 0, weights * pair, pair)
    positive, negative = {
        "weighted_bce": cross_entropy,
        "class_balanced": cross_entropy,
        "focal": paper_focal(z),
        "asymmetric": paper_asymmetric(z, 1.0, 4.0, 0.05),
        "logit_adjusted": (
            np.logaddexp(0, -(z + 0.5 * np.log((RATES + 0.5) / (documents - RATES + 0.5)))),
            np.logaddexp(0, z + 0.5 * np.log((RATES + 0.5) / (documents - RATES + 0.5))),
        ),
    }[kind]
    loss = np.where(labels > 0, weights * positive, negative)
    if kind == "class_balanced":
        rarity = (1 - 0.999) / (1 - 0.999 ** RATES.astype(np.float64))
        loss = loss * rarity / rarity.mean()
    return loss


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_its_papers_formula_and_so_is_its_gradient(kind):
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, (40, 6)).astype(np.float32)
    labels = (random.random((40, 6)) < 0.3).astype(np.float32)
    labels[0] = 0  # A document without labels.
    weights = np.array([1, 5, 2, 0.5, 1, 10], np.float32)
    mask = (random.random(40) < 0.8).astype(np.float32)
    config = config_of(kind, asymmetric_gamma_positive=1.0, logit_adjustment=0.5)
    loss = make_loss(config, weights, np.ones(6), RATES, DOCUMENTS)
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        total, count = loss(variable, tf.constant(labels), tf.constant(mask))

    def expected(z):
        return (per_label_loss(kind, z, labels, weights).mean(axis=1) * mask).sum()

    z = logits.astype(np.float64)
    assert float(count) == mask.sum()
    assert float(total) == pytest.approx(expected(z), rel=2e-6)
    gradient = tape.gradient(total, variable).numpy()
    numeric = np.zeros_like(z)
    for place in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[place] = 1e-5
        numeric[place] = (expected(z + step) - expected(z - step)) / 2e-5
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_stays_finite_at_extreme_logits_and_in_empty_slots(kind):
    logits = tf.Variable(
        np.array([[80, -80, 500, -500, 1e4, -1e4], [0, 0, 0, 0, 0, 0], [np.nan] * 6], np.float32)
    )
    loss = make_loss(config_of(kind), np.full(6, 3.0), np.ones(6), RATES, DOCUMENTS)
    for labels in (np.zeros((3, 6)), np.ones((3, 6))):
        with tf.GradientTape() as tape:
            total, count = loss(logits, tf.constant(labels), tf.constant([1.0, 1.0, 0.0]))
        gradient = tape.gradient(total, logits).numpy()
        assert float(count) == 2 and np.isfinite(float(total))
        assert np.all(np.isfinite(gradient)) and np.all(gradient[2] == 0)


def test_asymmetric_without_focus_and_margin_is_cross_entropy(batch):
    logits, labels, weights = batch
    constants = dict.fromkeys(("asymmetric_gamma_negative", "asymmetric_margin"), 0.0)
    plain = make_loss(config_of("asymmetric", **constants), weights, np.ones(6), RATES, DOCUMENTS)
    total, _ = plain(tf.constant(logits), tf.constant(labels), tf.ones(9))
    assert float(total) == pytest.approx(reference_loss(logits, labels, np.ones(9), weights), 1e-6)


def test_label_smoothing_mixes_both_answers(batch):
    logits, labels, weights = batch
    smooth = make_loss(
        config_of("weighted_bce", label_smoothing=0.2), weights, np.ones(6), RATES, DOCUMENTS
    )
    total, _ = smooth(tf.constant(logits), tf.constant(labels), tf.ones(9))
    expected = reference_loss(logits, labels * 0.8 + 0.1, np.ones(9), weights)
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_balanced_classes_are_scikit_learns_balanced_weights():
    random = np.random.default_rng(11)
    labels = random.random((500, 3)) < [0.5, 0.1, 0.02]
    counts = labels.sum(axis=0)
    positive = positive_weights("balanced_classes", counts, 500, 1e6, ("a", "b", "c"))
    whole = label_weights("balanced_classes", counts, 500)
    for column in range(3):
        w0, w1 = compute_class_weight(
            "balanced", classes=np.array([False, True]), y=labels[:, column]
        )
        assert whole[column] == pytest.approx(w0, rel=1e-6)
        assert whole[column] * positive[column] == pytest.approx(w1, rel=1e-6)
    np.testing.assert_array_equal(label_weights("balanced", counts, 500), 1)
    np.testing.assert_array_equal(label_weights("balanced_classes", [0, 500], 500), 1)


def test_the_first_logits_of_logit_adjustment_predict_the_label_frequencies():
    config = config_of("logit_adjusted")
    bias = initial_bias(RATES, DOCUMENTS, np.ones(6)) - logit_offset(config, RATES, DOCUMENTS)
    np.testing.assert_allclose(bias, 0, atol=1e-6)


@pytest.mark.parametrize(
    "constants, exact",
    [
        ({"loss": "weighted_bce"}, True),
        ({"loss": "class_balanced"}, True),
        ({"loss": "weighted_bce", "label_smoothing": 0.1}, False),
        ({"loss": "focal"}, False),
        ({"loss": "logit_adjusted"}, False),
    ],
)
def test_the_exact_correction_is_for_cross_entropy_on_hard_labels(constants, exact):
    assert has_exact_correction(LossConfig(**constants)) is exact


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"loss": "hinge"}, "--loss=hinge: expected one of weighted_bce, focal"),
        ({"focal_gamma": -1.0}, "--focal_gamma=-1.0: expected a number not below 0"),
        ({"asymmetric_gamma_negative": 0.5}, "expected 0, or 1 or more"),
        ({"label_smoothing": 1.0}, "--label_smoothing=1.0"),
    ],
)
def test_constants_out_of_range_are_named(constants, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**constants)
